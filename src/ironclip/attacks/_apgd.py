"""The loop of Auto-PGD: momentum steps whose length halves at checkpoints (Croce & Hein 2020, arXiv 2003.01690)."""

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
class Auto:
    """Geometry and schedule of one run, see ``attacks/apgd.py`` for the fields; ``eps`` in pixel units."""

    eps: float
    steps: int
    norm: str = "linf"
    rho: float = 0.75
    quirk: bool = False
    stop: bool = False
    trace: bool = False


def checkpoints(steps: int) -> list[int]:
    """After how many steps the step size is reconsidered: 100 gives 22, 41, 57, 70, 80, 87, 93, 99.

    The first gap is 22% of the steps, each next one 3% shorter, none under 6%; every figure rounded down, at least 1.
    """
    gap, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    at, marks = gap, []
    while at <= steps:
        marks.append(at)
        gap = max(gap - less, least)
        at += gap
    return marks


def autopgd(
    clf: Fn,
    x: Tensor,
    loss: RowLoss,
    fooled: Callable[[Tensor, Tensor], Tensor],
    run: Auto,
    rng: SampleRNG,
    fallback: RowLoss | None = None,
) -> AttackResult:
    """Climb ``loss`` around ``x``; arguments as in ``ascend``. Costs (steps + 1) F + steps B.

    The step of every image starts at 2 eps. At a checkpoint it is halved, and the climb goes on from the best point, if
    the loss rose in at most ``rho`` of the steps since the last checkpoint, or if neither the step nor the best loss
    changed since then. ``quirk`` counts the first step as a rise when its loss is positive, as the published code does
    by reading a row it has not filled; otherwise it is compared with the loss at the start.
    """
    b, eps, draws = x.shape[0], run.eps, draws_of(clf)
    stop, linf = run.stop and independent(clf), run.norm == "linf"
    start = (x + start_delta(x, eps, run.norm, "surface", rng.fold("start"))).clamp_(0.0, 1.0)
    tally, marks = Tally(start, run.steps), iter(checkpoints(run.steps))
    rows, noise = torch.arange(b, device=x.device), rng.fold("defense")
    swapped = torch.zeros(b, dtype=torch.bool, device=x.device)
    trace: dict[str, list[Tensor]] = {"loss": [], "best_loss": [], "grad_norm": [], "step_size": []}
    if run.steps == 0:
        out, last = value(clf, start, lambda z: loss(z, rows), noise)
        tally.spend(rows, draws)
        tally.offer(rows, start, last, fooled(out, rows))
        return tally.result()

    g, _ = gradient(clf, start, loss, fallback, rows, swapped, noise, tally)
    tally.offer(rows, start, g.loss, fooled(g.out, rows))
    tally.gradient(rows, g.grad)
    zero = torch.zeros_like(g.loss)
    s = {
        "x": x,
        "at": start,
        "old": start,
        "grad": g.grad,
        "best": start.clone(),
        "best_grad": g.grad.clone(),
        "best_loss": g.loss.clone(),
        "last_loss": zero if run.quirk else g.loss,
        "check_loss": g.loss.clone(),
        "reduced": torch.ones_like(g.loss, dtype=torch.bool),
        "rises": zero.clone(),
        "size": torch.full_like(g.loss, 2 * eps),
    }
    if linf:
        s |= {"low": (x - eps).clamp_(min=0.0), "high": (x + eps).clamp_(max=1.0)}

    def inside(point: Tensor) -> Tensor:
        return point.clamp_(s["low"], s["high"]) if linf else project(point, s["x"], eps, run.norm)

    done, mark = 0, next(marks, 0)
    for i in range(run.steps):
        if stop and bool(tally.hit[rows].any()):
            keep = ~tally.hit[rows]
            rows, noise, s = rows[keep], noise[keep], {k: v[keep] for k, v in s.items()}
            if rows.numel() == 0:
                break
        at, size = s["at"], s["size"].view(-1, 1, 1, 1)
        a = 0.75 if i else 1.0
        up = inside(unit_step(s["grad"], run.norm).mul_(size).add_(at))
        new = inside(up.sub_(at).mul_(a).add_(at).add_((at - s["old"]).mul_(1 - a)))
        s["old"], s["at"] = at, new
        if i + 1 < run.steps:
            g, fresh = gradient(clf, new, loss, fallback, rows, swapped, noise.at(i + 1), tally)
            out, now, s["grad"] = g.out, g.loss, g.grad
            tally.gradient(rows, g.grad)
            if bool(fresh.any()):
                s["best_loss"][fresh] = s["last_loss"][fresh] = s["check_loss"][fresh] = -torch.inf
        else:
            final = mixed(loss, fallback, rows, swapped)
            out, now = value(clf, new, final, noise.at(i + 1))
            tally.spend(rows, draws)
        tally.offer(rows, new, now, fooled(out, rows), i + 1)
        s["rises"] += now > s["last_loss"]
        s["last_loss"] = now
        better = now > s["best_loss"]
        s["best"][better], s["best_grad"][better] = new[better], s["grad"][better]
        s["best_loss"] = torch.where(better, now, s["best_loss"])
        if run.trace:
            lines = (now, s["best_loss"], norms(s["grad"], "l2"), s["size"])
            for key, line in zip(trace, lines, strict=True):
                trace[key].append(spread(line, rows, b))
        if i + 1 == mark:
            stuck = ~s["reduced"] & (s["check_loss"] >= s["best_loss"])
            halve = (s["rises"] <= run.rho * (mark - done)) | stuck
            s["reduced"], s["check_loss"] = halve, s["best_loss"].clone()
            s["rises"] = torch.zeros_like(now)
            s["size"] = torch.where(halve, s["size"] / 2, s["size"])
            image = halve.view(-1, 1, 1, 1)
            s["at"] = torch.where(image, s["best"], s["at"])
            s["grad"] = torch.where(image, s["best_grad"], s["grad"])
            done, mark = mark, next(marks, 0)
    notes = ("zero gradients: margin used on some samples",) if bool(swapped.any()) else ()
    return tally.result(trace if run.trace else None, notes)
