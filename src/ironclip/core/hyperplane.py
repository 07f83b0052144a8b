"""Smallest step from a pixel image to a hyperplane inside the box [0, 1], in l_inf, l_2 or l_1, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ironclip.core.check import check_choice

NEWTON_STEPS = 60


def to_hyperplane(x: Tensor, w: Tensor, value: Tensor, norm: str = "linf") -> Tensor:
    """Shortest ``delta`` with ``w . delta = -value`` and ``x + delta`` in [0, 1].

    ``x``: (n, d) pixels in [0, 1]; ``w``: (n, d) normals; ``value``: (n,) what the linear function is at ``x``. Where
    the box does not reach the plane, delta goes as far as the box allows. For l_inf and l_2 every coordinate moves at a
    speed (1, or the size of w_j) until it meets its wall, so the distance covered is concave and piecewise linear in
    time, and Newton's method from 0 finds the time in a few exact steps, without sorting; for l_1 the steepest
    coordinates are used up first. Raises ValueError for another norm.
    """
    check_choice(norm, ("linf", "l2", "l1"), "norm")
    gain = w.abs()
    sign = -w.sign() * value.sign()[:, None]
    room = torch.where(sign > 0, 1 - x, x).clamp_(min=0.0)
    need = value.abs()
    moved = _greedy(gain, room, need) if norm == "l1" else _race(gain, room, need, norm)
    return moved.mul_(sign)


def _race(gain: Tensor, room: Tensor, need: Tensor, norm: str) -> Tensor:
    speed = (gain > 0).to(gain) if norm == "linf" else gain
    rate = gain * speed
    time = need / rate.sum(dim=1).clamp(min=1e-30)
    for _ in range(NEWTON_STEPS):
        ahead = speed * time[:, None]
        free = ahead < room
        short = need - torch.where(free, ahead, room).mul_(gain).sum(dim=1)
        slope = (rate * free).sum(dim=1)
        step = torch.where((slope > 0) & (short > 1e-6 * need), short / slope.clamp(min=1e-30), 0.0)
        if not bool(step.any()):
            break
        time = time + step
    return torch.minimum(speed * time[:, None], room)


def _greedy(gain: Tensor, room: Tensor, need: Tensor) -> Tensor:
    sorted_, order = gain.sort(dim=1, descending=True)
    reach = (sorted_ * room.gather(1, order)).cumsum(dim=1)
    full = reach <= need[:, None]
    last = full.sum(dim=1, keepdim=True).clamp(max=gain.shape[1] - 1)
    before = torch.where(last > 0, reach.gather(1, (last - 1).clamp(min=0)), 0.0)
    part = ((need[:, None] - before) / sorted_.gather(1, last).clamp(min=1e-30)).clamp(min=0.0)
    moved = torch.where(full, room.gather(1, order), 0.0)
    limit = room.gather(1, order.gather(1, last))
    moved.scatter_(1, last, torch.where(sorted_.gather(1, last) > 0, torch.minimum(part, limit), 0.0))
    return torch.zeros_like(room).scatter_(1, order, moved * (sorted_ > 0))
