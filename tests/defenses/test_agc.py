"""AGC (reconstruction): the views, the choice, the step, and calibration."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from reference import agc_literal
from torch import Tensor
from toys import toy_clf, toy_images

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.views import base_of
from ironclip.defenses.agc import AGC


@pytest.mark.parametrize("tau", [0.05, 0.5, 5.0])
def test_equals_the_literal_transcription(tau: float) -> None:
    clf, x, rng = toy_clf(1), toy_images(6), SampleRNG.rows(6, 2)
    deep = copy.deepcopy(clf.vlm).double()

    def encode(image: Tensor) -> Tensor:
        return deep.image((image[None] - 0.5) / 0.25)[0]

    agc = AGC(tau=tau)
    views = agc.views(x, rng).double()
    got = agc.apply(clf)(x, rng)
    classes = clf.weights.double()
    for i in range(6):
        want = agc_literal.logits(encode, x[i].double(), list(views[:, i]), classes, clf.scale, tau)
        assert float((got[i] - want).abs().max() / want.abs().max()) < 1e-5


def test_views_are_what_they_say() -> None:
    x, rng = 0.2 + 0.6 * toy_images(3, size=20), SampleRNG.rows(3)
    near, soft, far, noisy = AGC(crop=0.8, pad=0.1, sigma=0.05).views(x, rng)
    assert float((soft - x).abs().max()) > 0.01
    assert float(far[:, :, 0].abs().max()) < 0.1, "the padding is black"
    assert float(far[:, :, 10, 10].min()) > 0.1
    torch.testing.assert_close(noisy - x, 0.05 * rng.fold("agc").normal_like(x), rtol=0, atol=1e-6)
    flat = torch.full((1, 3, 20, 20), 0.5)
    flat[:, :, :2] = 1.0
    inner = AGC(crop=0.8).views(flat, rng[:1])[0]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5))
    assert near.shape == x.shape


def test_nothing_moves_when_the_views_are_the_image() -> None:
    clf, x = toy_clf(), toy_images(4)
    agc = AGC(crop=1.0, blur=0.0, pad=0.0, sigma=0.0, tau=0.1)
    torch.testing.assert_close(agc.apply(clf)(x), clf(x), rtol=0, atol=1e-4)
    assert not base_of(agc.apply(clf), "randomized")


def test_far_anchors_are_taken_and_near_ones_hardly_approached() -> None:
    clf, x, rng = toy_clf(), toy_images(6), SampleRNG.rows(6)
    z, a = AGC()._pair(clf, x, rng)
    torch.testing.assert_close(AGC(tau=1e-9).apply(clf).features(x, rng), a)
    torch.testing.assert_close(AGC(tau=1e9).apply(clf).features(x, rng), z, rtol=0, atol=1e-6)


def test_calibration() -> None:
    clf, x = toy_clf(), toy_images(100)
    tau = AGC().calibrate(clf, x, quantile=0.8, seed=1)
    assert float((AGC().drift(clf, x, SampleRNG.of(1, range(100))) > tau).float().mean()) == pytest.approx(
        0.2, abs=0.02
    )
    state = AGC().fit(clf, x, seed=1)
    assert float(state["tau"]) == pytest.approx(AGC().calibrate(clf, x, seed=1))
    rng = SampleRNG.rows(100)
    torch.testing.assert_close(AGC().apply(clf, state)(x, rng), AGC(tau=float(state["tau"])).apply(clf)(x, rng))
    with pytest.raises(ValueError, match="the state of AGC must hold 'tau', it holds nothing"):
        AGC().apply(clf, {})


def test_cost_is_five_forwards() -> None:
    clf, x = toy_clf(), toy_images(4)
    with clf.vlm.counting() as count, torch.no_grad():
        AGC(tau=0.1).apply(clf)(x, SampleRNG.rows(4))
    assert (count.forwards, count.backwards) == (20, 0)


def test_gradient_matches_finite_differences_for_a_fixed_draw() -> None:
    clf = toy_clf()
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    rng, defended, x = SampleRNG.rows(2), AGC(tau=1.0, sigma=0.05).apply(clf), (0.4 + 0.2 * toy_images(2)).double()
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    up, down = (defended(x + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("AGC(crop=0)", r"crop must lie in \(0, 1\], got 0.0; write 0.8"),
        ("AGC(sigma=-1)", "sigma must not be negative, got -1.0; write 0.1"),
        ("AGC(tau=0)", "tau must be positive, got 0.0; find it with calibrate"),
        ("AGC(reconstruction=False)", "its formula was not available, only a reconstruction exists"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)


def test_title_says_reconstruction() -> None:
    assert AGC.info.title == "AGC (reconstruction)"
