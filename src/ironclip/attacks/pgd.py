"""FGSM and projected gradient descent inside an l_inf, l_2 or l_1 ball.

Goodfellow et al. 2015 (arXiv 1412.6572), Madry et al. 2018 (arXiv 1706.06083); momentum: Dong et al. 2018 (arXiv
1710.06081). Our defaults differ from the usual ones where those are weak: 40 steps of 2.5 eps / steps, and the best
point of the run instead of the last. The presets keep everything that published CLIP code does, weaknesses included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import absorb, independent, value
from ironclip.core.check import check_choice
from ironclip.core.grad import draws_of
from ironclip.core.losses import TARGETED, UNTARGETED
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier

_LAST = {"returned": "last", "policy": "max_loss"}


@method
class PGD:
    """Projected gradient ascent on a classification loss.

    ``eps``: budget in pixel units, a rational (``4/255``). ``alpha``: step size, or None for ``rel_alpha * eps``, and
    where both are None for 2.5 eps / steps. ``loss``: ce, margin, dlr, lse, entropy, or ce_t, margin_t, dlr_t with
    ``target``. ``start``: zero, uniform, volume, surface. ``returned``: best (fooling first, then highest loss) or
    last. ``policy``: ``max_loss`` runs to the end, ``first_success`` lets fooled samples leave the batch. ``quantise``:
    ``round`` snaps the result to k/255 inside the ball and judges that. Costs steps (F + B) + 1 F for each restart.

    Called with ``clf``, ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad images,
    labels, logits or fields.
    """

    name: ClassVar[str] = "pgd"
    revision: ClassVar[int] = 1
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "table2-pgd10": {"eps": Fraction(1, 255), "alpha": Fraction(1, 255), "steps": 10, **_LAST},
        "table2-cw": {
            "eps": Fraction(1, 255),
            "alpha": Fraction(1, 255),
            "steps": 10,
            "loss": "margin",
            **_LAST,
        },
        "tecoa": {"eps": Fraction(2, 255), "alpha": Fraction(1, 255), "steps": 5, **_LAST},
        "pmg": {"eps": Fraction(1, 255), "alpha": Fraction(1, 255), "steps": 10, **_LAST},
        "rtpt": {"eps": Fraction(4, 255), "rel_alpha": Fraction(1, 4), "steps": 7, **_LAST},
        "apt": {"eps": Fraction(4, 255), "rel_alpha": Fraction(1, 4), "steps": 100, **_LAST},
        "csr": {"eps": Fraction(1, 255), "rel_alpha": Fraction(1, 4), "steps": 10, **_LAST},
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction | None = None
    rel_alpha: Fraction | None = None
    steps: int = 40
    norm: str = "linf"
    loss: str = "ce"
    start: str = "uniform"
    restarts: int = 1
    momentum: float = 0.0
    returned: str = "best"
    policy: str = "max_loss"
    quantise: str = "none"
    trace: bool = False

    def __post_init__(self) -> None:
        check_fields(self, losses={**UNTARGETED, **TARGETED}, steps=0, restarts=1)
        check_choice(self.quantise, ("none", "round"), "quantise")
        if self.quantise == "round" and self.norm != "linf":
            raise ValueError(f"quantise=round keeps only a linf budget, got norm={self.norm}; use quantise=none")

    @property
    def step_size(self) -> Fraction:
        """The step in pixel units."""
        if self.alpha is not None:
            return self.alpha
        return (self.rel_alpha or Fraction(5, 2 * max(self.steps, 1))) * self.eps

    @torch.no_grad()
    def __call__(
        self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG, target: Tensor | None = None
    ) -> AttackResult:
        """Attack one batch; ``target``: (b,) classes to reach, for the targeted losses only."""
        run = Ascent(
            eps=float(self.eps),
            alpha=float(self.step_size),
            steps=self.steps,
            norm=self.norm,
            start=self.start,
            momentum=self.momentum,
            best=self.returned == "best",
            stop=self.policy == "first_success",
            trace=self.trace,
        )
        streams = [rng.fold("pgd", i) for i in range(self.restarts)]
        result = climb(clf, x, y, run, self.loss, streams, target)
        if self.quantise == "none":
            return result
        return snapped(result, clf, x, Objective(self.loss, x, y, target), self.eps, rng)


@method
class FGSM:
    """One step of size eps along the gradient's sign (l_2: along the gradient). A sanity row, not a strong attack.

    ``start``: zero, or uniform in a ball of radius eps / 2. Costs 2 F + 1 B.
    """

    name: ClassVar[str] = "fgsm"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    loss: str = "ce"
    start: str = "zero"

    def __post_init__(self) -> None:
        check_fields(self, losses=UNTARGETED)
        check_choice(self.start, ("zero", "uniform"), "start")

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        size = float(self.eps)
        run = Ascent(size, size, 1, self.norm, self.start, start_eps=size / 2, best=False)
        return climb(clf, x, y, run, self.loss, [rng.fold("fgsm")])


def climb(
    clf: Classifier,
    x: Tensor,
    y: Tensor,
    run: Ascent,
    loss_name: str,
    streams: list[SampleRNG],
    target: Tensor | None = None,
) -> AttackResult:
    """Ascent on a classification loss, one restart per stream, merged per sample.

    With ``run.stop`` later restarts see only the images that still hold. Falls back to the margin where the loss needs
    more classes, and for single samples where dlr has no gradient. Raises ValueError for bad images, labels or logits.
    """
    goal = Objective(loss_name, x, y, target)
    rows, total = torch.arange(x.shape[0], device=x.device), None
    for stream in streams:
        if total is not None and run.stop and independent(clf):
            rows = (~total.success).nonzero().flatten()
            if rows.numel() == 0:
                break
        part = goal if len(rows) == len(y) else goal.subset(rows)
        new = ascend(clf, x[rows], part, part.fooled, run, stream[rows], part.rescue)
        total = new if total is None else absorb(total, new, rows)
    assert total is not None
    return replace(total, notes=(*goal.notes, *total.notes))


def snapped(
    result: AttackResult, clf: Classifier, x: Tensor, goal: Objective, eps: Fraction, rng: SampleRNG
) -> AttackResult:
    """The result on the 8-bit lattice: every pixel at the nearest k/255 that lies inside the ball, judged again.

    Never by truncation, which leaves the budget. Raises ValueError where the lattice has no point inside, that is for
    images that are not 8-bit themselves and a budget under 1/510.
    """
    low = ((x - float(eps)) * 255 - 1e-4).ceil().clamp(min=0)
    high = ((x + float(eps)) * 255 + 1e-4).floor().clamp(max=255)
    if bool((low > high).any()):
        raise ValueError(f"eps={eps} holds no 8-bit value around some pixels; use quantise=none or eps >= 1/510")
    x_adv = torch.minimum(torch.maximum((result.x_adv * 255).round(), low), high) / 255
    rows = torch.arange(x.shape[0], device=x.device)
    out, loss = value(clf, x_adv, lambda z: goal(z, rows), rng.fold("snapped"))
    forwards, notes = result.forwards + draws_of(clf), (*result.notes, "8-bit re-checked")
    return replace(result, x_adv=x_adv, success=goal.fooled(out, rows), loss=loss, forwards=forwards, notes=notes)
