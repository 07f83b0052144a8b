"""Sign steps on the pixels before they are classified: what defenses share that move the image uphill for itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ironclip.core.grad import forwarded, wants_graph
from ironclip.defenses._inner import boxed, checkpointed, inner_gradient, smooth_signs


def sign_walk(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int,
    alpha: float | Tensor,
    eps: float | None = None,
    box: bool = True,
    kappa: float | None = None,
) -> Tensor:
    """x (b, 3, h, w) after ``steps`` sign steps of size ``alpha`` that raise ``objective`` (b,) of the pixels.

    ``eps``: radius in l_inf, None for none; ``box``: pixels stay in [0, 1]. The derivative in x is exact: that of the
    identity but for pixels the box has cut, since a sign has derivative zero; with ``kappa`` signs have that of
    tanh(kappa g / mean|g|) and the steps are differentiated through.
    """
    unrolled = wants_graph(x) and kappa is not None
    delta = torch.zeros_like(x)

    def advance(delta: Tensor, x: Tensor) -> Tensor:
        keep = unrolled and wants_graph(x)
        grad = inner_gradient(objective, x + delta, keep)
        step = grad.sign()
        if keep:
            step = smooth_signs(step, grad, kappa or 1.0)
        delta = delta + alpha * step
        if eps is not None:
            delta = delta.clamp(-eps, eps)
        return boxed(x, delta) - x if box else delta

    for _ in range(steps):
        delta = checkpointed(advance, delta, x) if unrolled else advance(delta, x)
    return x + delta


def walked(make: Callable[[Tensor, float | None], Tensor], x: Tensor, how: str) -> Tensor:
    """``make(x, kappa)`` with the derivative that ``how`` names: exact, bpda (of the identity), smooth (unrolled)."""
    if how == "bpda":
        with torch.no_grad():
            value = make(x.detach(), None)
        return forwarded(value, x)
    return make(x, 10.0 if how == "smooth" else None)
