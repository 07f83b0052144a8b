"""Class texts as points on a sphere: how far apart they are, what margin a pair deserves, whether order was kept.

Minimum hyperspherical energy: Liu et al. 2018 (arXiv 1805.09298).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 10_000
"""Class texts whose distances to all others are in memory at once."""
CLOSEST = 1e-6
"""Squared distance that float32 still tells from 0 for unit rows."""


def energy(text: Tensor, power: float = 2.0, kind: str = "stabilised", block: int = BLOCK) -> Tensor:
    """Mean over pairs of different rows (k, d) of 1 / (1 + distance^power), or ``raw`` distance^-power.

    From the Gram matrix, in blocks of rows where there are many. Raises ValueError for less than two rows, and for
    ``raw`` where two rows coincide: that energy is infinite.
    """
    k = text.shape[0]
    if k < 2:
        raise ValueError(f"the energy needs at least 2 class texts, got {k}")
    starts = range(0, k, block)
    if len(starts) == 1:
        return _energy_rows(text, 0, k, power, kind) / (k * (k - 1))
    parts = [
        checkpoint(_energy_rows, text, i, min(i + block, k), power, kind, use_reentrant=False)
        if torch.is_grad_enabled()
        else _energy_rows(text, i, min(i + block, k), power, kind)
        for i in starts
    ]
    return torch.stack([p for p in parts if p is not None]).sum() / (k * (k - 1))


def _energy_rows(text: Tensor, first: int, last: int, power: float, kind: str) -> Tensor:
    """The summed energy of rows ``first`` to ``last`` against all others."""
    own = torch.arange(first, last, device=text.device)
    squared = squared_distances(text[first:last], text)
    other = torch.ones_like(squared, dtype=torch.bool)
    other[own - first, own] = False
    if kind == "raw":
        if bool((squared.detach()[other] < CLOSEST).any()):
            raise ValueError("energy=raw is infinite: two class texts coincide; write energy=stabilised")
        return squared.masked_fill(~other, 1.0).pow(-power / 2).masked_fill(~other, 0.0).sum()
    near = squared if power == 2 else squared.clamp(min=1e-12).pow(power / 2)
    return (1 / (1 + near)).masked_fill(~other, 0.0).sum()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d) and (k, d) to (n, k), not below 0."""
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (lengths - 2 * (a @ b.T)).clamp(min=0.0)


def consistency_loss(text: Tensor, origin: Tensor) -> Tensor:
    """One minus the correlation of the cosines between different rows of ``text`` with those of ``origin``.

    Raises ValueError for less than three rows, which have one cosine and no order.
    """
    k = text.shape[0]
    if k < 3:
        raise ValueError(f"the correlation of cosines needs at least 3 classes, got {k}; write w_s=0")
    i, j = torch.triu_indices(k, k, 1, device=text.device)
    rows = []
    for points in (text, origin):
        cosines = (points @ points.T)[i, j]
        cosines = cosines - cosines.mean()
        rows.append(cosines / cosines.norm().clamp(min=1e-6))
    return 1 - (rows[0] * rows[1]).sum()


def margin_rows(kind: str, text: Tensor, y: Tensor, m: float, m0: float = 0.0, origin: Tensor | None = None) -> Tensor:
    """(b, k) margins of the classes against labels (b,), 0 at the label, without a gradient.

    ``distance``: m d / max d over all pairs. ``similarity``: m (1 + c) / 2. ``constant``: m. ``asam``: m0 more than
    ``similarity``, with the cosines of ``origin``, and nothing below 0.
    """
    with torch.no_grad():
        points = F.normalize(text if origin is None or kind != "asam" else origin, dim=1)
        if kind == "constant":
            out = points.new_full((len(y), len(points)), m)
        elif kind == "distance":
            out = m * squared_distances(points[y], points).sqrt() / _largest(points)
        else:
            out = m * (1 + (points[y] @ points.T).clamp(-1, 1)) / 2
            if kind == "asam":
                out = (m0 + out).clamp(min=0)
        return out.scatter(1, y[:, None], 0.0)


def _largest(points: Tensor) -> Tensor:
    rows = [squared_distances(points[i : i + BLOCK], points).max() for i in range(0, len(points), BLOCK)]
    return torch.stack(rows).max().sqrt().clamp(min=1e-12)


def with_margin(cosines: Tensor, margin: Tensor | None, scale: float, where: str) -> Tensor:
    """Logits (b, k) of cosines to which a margin was added: ``cosine``, ``logit`` (after scaling) or ``angle`` (radians
    by which wrong classes come nearer).
    """
    if margin is None:
        return scale * cosines
    if where == "cosine":
        return scale * (cosines + margin)
    if where == "logit":
        return scale * cosines + margin
    angle = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return scale * torch.where(margin > 0, (angle - margin).clamp(min=0).cos(), cosines)


def divergence(teacher: Tensor, student: Tensor, reverse: bool = False) -> Tensor:
    """(b,) KL(softmax teacher || softmax student) of logits (b, k), or the other way round."""
    p, q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    if reverse:
        p, q = q, p
    return (p.exp() * (p - q)).sum(dim=1)
