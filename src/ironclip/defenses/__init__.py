"""Defenses: one file per method, one frozen dataclass each, the paradigm in its ``info``."""
