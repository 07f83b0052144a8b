"""FAB-T on models whose nearest boundary is known."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from attack_toys import Conv, Linear, images, labels_of, tensor, two_class
from torch import Tensor

from ironclip.attacks.apgd import APGD
from ironclip.attacks.fab import FABT
from ironclip.core.ball import NORMS, norms
from ironclip.core.hyperplane import to_hyperplane
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted

WIDE = {"linf": Fraction(1), "l2": Fraction(30), "l1": Fraction(200)}


def linear(b: int = 6, low: float = 0.4, high: float = 0.6) -> tuple[Linear, Tensor, Tensor]:
    """A two-class model whose boundary lies near the grey images."""
    w = tensor(3, 8, 8)
    clf, x = two_class(w, -0.5 * float(w.sum())), images(b, low=low, high=high)
    return clf, x, labels_of(clf, x)


def distance(clf: Linear, x: Tensor, norm: str) -> Tensor:
    """(b,) exact distance to the boundary of a two-class model inside the box."""
    w = (clf.w[1] - clf.w[0]).detach().float().expand(len(x), -1)
    z = clf(x).detach()
    return norms(to_hyperplane(x.flatten(1), w, z[:, 1] - z[:, 0], norm), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_one_success_then_one_backward_step(norm: str) -> None:
    clf, x, y = linear()
    exact = distance(clf, x, norm)
    attack = FABT(eps=WIDE[norm], norm=norm, steps=2, targets=1, trace=True, alpha_max=0)
    result = attack(clf, x, y, rng=SampleRNG.rows(6))
    assert result.trace is not None
    torch.testing.assert_close(result.trace["norm"][0] / exact, torch.full((6,), 1.05), atol=2e-3, rtol=0)
    torch.testing.assert_close(result.trace["norm"][1] / exact, torch.full((6,), 1.00275), atol=2e-3, rtol=0)
    pulled = replace(attack, alpha_max=0.1)(clf, x, y, rng=SampleRNG.rows(6))
    assert pulled.trace is not None
    share = 0.055 / 1.055
    want = (1 - share) * 1.00275 + share * 1.05
    torch.testing.assert_close(pulled.trace["norm"][1] / exact, torch.full((6,), want), atol=2e-3, rtol=0)
    torch.testing.assert_close(norms(pulled.x_adv - x, norm), pulled.trace["norm"][1])


@pytest.mark.parametrize("norm", NORMS)
def test_walls_of_the_box_are_counted_in(norm: str) -> None:
    """Two thirds of the pixels stand at a wall; the optimum is the projection inside the box, checked against an LP."""
    w = tensor(3, 8, 8)
    x = images(6, low=-1.0, high=2.0).clamp(0, 1)
    clf = two_class(w, -float((w * x[0]).sum()) - 1.0)
    y = labels_of(clf, x)
    result = FABT(eps=WIDE[norm], norm=norm, steps=25, targets=1)(clf, x, y, rng=SampleRNG.rows(6))
    assert bool(result.success.all())
    ratio = norms(result.x_adv - x, norm) / distance(clf, x, norm)
    assert bool(((ratio >= 1 - 1e-4) & (ratio < 1.02)).all()), ratio


@pytest.mark.parametrize("norm", NORMS)
def test_norms_never_rise(norm: str) -> None:
    clf, x = Conv(), images(8)
    result = FABT(eps=WIDE[norm], norm=norm, steps=12, targets=3, trace=True)(
        clf, x, labels_of(clf, x), rng=SampleRNG.rows(8)
    )
    assert result.trace is not None
    assert result.trace["norm"].shape == (36, 8)
    for a, b in pairwise(result.trace["norm"]):
        assert bool((b <= a).all())
    torch.testing.assert_close(result.trace["norm"][-1], norms(result.x_adv - x, norm))


def test_success_only_within_the_budget() -> None:
    clf, x = Conv(), images(32)
    y, rng = labels_of(clf, x), SampleRNG.rows(32)
    wide = FABT(eps=1, steps=20, targets=3)(clf, x, y, rng=rng)
    size = norms(wide.x_adv - x)
    assert bool(wide.success.all())
    eps = Fraction(2, 255)
    tight = FABT(eps=eps, steps=20, targets=3)(clf, x, y, rng=rng)
    assert torch.equal(tight.success, size <= float(eps))
    assert 4 < int(tight.success.sum()) < 30
    assert float(norms(tight.x_adv - x).max()) <= float(eps) + 1e-6
    torch.testing.assert_close(tight.x_adv[tight.success], wide.x_adv[tight.success])
    assert bool((tight.loss[~tight.success] < 0).all())
    assert bool((tight.x_adv != x).flatten(1).any(1).any())


def test_costs_and_early_leave() -> None:
    clf, x = Conv(), images(16)
    y, rng = labels_of(clf, x), SampleRNG.rows(16)
    full = FABT(eps="2/255", steps=10, targets=2)(clf, x, y, rng=rng)
    assert full.forwards.tolist() == [41] * 16
    assert full.backwards.tolist() == [20] * 16
    view = counted(clf)
    quick = FABT(eps="2/255", steps=10, targets=2, policy="first_success")(view, x, y, rng=rng)
    assert torch.equal(quick.success, full.success)
    assert view.count.forwards == int(quick.forwards.sum()) < int(full.forwards.sum())
    assert torch.equal(quick.x_adv[~quick.success], full.x_adv[~full.success])


def test_an_image_wrong_from_the_start_has_norm_zero() -> None:
    clf, x = Conv(), images(3)
    y = (labels_of(clf, x) + 1) % 10
    result = FABT(eps="1/255", steps=5)(clf, x, y, rng=SampleRNG.rows(3))
    assert torch.equal(result.x_adv, x)
    assert result.forwards.tolist() == [1, 1, 1]


def test_restarts_start_elsewhere_and_help_or_tie() -> None:
    clf, x = Conv(), images(8)
    y, rng = labels_of(clf, x), SampleRNG.rows(8)
    one = FABT(eps=1, steps=8, targets=1)(clf, x, y, rng=rng)
    three = FABT(eps=1, steps=8, targets=1, restarts=3)(clf, x, y, rng=rng)
    a, b = norms(one.x_adv - x), norms(three.x_adv - x)
    assert bool((b <= a).all())
    assert three.forwards.tolist() == [49] * 8


def test_agrees_with_the_best_ball_attack() -> None:
    clf, x = Conv(), images(48)
    y, rng = labels_of(clf, x), SampleRNG.rows(48)
    fab = FABT(eps="2/255", steps=40)(clf, x, y, rng=rng)
    ball = APGD(eps="2/255", steps=40, loss="margin")(clf, x, y, rng=rng)
    assert abs(int(fab.success.sum()) - int(ball.success.sum())) <= 3


def test_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha_max must be in"):
        FABT(beta=1.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        FABT(steps=0)
