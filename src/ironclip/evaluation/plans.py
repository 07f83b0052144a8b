"""Members made ready for one cell: the view, how many draws its gradients need, the attack's spec."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.grad import NoGradientError, loss_and_grad
from ironclip.core.losses import ce
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import digest
from ironclip.core.types import Classifier
from ironclip.core.views import base_of, eot
from ironclip.evaluation.block import Block, Entry
from ironclip.evaluation.recipes import STORED, Member
from ironclip.evaluation.threat import attack_view, composition, has_features

DRAWS = (1, 5, 20, 50)
COSINE = 0.5
LOOK = 4
"""Images on which the number of draws is chosen."""


@dataclass(frozen=True, eq=False)
class Plan:
    """``view``: with ``draws`` averaged, None for stored examples. ``cosine``: agreement of two independent
    gradient estimates of so many draws, None where nothing is random or nobody looked."""

    member: Member
    view: Classifier | None
    spec: str
    draws: int = 1
    cosine: float | None = None

    def key(self) -> list[Any]:
        """What the cell's digest holds of it."""
        return [self.member.name, self.member.view, self.spec, self.member.beta, self.draws]


def plan(
    block: Block, entry: Entry, eps: Fraction, norm: str, threat: str = "adaptive", look: bool = True
) -> list[Plan]:
    """The composition of a defense under the block's budget, in the order in which it runs; ``look`` as below."""
    out = []
    for member in composition(entry.defense, block.budget, threat, norm, bool(block.relatives)):
        if member.view in STORED:
            out.append(Plan(member, None, member.view))
            continue
        view = attack_view(entry.defense, block.fast, entry.state, member, block.relatives)
        if member.attack == "feature" and not has_features(view):
            continue
        draws, cosine = draws_for(block, entry, member, view, look)
        shown = view if member.view == "base" else eot(view, draws)
        out.append(Plan(member, shown, member.spec(eps, norm, block.budget, draws), draws, cosine))
    return out


def draws_for(
    block: Block, entry: Entry, member: Member, view: Classifier, look: bool = True
) -> tuple[int, float | None]:
    """How many draws a gradient through ``view`` needs: the fewest of 1, 5, 20, 50 at which two independent estimates
    have a cosine above 0.5 (mean over the block's first 4 images), at most ``budget.eot``.

    One draw where nothing is random or the member asks for one. The answer is stored, and is part of the cell's key.
    Budgets without probes do not look; they take ``budget.eot``, as does ``look=False`` where nobody has looked yet.
    """
    if not member.eot or not base_of(view, "randomized"):
        return 1, None
    most = block.budget.eot
    if block.budget.probe == 0:
        return most, None
    key = digest(
        block.key(
            defense=entry.text,
            state=entry.state_hash,
            view=member.view,
            beta=member.beta,
            most=most,
            precision=block.precision,
            ids=block.data.ids[:LOOK],
        )
    )
    found: list[Any] | None = block.store.get_json("draws", key)
    if found is None and not look:
        return most, None
    if found is None:
        x, y, ids = next(iter(block.data.batches(LOOK, list(range(min(LOOK, len(block.data)))))))
        x, y = x.to(block.device), block.clf.labels(y.to(block.device))
        found = list(fewest_draws(view, x, y, block.rng(ids).fold("draws", member.view), most))
        block.store.put_json("draws", key, found)
    return int(found[0]), found[1]


def fewest_draws(view: Classifier, x: Tensor, y: Tensor, rng: SampleRNG, most: int) -> tuple[int, float | None]:
    """The number of draws up to ``most`` and the cosine reached with it; (1, None) where there is no gradient."""
    tried = sorted({n for n in DRAWS if n < most} | {most})
    reached: tuple[int, float | None] = (1, None)
    for n in tried:
        try:
            reached = n, gradient_cosine(view, x, y, rng, n)
        except NoGradientError:
            return 1, None
        if reached[1] is not None and reached[1] > COSINE:
            break
    return reached


def gradient_cosine(view: Classifier, x: Tensor, y: Tensor, rng: SampleRNG, draws: int) -> float:
    """Cosine of two independent estimates of the cross-entropy's gradient, mean over the images; 0 where one is 0."""
    a, b = (
        loss_and_grad(eot(view, draws), x, lambda z: ce(z, y), rng.fold("estimate", i)).grad.flatten(1).double()
        for i in range(2)
    )
    return float(torch.nan_to_num(F.cosine_similarity(a, b, dim=1)).mean())
