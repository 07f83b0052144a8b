"""FAB-T: the smallest perturbation that reaches one of the best wrong classes.

Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (arXiv 1907.02044),
in the targeted form that AutoAttack uses (arXiv 2003.01690). We differ in keeping, where nothing within the budget
fools, the iterate within the budget that came closest, instead of the clean image.
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
from ironclip.attacks._tally import Tally, gradient, independent, value
from ironclip.attacks.apgd import ranked
from ironclip.core.ball import norms, start_delta
from ironclip.core.grad import draws_of
from ironclip.core.hyperplane import to_hyperplane
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier


@method
class FABT:
    """Steps on the linearised boundary between the label and a target, pulled back towards the clean image.

    ``eps``: budget in pixel units; only perturbations within it are returned and count. ``norm``: linf, l2 or l1.
    ``alpha_max``: most weight of the pull, ``eta``: overshoot over the plane, ``beta``: how far a fooling point is
    drawn back. ``targets``: best wrong classes of the clean image, each from ``restarts`` starts (the first is the
    clean image). ``policy``: ``min_norm`` looks for the smallest perturbation to the end, ``first_success`` stops once
    it is within eps. ``trace``: smallest fooling norm so far, (targets x restarts x steps, b). Costs
    1 F + targets x restarts x steps (2 F + B).

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "fab_t"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    policy: str = "min_norm"
    trace: bool = False

    def __post_init__(self) -> None:
        check_fields(self, words={"policy": ("min_norm", "first_success")}, targets=1, steps=1, restarts=1)
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta < 1):
            raise ValueError(
                "alpha_max must be in [0, 1], eta at least 1 and beta in (0, 1), "
                f"got {self.alpha_max}, {self.eta}, {self.beta}; write alpha_max=0.1, eta=1.05, beta=0.9"
            )

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        stream = rng.fold("fab_t")
        tally, classes, note = ranked(clf, x, y, self.targets, stream)
        tally.steps = self.steps
        best = torch.where(tally.hit, 0.0, torch.inf).to(x)
        tally.rank = torch.where(tally.hit, 0.0, tally.rank)
        rows, drop = (~tally.hit).nonzero().flatten(), self.policy == "first_success" and independent(clf)
        lines: list[Tensor] = []
        for t in range(classes.shape[1]):
            for i in range(self.restarts):
                rows = (~tally.hit).nonzero().flatten() if drop else rows
                if rows.numel():
                    self._run(clf, x, y, classes[:, t], rows, stream.fold("target", t, i), i > 0, tally, best, lines)
        result = tally.result(notes=(note,))
        return replace(result, trace={"norm": torch.stack(lines)}) if self.trace and lines else result

    def _run(
        self,
        clf: Classifier,
        images: Tensor,
        y: Tensor,
        target: Tensor,
        rows: Tensor,
        stream: SampleRNG,
        random: bool,
        tally: Tally,
        best: Tensor,
        lines: list[Tensor],
    ) -> None:
        """One start towards one class for the images in ``rows``; ``best`` (b,): smallest fooling norms so far."""
        goal, true = Objective("margin_t", images, y, target), Objective("margin", images, y)
        never = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        noise, drop, eps = stream.fold("defense"), self.policy == "first_success" and independent(clf), float(self.eps)
        x0 = x = images[rows]
        if random:
            start = start_delta(x0, eps / 2, self.norm, "surface", stream.fold("start")[rows])
            x = (x0 + start).clamp_(0.0, 1.0)
        for step in range(self.steps):
            g, _ = gradient(clf, x, goal, None, rows, never, noise[rows].at(2 * step), tally)
            tally.gradient(rows, g.grad)
            w = g.grad.flatten(1)
            flat, flat0 = x.flatten(1), x0.flatten(1)
            there = to_hyperplane(flat, w, g.loss, self.norm)
            back = to_hyperplane(flat0, w, g.loss + (w * (flat0 - flat)).sum(dim=1), self.norm)
            far, far0 = norms(there, self.norm).clamp_(min=1e-8), norms(back, self.norm).clamp_(min=1e-8)
            pull = (far / (far + far0)).clamp_(max=self.alpha_max)[:, None]
            moved = there.mul_(self.eta).add_(flat).lerp_(back.mul_(self.eta).add_(flat0), pull)
            x = moved.clamp_(0.0, 1.0).view_as(x0)
            out, now = value(clf, x, partial(true, rows=rows), noise[rows].at(2 * step + 1))
            tally.spend(rows, draws_of(clf))
            hit, size = true.fooled(out, rows), norms(x - x0, self.norm)
            near = size <= eps
            rank = torch.where(hit, -size, now)
            tally.offer(rows[near], x[near], now[near], hit[near], step + 1, rank[near])
            best[rows] = torch.where(hit, torch.minimum(best[rows], size), best[rows])
            if self.trace:
                lines.append(best.clone())
            x = torch.where(hit.view(-1, 1, 1, 1), x0.lerp(x, self.beta), x)
            if drop and bool(tally.hit[rows].any()):
                keep = ~tally.hit[rows]
                rows, x, x0 = rows[keep], x[keep], x0[keep]
                if rows.numel() == 0:
                    break
