"""The one loop of projected gradient ascent that PGD, its momentum variants and the feature attacks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.core.ball import norms, project, start_delta, unit_step
from ironclip.core.grad import Fn, draws_of, loss_and_grad
from ironclip.core.rng import SampleRNG
from ironclip.core.types import AttackResult
from ironclip.core.views import base_of

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""``(out, rows) -> (b,)``: loss of the outputs that belong to the rows (long indices) of the batch."""


@dataclass(frozen=True)
class Ascent:
    """Geometry and schedule of one run; budgets are floats in pixel units, see ``attacks/pgd.py`` for the fields."""

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


def ascend(
    clf: Fn,
    x: Tensor,
    loss: RowLoss,
    fooled: Callable[[Tensor, Tensor], Tensor],
    run: Ascent,
    rng: SampleRNG,
    fallback: RowLoss | None = None,
) -> AttackResult:
    """Climb ``loss`` inside the ball around ``x``; ``rng`` carries the samples and this run's place in the stream.

    ``fooled(out, rows)`` says which rows count as successes. The best point is the fooling one with the highest loss,
    or the one with the highest loss where none fools. ``fallback`` replaces the loss of the single samples whose
    gradient is all zero, from the step at which that is seen. With ``run.stop`` fooled samples leave the batch, which
    is exact for classifiers that treat images independently and draw nothing; others run to the end.
    """
    b, draws = x.shape[0], draws_of(clf)
    stop = run.stop and not base_of(clf, "batchwise") and not base_of(clf, "randomized")
    radius = run.eps if run.start_eps is None else run.start_eps
    x_adv = (x + start_delta(x, radius, run.norm, run.start, rng.fold("start"))).clamp(0.0, 1.0)
    best_x, best_loss = x_adv.clone(), x.new_full((b,), -torch.inf)
    best_hit = torch.zeros(b, dtype=torch.bool, device=x.device)
    last_loss, first_loss, early = (x.new_zeros(b) for _ in range(3))
    forwards, backwards = (torch.zeros(b, dtype=torch.long) for _ in range(2))
    zero_grad, swapped = (torch.zeros(b, dtype=torch.bool, device=x.device) for _ in range(2))
    zero_pixels, velocity = x.new_zeros(b), torch.zeros_like(x) if run.momentum else None
    steps_taken = x.new_zeros(b)
    trace: dict[str, list[Tensor]] = {"loss": [], "grad_norm": [], "zero_pixels": [], "step_size": []}
    rows = torch.arange(b, device=x.device)
    noise = rng.fold("defense")

    def record(out: Tensor, value: Tensor, step: int, at: Tensor) -> None:
        hit = fooled(out, rows)
        better = (hit & ~best_hit[rows]) | ((hit == best_hit[rows]) & (value > best_loss[rows]))
        if not run.best:
            better = torch.ones_like(better)
        best_x[rows[better]] = at[better]
        best_loss[rows[better]], best_hit[rows[better]] = value[better], hit[better]
        last_loss[rows] = value
        if step == 0:
            first_loss[rows] = value
        if step <= 0.9 * run.steps:
            early[rows] = best_loss[rows]

    for step in range(run.steps):
        batch = x_adv[rows] if stop else x_adv
        mixed = _mixed(loss, fallback, rows, swapped)
        g = loss_and_grad(clf, batch, mixed, noise[rows].at(step))
        dead = g.grad.flatten(1).abs().amax(dim=1) == 0
        if fallback is not None and bool((dead & ~swapped[rows]).any()):
            swapped[rows] |= dead
            redo = torch.where(dead)[0]
            picked = rows[redo]
            again = loss_and_grad(clf, batch[redo], _rows_loss(fallback, picked), noise[picked].at(step))
            grad, value = g.grad.clone(), g.loss.clone()
            grad[redo], value[redo] = again.grad, again.loss
            g = type(g)(g.out, value, grad, g.draws)
            forwards[picked.cpu()] += draws
            backwards[picked.cpu()] += draws
            dead = g.grad.flatten(1).abs().amax(dim=1) == 0
        forwards[rows.cpu()] += draws
        backwards[rows.cpu()] += draws
        record(g.out, g.loss, step, batch)
        zero_grad[rows] |= dead
        zero_share = (g.grad == 0).flatten(1).float().mean(dim=1)
        zero_pixels[rows] += zero_share
        steps_taken[rows] += 1
        if run.trace:
            for key, value in zip(
                trace,
                (g.loss, norms(g.grad, "l2"), zero_share, torch.full_like(g.loss, run.alpha)),
                strict=True,
            ):
                trace[key].append(x.new_full((b,), torch.nan).index_copy(0, rows, value))
        grad = g.grad
        if velocity is not None:
            velocity[rows] = _push(velocity[rows], grad, run)
            grad = velocity[rows]
        moved = project(batch + run.alpha * unit_step(grad, run.norm), x[rows] if stop else x, run.eps, run.norm)
        if stop:
            x_adv[rows] = moved
            rows = rows[~best_hit[rows]]
            if rows.numel() == 0:
                break
        else:
            x_adv = moved
    if rows.numel():
        with torch.no_grad():
            batch = x_adv[rows] if stop else x_adv
            out, value = _forward(clf, batch, _mixed(loss, fallback, rows, swapped), noise[rows].at(run.steps))
        forwards[rows.cpu()] += draws
        record(out, value, run.steps, batch)
    gain = (best_loss - first_loss).clamp(min=1e-12)
    return AttackResult(
        x_adv=best_x,
        success=best_hit,
        loss=best_loss,
        final_loss=last_loss,
        forwards=forwards,
        backwards=backwards,
        zero_grad=zero_grad,
        zero_pixels=zero_pixels / steps_taken.clamp(min=1),
        late_gain=((best_loss - early) / gain).clamp(0.0, 1.0),
        trace={k: torch.stack(v) for k, v in trace.items()} if run.trace and trace["loss"] else None,
        notes=("zero gradients: margin used on some samples",) if bool(swapped.any()) else (),
    )


def merge_restarts(results: list[AttackResult]) -> AttackResult:
    """Per sample the restart that fooled, or else the one with the highest loss; counts add up."""
    total = results[0]
    for r in results[1:]:
        take = (r.success & ~total.success) | ((r.success == total.success) & (r.loss > total.loss))
        image = take.view(-1, 1, 1, 1)
        total = AttackResult(
            x_adv=torch.where(image, r.x_adv, total.x_adv),
            success=total.success | r.success,
            loss=torch.where(take, r.loss, total.loss),
            final_loss=torch.where(take, r.final_loss, total.final_loss),
            forwards=total.forwards + r.forwards,
            backwards=total.backwards + r.backwards,
            zero_grad=total.zero_grad | r.zero_grad,
            zero_pixels=(total.zero_pixels + r.zero_pixels) / 2,
            late_gain=torch.where(take, r.late_gain, total.late_gain),
            trace=total.trace,
            notes=tuple(dict.fromkeys(total.notes + r.notes)),
        )
    return total


def _rows_loss(loss: RowLoss, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda out: loss(out, rows)


def _mixed(loss: RowLoss, fallback: RowLoss | None, rows: Tensor, swapped: Tensor) -> Callable[[Tensor], Tensor]:
    if fallback is None or not bool(swapped[rows].any()):
        return _rows_loss(loss, rows)
    other = fallback
    return lambda out: torch.where(swapped[rows], other(out, rows), loss(out, rows))


def _push(velocity: Tensor, grad: Tensor, run: Ascent) -> Tensor:
    """Momentum: ``mean`` divides the gradient by its mean magnitude (MI-FGSM), ``unit`` adds and keeps unit steps."""
    if run.momentum_form == "unit":
        return unit_step(run.momentum * velocity + unit_step(grad, run.norm), run.norm)
    size = grad.flatten(1).abs().mean(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return run.momentum * velocity + grad / size


def _forward(clf: Fn, x: Tensor, loss: Callable[[Tensor], Tensor], rng: SampleRNG) -> tuple[Tensor, Tensor]:
    draws = draws_of(clf)
    if draws == 1:
        out = clf(x, rng)
        return out, loss(out)
    base = getattr(clf, "base", clf)
    outs = [base(x, rng.at(rng.draw * draws + i)) for i in range(draws)]
    return torch.stack(outs).mean(0), torch.stack([loss(o) for o in outs]).mean(0)
