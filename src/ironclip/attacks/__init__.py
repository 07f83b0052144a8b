"""Attacks: one file per method; every attack maximises a loss inside a stated budget."""
