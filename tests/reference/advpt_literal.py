"""AdvPT written out in float64, one image at a time: the bank's attack, then tuning on its rows by hand.

The text side is that of ``apt_literal``. Nothing of the package's bank, loss or loop is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def softmax(v: Tensor) -> Tensor:
    """Of one vector."""
    e = (v - v.max()).exp()
    return e / e.sum()


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """KL(softmax clean || softmax moved) of two raw feature vectors, summed over their coordinates."""
    p, q = softmax(clean), softmax(moved)
    return (p * (p / q).log()).sum()


def attacked(
    encode: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, alpha: float, steps: int, one_sided: bool
) -> Tensor:
    """x + delta of one image (3, h, w); a one-sided start may leave the pixel box before its first step."""
    clean = encode(x).detach()
    at = x + start if one_sided else (x + start).clamp(0, 1)
    for _ in range(steps):
        leaf = at.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(divergence(clean, encode(leaf)), leaf)
        delta = (at + alpha * torch.sign(grad) - x).clamp(-eps, eps)
        at = (x + delta).clamp(0, 1)
    return at


def final_offset(start: float, eps: float, alpha: float, steps: int) -> float:
    """Where a mid-grey pixel whose gradient stays negative ends."""
    delta = start
    for _ in range(steps):
        delta = max(-eps, min(eps, delta - alpha))
    return delta


def loss(rows: Tensor, texts: Tensor, y: Sequence[int], scale: float) -> Tensor:
    """Mean over images (b, e, d) and kinds of logsumexp minus the true logit; rows of any length."""
    total, n = rows.new_zeros(()), 0
    for image, label in zip(rows, y, strict=True):
        for row in image:
            logits = scale * (texts @ (row / (row * row).sum().sqrt()))
            total, n = total + logits.logsumexp(0) - logits[label], n + 1
    return total / n


def train(
    texts_of: Callable[[Tensor], Tensor], vectors: Tensor, batches: Sequence[tuple[Tensor, Sequence[int]]],
    scale: float, *, rates: Sequence[float], momentum: float, decay: float,
) -> Tensor:  # fmt: skip
    """Vectors after SGD over ``batches`` of (rows, y)."""
    v = vectors.double()
    velocity = torch.zeros_like(v)
    for step, (rows, y) in enumerate(batches):
        own = v.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(rows.double(), texts_of(own), y, scale), own)
        velocity = momentum * velocity + grad + decay * v if step else grad + decay * v
        v = v - rates[step] * velocity
    return v
