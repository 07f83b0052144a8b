"""TTC as its note states it: one image at a time, float64, every offset stored, draws handed in.

Nothing here comes from the package; ``encode`` maps one image (3, h, w) in [0, 1] to its feature (d,), not normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Encode = Callable[[torch.Tensor], torch.Tensor]


def weights(beta: float, steps: int) -> list[float]:
    raw = [math.exp(beta * i) for i in range(steps + 1)]
    return [r / math.fsum(raw) for r in raw]


def relative_drift(encode: Encode, image: torch.Tensor, offset: torch.Tensor) -> float:
    before, after = encode(image), encode(image + offset)
    return float(torch.sqrt(((after - before) ** 2).sum()) / torch.sqrt((before**2).sum()))


def offsets(encode, image, first, eps: float, alpha: float, steps: int, norm: str = "linf") -> list[torch.Tensor]:
    """delta_0 .. delta_N of one image."""
    anchor = encode(image).detach()
    kept = [first]
    for _ in range(steps):
        delta = kept[-1].clone().requires_grad_(True)
        distance = ((encode(image + delta) - anchor) ** 2).sum()
        distance.backward()
        g = delta.grad
        new = torch.empty_like(g)
        if norm == "linf":
            for place in range(g.numel()):
                value = g.view(-1)[place].item()
                direction = (value > 0) - (value < 0)
                moved = kept[-1].view(-1)[place].item() + alpha * direction
                new.view(-1)[place] = min(max(moved, -eps), eps)
        else:
            new = kept[-1] + alpha * g / torch.sqrt((g**2).sum())
            length = float(torch.sqrt((new**2).sum()))
            new = new * min(1.0, eps / length)
        kept.append(torch.clamp(image + new, 0, 1) - image)
    return [k.detach() for k in kept]


def logits(
    encode: Encode,
    images: torch.Tensor,
    draws: torch.Tensor,
    classes: torch.Tensor,
    scale: float,
    *,
    eps: float = 4 / 255,
    alpha: float = 1 / 255,
    steps: int = 2,
    tau: float = 0.2,
    beta: float = 2.0,
    clean_offset: str = "noise",
    norm: str = "linf",
) -> tuple[torch.Tensor, list[bool]]:
    """Logits (b, k) and which images were judged attacked; ``draws``: the noise before the pixel box."""
    rows, judged = [], []
    for image, draw in zip(images.double(), draws.double(), strict=True):
        first = torch.clamp(image + draw, 0, 1) - image
        attacked = relative_drift(encode, image, first) < tau
        if attacked:
            total = torch.zeros_like(image)
            for w, delta in zip(
                weights(beta, steps), offsets(encode, image, first, eps, alpha, steps, norm), strict=True
            ):
                total = total + w * delta
        else:
            total = first if clean_offset == "noise" else torch.zeros_like(image)
        feature = encode(image + total).detach()
        feature = feature / torch.sqrt((feature**2).sum())
        rows.append(scale * classes.double() @ feature)
        judged.append(attacked)
    return torch.stack(rows), judged
