"""The filters from their definitions, one plane and one pixel at a time, float64. Nothing comes from the package."""

from __future__ import annotations

import cmath
import math

import torch


def low_pass(plane: torch.Tensor, radius: float) -> torch.Tensor:
    """(s, s): the sum over the kept frequencies, each from its definition."""
    s = plane.shape[0]
    out = torch.zeros(s, s, dtype=torch.float64)
    for u in range(s):
        for v in range(s):
            fu, fv = (f if f < s / 2 else f - s for f in (u, v))
            if math.hypot(fu, fv) > radius:
                continue
            terms = (
                float(plane[i, j]) * cmath.exp(-2j * math.pi * (u * i + v * j) / s) for i in range(s) for j in range(s)
            )
            c = sum(terms) / (s * s)
            for i in range(s):
                for j in range(s):
                    out[i, j] += (c * cmath.exp(2j * math.pi * (u * i + v * j) / s)).real
    return out.clamp(0, 1)


def mirror(i: int, s: int) -> int:
    if i < 0:
        return -i
    return 2 * (s - 1) - i if i >= s else i


def windowed(plane: torch.Tensor, size: int, f) -> torch.Tensor:
    s, half = plane.shape[0], size // 2
    out = torch.zeros(s, s, dtype=torch.float64)
    for i in range(s):
        for j in range(s):
            out[i, j] = f(
                [
                    [float(plane[mirror(i + a, s), mirror(j + b, s)]) for b in range(-half, half + 1)]
                    for a in range(-half, half + 1)
                ]
            )
    return out


def median(plane: torch.Tensor, size: int) -> torch.Tensor:
    return windowed(plane, size, lambda w: sorted(v for row in w for v in row)[size * size // 2])


def blur(plane: torch.Tensor, sigma: float) -> torch.Tensor:
    raw = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-2, 3)]
    line = [r / sum(raw) for r in raw]
    return windowed(plane, 5, lambda w: sum(line[a] * line[b] * w[a][b] for a in range(5) for b in range(5)))


def bits(plane: torch.Tensor, number: int) -> torch.Tensor:
    levels = 2**number - 1
    return torch.tensor([[round(float(v) * levels) / levels for v in row] for row in plane]).double()
