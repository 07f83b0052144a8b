"""Our reconstruction of FPT-Noise's choice of a strength, one image at a time. Nothing comes from the package."""

from __future__ import annotations

import math

import torch


def strength(features: list[torch.Tensor], sigmas: list[float], limit: float, rate: float) -> float:
    """``features``: unit (d,) without noise, then at each of ``sigmas``."""

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return 1 - float(a @ b)

    if apart(features[0], features[-1]) <= limit:
        return 0.0
    steps = [math.sqrt(max(0.0, apart(features[i + 1], features[i]))) for i in range(len(sigmas))]
    for i in range(len(sigmas) - 1):
        if steps[i + 1] < rate * max(steps):
            return sigmas[i]
    return sigmas[-1]
