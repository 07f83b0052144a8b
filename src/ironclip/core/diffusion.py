"""Gaussian diffusion: the cosine schedule, noising, and what a network's output says about the clean point.

Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672), Song et al. 2021 (arXiv 2010.02502). Of
the clean point x0 a step t keeps the share ``kept[t]``: x_t = sqrt(kept) x0 + sqrt(1 - kept) noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ironclip.core.check import check_choice

PREDICTIONS = ("sample", "epsilon", "v_prediction")


def cosine_kept(steps: int = 1000) -> Tensor:
    """(steps,) float64: the share of x0's variance that is kept at step t = 0, 1, ..., each beta at most 0.999."""

    def f(t: float) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def noised(x0: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """x_t of clean points (b, ...) for ``kept`` (b,) or a number."""
    kept = _like(kept, x0)
    return kept.sqrt() * x0 + (1 - kept).sqrt() * noise


def clean_of(out: Tensor, x_t: Tensor, kept: Tensor, kind: str) -> Tensor:
    """The x0 that a network's output stands for: ``sample`` is x0, ``epsilon`` the noise, ``v_prediction`` a mix of
    both (Salimans & Ho 2022, arXiv 2202.00512). Raises ValueError for another kind."""
    check_choice(kind, PREDICTIONS, "prediction_type")
    kept = _like(kept, x_t)
    if kind == "sample":
        return out
    if kind == "epsilon":
        return (x_t - (1 - kept).sqrt() * out) / kept.sqrt()
    return kept.sqrt() * x_t - (1 - kept).sqrt() * out


def ancestral(x_t: Tensor, x0: Tensor, noise: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """A draw from the posterior of the earlier point whose kept share is ``before``, given x_t and x0 (b, ...).

    The DDPM step, over any stride; without noise, x0 itself, where ``before`` is 1.
    """
    ratio = kept / before
    mean = before.sqrt() * (1 - ratio) / (1 - kept) * x0 + ratio.sqrt() * (1 - before) / (1 - kept) * x_t
    return mean + ((1 - before) / (1 - kept) * (1 - ratio)).clamp(min=0).sqrt() * noise


def _like(kept: Tensor, x: Tensor) -> Tensor:
    kept = torch.as_tensor(kept).to(x)
    return kept.view(-1, *[1] * (x.ndim - 1)) if kept.ndim else kept
