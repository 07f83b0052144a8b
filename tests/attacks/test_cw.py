"""Carlini & Wagner on a model whose smallest perturbation is a formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attack_toys import Conv, images, labels_of, tensor, two_class

from ironclip.attacks.cw import CW
from ironclip.attacks.fab import FABT
from ironclip.core.ball import norms
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted


def test_linear_model_gives_the_distance_to_the_hyperplane() -> None:
    w = tensor(3, 4, 4)
    clf, x = two_class(w, -0.5 * float(w.sum())), images(4, size=4, low=0.45, high=0.55)
    y = labels_of(clf, x)
    exact = margin(clf(x), y).abs().detach() / w.norm()
    result = CW(steps=400, search=9, lr=2e-3, c=1e-2)(clf, x, y, rng=SampleRNG.rows(4))
    assert bool(result.success.all())
    ratio = norms(result.x_adv - x, "l2") / exact
    assert bool(((ratio >= 1 - 1e-3) & (ratio < 1.01)).all()), ratio


def test_norm_never_rises_over_search_steps() -> None:
    clf, x = Conv(), images(8)
    result = CW(steps=60, search=6, c=1.0, trace=True)(clf, x, labels_of(clf, x), rng=SampleRNG.rows(8))
    assert result.trace is not None
    assert result.trace["norm"].shape == (6, 8)
    for a, b in pairwise(result.trace["norm"]):
        assert bool((b <= a).all())
    torch.testing.assert_close(result.trace["norm"][-1], norms(result.x_adv - x, "l2"))


def test_is_close_to_fab() -> None:
    clf, x = Conv(), images(8)
    y, rng = labels_of(clf, x), SampleRNG.rows(8)
    cw = norms(CW(steps=200, search=7, c=0.1)(clf, x, y, rng=rng).x_adv - x, "l2")
    fab = norms(FABT(eps=30, norm="l2", steps=40)(clf, x, y, rng=rng).x_adv - x, "l2")
    assert float((cw / fab).median()) < 1.15


def test_budget_kappa_and_cost() -> None:
    clf, x = Conv(), images(12)
    y, rng = labels_of(clf, x), SampleRNG.rows(12)
    free = CW(steps=50, search=5, c=0.1)(clf, x, y, rng=rng)
    tight = CW(steps=50, search=5, c=0.1, eps="1/20")(clf, x, y, rng=rng)
    assert bool(free.success.all())
    assert torch.equal(tight.success, norms(free.x_adv - x, "l2") <= 0.05)
    assert float(norms(tight.x_adv - x, "l2").max()) <= 0.05 + 1e-6
    sure = CW(steps=50, search=5, c=0.1, kappa=0.5)(clf, x, y, rng=rng)
    assert bool((sure.loss[sure.success] >= 0.5).all())
    full = CW(steps=7, search=2, abort=False)(clf, x, y, rng=rng)
    assert full.forwards.tolist() == [15] * 12
    assert full.backwards.tolist() == [14] * 12


def test_a_stalled_search_is_left_image_by_image() -> None:
    clf, x = Conv(), images(6)
    y, rng = labels_of(clf, x), SampleRNG.rows(6)
    view = counted(clf)
    quick = CW(steps=100, search=3, c=1.0)(view, x, y, rng=rng)
    assert view.count.forwards == int(quick.forwards.sum()) < 6 * 301
    assert len(set(quick.forwards.tolist())) > 1
    slow = CW(steps=100, search=3, c=1.0, abort=False)(clf, x, y, rng=rng)
    assert torch.equal(quick.success, slow.success)


def test_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="c and lr must be positive and kappa not negative"):
        CW(c=0)
    with pytest.raises(ValueError, match="search must be at least 1, got 0"):
        CW(search=0)
