"""Views are classifiers again: their values, their gradients, their counts."""

from __future__ import annotations

import pytest
import torch
from attack_toys import Constant, Conv, Fixed, Linear, Noisy, Rounded, images, labels_of

from ironclip.attacks.pgd import PGD
from ironclip.core.grad import NoGradientError, draws_of, loss_and_grad
from ironclip.core.losses import ce, cosine
from ironclip.core.rng import SampleRNG
from ironclip.core.views import base_of, counted, eot, quantized, straight_through


def test_eot_averages_gradients_over_its_own_draws() -> None:
    clf, x, rng = Noisy(Conv(), 0.2), images(3), SampleRNG.rows(3)
    y = torch.tensor([0, 1, 2])
    view = eot(clf, 4)
    got = loss_and_grad(view, x, lambda z: ce(z, y), rng.at(2))
    each = [loss_and_grad(clf, x, lambda z: ce(z, y), rng.at(8 + i)) for i in range(4)]
    torch.testing.assert_close(got.grad, torch.stack([e.grad for e in each]).mean(0))
    torch.testing.assert_close(got.loss, torch.stack([e.loss for e in each]).mean(0))
    torch.testing.assert_close(view(x, rng.at(2)), torch.stack([e.out for e in each]).mean(0))
    assert (got.draws, draws_of(view), draws_of(clf)) == (4, 4, 1)


def test_eot_error_falls_like_one_over_root_of_draws() -> None:
    clf, x, y = Noisy(Linear(3, scale=0.3), 0.2), images(1).expand(200, -1, -1, -1), torch.zeros(200, dtype=torch.long)
    variance = {}
    for draws in (1, 4, 16):
        g = loss_and_grad(eot(clf, draws), x, lambda z: ce(z, y), SampleRNG.rows(200)).grad
        variance[draws] = float((g - g.mean(0)).square().sum(dim=(1, 2, 3)).mean())
    assert variance[1] / variance[4] == pytest.approx(4, rel=0.3)
    assert variance[4] / variance[16] == pytest.approx(4, rel=0.3)
    assert cosine(g[0], g[1]) > 0.5


def test_eot_of_one_is_the_classifier_and_zero_is_refused() -> None:
    clf = Noisy(Linear())
    assert eot(clf, 1) is clf
    with pytest.raises(ValueError, match="eot draws must be at least 1, got 0"):
        eot(clf, 0)


def test_eot_does_not_depend_on_company() -> None:
    clf, x, rng = eot(Noisy(Linear(4)), 3), images(5), SampleRNG.rows(5)
    whole = clf(x, rng.at(1))
    assert torch.equal(torch.cat([clf(x[i : i + 1], rng[[i]].at(1)) for i in range(5)]), whole)


def test_straight_through_takes_one_value_and_the_other_gradient() -> None:
    soft = Conv()
    hard, x, y = Rounded(soft), images(4), torch.tensor([0, 1, 2, 3])
    view = straight_through(hard, soft)
    torch.testing.assert_close(view(x, None), hard(x))
    got = loss_and_grad(view, x, lambda z: z.sum(1), None)
    want = loss_and_grad(soft, x, lambda z: z.sum(1), None)
    assert torch.equal(got.grad, want.grad)
    assert not loss_and_grad(hard, x, lambda z: ce(z, y), None).grad.any()


def test_bpda_succeeds_where_the_rounding_layer_has_no_gradient() -> None:
    soft = Conv()
    hard, x, rng = Rounded(soft), images(16), SampleRNG.rows(16)
    y = labels_of(hard, x)
    attack = PGD(eps=16 / 255, start="zero", steps=20)
    plain, bpda = attack(hard, x, y, rng=rng), attack(straight_through(hard, soft), x, y, rng=rng)
    assert not plain.success.any()
    assert bool(plain.zero_grad.all())
    assert float(bpda.success.float().mean()) > 0.8
    assert not bpda.zero_grad.any()


def test_a_classifier_that_detaches_is_refused_and_one_that_ignores_pixels_flagged() -> None:
    base, x, y = Linear(), images(2), torch.tensor([0, 1])
    with pytest.raises(NoGradientError, match="carries no gradient to the pixels"):
        PGD()(Fixed(lambda v: base(v).detach()), x, y, rng=SampleRNG.rows(2))
    frozen = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(NoGradientError, match="the pixels do not reach"):
        PGD()(Fixed(lambda v: frozen + 0), x, y, rng=SampleRNG.rows(2))
    result = PGD(steps=3)(Constant((1.0, 0.0)), x, y, rng=SampleRNG.rows(2))
    assert bool(result.zero_grad.all())
    assert result.zero_pixels.tolist() == [1, 1]


def test_quantized_rounds_the_value_and_passes_the_gradient() -> None:
    seen = []
    view = quantized(Fixed(lambda v: seen.append(v.detach()) or v.flatten(1)[:, :2] * 3))
    x = images(2)
    g = loss_and_grad(view, x, lambda z: z.sum(1), None)
    torch.testing.assert_close(seen[0], (x * 255).round() / 255, atol=1e-7, rtol=0)
    assert g.grad.flatten(1)[:, :2].eq(3).all()


def test_counted_counts_images_not_calls() -> None:
    view, x = counted(Linear()), images(5)
    view(x)
    loss_and_grad(view, x[:3], lambda z: z.sum(1), None)
    assert (view.count.forward_calls, view.count.forwards, view.count.backwards) == (2, 8, 3)
    with torch.no_grad():
        view(x)
    assert (view.count.forwards, view.count.backwards) == (13, 3)


def test_attributes_are_found_through_views() -> None:
    noisy = Noisy(Linear())
    assert base_of(quantized(counted(eot(noisy, 2))), "sigma") == 0.1
    assert base_of(counted(noisy), "nothing") is None


def test_no_parameter_gets_a_gradient() -> None:
    clf, x = Conv(), images(2)
    loss_and_grad(clf, x, lambda z: z.sum(1), None)
    assert all(p.grad is None for p in clf.parameters())
    assert not x.requires_grad
