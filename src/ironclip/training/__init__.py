"""Contrastive pre-training from nothing: the command that makes `tiny`. Data come in as arguments."""
