"""On the trained `tiny`: more work by the attacker never helps the model, and a huge budget leaves nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import ironclip
from ironclip import SampleRNG
from ironclip.core.types import prediction
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import build_attack

Problem = tuple[ZeroShot, torch.Tensor, torch.Tensor, SampleRNG]
N = 32
SLACK = 1  # images: two attacks of a kind may each find one that the other misses


@pytest.fixture(scope="module")
def problem() -> Problem:
    data = ironclip.load_data("shapes", 64).subset(N)
    clf = ZeroShot.build(ironclip.load("tiny"), data.class_names, data.templates)
    x, y, ids = next(iter(data.batches(N)))
    return clf, x, y, SampleRNG.of(0, ids)


def survivors(problem: Problem, spec: str) -> int:
    clf, x, y, rng = problem
    x_adv = build_attack(spec)(clf, x, y, rng=rng).x_adv
    with torch.no_grad():
        return int((prediction(clf(x_adv)) == y).sum())


def test_order_of_attacks(problem: Problem) -> None:
    """Noise (PGD without steps), then FGSM, then 10 and 40 steps of the same budget."""
    attacks = ("PGD(steps=0)", "FGSM()", "PGD(steps=10)", "PGD(steps=40)")
    counts = [survivors(problem, attack) for attack in attacks]
    assert all(later <= earlier + SLACK for earlier, later in pairwise(counts)), counts
    assert counts[0] >= 0.9 * N, counts
    assert counts[-1] <= 0.75 * counts[0], counts


def test_order_of_budgets(problem: Problem) -> None:
    counts = [survivors(problem, f"PGD(eps={eps}, steps=5)") for eps in ("1/2040", "1/255", "4/255", "64/255")]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] + N / 4
    assert counts[-1] == 0
