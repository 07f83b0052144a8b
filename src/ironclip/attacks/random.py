"""Random points of the ball: what any attack must beat, and a probe for masked gradients (arXiv 2106.09947)."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import value
from ironclip.core.ball import start_delta
from ironclip.core.check import check_choice
from ironclip.core.grad import draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier


@method
class RandomPoints:
    """Tries ``points`` random perturbations per image and keeps the first that fools, or the worst by margin.

    ``kind``: ``corner`` (linf: every pixel at plus or minus eps; l2 and l1: at the surface) or ``inside``. Costs
    points x F.
    """

    name: ClassVar[str] = "random"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    points: int = 16
    norm: str = "linf"
    kind: str = "corner"

    def __post_init__(self) -> None:
        check_fields(self, points=1)
        check_choice(self.kind, ("corner", "inside"), "kind")

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch: ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels."""
        goal, rows = Objective("margin", x, y), torch.arange(x.shape[0], device=x.device)
        b, eps = x.shape[0], float(self.eps)
        best, most = x.clone(), x.new_full((b,), -torch.inf)
        last, hit = most.clone(), torch.zeros(b, dtype=torch.bool, device=x.device)
        stream = rng.fold("random")
        for i in range(self.points):
            if self.norm == "linf" and self.kind == "corner":
                delta = eps * stream.fold("point", i).uniform_like(x, -1.0, 1.0).sign()
            else:
                kind = "surface" if self.kind == "corner" else "uniform"
                delta = start_delta(x, eps, self.norm, kind, stream.fold("point", i))
            point = (x + delta).clamp(0.0, 1.0)
            z, last = value(clf, point, partial(goal, rows=rows), stream.fold("defense").at(i))
            fooled = goal.fooled(z, rows)
            better = (fooled & ~hit) | ((fooled == hit) & (last > most))
            best[better], most[better] = point[better], last[better]
            hit |= fooled
        zeros = torch.zeros(b, dtype=torch.bool, device=x.device)
        return AttackResult(
            x_adv=best,
            success=hit,
            loss=most,
            final_loss=last,
            forwards=torch.full((b,), self.points * draws_of(clf)),
            backwards=torch.zeros(b, dtype=torch.long),
            zero_grad=zeros,
            zero_pixels=x.new_zeros(b),
            late_gain=x.new_zeros(b),
            notes=goal.notes,
        )
