"""The span of many vectors, from their small Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 65_536
"""Rows that are added to the Gram matrix at a time, in float64."""


def leading_directions(rows: Tensor, rank: int | None = None) -> Tensor:
    """(d, c) orthonormal columns: the leading left singular directions of the matrix whose columns are ``rows`` (n, d).

    Uncentred, in float64, from the d x d Gram matrix: up to sign and rotation those of a full SVD. Largest first, no
    more than ``rank`` of them and than the numerical rank (singular values above 1e-5 of the largest). Raises
    ValueError for NaN and for rows that are all zero.
    """
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.detach().split(CHUNK):
        part = part.double()
        gram += part.T @ part
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the vectors hold NaN or infinity; expected finite features")
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    if not float(values[0]) > 0:
        raise ValueError("the vectors are all zero and span nothing")
    found = int((values > 1e-10 * values[0]).sum())
    return vectors[:, : min(found, rank or found)]
