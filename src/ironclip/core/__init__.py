"""Tensors and types: everything the rest of the package stands on. Imports torch, numpy and jaxtyping only."""
