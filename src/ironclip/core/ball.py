"""Geometry of the budget: norms, projections, random starts and steepest-ascent directions, all per sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = ("linf", "l2", "l1")


def norms(delta: Tensor, norm: str = "linf") -> Tensor:
    """(b, ...) to (b,): the norm of every sample's perturbation."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    return flat.norm(p=2 if norm == "l2" else 1, dim=1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *([1] * (like.ndim - 1)))


def project_l1(delta: Tensor, radius: float) -> Tensor:
    """Euclidean projection of every row on the l1 ball (Duchi et al. 2008, by sorting)."""
    flat = delta.flatten(1)
    mags = flat.abs()
    sorted_, _ = mags.sort(dim=1, descending=True)
    excess = sorted_.cumsum(1) - radius
    rank = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    keep = (sorted_ * rank > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = excess.gather(1, keep - 1) / keep
    inside = mags.sum(1, keepdim=True) <= radius
    shrunk = flat.sign() * (mags - threshold.clamp(min=0)).clamp(min=0)
    return torch.where(inside, flat, shrunk).view_as(delta)


def project_delta(delta: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Nearest point of the eps-ball around 0, per sample."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    if norm == "l2":
        size = norms(delta, "l2").clamp(min=1e-12)
        return delta * _per_sample((eps / size).clamp(max=1.0), delta)
    return project_l1(delta, eps)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Back into the ball around ``x`` first, then into the pixel box [0, 1].

    The image space form ``x + clip(x_adv - x)``: the box keeps the ball, since clamping moves no pixel away from x.
    """
    if norm == "linf":
        return (x_adv - x).clamp_(-eps, eps).add_(x).clamp_(0.0, 1.0)
    return (x + project_delta(x_adv - x, eps, norm)).clamp_(0.0, 1.0)


def unit_step(grad: Tensor, norm: str = "linf") -> Tensor:
    """Direction of steepest ascent: sign (linf), g / ||g||_2 (l2), the largest coordinate alone (l1)."""
    if norm == "linf":
        return grad.sign()
    if norm == "l2":
        return grad / _per_sample(norms(grad, "l2") + 1e-10, grad)
    flat = grad.flatten(1)
    top = flat.abs().argmax(dim=1, keepdim=True)
    step = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign())
    return step.view_as(grad)


def start_delta(x: Tensor, eps: float, norm: str, kind: str, rng: SampleRNG) -> Tensor:
    """Random perturbation to start from, before the pixel box.

    ``zero``; ``uniform``: linf uniform in the cube, l2 and l1 a random direction times eps * U(0, 1) (what TeCoA, TTC
    and torchattacks do); ``volume``: uniform in the ball's volume (for linf the cube again), where almost all mass
    lies at the surface; ``surface``: noise rescaled so that its norm is exactly eps (AutoAttack's start).
    """
    if kind == "zero" or eps == 0:
        return torch.zeros_like(x)
    if norm == "linf":
        noise = rng.uniform_like(x, -1.0, 1.0)
        if kind == "surface":
            noise = noise / _per_sample(norms(noise).clamp(min=1e-12), noise)
        return eps * noise
    if norm == "l2":
        noise = rng.normal_like(x)
    else:
        expo = -torch.log1p(-rng.uniform_like(x))
        noise = expo * rng.fold("sign").uniform_like(x, -1.0, 1.0).sign()
    noise = noise / _per_sample(norms(noise, norm).clamp(min=1e-12), noise)
    if kind == "surface":
        return eps * noise
    radius = rng.fold("radius").uniform(1).flatten().to(x)
    if kind == "volume":
        radius = radius ** (1.0 / x[0].numel())
    return eps * noise * _per_sample(radius, noise)


STARTS: tuple[str, ...] = ("zero", "uniform", "volume", "surface")
