"""Loss and pixel gradient of any classifier, the one place where attacks call autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ironclip.core.rng import SampleRNG

Fn = Callable[[Tensor, "SampleRNG | None"], Tensor]


def forwarded(value: Tensor, backward: Tensor) -> Tensor:
    """Exactly ``value`` going forward, the derivative of ``backward`` going back (Athalye et al. 2018)."""
    return value.detach() + (backward - backward.detach())


@dataclass(frozen=True, eq=False)
class Grad:
    """``out``: (b, k) mean output over draws; ``loss``: (b,) mean loss; ``grad``: like x, mean gradient; ``draws``."""

    out: Tensor
    loss: Tensor
    grad: Tensor
    draws: int


def draws_of(clf: Fn) -> int:
    """How many EOT draws the classifier asks an attack to average; 1 unless it is an ``eot`` view."""
    return int(getattr(clf, "draws", 1))


def loss_and_grad(clf: Fn, x: Tensor, loss: Callable[[Tensor], Tensor], rng: SampleRNG | None = None) -> Grad:
    """Per-sample loss and its gradient with respect to the pixels.

    ``loss`` maps the classifier's output to (b,) values. Gradients of the summed loss are averaged over the draws of an
    ``eot`` view (mean of gradients, not gradient of mean logits; Athalye et al. 2018, arXiv 1707.07397). Parameters get
    no gradient. A ``penalised`` view's penalty is taken off the loss. Raises NoGradientError if the output does not
    depend on the pixels through autograd at all.
    """
    draws, base = draws_of(clf), getattr(clf, "base", clf) if draws_of(clf) > 1 else clf
    total_out = total_loss = total_grad = None
    for i in range(draws):
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = _called(base, leaf, _draw(rng, i, draws))
            value = loss(out)
            penalty = getattr(base, "penalty", None)
            if penalty is not None:
                value = value - penalty(leaf, _draw(rng, i, draws))
            if not value.requires_grad:
                raise NoGradientError(
                    "the classifier's output carries no gradient to the pixels (a detached or non-differentiable "
                    "defense); attack its surrogate, or use a black-box attack"
                )
            (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if grad is None:
            raise NoGradientError(
                "the pixels do not reach the classifier's output; use its surrogate or a black-box attack"
            )
        out, value, grad = out.detach(), value.detach(), grad.detach()
        if total_out is None or total_loss is None or total_grad is None:
            total_out, total_loss, total_grad = out, value, grad
        else:
            total_out, total_loss, total_grad = total_out + out, total_loss + value, total_grad + grad
    assert total_out is not None
    assert total_loss is not None
    assert total_grad is not None
    if draws == 1:
        return Grad(total_out, total_loss, total_grad, 1)
    return Grad(total_out / draws, total_loss / draws, total_grad / draws, draws)


def _called(clf: Fn, x: Tensor, rng: SampleRNG | None) -> Tensor:
    try:
        return clf(x, rng)
    except RuntimeError as err:
        if "numpy()" not in str(err):  # what torch says when NumPy or PIL asks for the pixels
            raise
        raise NoGradientError(
            "the classifier takes the pixels out of autograd (NumPy, PIL); attack its surrogate, or use a black-box "
            f"attack: {err}"
        ) from err


def _draw(rng: SampleRNG | None, i: int, draws: int) -> SampleRNG | None:
    return None if rng is None else rng.at(rng.draw * draws + i)


class NoGradientError(RuntimeError):
    """The attacked classifier cannot be differentiated; the message says what to use instead."""


@contextmanager
def second_order() -> Iterator[None]:
    """Attention with a second derivative: the fused kernels have none (footgun 1)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def wants_graph(x: Tensor) -> bool:
    """True when the caller differentiates through us, so that inner optimisation must keep its graph."""
    return torch.is_grad_enabled() and x.requires_grad
