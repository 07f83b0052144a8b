"""Anti-Adversary and Hedge Defense as their note states them: one image at a time, float64, pixel by pixel.

``classify`` maps one image (3, h, w) to its logits (k,). Nothing here comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Classify = Callable[[torch.Tensor], torch.Tensor]


def minus_log_p(logits: torch.Tensor, c: int) -> torch.Tensor:
    top = float(logits.detach().max())
    return top + torch.log(sum(torch.exp(v - top) for v in logits)) - logits[c]


def signs(g: torch.Tensor) -> torch.Tensor:
    return torch.tensor([math.copysign(1.0, v) if v else 0.0 for v in g.flatten().tolist()]).double().view(g.shape)


def anti_adversary(classify: Classify, image: torch.Tensor, steps: int, alpha: list[float], box: bool) -> torch.Tensor:
    """The moved image; ``alpha``: step of each channel in raw pixels."""
    said = int(classify(image).argmax())
    extra = torch.zeros_like(image)
    for _ in range(steps):
        leaf = (image + extra).clone().requires_grad_(True)
        minus_log_p(classify(leaf), said).backward()
        direction = signs(leaf.grad)
        for c in range(3):
            extra[c] -= alpha[c] * direction[c]
        if box:
            extra = (image + extra).clamp(0, 1) - image
    return image + extra


def hedge(classify: Classify, image: torch.Tensor, steps: int, alpha: float, eps: float) -> torch.Tensor:
    extra = torch.zeros_like(image)
    for _ in range(steps):
        leaf = (image + extra).clone().requires_grad_(True)
        logits = classify(leaf)
        sum(minus_log_p(logits, c) for c in range(len(logits))).backward()
        extra = (extra + alpha * signs(leaf.grad)).clamp(-eps, eps)
        extra = (image + extra).clamp(0, 1) - image
    return image + extra
