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


def window(top: Tensor, left: Tensor, side: int, w: int, c: int) -> Tensor:
    """(n, c, side^2) places of one square per image in images of width ``w`` laid flat; ``top``, ``left``: (n,)."""
    run = torch.arange(side, device=top.device)
    places = (top[:, None, None] + run[:, None]) * w + left[:, None, None] + run
    return places.flatten(1)[:, None].expand(-1, c, -1)


def shifted(delta: Tensor, shape: Tensor, to: Tensor, off: Tensor, eps: float) -> Tensor:
    """Move the energy of window ``off``, and what is missing to norm eps, into window ``to``.

    ``delta``: (n, c, h w), changed in place; ``shape``: (n, c, side^2) bumps of norm 1; ``to``, ``off``: places from
    ``window``. Window ``to`` gets the bump plus what it held, both as directions, at the energy that both windows had
    together in that channel plus an equal share of the missing one; ``off`` is emptied, all is scaled to norm eps.
    """
    missing = (eps**2 - delta.square().sum(dim=(1, 2))).clamp_(min=0.0) / delta.shape[1]
    held = delta.gather(2, to)
    empty = torch.zeros_like(held)
    energy = held.square().sum(dim=2)
    delta.scatter_(2, to, empty)
    energy += delta.gather(2, off).square().sum(dim=2) + missing[:, None]
    new = shape + held / held.norm(dim=2, keepdim=True).clamp_(min=1e-12)
    new.mul_(energy.sqrt_()[:, :, None] / new.norm(dim=2, keepdim=True).clamp_(min=1e-12))
    delta.scatter_(2, off, empty).scatter_(2, to, new)
    return delta.mul_(eps / delta.flatten(1).norm(dim=1).clamp_(min=1e-12)[:, None, None])


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
