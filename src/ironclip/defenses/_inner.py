"""What defenses with steps of their own share: gradients inside a call, values with another value's derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ironclip.core.ball import project_delta, unit_step
from ironclip.core.grad import forwarded, second_order, wants_graph
from ironclip.core.vlm import VLM


def inner_gradient(objective: Callable[[Tensor], Tensor], at: Tensor, keep: bool = False) -> Tensor:
    """Gradient at ``at`` of the objective's values (b,), summed, so that every row gets its own.

    Works whatever the caller switched off (``no_grad``, ``inference_mode``) and touches no parameter. With ``keep`` the
    gradient stays differentiable, attention included: ``at`` must then belong to the caller's graph.
    """
    if keep:
        with second_order():
            (grad,) = torch.autograd.grad(objective(at).sum(), at, create_graph=True)
        return grad
    with torch.inference_mode(False), torch.enable_grad():
        leaf = at.detach().clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    return grad


class _Again(torch.autograd.Function):
    """Forward without a graph; backward runs the step once more and differentiates that."""

    @staticmethod
    def forward(ctx: Any, step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*inputs)
        return step(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [
                v.detach().requires_grad_(need)
                for v, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
            ]
            wanted = [v for v in leaves if v.requires_grad]
            made = iter(torch.autograd.grad(ctx.step(*leaves), wanted, grad, allow_unused=True))
        return None, *(next(made) if v.requires_grad else None for v in leaves)


def checkpointed(step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``step(*inputs)`` that keeps its inputs alone until backward, where it is computed again.

    For the steps of an unrolled ascent: memory holds one step's graph of second order at a time, however many there
    are. ``step`` must not draw random numbers, and gradients reach nothing but its ``inputs``.
    """
    out: Tensor = _Again.apply(step, *inputs)
    return out


def smooth_signs(step: Tensor, grad: Tensor, kappa: float) -> Tensor:
    """The signs ``step`` of ``grad`` (b, ...) with the derivative of tanh(kappa grad / mean|grad|), mean per image."""
    size = grad.abs().flatten(1).mean(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
    return forwarded(step, torch.tanh(kappa * grad / size))


def boxed(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta inside the pixel box; derivative zero at the pixels that were cut."""
    return (x + delta).clamp(0.0, 1.0)


def counterattack(
    vlm: VLM,
    x: Tensor,
    noise: Tensor,
    clean: Tensor,
    eps: float,
    alpha: float,
    norm: str,
    weights: Sequence[float],
    kappa: float | None = None,
) -> Tensor:
    """``x + sum_i weights[i] delta_i`` after ``len(weights) - 1`` ascent steps on ``||e(x + delta) - clean||^2``.

    ``noise``: delta_0 before the pixel box. ``clean``: (b, d) features that are left, a constant of every step. Every
    delta_i stays in the eps-ball and the pixel box. Differentiable in x where the caller wants that: through the box
    alone for sign steps, whose derivative is zero, and through the whole ascent for l2 steps or with ``kappa``, which
    gives the signs the derivative of tanh(kappa g / mean|g|).
    """
    unrolled = wants_graph(x) and len(weights) > 1 and (kappa is not None or norm != "linf")
    if unrolled:
        with second_order():
            clean = vlm.encode_image(x, normalize=False)
    delta = boxed(x, noise) - x
    total = weights[0] * delta

    def advance(delta: Tensor, x: Tensor, clean: Tensor) -> Tensor:
        keep = unrolled and wants_graph(delta)
        start = x if keep else x.detach()

        def distance(d: Tensor) -> Tensor:
            return (vlm.encode_image(start + d, normalize=False) - clean).square().sum(dim=1)

        grad = inner_gradient(distance, delta, keep)
        step = unit_step(grad, norm)
        if keep and norm == "linf":
            step = smooth_signs(step, grad, kappa or 1.0)
        return boxed(x, project_delta(delta + alpha * step, eps, norm)) - x

    for weight in weights[1:]:
        delta = checkpointed(advance, delta, x, clean) if unrolled else advance(delta, x, clean)
        total = total + weight * delta
    return x + total
