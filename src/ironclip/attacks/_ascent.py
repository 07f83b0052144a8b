"""The one loop of projected gradient ascent that PGD, its momentum variants and the feature attacks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.attacks._objective import RowLoss
from ironclip.attacks._tally import Tally, gradient, independent, mixed, spread, value
from ironclip.core.ball import norms, project, start_delta, unit_step
from ironclip.core.grad import Fn, draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.types import AttackResult


@dataclass(frozen=True)
class Ascent:
    """Geometry and schedule of one run; budgets are floats in pixel units, see ``attacks/pgd.py`` for the fields.

    ``smooth`` changes every gradient before it is used (translation-invariant attacks).
    """

    eps: float
    alpha: float
    steps: int
    norm: str = "linf"
    start: str = "uniform"
    start_eps: float | None = None
    momentum: float = 0.0
    momentum_form: str = "mean"
    best: bool = True
    stop: bool = False
    trace: bool = False
    smooth: Callable[[Tensor], Tensor] | None = None


def ascend(
    clf: Fn,
    x: Tensor,
    loss: RowLoss,
    fooled: Callable[[Tensor, Tensor], Tensor],
    run: Ascent,
    rng: SampleRNG,
    fallback: RowLoss | None = None,
    judge: Fn | None = None,
) -> AttackResult:
    """Climb ``loss`` inside the ball around ``x``; ``rng`` carries the samples and this run's place in the stream.

    ``fooled(out, rows)`` says which rows count as successes. The best point is the fooling one with the highest loss,
    or the one with the highest loss where none fools. ``fallback`` replaces the loss of the single samples whose
    gradient is all zero, from the step at which that is seen. With ``run.stop`` fooled samples leave the batch, which
    is exact for classifiers that treat images independently and draw nothing; others run to the end. ``judge`` sees the
    last point in place of ``clf`` where the steps are taken through a changed classifier.
    """
    b, draws = x.shape[0], draws_of(clf)
    stop = run.stop and independent(clf)
    radius = run.eps if run.start_eps is None else run.start_eps
    at = (x + start_delta(x, radius, run.norm, run.start, rng.fold("start"))).clamp_(0.0, 1.0)
    tally = Tally(at, run.steps, run.best)
    rows, noise = torch.arange(b, device=x.device), rng.fold("defense")
    swapped = torch.zeros(b, dtype=torch.bool, device=x.device)
    velocity = torch.zeros_like(x) if run.momentum else None
    trace: dict[str, list[Tensor]] = {"loss": [], "grad_norm": [], "zero_pixels": [], "step_size": []}

    for step in range(run.steps):
        g, new = gradient(clf, at, loss, fallback, rows, swapped, noise.at(step), tally)
        if bool(new.any()):
            tally.first[rows[new]] = g.loss[new]
        tally.offer(rows, at, g.loss, fooled(g.out, rows), step)
        zero = tally.gradient(rows, g.grad)
        if run.trace:
            size = torch.full_like(g.loss, run.alpha)
            for key, line in zip(trace, (g.loss, norms(g.grad, "l2"), zero, size), strict=True):
                trace[key].append(spread(line, rows, b))
        grad = g.grad if run.smooth is None else run.smooth(g.grad)
        if velocity is not None:
            grad = velocity = _push(velocity, grad, run)
        at = project(unit_step(grad, run.norm).mul_(run.alpha).add_(at), x, run.eps, run.norm)
        if stop and bool(tally.hit[rows].any()):
            keep = ~tally.hit[rows]
            rows, noise, at, x = rows[keep], noise[keep], at[keep], x[keep]
            velocity = None if velocity is None else velocity[keep]
            if rows.numel() == 0:
                break
    if rows.numel():
        final = mixed(loss, fallback, rows, swapped)
        out, last = value(clf if judge is None else judge, at, final, noise.at(run.steps))
        tally.spend(rows, draws if judge is None else draws_of(judge))
        tally.offer(rows, at, last, fooled(out, rows), run.steps)
    notes = ("zero gradients: margin used on some samples",) if bool(swapped.any()) else ()
    return tally.result(trace if run.trace else None, notes)


def _push(velocity: Tensor, grad: Tensor, run: Ascent) -> Tensor:
    """Momentum: ``mean`` divides the gradient by its mean magnitude (MI-FGSM), ``unit`` adds and keeps unit steps."""
    if run.momentum_form == "unit":
        return unit_step(run.momentum * velocity + unit_step(grad, run.norm), run.norm)
    size = grad.flatten(1).abs().mean(dim=1).clamp_(min=1e-12).view(-1, 1, 1, 1)
    return (grad / size).add_(velocity, alpha=run.momentum)
