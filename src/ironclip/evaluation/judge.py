"""Predictions that count: fp32, fresh draws, one record per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.core.check import check_logits
from ironclip.core.losses import margin, top_two_gap
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier, prediction
from ironclip.core.views import base_of


@dataclass(frozen=True, eq=False)
class Verdict:
    """Per sample: ``pred`` of draw 0, ``correct`` share of draws in [0, 1], ``worst`` correct in all draws, ``margin``
    (true minus best wrong logit, mean over draws), ``tie``, ``flips`` (the label changed between draws),
    ``probabilities`` (rows sum to one)."""

    pred: Tensor
    correct: Tensor
    worst: Tensor
    margin: Tensor
    tie: Tensor
    flips: Tensor
    probabilities: Tensor
    logits: Tensor


def is_random(clf: Classifier) -> bool:
    """Does the classifier draw random numbers, by its own account?"""
    return bool(base_of(clf, "randomized"))


def judge(clf: Classifier, x: Tensor, y: Tensor, rng: SampleRNG, draws: int = 1) -> Verdict:
    """Classify a batch; randomised classifiers on ``draws`` fresh draws, others once.

    ``rng`` must be a stream that no attack has used. Raises ValueError for NaN or wrongly shaped logits.
    """
    n = draws if is_random(clf) else 1
    fresh = rng.fold("judge")
    preds, margins, ties, logits0 = [], [], [], None
    with torch.no_grad():
        for i in range(n):
            z = clf(x, fresh.at(i)).float()
            check_logits(z, x.shape[0])
            preds.append(prediction(z))
            margins.append(-margin(z, y))
            ties.append(top_two_gap(z) <= 1e-6)
            logits0 = z if logits0 is None else logits0
    assert logits0 is not None
    p = torch.stack(preds)
    right = p == y
    sums = logits0.sum(dim=1)
    probs = ((sums - 1).abs() < 1e-5) & (logits0 >= 0).all(dim=1)
    return Verdict(
        pred=p[0],
        correct=right.float().mean(0),
        worst=right.all(dim=0),
        margin=torch.stack(margins).mean(0),
        tie=torch.stack(ties).any(dim=0),
        flips=(p != p[0]).any(dim=0),
        probabilities=probs,
        logits=logits0,
    )
