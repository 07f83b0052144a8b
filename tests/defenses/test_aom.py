"""AOM against hand cases, its literal transcription and finite differences."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import aom_literal
from torch import Tensor
from toys import toy_clf, toy_images, words

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.sphere import angle_between, coefficients, drift_between, move
from ironclip.core.views import base_of
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses import aom as module
from ironclip.defenses.aom import AOM
from ironclip.evaluation.recipes import BUDGETS
from ironclip.evaluation.threat import composition

Z, A = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def double(clf: ZeroShot) -> ZeroShot:
    return replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())


def draws_of(x: Tensor, rng: SampleRNG, n: int) -> Tensor:
    return torch.stack([rng.fold("aom").at(i).normal_like(x) for i in range(n)], dim=1)


# the move, by hand


@pytest.mark.parametrize(
    ("lam", "want"), [(0.0, (1, 0)), (0.5, (0.70711, 0.70711)), (1.0, (0, 1)), (2.5, (-0.51450, 0.85749))]
)
def test_chord_by_hand(lam: float, want: tuple[float, float]) -> None:
    torch.testing.assert_close(move(Z, A, lam), torch.tensor([want], dtype=torch.float32), rtol=0, atol=1e-5)


def test_both_paths_by_hand() -> None:
    torch.testing.assert_close(move(Z, A, 0.5, "geodesic"), move(Z, A, 0.5, "chord"))
    for path, degrees in (("geodesic", 30.0), ("chord", 26.565)):
        angle = angle_between(Z, move(Z, A, 1 / 3, path))
        assert math.degrees(float(angle)) == pytest.approx(degrees, abs=1e-3)


@pytest.mark.parametrize("path", ["chord", "geodesic"])
def test_ends_length_and_score_formula(path: str) -> None:
    g = torch.Generator().manual_seed(0)
    z, a = (F.normalize(torch.randn(50, 6, generator=g), dim=1) for _ in range(2))
    t = F.normalize(torch.randn(4, 6, generator=g), dim=1)
    for lam in (0.0, 0.3, 1.0, 1.7):
        moved = move(z, a, lam, path)
        torch.testing.assert_close(moved.norm(dim=1), torch.ones(50))
        of_z, of_a = coefficients(angle_between(z, a), lam, path)
        torch.testing.assert_close(
            of_z[:, None] * (z @ t.T) + of_a[:, None] * (a @ t.T), moved @ t.T, rtol=0, atol=2e-6
        )
    torch.testing.assert_close(move(z, a, 1.0, path), a)


def test_equal_and_opposite_anchors_never_give_nan() -> None:
    for path in ("chord", "geodesic"):
        leaf = Z.clone().requires_grad_(True)
        out = move(leaf, Z.clone(), 0.7, path)
        torch.testing.assert_close(out.detach(), Z)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert bool(torch.isfinite(grad).all())
        with pytest.warns(UserWarning, match="1 images have an anchor opposite to their feature; they take the anchor"):
            torch.testing.assert_close(move(Z, -Z, 0.5, path), -Z)
    assert float(drift_between(Z, -Z)) == 2.0


# the whole, against the transcription


@pytest.mark.parametrize("path", ["chord", "geodesic"])
@pytest.mark.parametrize("lam", [0.5, 1.0, 2.5])
def test_equals_the_literal_transcription(path: str, lam: float) -> None:
    clf, x, rng = toy_clf(2), toy_images(6), SampleRNG.rows(6, 4)
    tower = copy.deepcopy(clf.vlm).double()
    noise = draws_of(x, rng, 3)

    def encode(image: Tensor) -> Tensor:
        return tower.image((image[None] - 0.5) / 0.25)[0]

    want = aom_literal.logits(encode, x, noise, clf.weights, clf.scale, 0.2, lam, path)
    got = AOM(sigma=0.2, draws=3, lam=lam, path=path).apply(clf)(x, rng)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    gated = AOM(sigma=0.2, draws=3, lam=lam, path=path, gate="high_noise_drift", gate_sigma=0.3)
    drift = gated.drift(clf, x, rng)
    limit = float(drift.sort().values[2:4].mean())
    gated = replace(gated, threshold=limit)
    assert gated.gated(clf, x, rng).sum() == 3
    want = aom_literal.logits(encode, x, noise, clf.weights, clf.scale, 0.2, lam, path, 0.3, limit)
    assert float((gated.apply(clf)(x, rng) - want).abs().max() / want.abs().max()) < 1e-5


# identities and costs


def test_lam_zero_is_the_plain_model_at_its_cost() -> None:
    clf, x = toy_clf(), toy_images(5)
    for aom in (AOM(lam=0), AOM(sigma=0), AOM(lam=0, gate="high_noise_drift")):
        defended = aom.apply(clf)
        with clf.vlm.counting() as count:
            assert torch.equal(defended(x), clf(x))
        assert count.forwards == 5 + 5
        assert not base_of(defended, "randomized")


def test_without_noise_any_lam_stays() -> None:
    clf, x, rng = toy_clf(), toy_images(5), SampleRNG.rows(5)
    made = AOM(sigma=0.3).encodings(clf.vlm, x, rng, sigma=0.0)
    for path in ("chord", "geodesic"):
        for lam in (0.5, 1.0, 2.5):
            torch.testing.assert_close(move(made.z, made.anchor(), lam, path), made.z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("aom", "passes"),
    [
        (AOM(draws=3), 3),
        (AOM(draws=3, lam=0.5), 4),
        (AOM(draws=3, gate="high_noise_drift", threshold=0.1), 4),
        (AOM(draws=3, gate="high_noise_drift", threshold=0.1, gate_sigma=0.3), 8),
    ],
)
def test_tower_passes(aom: AOM, passes: int) -> None:
    clf, x = toy_clf(), toy_images(5)
    with clf.vlm.counting() as count, torch.no_grad():
        aom.apply(clf)(x, SampleRNG.rows(5))
    assert (count.forwards, count.backwards) == (5 * passes, 0)


def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    want = AOM(lam=0.5).apply(clf)(x, rng)
    for rows in (1, 7):
        monkeypatch.setattr(module, "ROWS", rows)
        torch.testing.assert_close(AOM(lam=0.5).apply(clf)(x, rng), want)


def test_antithetic_draws_come_in_opposite_pairs_inside_the_box() -> None:
    seen: list[Tensor] = []

    def tower(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1) + 1

    clf = ZeroShot.build(VLM.wrap(tower, words(12), 2), ["a", "b"])
    x, rng = torch.full((1, 3, 2, 2), 0.5), SampleRNG.rows(1)
    AOM(sigma=0.01, draws=4, antithetic=True).apply(clf)(x, rng)
    copies = seen[-1]
    torch.testing.assert_close(copies[0::2] + copies[1::2], torch.ones_like(copies[::2]))
    assert not torch.equal(copies[0], copies[2])
    AOM(sigma=2.0).apply(clf)(x, rng)
    assert (float(seen[-1].min()), float(seen[-1].max())) == (0.0, 1.0)
    assert torch.equal(x, torch.full((1, 3, 2, 2), 0.5))


def test_a_linear_tower_converges_and_a_blind_one_stays() -> None:
    linear = ZeroShot.build(VLM.wrap(lambda x: x.flatten(1) + 5.0, words(12), 2), ["a", "b"])
    x, rng = 0.5 + 0.0 * toy_images(200, size=2), SampleRNG.rows(200)
    errors = [
        float((AOM(draws=n).apply(linear).features(x, rng) - linear.features(x)).norm(dim=1).mean()) for n in (1, 16)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)
    blind = ZeroShot.build(VLM.wrap(lambda x: (4 * x).round().mean(dim=(2, 3)) + 1, words(3), 2), ["a", "b"])
    torch.testing.assert_close(AOM(sigma=0.01).apply(blind).features(x[:4], rng[:4]), blind.features(x[:4]))


# one pass for all constants


def test_sweep_equals_single_runs_and_encodes_once_per_sigma() -> None:
    clf, x, rng = toy_clf(), toy_images(5), SampleRNG.rows(5)
    for path in ("chord", "geodesic"):
        with clf.vlm.counting() as count:
            table = AOM(path=path).sweep(clf, x, rng, (0.05, 0.2), (0.5, 1.0, 2.5), draws=(1, 4, 8))
        assert count.forwards == 2 * 9 * 5
        assert len(table) == 18
        for (sigma, lam, n), got in table.items():
            want = AOM(sigma=sigma, lam=lam, draws=n, path=path).apply(clf)(x, rng)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"draws must lie in 1..8, got \(16,\); write AOM\(draws=16\)"):
        AOM().sweep(clf, x, rng, draws=(16,))


# the gate


def test_below_the_threshold_nothing_moves() -> None:
    clf, x, rng = toy_clf(), toy_images(8), SampleRNG.rows(8)
    aom = AOM(gate="high_noise_drift", lam=0.5)
    limit = float(aom.drift(clf, x, rng).median())
    aom = replace(aom, threshold=limit)
    judged = aom.gated(clf, x, rng)
    assert judged.sum() == 4
    got = aom.apply(clf)(x, rng)
    torch.testing.assert_close(got[~judged], clf(x)[~judged])
    torch.testing.assert_close(got[judged], AOM(lam=0.5).apply(clf)(x, rng)[judged])
    assert bool(AOM().gated(clf, x).all())


def test_calibration_leaves_the_asked_share_of_clean_images_alone() -> None:
    clf, x = toy_clf(), toy_images(200)
    aom = AOM(gate="high_noise_drift")
    for quantile in (0.95, 0.7):
        limit = aom.calibrate(clf, x, quantile, seed=3)
        moved = replace(aom, threshold=limit).gated(clf, x, SampleRNG.of(3, range(200))).float().mean()
        assert float(moved) == pytest.approx(1 - quantile, abs=0.011)
    state = aom.fit(clf, [(x[:100], None, list(range(100))), (x[100:], None, list(range(100, 200)))], seed=3)
    assert float(state["threshold"]) == pytest.approx(aom.calibrate(clf, x, seed=3))
    rng = SampleRNG.rows(200)
    limit = float(state["threshold"])
    torch.testing.assert_close(aom.apply(clf, state)(x, rng), replace(aom, threshold=limit).apply(clf)(x, rng))
    for bad, message in (
        ({"quantile": 5}, r"quantile must lie in \(0, 1\), got 5"),
        ({}, "needs clean images, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            aom.calibrate(clf, x[:0], **bad)


def test_an_uncalibrated_gate_says_how_to_calibrate() -> None:
    with pytest.raises(ValueError, match=r"needs a threshold for toy-conv: run ironclip fit 'AOM\(gate=hi"):
        AOM(gate="high_noise_drift").apply(toy_clf())


def test_only_a_gate_is_evaded() -> None:
    names = [m.name for m in composition(AOM(), BUDGETS["standard"])]
    assert "through-ce" in names
    assert not any(n.startswith("evade") for n in names)
    names = [m.name for m in composition(AOM(gate="high_noise_drift", threshold=0.1), BUDGETS["standard"])]
    assert sum(n.startswith("evade") for n in names) >= 3


# gradients and refusals


@pytest.mark.parametrize(
    "aom", [AOM(draws=3), AOM(draws=3, lam=2.5, path="geodesic"), AOM(draws=2, antithetic=True, lam=0.5)]
)
def test_gradient_matches_finite_differences_for_a_fixed_draw(aom: AOM) -> None:
    clf, rng = double(toy_clf()), SampleRNG.rows(2)
    defended, leaf = aom.apply(clf), (0.35 + 0.3 * toy_images(2)).double().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    up, down = (defended(leaf.detach() + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float(grad.abs().max()) > 0
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("AOM(sigma=-0.1)", r"sigma must not be negative, got -0.1; write 0.1"),
        ("AOM(draws=0)", "draws must be at least 1, got 0; write 8"),
        ("AOM(path=straight)", "unknown path 'straight'"),
        ("AOM(gate=on)", "unknown gate 'on'"),
        ("AOM(gate=high_noise_drift, gate_sigma=0)", "gate_sigma must be positive"),
        ("AOM(preset=reference)", "unknown preset of AOM 'reference'"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)


def test_bad_lam_images_and_weights() -> None:
    with pytest.raises(ValueError, match="lam must be a number, got nan"):
        AOM(lam=float("nan"))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        AOM().apply(toy_clf())(toy_images(2) + 1, SampleRNG.rows(2))
    with pytest.raises(ValueError, match="class weights have 7 dimensions, toy-conv has 16"):
        AOM().apply(replace(toy_clf(), weights=torch.eye(5, 7)))


def test_title_says_reconstruction() -> None:
    assert AOM.info.title == "AOM (reconstruction)"
