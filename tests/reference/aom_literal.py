"""AOM as its note writes it: one image, one draw at a time, float64, draws handed in. Nothing comes from the package.

``encode`` maps one image (3, h, w) in [0, 1] to its feature (d,), of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Encode = Callable[[torch.Tensor], torch.Tensor]


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / math.sqrt(float((v * v).sum()))


def anchor(encode: Encode, image: torch.Tensor, draws: torch.Tensor, sigma: float) -> torch.Tensor:
    total = torch.zeros_like(encode(image))
    for n in draws:
        total = total + unit(encode((image + sigma * n).clamp(0, 1)))
    return unit(total / len(draws))


def corrected(z: torch.Tensor, a: torch.Tensor, lam: float, path: str) -> torch.Tensor:
    if path == "chord":
        return unit(z + lam * (a - z))
    theta = math.acos(max(-1.0, min(1.0, float(z @ a))))
    return (math.sin((1 - lam) * theta) * z + math.sin(lam * theta) * a) / math.sin(theta)


def logits(
    encode: Encode,
    images: torch.Tensor,
    draws: torch.Tensor,
    classes: torch.Tensor,
    scale: float,
    sigma: float,
    lam: float,
    path: str = "chord",
    gate_sigma: float = 0.1,
    threshold: float | None = None,
) -> torch.Tensor:
    """(b, k); ``draws``: (b, draws, 3, h, w) standard normal. ``threshold``: moved only where 1 - z.a exceeds it."""
    rows = []
    for image, own in zip(images.double(), draws.double(), strict=True):
        z = unit(encode(image))
        out = corrected(z, anchor(encode, image, own, sigma), lam, path)
        if threshold is not None and not 1 - float(z @ anchor(encode, image, own, gate_sigma)) > threshold:
            out = z
        rows.append(scale * torch.stack([c @ out for c in classes.double()]))
    return torch.stack(rows)
