"""The planted defenses keep their promises: they cost little accuracy, hide the gradient, and fall to who knows how."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from planted import DetachedGradient, EightBit, RandomNoise, SignUnroll
from toys import toy_problem

from ironclip.attacks.pgd import PGD
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier, Defense, Surrogate, prediction
from ironclip.core.views import eot, straight_through

N, ATTACK = 40, PGD(eps=Fraction(6, 255), steps=20)
PLANTED = (DetachedGradient(), EightBit(levels=63), RandomNoise(), SignUnroll())


def accuracy(clf: Classifier, x: torch.Tensor, y: torch.Tensor, draws: int = 1) -> float:
    with torch.no_grad():
        hits = [prediction(clf(x, SampleRNG.rows(N, seed=9).at(i))) == y for i in range(draws)]
    return float(torch.stack(hits).float().mean())


@pytest.mark.parametrize("defense", PLANTED, ids=repr)
def test_clean_accuracy_and_protocol(defense: Defense) -> None:
    clf, x, y = toy_problem(N, contrast=0.3 if defense.info.randomized else 0.06)
    assert isinstance(defense, Defense)
    assert accuracy(clf, x, y) > 0.9
    assert accuracy(defense.apply(clf), x, y, draws=5) > 0.7


def test_detached_has_no_gradient_and_falls_to_bpda() -> None:
    clf, x, y = toy_problem(N)
    defended, rng = DetachedGradient().apply(clf), SampleRNG.rows(N)
    with pytest.raises(RuntimeError, match="carries no gradient to the pixels"):
        ATTACK(defended, x, y, rng=rng)
    found = ATTACK(straight_through(defended, clf), x, y, rng=rng)
    assert accuracy(defended, found.x_adv, y) < 0.1


@pytest.mark.parametrize("defense", [EightBit(levels=63), SignUnroll()], ids=repr)
def test_zero_gradients_stop_pgd_but_not_the_surrogate(defense: Surrogate) -> None:
    clf, x, y = toy_problem(N)
    defended, rng = defense.apply(clf), SampleRNG.rows(N)
    blind = ATTACK(defended, x, y, rng=rng)
    assert bool(blind.zero_grad.all())
    before = accuracy(defended, blind.x_adv, y)
    assert before > 0.6
    soft = defense.surrogate(clf, None, defense.surrogates[0])
    torch.testing.assert_close(soft(x, rng), defended(x, rng), rtol=0, atol=1e-4)
    found = ATTACK(soft, x, y, rng=rng)
    assert accuracy(defended, found.x_adv, y) < before - 0.4


def test_noise_needs_fresh_draws_for_the_verdict_and_average_gradients() -> None:
    clf, x, y = toy_problem(N, contrast=0.3)
    defended, rng = RandomNoise().apply(clf), SampleRNG.rows(N)
    clean = accuracy(defended, x, y, draws=10)
    nothing = PGD(eps=Fraction(0), steps=20)(defended, x, y, rng=rng)
    assert float(nothing.success.float().mean()) > 1 - clean + 0.2, "twenty tries find an unlucky draw"
    one = ATTACK(defended, x, y, rng=rng)
    many = ATTACK(eot(defended, 16), x, y, rng=rng)
    after_one, after_many = (accuracy(defended, r.x_adv, y, draws=20) for r in (one, many))
    assert float(one.success.float().mean()) > 1 - after_one + 0.2
    assert after_many < after_one - 0.05
    assert after_many < clean - 0.2
