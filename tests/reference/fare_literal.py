"""FARE in float64 from the mathematics of the method note: one image at a time, attack and AdamW spelled out.

``momentum`` and ``boxed`` are the published attack's: velocity sign(0.9 v + sign g), a start that may leave the box.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def distance(z: Tensor, goal: Tensor) -> Tensor:
    """Squared distances (b,), summed over dimensions and not divided by them."""
    return torch.stack([sum((a - c) ** 2 for a, c in zip(row, other, strict=True)) for row, other in zip(z, goal)])  # type: ignore[misc]  # noqa: B905


def attack(
    tower: nn.Module, x: Tensor, goal: Tensor, mean: Tensor, std: Tensor, start: Tensor, *,
    eps: float, alpha: float, steps: int, momentum: float, boxed: bool,
) -> Tensor:  # fmt: skip
    """delta of the last of ``steps`` iterates."""
    delta = (x + start).clamp(0, 1) - x if boxed else start
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        leaf = delta.clone().requires_grad_(True)
        value = ((tower((x + leaf - mean) / std) - goal) ** 2).sum(dim=1).mean()
        (g,) = torch.autograd.grad(value, leaf)
        velocity = torch.sign(momentum * velocity + torch.sign(g))
        delta = (delta + alpha * velocity).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return delta


def train(
    tower: nn.Module, batches: list[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor, *,
    eps: float, alpha: float, steps: int, momentum: float, boxed: bool,
    lr: float, decay: float, warmup: int, late: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights after AdamW over ``batches`` of (x, start). ``late``: rates are set after each step, as published."""
    teacher = copy.deepcopy(tower).double().eval().requires_grad_(False)
    student = copy.deepcopy(tower).double().eval().requires_grad_(True)
    mean, std, total = mean.double(), std.double(), len(batches)
    first = {k: torch.zeros_like(p) for k, p in student.named_parameters()}
    second = {k: torch.zeros_like(p) for k, p in student.named_parameters()}

    def scheduled(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * lr

    rate = lr if late else scheduled(0)
    for step, (x, start) in enumerate(batches):
        x, start = x.double(), start.double()
        if not late:
            rate = scheduled(step)
        goal = teacher((x - mean) / std)
        delta = attack(
            student, x, goal, mean, std, start, eps=eps, alpha=alpha, steps=steps, momentum=momentum, boxed=boxed
        )
        value = distance(student((x + delta - mean) / std), goal).mean()
        names, params = zip(*student.named_parameters(), strict=True)
        grads = torch.autograd.grad(value, params)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p.mul_(1 - rate * decay)
                p -= rate * m / (v.sqrt() + 1e-8)
        if late:
            rate = scheduled(step + 1)
    return {k: v.detach() for k, v in student.state_dict().items()}
