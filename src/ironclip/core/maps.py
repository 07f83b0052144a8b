"""Text-guided maps: how far each patch of an image points at a text, and distances between such maps when enlarged.

An enlarged map is U m for a fixed bilinear matrix, so its Euclidean length needs only a small triangular factor of U:
49 numbers a map instead of 50,176 at 224 pixels, with the same value up to rounding.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice

TOKENS = ("feature", "token", "none")
DISTANCES = ("l2", "l1", "cos")
FLAT = 1e-12
"""Maps whose values differ by less are taken for constant."""
EQUAL = 1e-5
"""Root mean square up to which two maps are equal: rounding, whose direction a norm would blow up to unit length."""


def patch_scores(tokens: Tensor, text: Tensor, normalise: str = "feature") -> Tensor:
    """(b, p) products of every patch with its image's text.

    ``tokens``: (b, 1 + p, d), the image feature first. ``text``: (b, d) unit rows. ``normalise``: ``feature`` gives
    every patch unit length, so that scores are cosines; ``token`` gives every channel unit length over all tokens, the
    image feature among them, as published code does; ``none``. Raises ValueError for another word.
    """
    check_choice(normalise, TOKENS, "normalise")
    if normalise == "token":
        tokens = F.normalize(tokens, dim=1)
    patches = tokens[:, 1:]
    if normalise == "feature":
        patches = F.normalize(patches, dim=-1)
    return (patches * text[:, None]).sum(dim=-1)


def square_side(p: int, grid: tuple[int, int] = (0, 0)) -> int:
    """Side of the square that p patches form; ``grid`` (rows, columns) where it is known. Raises ValueError."""
    rows, columns = grid if any(grid) else (math.isqrt(p), math.isqrt(p))
    if rows != columns or rows * columns != p or p < 1:
        shape = f"{rows} x {columns} patches" if any(grid) else f"{p} patches"
        raise ValueError(f"attention maps need a square grid, got {shape}")
    return rows


def stretched(scores: Tensor, over: Tensor | None = None) -> Tensor:
    """Each row shifted and scaled so that the values ``over`` (b, q), its own by default, reach from 0 to 1.

    Minimum and maximum carry gradient. A constant row becomes zeros, with a finite gradient.
    """
    over = scores if over is None else over
    low = over.amin(dim=1, keepdim=True)
    span = over.amax(dim=1, keepdim=True) - low
    return (scores - low) / torch.where(span > FLAT, span, torch.ones_like(span))


def enlarged(maps: Tensor, size: int) -> Tensor:
    """(b, p) square maps to (b, size, size), bilinear with half-pixel centres."""
    side = square_side(maps.shape[1])
    u = bilinear(side, size).to(maps)
    return u @ maps.view(-1, side, side) @ u.T


def map_distance(a: Tensor, b: Tensor, size: int, kind: str = "l2") -> Tensor:
    """(n,) distances between maps (n, p) enlarged to ``size`` x ``size``, which ``l2`` and ``cos`` do not form.

    ``l2``: length of the difference, 0 with gradient 0 for equal maps (``EQUAL``); ``cos``: 1 - cosine; ``l1``: mean
    absolute difference. Raises ValueError for another word.
    """
    check_choice(kind, DISTANCES, "distance")
    if kind == "l1":
        return enlarged(a - b, size).abs().mean(dim=(1, 2))
    side = square_side(a.shape[1])
    r = triangle(side, size).to(a)
    if kind == "l2":
        small = r @ (a - b).view(-1, side, side) @ r.T
        apart = torch.linalg.vector_norm(small.flatten(1), dim=1)
        return torch.where(apart > EQUAL * size, apart, 0.0)
    one, two = ((r @ m.view(-1, side, side) @ r.T).flatten(1) for m in (a, b))
    return 1 - F.cosine_similarity(one, two, dim=1)


@lru_cache
def bilinear(side: int, size: int) -> Tensor:
    """(size, side) float64: rows sum to 1. Raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"size must be 1 or more, got {size}; write 224")
    eye = torch.eye(side, dtype=torch.float64)
    return F.interpolate(eye[None], size=size, mode="linear", align_corners=False)[0].T.contiguous()


@lru_cache
def triangle(side: int, size: int) -> Tensor:
    """R (r, side) float64 with R'R = U'U for U = ``bilinear(side, size)``, so that |U m| = |R m| for every m."""
    return torch.linalg.qr(bilinear(side, size), mode="r").R
