"""RayS: labels only, and the right corner where it can be worked out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attack_toys import Conv, Fixed, images, labels_of, two_class
from torch import Tensor

from ironclip.attacks.pgd import PGD
from ironclip.attacks.rays import RayS
from ironclip.core.rng import SampleRNG
from ironclip.core.types import prediction
from ironclip.core.views import counted


def block_model() -> tuple[object, Tensor, Tensor]:
    """The label falls when the upper half darkens and the lower half brightens: one flip of a half away."""
    w = torch.ones(3, 4, 4)
    w[:, 2:] = -1
    clf, x = two_class(w, 1.2), images(4, size=4, low=0.45, high=0.55)
    return clf, x, labels_of(clf, x)


def test_labels_are_enough() -> None:
    conv, x = Conv(), images(8)
    y = labels_of(conv, x)
    hard = Fixed(lambda v: torch.nn.functional.one_hot(prediction(conv(v)), 10).float())
    a = RayS(eps="8/255", queries=80)(conv, x, y, rng=SampleRNG.rows(8))
    b = RayS(eps="8/255", queries=80)(hard, x, y, rng=SampleRNG.rows(8))
    assert torch.equal(a.x_adv, b.x_adv)
    assert a.backwards.tolist() == [0] * 8


def test_finds_the_exact_radius_once_the_signs_are_right() -> None:
    w = torch.ones(3, 4, 4)
    clf, x = two_class(w, -25.0), images(4, size=4, low=0.45, high=0.55)
    y = labels_of(clf, x)
    exact = (25.0 - x.flatten(1).sum(1)) / 48
    result = RayS(eps=1, queries=60, policy="min_norm", trace=True)(clf, x, y, rng=SampleRNG.rows(4))
    assert result.trace is not None
    got = result.trace["radius"][-1]
    assert bool(((got >= exact - 1e-6) & (got <= exact + 2e-4)).all())
    torch.testing.assert_close((result.x_adv - x).abs().amax((1, 2, 3)), got, atol=1e-6, rtol=0)


def test_flips_blocks_until_the_direction_is_right() -> None:
    clf, x, y = block_model()
    flat = torch.ones(3, 4, 4)
    flat[:, 2:] = -1
    z = (x * flat).sum((1, 2, 3)) + 1.2
    exact = z.abs() / 48
    result = RayS(eps=1, queries=1500, policy="min_norm", trace=True)(clf, x, y, rng=SampleRNG.rows(4))  # type: ignore[arg-type]
    assert result.trace is not None
    assert bool((result.trace["radius"][-1] <= exact * 1.02 + 2e-4).all())


def test_radius_never_grows_and_success_is_within_the_budget() -> None:
    conv, x = Conv(), images(16)
    y, rng = labels_of(conv, x), SampleRNG.rows(16)
    result = RayS(eps="6/255", queries=400, policy="min_norm", trace=True)(conv, x, y, rng=rng)
    assert result.trace is not None
    for a, b in pairwise(result.trace["radius"]):
        assert bool((b <= a).all())
    assert bool(result.success[result.trace["radius"][-1] <= 6 / 255].all())
    quick = RayS(eps="6/255", queries=400)(conv, x, y, rng=rng)
    assert torch.equal(quick.success, result.success)
    assert 2 < int(quick.success.sum()) < 16
    assert int(quick.forwards.sum()) < int(result.forwards.sum())


def test_never_stronger_than_the_gradient_by_more_than_chance() -> None:
    conv, x = Conv(), images(32)
    y, rng = labels_of(conv, x), SampleRNG.rows(32)
    white = PGD(eps="4/255", steps=40)(conv, x, y, rng=rng)
    black = RayS(eps="4/255", queries=300)(conv, x, y, rng=rng)
    assert int(black.success.sum()) <= int(white.success.sum()) + 1
    assert int(black.success.sum()) > 4


def test_costs_and_wrong_images() -> None:
    conv, x = Conv(), images(4)
    y = labels_of(conv, x)
    y[2] = (y[2] + 1) % 10
    view = counted(conv)
    result = RayS(eps=0, queries=25)(view, x, y, rng=SampleRNG.rows(4))
    assert result.forwards.tolist() == [27, 27, 1, 27]
    assert view.count.forwards == 82
    assert result.success.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        RayS(queries=0)
