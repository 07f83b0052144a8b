"""Auto-PGD, untargeted and targeted: PGD that chooses its own step size.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
(arXiv 2003.01690). We differ from the published code where it reads an unfilled row at the first checkpoint
(``reference_quirk=True`` brings that back), in averaging the loss over ``eot`` draws as the gradient is averaged, in
leaving out the last gradient, which nobody uses, and in going on with the margin where dlr has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks._apgd import Auto, autopgd
from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import Tally, absorb, independent, value
from ironclip.core.grad import draws_of
from ironclip.core.losses import TARGETED, UNTARGETED
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier

NORMS = ("linf", "l2")


def _check(attack: APGD | APGDT, losses: Iterable[str], **least: int) -> None:
    check_fields(attack, NORMS, losses, None, steps=0, restarts=1, **least)
    if not 0 < attack.rho < 1:
        raise ValueError(f"rho must be in (0, 1), got {attack.rho}; write 0.75")


def _run(attack: APGD | APGDT) -> Auto:
    return Auto(
        eps=float(attack.eps),
        steps=attack.steps,
        norm=attack.norm,
        rho=attack.rho,
        quirk=attack.reference_quirk,
        stop=attack.policy == "first_success",
        trace=attack.trace,
    )


@method
class APGD:
    """Auto-PGD on ce, dlr, margin, lse or entropy.

    ``eps``: budget in pixel units. ``norm``: linf or l2. ``rho``: a step size is kept while the loss rises in more than
    this share of the steps. ``policy``: ``max_loss`` runs to the end, ``first_success`` lets fooled images leave.
    ``reference_quirk``: see the module. Costs (steps + 1) F + steps B for each restart; later restarts see only the
    images that still hold, with ``first_success``.

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "apgd"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    policy: str = "max_loss"
    reference_quirk: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        _check(self, UNTARGETED)

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        goal, run = Objective(self.loss, x, y), _run(self)
        total: AttackResult | None = None
        rows = torch.arange(x.shape[0], device=x.device)
        for i in range(self.restarts):
            if total is not None and run.stop and independent(clf):
                rows = (~total.success).nonzero().flatten()
                if rows.numel() == 0:
                    break
            part, stream = goal if len(rows) == len(y) else goal.subset(rows), rng.fold("apgd", i)[rows]
            new = autopgd(clf, x[rows], part, part.fooled, run, stream, part.rescue)
            total = new if total is None else absorb(total, new, rows)
        assert total is not None
        return replace(total, notes=(*goal.notes, *total.notes))


@method
class APGDT:
    """Auto-PGD towards each of the ``targets`` classes that score highest on the clean image (APGD-T).

    ``loss``: dlr_t (margin_t below 4 classes), margin_t or ce_t. With k classes at most k - 1 targets. Images that are
    wrong before any step are returned as they are under ``first_success``, which also drops fooled images between and
    within targets; with ``max_loss`` every target is run for all. Other fields as in ``APGD``. Costs 1 F and, for each
    target, (steps + 1) F + steps B.

    The targets are a heuristic once there are many more classes than targets: the notes count both.
    """

    name: ClassVar[str] = "apgd_t"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    loss: str = "dlr_t"
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    policy: str = "max_loss"
    reference_quirk: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        _check(self, TARGETED, targets=1)

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        run, stream = _run(self), rng.fold("apgd_t")
        tally, classes, note = ranked(clf, x, y, self.targets, stream)
        clean = tally.result(notes=(note,))
        total = replace(clean, loss=clean.loss.where(clean.success, -torch.inf))  # any attacked point is better
        drop = run.stop and independent(clf)
        notes: tuple[str, ...] = ()
        rows = torch.arange(x.shape[0], device=x.device)
        for i in range(self.restarts):
            for t in range(classes.shape[1]):
                rows = (~total.success).nonzero().flatten() if drop else rows
                if rows.numel() == 0:
                    break
                goal = Objective(self.loss, x[rows], y[rows], classes[rows, t])
                part = stream.fold("target", t, i)[rows]
                new = autopgd(clf, x[rows], goal, goal.fooled, run, part, goal.rescue)
                total = absorb(total, new, rows)
                if len(rows) == x.shape[0] and total.trace is None:
                    total = replace(total, trace=new.trace)
                notes = goal.notes
        return replace(total, notes=(*notes, *total.notes))


def ranked(clf: Classifier, x: Tensor, y: Tensor, targets: int, rng: SampleRNG) -> tuple[Tally, Tensor, str]:
    """A tally that holds the clean images (1 F), their best wrong classes (b, min(targets, k - 1)) and a note.

    The note says how many of the other classes that is. Raises ValueError for bad images, labels or logits.
    """
    goal, rows, tally = Objective("margin", x, y), torch.arange(x.shape[0], device=x.device), Tally(x)
    z, clean = value(clf, x, lambda out: goal(out, rows), rng.fold("rank"))
    tally.spend(rows, draws_of(clf))
    tally.offer(rows, x, clean, goal.fooled(z, rows))
    classes = z.scatter(1, y[:, None], -torch.inf).topk(min(targets, z.shape[1] - 1), dim=1).indices
    return tally, classes, f"{classes.shape[1]} of {z.shape[1] - 1} other classes as targets"
