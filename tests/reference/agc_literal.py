"""Our reconstruction of AGC, one image at a time, float64, views handed in. Nothing comes from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def entropy(logits: torch.Tensor) -> float:
    top = float(logits.max())
    p = [math.exp(float(v) - top) for v in logits]
    total = math.fsum(p)
    return -math.fsum(q / total * math.log(q / total) for q in p if q > 0)


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / math.sqrt(float((v * v).sum()))


def logits(
    encode: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, views: list[torch.Tensor],
    classes: torch.Tensor, scale: float, tau: float,
) -> torch.Tensor:  # fmt: skip
    z = unit(encode(image))
    found = [unit(encode(v)) for v in views]
    sure = [entropy(scale * classes @ f) for f in found]
    a = found[sure.index(min(sure))]
    cosine = float(z @ a)
    t = min(1.0, max(0.0, (1 - cosine) / tau))
    angle = math.acos(cosine)
    moved = (math.sin((1 - t) * angle) * z + math.sin(t * angle) * a) / math.sin(angle)
    return scale * classes @ moved
