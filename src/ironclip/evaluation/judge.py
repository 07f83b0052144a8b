"""Predictions that count: fp32, fresh draws, one record per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ironclip.core.check import check_logits
from ironclip.core.losses import margin, top_two_gap
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier, prediction
from ironclip.core.views import base_of

STEADY = 1e-4
"""How far l_2-normalised logits may move between passes over the same image (AutoAttack's figure)."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """Per sample: ``pred`` of draw 0, ``correct`` share of draws in [0, 1], ``worst`` correct in all draws, ``margin``
    (true minus best wrong logit, mean over draws), ``tie``, ``moved`` (label or normalised logits changed between
    draws), ``probabilities`` (rows sum to one). ``autograd``: gradients were taken inside the classifier."""

    pred: Tensor
    correct: Tensor
    worst: Tensor
    margin: Tensor
    tie: Tensor
    moved: Tensor
    probabilities: Tensor
    logits: Tensor
    autograd: bool = False


class Watch(TorchFunctionMode):
    """Inside the block, ``seen`` becomes true if anything asks autograd for gradients: a defense that optimises."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def is_random(clf: Classifier) -> bool:
    """Does the classifier draw random numbers, by its own account?"""
    return bool(base_of(clf, "randomized"))


def judge(clf: Classifier, x: Tensor, y: Tensor, rng: SampleRNG, draws: int = 1, k: int | None = None) -> Verdict:
    """Classify a batch; randomised classifiers on ``draws`` fresh draws, others once.

    ``rng`` must be a stream that no attack has used. ``k``: how many logits there must be. Raises ValueError for NaN or
    wrongly shaped logits.
    """
    n = draws if is_random(clf) else 1
    fresh, watch = rng.fold("judge"), Watch()
    outs = []
    with torch.no_grad():
        for i in range(n):
            with nullcontext() if i else watch:
                outs.append(clf(x, fresh.at(i)).float())
            check_logits(outs[-1], x.shape[0], k)
    z, p = torch.stack(outs), torch.stack([prediction(out) for out in outs])
    right, units = p == y, F.normalize(z, dim=2)
    still = (units - units[0]).norm(dim=2) <= STEADY
    probs = ((z[0].sum(dim=1) - 1).abs() < 1e-5) & (z[0] >= 0).all(dim=1)
    return Verdict(
        pred=p[0],
        correct=right.float().mean(0),
        worst=right.all(dim=0),
        margin=torch.stack([-margin(out, y) for out in outs]).mean(0),
        tie=torch.stack([top_two_gap(out) <= 1e-6 for out in outs]).any(dim=0),
        moved=~(still & (p == p[0])).all(dim=0),
        probabilities=probs,
        logits=z[0],
        autograd=watch.seen,
    )
