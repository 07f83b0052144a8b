"""Square Attack: random search by squares on the scores alone, no gradients.

Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random search" (arXiv
1912.00049), with the schedule that AutoAttack uses. We differ in drawing squares per image instead of per batch, so
that results do not depend on company, and in drawing every admissible place: the published code leaves out the last.
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
from ironclip.attacks._squares import bump, shifted, stripes, tiles, window
from ironclip.attacks._tally import Tally, absorb, independent, value
from ironclip.core.grad import draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
BLOCK = 64


@method
class Square:
    """Sets squares of pixels to plus or minus eps (linf), or moves the perturbation's energy between squares (l2).

    ``queries``: proposals after the first query of the striped start. ``p``: share of the image that a square covers at
    first, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 queries; ``rescale`` stretches that to
    ``queries``. A proposal is kept if the loss (margin or ce) is higher or the image is newly fooled. ``policy``:
    ``first_success`` stops fooled images, where the classifier is deterministic. An ``eot`` view averages the loss over
    its draws in each query. Costs (queries + 1) F for each restart; no gradients.

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "square"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    loss: str = "margin"
    queries: int = 5000
    p: float = 0.8
    rescale: bool = False
    restarts: int = 1
    policy: str = "max_loss"
    trace: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ("linf", "l2"), ("margin", "ce"), queries=1, restarts=1)
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1], got {self.p}; write 0.8")

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        goal, total = Objective(self.loss, x, y), None
        rows = torch.arange(x.shape[0], device=x.device)
        drop = self.policy == "first_success" and independent(clf)
        for i in range(self.restarts):
            if total is not None and drop:
                rows = (~total.success).nonzero().flatten()
                if rows.numel() == 0:
                    break
            part = goal if len(rows) == len(y) else goal.subset(rows)
            new = self._run(clf, x[rows], part, rng.fold("square", i)[rows], drop)
            total = new if total is None else absorb(total, new, rows)
        assert total is not None
        return replace(total, notes=(*goal.notes, *total.notes))

    def side(self, query: int, h: int, w: int) -> int:
        """Side of the square at a query, counted from 0."""
        at = int(query / self.queries * 10_000) if self.rescale else query
        p = self.p / 2 ** sum(at > mark for mark in HALVINGS)
        side = max(round((p * h * w) ** 0.5), 1 if self.norm == "linf" else 3)
        if self.norm == "l2" and side % 2 == 0:
            side += 1
        return min(side, h, w)

    def _run(self, clf: Classifier, x: Tensor, goal: Objective, rng: SampleRNG, drop: bool) -> AttackResult:
        (b, c, h, w), eps, draws = x.shape, float(self.eps), draws_of(clf)
        rows, noise, moves_of = torch.arange(b, device=x.device), rng.fold("defense"), rng.fold("moves")
        first = (stripes(x, eps, rng) if self.norm == "linf" else tiles(x, eps, rng)).contiguous()
        tally, lines = Tally(x, self.queries), []

        def ask(points: Tensor, query: int) -> tuple[Tensor, Tensor]:
            out, now = value(clf, points, partial(goal, rows=rows), noise.at(query))
            tally.spend(rows, draws)
            return now, goal.fooled(out, rows)

        now, hit = ask(first, 0)
        tally.offer(rows, first, now, hit)
        s = {"x": x, "best": first, "new": first.clone()}
        if self.norm == "linf":
            s |= {"low": (x - eps).clamp_(min=0.0), "high": (x + eps).clamp_(max=1.0)}
        for query in range(self.queries):
            if drop and bool(tally.hit[rows].any()):
                keep = ~tally.hit[rows]
                rows, noise, moves_of, s = rows[keep], noise[keep], moves_of[keep], {k: v[keep] for k, v in s.items()}
                if rows.numel() == 0:
                    break
            if query % BLOCK == 0:
                s["moves"] = moves_of.at(query // BLOCK).uniform(BLOCK, c + 5)
            u, side = s["moves"][:, query % BLOCK].to(x), self.side(query, h, w)
            spots = [(u[:, k] * (size - side + 1)).long() for k, size in enumerate((h, w, h, w))]
            signs, to = (u[:, 5:] < 0.5).to(x).mul_(2).sub_(1)[:, :, None], window(spots[0], spots[1], side, w, c)
            best, new = s["best"].flatten(2), s["new"].flatten(2)
            if self.norm == "linf":
                old, low, high = best.gather(2, to), s["low"].flatten(2), s["high"].flatten(2)
                fresh = torch.add(old, signs, alpha=2 * eps).clamp_(low.gather(2, to), high.gather(2, to))
                new.scatter_(2, to, fresh)
            else:
                shape = bump(side).to(x)
                turned = torch.where((u[:, 4] < 0.5)[:, None], shape.flatten(), shape.T.flatten())[:, None]
                off = window(spots[2], spots[3], side, w, c)
                at = s["x"].flatten(2)
                torch.add(at, shifted(best - at, signs * turned, to, off, eps), out=new).clamp_(0.0, 1.0)
            now, hit = ask(s["new"], query + 1)
            kept = tally.offer(rows, s["new"], now, hit, query + 1).view(-1, 1, 1)
            if self.norm == "linf":
                chosen = torch.where(kept, fresh, old)
                best.scatter_(2, to, chosen)
                new.scatter_(2, to, chosen)
            else:
                s["best"] = torch.where(kept, new, best).view_as(s["best"])
            if self.trace:
                lines.append(tally.loss.clone())
        result = tally.result()
        return replace(result, trace={"best_loss": torch.stack(lines)}) if lines else result
