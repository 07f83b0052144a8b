"""Unit features: angles, drift, and moves from one towards another along the chord or the great circle."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

OPPOSITE = 1e-4
"""Radians short of pi at which no great circle is preferred any more."""


def move(z: Tensor, a: Tensor, lam: float | Tensor, path: str = "chord") -> Tensor:
    """(b, d) unit features at ``lam`` on the path from unit z (lam = 0) through unit a (lam = 1); one lam, or (b,).

    ``a`` itself, with a warning, where the path passes through zero or, on the sphere, is not defined.
    """
    if not isinstance(lam, Tensor) and lam == 0:
        return z
    if path == "chord":
        u = z + (lam[:, None] if isinstance(lam, Tensor) else lam) * (a - z)
    else:
        angle = angle_between(z, a)
        of_z, of_a = coefficients(angle, lam, path)
        defined = (torch.pi - angle >= OPPOSITE)[:, None]
        u = torch.where(defined, of_z[:, None] * z + of_a[:, None] * a, 0.0)
    return unit_or(u, a, "an anchor opposite to their feature; they take the anchor")


def coefficients(angle: Tensor, lam: float | Tensor, path: str) -> tuple[Tensor, Tensor]:
    """(b,) weights of z and of a in the moved unit feature, from the angle (b,) between them in radians."""
    c = angle.cos()
    size = ((1 - lam) ** 2 + lam**2 + 2 * lam * (1 - lam) * c).clamp(min=0).sqrt()
    none = size < 1e-6
    size = torch.where(none, torch.ones_like(size), size)
    of_z, of_a = (1 - lam) / size, lam / size
    if path == "geodesic":
        s = angle.sin()
        near, none = angle < 1e-4, torch.pi - angle < OPPOSITE
        s = torch.where(near | none, torch.ones_like(s), s)
        of_z = torch.where(near, of_z, torch.sin((1 - lam) * angle) / s)
        of_a = torch.where(near, of_a, torch.sin(lam * angle) / s)
    return torch.where(none, torch.zeros_like(of_z), of_z), torch.where(none, torch.ones_like(of_a), of_a)


def angle_between(z: Tensor, a: Tensor) -> Tensor:
    """(b,) radians between unit rows (b, d), exact near 0 and pi, with a derivative of zero where they are equal."""
    apart, along = (z - a).square().sum(1), (z + a).square().sum(1)
    return 2 * torch.atan2(apart.clamp(min=1e-14).sqrt(), along.clamp(min=1e-14).sqrt())


def drift_between(z: Tensor, a: Tensor) -> Tensor:
    """(b,) 1 - cosine of unit rows (b, d), without the cancellation of that difference."""
    return 0.5 * (z - a).square().sum(dim=1)


def unit_or(u: Tensor, other: Tensor, why: str) -> Tensor:
    """Rows of u (b, d) at unit length; unit rows ``other`` in place of those of length zero, with a warning."""
    none = u.detach().norm(dim=1, keepdim=True) < 1e-6
    if bool(none.any()):
        warnings.warn(f"{int(none.sum())} images have {why}", stacklevel=2)
        u = torch.where(none, other, u)
    return F.normalize(u, dim=-1)
