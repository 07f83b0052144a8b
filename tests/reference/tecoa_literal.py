"""TeCoA written out in float64, one image and one class at a time, from the mathematics of the method note.

Nothing of the package's loop, attack or loss is used: starts come in as numbers, the optimiser is spelled out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def features(tower: nn.Module, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(b, d) unit rows of pixels."""
    z = tower((x - mean) / std)
    rows = [row / (row * row).sum().sqrt() for row in z]
    return torch.stack(rows)


def loss(u: Tensor, text: Tensor, y: Tensor, scale: float) -> Tensor:
    """Mean over images of logsumexp minus the true logit; text rows of any length."""
    total = u.new_zeros(())
    for i in range(len(u)):
        logits = [scale * (u[i] * (t / (t * t).sum().sqrt())).sum() for t in text]
        top = max(float(v.detach()) for v in logits)
        lse = top + torch.stack([(v - top).exp() for v in logits]).sum().log()
        total = total + lse - logits[int(y[i])]
    return total / len(u)


def perturbation(
    encode: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, text: Tensor, scale: float, start: Tensor, eps: float,
    alpha: float, steps: int,
) -> Tensor:  # fmt: skip
    """delta after ``steps`` sign steps from ``start``, in the delta form: ball first, then the pixel box."""
    delta = (x + start).clamp(0, 1) - x
    for _ in range(steps):
        leaf = delta.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(encode(x + leaf), text, y, scale), leaf)
        delta = (delta + alpha * torch.sign(g)).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return delta


def rate(step: int, base: float, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero, set before every step."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base


def train(
    tower: nn.Module,
    batches: list[tuple[Tensor, Tensor, Tensor]],
    text: Tensor,
    scale: float,
    mean: Tensor,
    std: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    lr: float,
    warmup: int,
    momentum: float,
) -> dict[str, Tensor]:
    """Weights after SGD over ``batches`` of (x, y, start), all of the tower trained."""
    tower = copy.deepcopy(tower).double().eval().requires_grad_(True)
    text, mean, std = text.double(), mean.double(), std.double()
    velocity = {k: torch.zeros_like(p) for k, p in tower.named_parameters()}
    for step, (x, y, start) in enumerate(batches):
        x, start = x.double(), start.double()
        delta = perturbation(lambda v: features(tower, v, mean, std), x, y, text, scale, start, eps, alpha, steps)
        value = loss(features(tower, x + delta, mean, std), text, y, scale)
        names, params = zip(*tower.named_parameters(), strict=True)
        grads = torch.autograd.grad(value, params)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                velocity[name] = momentum * velocity[name] + g
                p -= rate(step, lr, warmup, len(batches)) * velocity[name]
    return {k: v.detach() for k, v in tower.state_dict().items()}
