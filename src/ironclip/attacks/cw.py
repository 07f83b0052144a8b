"""The l_2 attack of Carlini & Wagner 2017 (arXiv 1608.04644): smallest norm by penalty and binary search.

What tables on CLIP call "CW" is PGD on the margin (``PGD(loss=margin)``), not this. We differ in giving up a stalled
search image by image instead of batch by batch.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import Tally, gradient, value
from ironclip.core.ball import norms
from ironclip.core.grad import draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier


@method
class CW:
    """Minimises the squared norm plus c times the hinge of the margin, by Adam in tanh space; searches for c.

    ``eps``: l_2 budget in pixel units that the returned image must keep, or None for any. ``search``: values of c that
    are tried, from ``c`` on: ten times more while nothing fools, then by bisection. ``steps``: at most so many Adam
    steps of ``lr`` each; ``abort`` leaves an image alone once a tenth of the steps brought it under 0.01%.
    ``kappa``: margin to reach. Returns the smallest perturbation that fools; images wrong from the start cost 1 F.
    Costs at most 1 F + search x steps (F + B): for studies of minimal norms. ``trace``: best norm after each search.

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "cw"
    revision: ClassVar[int] = 1
    norm: ClassVar[str] = "l2"

    eps: Fraction | None = None
    search: int = 9
    steps: int = 1000
    c: float = 1e-3
    lr: float = 1e-2
    kappa: float = 0.0
    abort: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        check_fields(self, search=1, steps=1)
        if self.c <= 0 or self.lr <= 0 or self.kappa < 0:
            raise ValueError(
                f"c and lr must be positive and kappa not negative, got {self.c}, {self.lr}, {self.kappa}; "
                "write c=1e-3, lr=1e-2, kappa=0"
            )

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        goal, everyone, tally = Objective("margin", x, y), torch.arange(x.shape[0], device=x.device), Tally(x)
        stream = rng.fold("cw")
        out, clean = value(clf, x, partial(goal, rows=everyone), stream.fold("clean"))
        tally.spend(everyone, draws_of(clf))
        hit = goal.fooled(out, everyone) & (clean >= self.kappa)
        tally.offer(everyone, x, clean, hit, rank=torch.where(hit, 0.0, clean))
        rows, lines = (~hit).nonzero().flatten(), []
        best = torch.where(hit, 0.0, torch.inf).to(x)
        c, low, high = torch.full_like(best, self.c), torch.zeros_like(best), torch.full_like(best, torch.inf)
        for i in range(self.search):
            if rows.numel() == 0:
                break
            found = self._descend(clf, x, goal, rows, c, stream.fold("search", i), tally, best)
            high[rows] = torch.where(found, torch.minimum(high[rows], c[rows]), high[rows])
            low[rows] = torch.where(found, low[rows], torch.maximum(low[rows], c[rows]))
            c[rows] = torch.where(high[rows].isinf(), c[rows] * 10, (low[rows] + high[rows]) / 2)
            lines.append(best.clone())
        tally.steps = 0
        result = tally.result()
        return replace(result, trace={"norm": torch.stack(lines)}) if self.trace and lines else result

    def _descend(
        self,
        clf: Classifier,
        images: Tensor,
        goal: Objective,
        every: Tensor,
        c: Tensor,
        noise: SampleRNG,
        tally: Tally,
        best: Tensor,
    ) -> Tensor:
        """One value of c per image; returns which of the images ``every`` it fooled."""
        found = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        never, rows, x = torch.zeros_like(found), every, images[every]
        eps = float("inf") if self.eps is None else float(self.eps)
        w = torch.atanh((2 * x - 1).clamp_(-1 + 1e-6, 1 - 1e-6))
        mean, square, stall = torch.zeros_like(w), torch.zeros_like(w), x.new_full((len(rows),), torch.inf)
        for step in range(self.steps):
            t = w.tanh()
            at = (t + 1).div_(2)
            g, _ = gradient(clf, at, goal, None, rows, never, noise[rows].at(step), tally)
            tally.gradient(rows, g.grad)
            size = norms(at - x, "l2")
            hit = goal.fooled(g.out, rows) & (g.loss >= self.kappa)
            found[rows] |= hit
            best[rows] = torch.where(hit, torch.minimum(best[rows], size), best[rows])
            near = size <= eps
            tally.offer(rows[near], at[near], g.loss[near], hit[near], step, torch.where(hit, -size, g.loss)[near])
            pushed = g.loss < self.kappa
            slope = 2 * (at - x) - g.grad * (c[rows] * pushed).view(-1, 1, 1, 1)
            slope.mul_(1 - t * t).div_(2)
            mean.lerp_(slope, 0.1)
            square.lerp_(slope * slope, 0.001)
            scale = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            w = w - self.lr * (mean / (1 - 0.9 ** (step + 1))) / scale
            if self.abort and (step + 1) % max(self.steps // 10, 1) == 0:
                total = size.square() + c[rows] * (self.kappa - g.loss).clamp(min=0)
                keep = total <= stall * 0.9999
                if not bool(keep.all()):
                    rows, x, w, mean, square, total = (v[keep] for v in (rows, x, w, mean, square, total))
                stall = total
                if rows.numel() == 0:
                    break
        return found[every]
