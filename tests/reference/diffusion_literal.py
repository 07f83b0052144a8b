"""Diffusion purification as the papers state it, in float64, image by image. Nothing here comes from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Predict = Callable[[torch.Tensor, int], torch.Tensor]


def cosine_bar(t: int, steps: int = 1000) -> float:
    """The share of variance kept at step t: a product of 1 - beta, each beta cut at 0.999."""
    product = 1.0
    for i in range(t + 1):
        a = math.cos(((i + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        b = math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        product *= 1 - min(1 - a / b, 0.999)
    return product


def clipure_diff(
    z: torch.Tensor, predict: Predict, draws: list[tuple[list[int], torch.Tensor]], *, eta: float, per_row: bool
) -> torch.Tensor:
    """Unit rows z after one normalised gradient step per draw (steps of the rows, noise (b, d)).

    The error is that of the whole batch, a mean over rows; points are sqrt(d) times the unit rows.
    """
    scale = math.sqrt(z.shape[1])
    for steps, noise in draws:
        leaf = (scale * z).detach().requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        for row, (t, eps) in enumerate(zip(steps, noise, strict=True)):
            bar = cosine_bar(t)
            seen = math.sqrt(bar) * leaf[row] + math.sqrt(1 - bar) * eps
            error = predict(seen, t) - leaf[row]
            total = total + (error**2).mean() / len(z)
        (g,) = torch.autograd.grad(total, leaf)
        size = torch.sqrt((g**2).sum(1, keepdim=True)) if per_row else torch.sqrt((g**2).sum())
        u = z - eta * g / size
        z = u / torch.sqrt((u**2).sum(1, keepdim=True))
    return z


def network(w: dict[str, torch.Tensor], z: torch.Tensor, t: int) -> torch.Tensor:
    """The small prior's answer to one noisy point (d,)."""

    def normed(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)

    angles = [t * 10000 ** (-i / 31) for i in range(32)]
    beat = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
    h = w["in_w"] @ z + w["in_b"] + w["step_w"] @ beat
    block = 0
    while f"up{block}_w" in w:
        inner = w[f"up{block}_w"] @ normed(h) + w[f"up{block}_b"]
        h = h + w[f"down{block}_w"] @ (inner / (1 + torch.exp(-inner))) + w[f"down{block}_b"]
        block += 1
    bar = cosine_bar(t)
    return math.sqrt(bar) * z + math.sqrt(1 - bar) * (w["out_w"] @ normed(h) + w["out_b"])


def ddpm(
    x: torch.Tensor, noise_of: Predict, bars: list[float], times: list[int], start: torch.Tensor,
    noises: list[torch.Tensor], clip: float | None,
) -> torch.Tensor:  # fmt: skip
    """Pixels (3, s, s) in [0, 1] noised to times[0], then the DDPM posterior along times."""
    z = math.sqrt(bars[times[0]]) * (2 * x - 1) + math.sqrt(1 - bars[times[0]]) * start
    for i, t in enumerate(times):
        bar, before = bars[t], bars[times[i + 1]] if i + 1 < len(times) else 1.0
        x0 = (z - math.sqrt(1 - bar) * noise_of(z, t)) / math.sqrt(bar)
        if clip is not None:
            x0 = torch.clamp(x0, -clip, clip)
        beta = 1 - bar / before
        mean = math.sqrt(before) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * z
        z = mean + math.sqrt(beta * (1 - before) / (1 - bar)) * noises[i]
    return torch.clamp((z + 1) / 2, 0, 1)
