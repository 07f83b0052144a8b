"""AutoAttack and its relatives: several attacks in turn, each on the images that still hold.

Croce & Hein 2020 (arXiv 2003.01690). What papers on CLIP call "AutoAttack" differs, so the members are data and the
result names them: ``aa-standard`` is the published ensemble, ``aa-rand`` its version for random defenses, ``aa-fast``
what RobustVLM and CLIPure run, ``aa-tecoa`` what TeCoA, TTC and others run. We differ in giving every member a stream
of its own, so that leaving images out changes nothing for the others, and in judging the returned images once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import Tally, absorb, spread, value
from ironclip.attacks.apgd import APGD, APGDT
from ironclip.attacks.fab import FABT
from ironclip.attacks.pgd import FGSM, PGD
from ironclip.attacks.square import Square
from ironclip.core.grad import draws_of
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method, parse
from ironclip.core.types import AttackResult, Classifier
from ironclip.core.views import base_of, eot

MEMBERS = {cls.__name__: cls for cls in (APGD, APGDT, FABT, Square, PGD, FGSM)}
STANDARD = ("APGD()", "APGDT()", "FABT()", "Square()")


@method
class AutoAttack:
    """Per-image worst case over ``members``, specs of APGD, APGDT, FABT, Square, PGD or FGSM without eps and norm.

    ``eps``, ``norm`` (linf or l2) hold for every member. ``binary``: members for two classes instead, if any are given.
    ``eot``: draws averaged in every call, for random classifiers; a classifier that is an ``eot`` view already keeps
    its own. Images that are wrong on the clean image are returned as they are; every member runs, stopping at success,
    on the images that all earlier ones left; classifiers whose images influence each other are always attacked whole.

    ``success`` and ``loss`` (the margin) come from one more look at the returned images, except that for random
    classifiers ``success`` is what the members saw: judge again on fresh draws. Survivors keep the first member's
    image. ``trace``: per member (1, b), 1 where it fooled the image, 0 where it did not, NaN where it did not run.
    Raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "autoattack"
    revision: ClassVar[int] = 1
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "aa-standard": {"members": STANDARD},
        "aa-rand": {"members": ("APGD()", "APGD(loss=dlr)"), "eot": 20},
        "aa-fast": {"members": ("APGD()", "APGDT()")},
        "aa-tecoa": {"members": ("APGD()", "APGD(loss=dlr)"), "binary": ("APGD()",)},
    }

    eps: Fraction = Fraction(1, 255)
    norm: str = "linf"
    members: tuple[str, ...] = STANDARD
    binary: tuple[str, ...] = ()
    eot: int = 1

    def __post_init__(self) -> None:
        check_fields(self, ("linf", "l2"), eot=1)
        for field in ("members", "binary"):
            texts = getattr(self, field)
            if isinstance(texts, str):
                raise ValueError(f"{field} must be a tuple of specs, got {texts!r}; write {field}=({texts!r},)")
            object.__setattr__(self, field, tuple(_canonical(t) for t in texts))
            if len(set(getattr(self, field))) < len(texts):
                raise ValueError(f"{field} names an attack twice: {', '.join(getattr(self, field))}; change a field")
        if not self.members:
            raise ValueError("members is empty; write members=('APGD()', 'APGDT()')")

    def attack(self, member: str) -> Any:
        """The attack that a member stands for, at our budget."""
        made = parse(member, MEMBERS, "member")
        quick = {"policy": "first_success"} if hasattr(made, "policy") else {}
        return replace(made, eps=self.eps, norm=self.norm, **quick)

    def stream(self, rng: SampleRNG, member: str) -> SampleRNG:
        """The random stream of a member: it depends on nothing but its spec and the samples."""
        return rng.fold("autoattack", member)

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch: ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels."""
        view = eot(clf, self.eot) if draws_of(clf) == 1 else clf
        whole, random = bool(base_of(clf, "batchwise")), bool(base_of(clf, "randomized"))
        b, draws = x.shape[0], draws_of(view)
        goal, everyone, tally = Objective("margin", x, y), torch.arange(b, device=x.device), Tally(x)
        judge = partial(goal, rows=everyone)
        out, clean = value(view, x, judge, rng.fold("autoattack", "clean"))
        tally.spend(everyone, draws)
        tally.offer(everyone, x, clean, goal.fooled(out, everyone))
        members = self.binary if goal.k == 2 and self.binary else self.members
        total = replace(tally.result(), loss=tally.loss.where(tally.hit, -torch.inf))
        trace, notes = {}, [f"members: {', '.join(members)}"]
        for i, member in enumerate(members):
            rows = everyone if whole else (~total.success).nonzero().flatten()
            fooled, ran = total.success, len(rows)
            if ran:
                stream = self.stream(rng, member)[rows]
                new = self.attack(member)(view, x[rows], y[rows], rng=stream)
                total = absorb(total, new, rows, by_loss=i == 0)
            share = (total.success & ~fooled).to(x)
            trace[member] = spread(share[rows], rows, b)[None]
            notes.append(f"{member}: fooled {int(share.sum())} of {ran}")
        out, loss = value(view, total.x_adv, judge, rng.fold("autoattack", "again"))
        again = total.success if random else goal.fooled(out, everyone)
        changed = int((again != total.success).sum())
        if changed:
            notes.append(f"{changed} flags changed on the second look")
        return replace(
            total,
            success=again,
            loss=loss,
            final_loss=loss,
            forwards=total.forwards + draws,
            trace=trace,
            notes=(*notes, *total.notes),
        )


def _canonical(text: str) -> str:
    made = parse(str(text), MEMBERS, "member")
    if made.eps != type(made)().eps or made.norm != type(made)().norm:
        raise ValueError(f"member {text!r} must not set eps or norm; set them on AutoAttack")
    return repr(made)
