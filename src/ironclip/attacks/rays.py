"""RayS: an l_inf attack that sees nothing but the predicted label.

Chen & Gu 2020, "RayS: a ray searching method for hard-label adversarial attack" (arXiv 2006.12792). We differ in
trying the all-bright direction before the first flip, and in moving every image through its own search, one query for
all at a time, so that results do not depend on company.
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
from ironclip.attacks._tally import Tally, independent, value
from ironclip.core.grad import draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier


@method
class RayS:
    """Searches the corners of the cube for the direction in which the label changes soonest.

    Blocks of the direction's signs are flipped, the whole image first, then halves, quarters, ...; a flip is kept if
    the image still fools at the best radius, which is then shortened by bisection to ``tol`` (pixel units).
    ``queries``: label queries per image. ``policy``: ``first_success`` stops once the radius is within ``eps``,
    ``min_norm`` goes on. ``trace``: smallest fooling radius after each query.
    Returns the corner at the best radius, or at eps where that is larger, judged once more. Costs at most
    (queries + 2) F, no gradients; nothing is drawn at random.

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "rays"
    revision: ClassVar[int] = 1
    norm: ClassVar[str] = "linf"

    eps: Fraction = Fraction(1, 255)
    queries: int = 1000
    tol: float = 1e-4
    policy: str = "first_success"
    trace: bool = False

    def __post_init__(self) -> None:
        check_fields(self, words={"policy": ("first_success", "min_norm")}, queries=1)
        if self.tol <= 0:
            raise ValueError(f"tol must be positive, got {self.tol}; write 1e-4 (pixels)")

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        goal, everyone, tally = Objective("margin", x, y), torch.arange(x.shape[0], device=x.device), Tally(x)
        noise, eps, draws = rng.fold("rays"), float(self.eps), draws_of(clf)
        out, clean = value(clf, x, partial(goal, rows=everyone), noise)
        wrong = goal.fooled(out, everyone)
        tally.spend(everyone, draws)
        tally.offer(everyone, x, clean, wrong)
        radius, found = (~wrong).to(x), wrong.clone()
        kept, trial = (torch.ones(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        rows, walks = (~wrong).nonzero().flatten(), [_Walk(x[0].numel(), self.tol) for _ in range(x.shape[0])]
        lines, quick = [], self.policy == "first_success" and independent(clf)
        for query in range(self.queries):
            rows = rows[~(found[rows] & (radius[rows] <= eps))] if quick else rows
            if rows.numel() == 0:
                break
            at = x.new_tensor([walks[i].radius(float(radius[i])) for i in rows.tolist()])
            points = (x[rows] + trial[rows] * at.view(-1, 1, 1, 1)).clamp_(0.0, 1.0)
            out, _ = value(clf, points, partial(goal, rows=rows), noise[rows].at(query + 1))
            tally.spend(rows, draws)
            fooled = goal.fooled(out, rows)
            radius[rows], found[rows] = torch.where(fooled, at, radius[rows]), found[rows] | fooled
            for i, r, hit in zip(rows.tolist(), at.tolist(), fooled.tolist(), strict=True):
                walks[i].hear(hit, r, kept[i].view(-1), trial[i].view(-1))
            if self.trace:
                lines.append(torch.where(found, radius, torch.inf))
        searching = torch.tensor([w.searching for w in walks], dtype=torch.bool, device=x.device).view(-1, 1, 1, 1)
        size = torch.where(wrong, 0.0, radius.clamp(max=eps)).view(-1, 1, 1, 1)
        last = (x + torch.where(searching, trial, kept) * size).clamp_(0.0, 1.0)
        todo = (~wrong).nonzero().flatten()
        if todo.numel():
            out, now = value(clf, last[todo], partial(goal, rows=todo), noise.fold("last")[todo])
            tally.spend(todo, draws)
            tally.restart(todo)
            tally.offer(todo, last[todo], now, goal.fooled(out, todo))
        result = tally.result()
        return replace(result, trace={"radius": torch.stack(lines)}) if lines else result


class _Walk:
    """Where one image stands: which block of its signs is flipped on trial, and between which radii it searches."""

    def __init__(self, pixels: int, tol: float) -> None:
        self.pixels, self.tol = pixels, tol
        self.level, self.block, self.searching = -1, slice(0, 0), False
        self.low, self.high = 0.0, 1.0

    def radius(self, best: float) -> float:
        """The radius to ask about: the best one for a new direction, the middle during a search."""
        return (self.low + self.high) / 2 if self.searching else best

    def hear(self, fooled: bool, radius: float, kept: Tensor, trial: Tensor) -> None:
        """Take the answer in; once a block is decided, keep or undo its flip and flip the next on trial."""
        if self.searching:
            self.low, self.high = (self.low, radius) if fooled else (radius, self.high)
        elif fooled:
            self.searching, self.low, self.high = True, 0.0, radius
        if self.searching and self.high - self.low > self.tol:
            return
        source, goes = (trial, kept) if self.searching else (kept, trial)
        goes[self.block] = source[self.block]
        self.searching = False
        if self.block.stop in (0, self.pixels):
            self.level = min(self.level + 1, (self.pixels - 1).bit_length())
        start = self.block.stop % self.pixels
        self.block = slice(start, min(start + -(-self.pixels // 2**self.level), self.pixels))
        trial[self.block] = -kept[self.block]
