"""FPT-Noise (reconstruction): the strengths, the gate, and what is scored in the end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from reference import fpt_noise_literal
from toys import toy_clf, toy_images

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.defenses.fpt_noise import FPTNoise, chosen
from ironclip.defenses.tte import TTE


def on_circle(*degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]


@pytest.mark.parametrize(
    ("degrees", "want"),
    [((0, 10, 40, 42, 43), 0.2), ((0, 30, 31, 32, 33), 0.1), ((0, 10, 20, 30, 40), 0.4), ((0, 1, 2, 1, 2), 0.0)],
)
def test_strengths_by_hand(degrees: tuple[float, ...], want: float) -> None:
    """Steps of the angle are steps of the feature: the first level after which they shrink below half the largest."""
    sigmas = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    z = on_circle(*degrees)
    assert float(chosen(z, sigmas, 0.01, 0.5)) == pytest.approx(want)
    assert fpt_noise_literal.strength(list(z[:, 0]), sigmas.tolist(), 0.01, 0.5) == pytest.approx(want)


def test_strengths_equal_the_literal_transcription() -> None:
    clf = toy_clf(1)
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    x, rng, fpt = toy_images(40).double(), SampleRNG.rows(40), FPTNoise(sigma=0.3, levels=5, rate=0.8)
    limit = float(fpt.drift(clf, x, rng).quantile(0.3))
    got = fpt.strengths(clf, x, limit, rng)
    z = fpt._walk(clf, x, rng)
    sigmas = [0.3 * i / 5 for i in range(1, 6)]
    want = [fpt_noise_literal.strength(list(z[:, i]), sigmas, limit, 0.8) for i in range(40)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert len(set(want)) > 3
    torch.testing.assert_close(fpt.drift(clf, x, rng) > limit, got > 0)


def test_stable_images_get_tte_alone_and_others_tte_of_the_noised_image() -> None:
    clf, x, rng = toy_clf(), toy_images(4), SampleRNG.rows(4)
    views = rng.fold("fpt_noise", "views")
    torch.testing.assert_close(FPTNoise(stable=3.0).apply(clf)(x, rng), TTE().apply(clf)(x, views))
    fpt = FPTNoise(stable=-1.0, sigma=0.2)
    strength = fpt.strengths(clf, x, -1.0, rng).view(4, 1, 1, 1)
    assert float(strength.min()) > 0
    noised = (x + strength * rng.fold("fpt_noise").normal_like(x)).clamp(0, 1)
    torch.testing.assert_close(fpt.apply(clf)(x, rng), TTE().apply(clf)(noised, views))


def test_calibration_and_penalty() -> None:
    clf, x = toy_clf(), toy_images(100)
    limit = FPTNoise().calibrate(clf, x, quantile=0.8, seed=1)
    rng = SampleRNG.of(1, range(100))
    fpt = FPTNoise(stable=limit)
    assert float(fpt.gated(clf, x, rng).float().mean()) == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(fpt.penalty(clf)(x, rng), (fpt.drift(clf, x, rng) - 0.9 * limit).clamp(min=0))
    state = FPTNoise().fit(clf, x, seed=1)
    assert float(state["stable"]) == pytest.approx(FPTNoise().calibrate(clf, x, seed=1))


def test_cost() -> None:
    clf, x = toy_clf(), toy_images(4)
    with clf.vlm.counting() as count, torch.no_grad():
        FPTNoise(stable=0.1, levels=3, crops=2).apply(clf)(x, SampleRNG.rows(4))
    assert (count.forwards, count.backwards) == (4 * (1 + 3 + 6), 0)


def test_gradient_matches_finite_differences_for_a_fixed_draw() -> None:
    clf = toy_clf()
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    rng, defended = SampleRNG.rows(2), FPTNoise(stable=-1.0, sigma=0.02).apply(clf)
    x = (0.4 + 0.2 * toy_images(2)).double()
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    up, down = (defended(x + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("FPTNoise(sigma=0)", r"sigma must be positive, got 0.0; write 0.1"),
        ("FPTNoise(levels=0)", "levels must be at least 1, got 0; write 4"),
        ("FPTNoise(rate=2)", r"rate must lie in \[0, 1\], got 2.0; write 0.5"),
        ("FPTNoise(crops=-1)", "crops must not be negative"),
        ("FPTNoise(reconstruction=False)", "its formula was not available, only a reconstruction exists"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)
