"""Geometry of the Square Attack: stripes, bumps, and the shift of energy between two windows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ironclip.core.ball import norms
from ironclip.core.rng import SampleRNG


def stripes(x: Tensor, eps: float, rng: SampleRNG) -> Tensor:
    """Vertical stripes of plus or minus eps, one column wide, each channel its own."""
    signs = (rng.fold("start").uniform(x.shape[1], 1, x.shape[3]) < 0.5).to(x).mul_(2).sub_(1)
    return (x + eps * signs).clamp_(0.0, 1.0)


def tiles(x: Tensor, eps: float, rng: SampleRNG) -> Tensor:
    """A grid of bumps of random signs and directions, scaled to norm eps."""
    b, c, h, w = x.shape
    side = max(min(h, w) // 5, 1)
    top, left = (h % side) // 2, (w % side) // 2
    u = rng.fold("start").uniform(h // side, w // side, c + 1).to(x)
    shape, delta = bump(side).to(x), torch.zeros_like(x)
    for i in range(h // side):
        for j in range(w // side):
            turned = (u[:, i, j, c] < 0.5).view(b, 1, 1, 1)
            signs = (u[:, i, j, :c] < 0.5).to(x).mul_(2).sub_(1)[:, :, None, None]
            r, q = slice(top + i * side, top + (i + 1) * side), slice(left + j * side, left + (j + 1) * side)
            delta[:, :, r, q] = signs * torch.where(turned, shape.T, shape)
    size = norms(delta, "l2").clamp(min=1e-12).view(-1, 1, 1, 1)
    return (x + eps * delta / size).clamp_(0.0, 1.0)


Window = tuple[slice, slice]


def shifted(delta: Tensor, shape: Tensor, to: Window, off: Window, eps: float) -> Tensor:
    """Move the energy of window ``off``, and what is missing to norm eps, into window ``to``.

    ``delta``: (c, h, w), changed in place; ``shape``: (c, s, s) bumps of norm 1. Window ``to`` gets the bump plus what
    it held, both as directions, at the energy that both windows had together in that channel plus an equal share of the
    missing one; window ``off`` is emptied, and all is scaled to norm eps.
    """
    c = delta.shape[0]
    square = delta.square()
    both = (
        square[(slice(None), *to)].sum((1, 2)) + square[(slice(None), *off)].sum((1, 2)) - _overlap(square, to, off)
    )[:, None, None]
    missing = (eps**2 - square.sum()).clamp(min=0.0) / c
    held = delta[(slice(None), *to)]
    new = shape + held / held.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    new = new / new.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None] * (missing + both).clamp(min=0.0).sqrt()
    delta[(slice(None), *off)] = 0.0
    delta[(slice(None), *to)] = new
    return delta.mul_(eps / delta.norm().clamp(min=1e-12))


def _overlap(square: Tensor, a: Window, b: Window) -> Tensor:
    r, q = (slice(max(u.start, v.start), min(u.stop, v.stop)) for u, v in zip(a, b, strict=True))
    if r.start >= r.stop or q.start >= q.stop:
        return square.new_zeros(square.shape[0])
    return square[:, r, q].sum((1, 2))


@lru_cache(maxsize=256)
def bump(side: int) -> Tensor:
    """(side, side): a positive and a negative pyramid one above the other, of l_2 norm 1."""
    out = torch.zeros(side, side)
    half = side // 2
    out[:half], out[half:] = pyramid(half, side), -pyramid(side - half, side)
    return out / out.norm().clamp(min=1e-12)


def pyramid(h: int, w: int) -> Tensor:
    """(h, w): nested rectangles around the centre, the k-th (from 1) adding 1 / k^2."""
    i, j = torch.arange(h)[:, None], torch.arange(w)[None]
    ring = torch.maximum((i - h // 2).abs(), (j - w // 2).abs())
    count = max(h // 2, w // 2) + 1
    heights = torch.tensor([1.0 / k**2 for k in range(1, count + 1)])
    total = heights.flip(0).cumsum(0).flip(0)
    out: Tensor = total[ring.clamp(max=count - 1)]
    return out / out.norm().clamp(min=1e-12) if out.numel() else out
