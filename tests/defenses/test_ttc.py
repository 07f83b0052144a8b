"""TTC against hand cases, against its literal transcription, and against what it must never do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from reference import ttc_literal
from torch import Tensor, nn
from toys import toy_clf, toy_images, words

from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._inner import counterattack
from ironclip.defenses.ttc import TTC

U = 1 / 255
ALWAYS, NEVER = 1e6, 1e-9


def clf_of(image_fn: Callable[[Tensor], Tensor], size: int = 1, classes: tuple[str, ...] = ("a", "b")) -> ZeroShot:
    with torch.no_grad():
        dim = image_fn(torch.zeros(1, 3, size, size)).shape[1]
    return ZeroShot.build(VLM.wrap(image_fn, words(dim), size), list(classes))


def doubled(x: Tensor) -> Tensor:
    """e(x) = 2x of the first channel of a one-pixel image, beside a constant that keeps classes apart."""
    return 2 * x[:, :1, 0, 0]


def fixed_start(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr("ironclip.defenses.ttc.start_delta", lambda x, *_rest, **_named: torch.full_like(x, value))


def drawn(ttc: TTC, x: Tensor, rng: SampleRNG) -> Tensor:
    """The noise that the defense draws for these rows, before the pixel box."""
    return float(ttc.eps) * rng.fold("ttc").uniform_like(x, -1.0, 1.0)


def offset(ttc: TTC, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
    with torch.no_grad():
        return ttc.apply(clf).seen(x, rng or SampleRNG.rows(len(x))) - x


# one pixel, by hand


def test_one_pixel_counterattack(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_start(monkeypatch, U)
    clf, x, ttc = clf_of(doubled), torch.full((1, 3, 1, 1), 0.5), TTC(preset="reference")
    rng = SampleRNG.rows(1)
    assert float(ttc.drift(clf, x, rng)) == pytest.approx(2 * U / 1.0, rel=1e-4)
    assert ttc.gate(clf, x, rng).tolist() == [True]
    w = [math.exp(2 * i) for i in range(3)]
    by_hand = sum(a * d for a, d in zip(w, (1, 2, 3), strict=True)) / sum(w)
    assert by_hand == pytest.approx(2.85094, abs=1e-5)
    assert float(offset(ttc, clf, x)[0, 0, 0, 0]) * 255 == pytest.approx(by_hand, abs=1e-3)


def test_above_the_threshold_only_the_start_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_start(monkeypatch, U)
    clf, x = clf_of(doubled), torch.full((1, 3, 1, 1), 0.5)
    assert torch.equal(offset(TTC(tau=0.005, clean_offset="noise"), clf, x), (x + U) - x)
    assert torch.equal(offset(TTC(tau=0.005, clean_offset="zero"), clf, x), torch.zeros_like(x))


def test_a_drift_equal_to_tau_counts_as_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_start(monkeypatch, U)
    clf, x = clf_of(doubled), torch.full((1, 3, 1, 1), 0.5)
    drift = float(TTC().drift(clf, x, SampleRNG.rows(1)))
    at, above = TTC(tau=drift), TTC(tau=math.nextafter(drift, 1) * (1 + 1e-6))
    assert at.gate(clf, x, SampleRNG.rows(1)).tolist() == [False]
    assert above.gate(clf, x, SampleRNG.rows(1)).tolist() == [True]
    assert torch.equal(offset(at, clf, x), (x + U) - x)


def test_steps_stop_at_the_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_start(monkeypatch, 4 * U)
    clf, x = clf_of(doubled), torch.full((1, 3, 1, 1), 0.5)
    assert float(offset(TTC(), clf, x)[0, 0, 0, 0]) == pytest.approx(4 * U, abs=1e-6)


@pytest.mark.parametrize(("beta", "expected"), [(2.0, (0.01588, 0.11731, 0.86681)), (0.0, (1 / 3, 1 / 3, 1 / 3))])
def test_step_weights(beta: float, expected: tuple[float, ...]) -> None:
    assert TTC(beta=beta).weights == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("beta", "last"), [(200.0, [0.0, 0.0, 1.0]), (-400.0, [1.0, 0.0, 0.0])])
def test_extreme_weights_do_not_overflow(beta: float, last: list[float]) -> None:
    assert TTC(beta=beta).weights == pytest.approx(last)
    assert sum(TTC(beta=beta, steps=50).weights) == pytest.approx(1.0)


# against the literal transcription


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "fields", [{}, {"clean_offset": "zero", "steps": 4}, {"norm": "l2", "eps": "0.5", "alpha": "0.2"}]
)
def test_equals_the_literal_transcription(seed: int, fields: dict) -> None:
    fields = {k: Fraction(v) if k in ("eps", "alpha") else v for k, v in fields.items()}
    clf, x, rng = toy_clf(seed), toy_images(8, seed=seed), SampleRNG.rows(8, seed)
    median = float(TTC(preset="reference", **fields).drift(clf, x, rng).median())
    ttc = TTC(preset="reference", tau=median * 1.0001, **fields)
    literal_tower = copy.deepcopy(clf.vlm).double()

    def encode(image: Tensor) -> Tensor:
        return literal_tower.image((image[None] - 0.5) / 0.25)[0]

    noise = ttc._look(clf.vlm, x, rng).noise
    if ttc.norm == "linf":
        assert torch.equal(noise, drawn(ttc, x, rng))
    want, judged = ttc_literal.logits(
        encode, x, noise, clf.weights, clf.scale, eps=float(ttc.eps), alpha=float(ttc.alpha), tau=ttc.tau,
        steps=ttc.steps, clean_offset=ttc.clean_offset, norm=ttc.norm,
    )  # fmt: skip
    assert ttc.gate(clf, x, rng).tolist() == judged
    assert 0 < sum(judged) < 8, "both branches must be compared"
    got = ttc.apply(clf)(x, rng)
    # an l2 start may lie almost on the image, where fp32 loses digits of the distance's gradient
    assert float((got - want).abs().max() / want.abs().max()) < (1e-5 if ttc.norm == "linf" else 1e-4)


# exact savings


@pytest.mark.parametrize("tau", [NEVER, ALWAYS, None])
@pytest.mark.parametrize("clean_offset", ["zero", "noise"])
def test_working_on_gated_images_only_changes_nothing(tau: float | None, clean_offset: str) -> None:
    clf, x, rng = toy_clf(), toy_images(8), SampleRNG.rows(8)
    drift = TTC().drift(clf, x, rng)
    ttc = TTC(tau=tau or float(drift.median()), clean_offset=clean_offset)
    gate, vlm = ttc.gate(clf, x, rng), clf.vlm
    noise = drawn(ttc, x, rng)
    every = counterattack(vlm, x, noise, vlm.encode_image(x, normalize=False), 4 * U, U, "linf", ttc.weights)
    kept = x if clean_offset == "zero" else (x + noise).clamp(0, 1)
    full = clf(torch.where(gate.view(-1, 1, 1, 1), every, kept))
    torch.testing.assert_close(ttc.apply(clf)(x, rng), full, rtol=0, atol=1e-5)
    torch.testing.assert_close(ttc.apply(clf).seen(x, rng), torch.where(gate.view(-1, 1, 1, 1), every, kept))


def test_working_on_gated_images_only_is_bit_exact_for_a_pixelwise_tower() -> None:
    clf = clf_of(lambda x: torch.tanh(x.flatten(1)), size=2)
    x, rng = toy_images(8, size=2), SampleRNG.rows(8)
    ttc = TTC(tau=float(TTC().drift(clf, x, rng).median()))
    both = ttc.apply(clf).features(x, rng)
    alone = torch.cat([ttc.apply(clf).features(x[i : i + 1], rng[i : i + 1]) for i in range(8)])
    assert 0 < int(ttc.gate(clf, x, rng).sum()) < 8
    assert torch.equal(both, alone)


@pytest.mark.parametrize("clean_offset", ["zero", "noise"])
def test_tower_passes(clean_offset: str) -> None:
    clf, x, rng = toy_clf(), toy_images(8), SampleRNG.rows(8)
    drift = TTC().drift(clf, x, rng)
    for tau, gated in ((NEVER, 0), (ALWAYS, 8), (float(drift.sort().values[3]), 3)):
        defended = TTC(tau=tau, clean_offset=clean_offset).apply(clf)
        with clf.vlm.counting() as count, torch.no_grad():
            defended(x, rng)
        assert (count.forwards, count.backwards) == (16 + 3 * gated, 2 * gated)


def test_a_differentiated_call_costs_one_more_forward() -> None:
    clf, x, rng = toy_clf(), toy_images(8).requires_grad_(True), SampleRNG.rows(8)
    for name in ("exact", "bpda"):
        ttc = TTC(tau=ALWAYS)
        view = ttc.apply(clf) if name == "exact" else ttc.surrogate(clf, None, name)
        with clf.vlm.counting() as count:
            view(x, rng).sum().backward()
        assert (count.forwards, count.backwards) == (40, 24), name


# bounds and branches


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_offset_stays_in_the_ball_and_the_box(norm: str) -> None:
    clf, x = toy_clf(), toy_images(16).round(decimals=1)
    assert int(((x == 0) | (x == 1)).sum()) > 50
    ttc = TTC(norm=norm, tau=ALWAYS, steps=6, eps=Fraction(1, 10), alpha=Fraction(1, 20))
    delta = offset(ttc, clf, x)
    size = delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert float(size.max()) <= 0.1 + 1e-6
    assert float(size.min()) > 0.02
    moved = x + delta
    assert float(moved.min()) >= -1e-6
    assert float(moved.max()) <= 1 + 1e-6


def test_no_steps_is_random_noise_for_everybody() -> None:
    clf, x, rng = toy_clf(), toy_images(6), SampleRNG.rows(6)
    noisy = (x + drawn(TTC(), x, rng)).clamp(0, 1)
    for tau in (NEVER, ALWAYS):
        got = TTC(steps=0, tau=tau, clean_offset="noise").apply(clf)(x, rng)
        torch.testing.assert_close(got, clf(noisy), rtol=0, atol=1e-5)


def test_the_distance_sees_the_length_of_features() -> None:
    """e(x) is a fixed direction times the mean brightness: unit features never move, the offset must."""
    clf = clf_of(lambda x: x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([[3.0, 4.0]]), size=2)
    x = torch.full((1, 3, 2, 2), 0.5)
    moved = offset(TTC(tau=ALWAYS, beta=50.0), clf, x)
    start = drawn(TTC(), x, SampleRNG.rows(1))
    toward = torch.sign(start.mean())
    torch.testing.assert_close(moved, (start + 2 * U * toward).clamp(-4 * U, 4 * U), rtol=0, atol=1e-6)


def test_images_judged_clean_are_scored_as_they_are_with_offset_zero() -> None:
    clf, x = toy_clf(), toy_images(4)
    plain = TTC(tau=NEVER, clean_offset="zero").apply(clf)(x, SampleRNG.rows(4))
    torch.testing.assert_close(plain, clf(x))
    noisy = TTC(tau=NEVER).apply(clf)(x, SampleRNG.rows(4))
    assert float((noisy - clf(x)).abs().max()) > 1e-3


def test_a_feature_of_length_zero_is_clean_and_warns() -> None:
    clf = clf_of(lambda x: torch.stack([x.mean(dim=(1, 2, 3)) - 0.5, 0 * x.mean(dim=(1, 2, 3))], 1), size=2)
    x = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 0.9)]).requires_grad_(True)
    rng = SampleRNG.rows(2)
    with pytest.warns(UserWarning, match="length zero and takes those images for clean"):
        assert TTC(tau=ALWAYS).gate(clf, x, rng).tolist() == [False, True]
    with pytest.warns(UserWarning, match="length zero"):
        logits = TTC(tau=ALWAYS).apply(clf)(x, rng)
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert bool(torch.isfinite(logits).all() & torch.isfinite(grad).all())


# gradients


def test_gradients_of_apply_match_finite_differences_away_from_jumps() -> None:
    """With sign steps the offset is locally constant: exact, bpda and finite differences agree inside the box."""
    clf, x = toy_clf(), 0.2 + 0.6 * toy_images(2)
    double = copy.deepcopy(clf.vlm).double()
    clf = replace(clf, vlm=double, weights=clf.weights.double())
    x, rng, ttc = x.double(), SampleRNG.rows(2), TTC(tau=ALWAYS)

    def value(at: Tensor) -> Tensor:
        return ttc.apply(clf)(at, rng)[:, 0].sum()

    leaf = x.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(value(leaf), leaf)
    (bpda,) = torch.autograd.grad(ttc.surrogate(clf, None, "bpda")(leaf, rng)[:, 0].sum(), leaf)
    torch.testing.assert_close(exact, bpda)
    along = torch.zeros_like(x)
    along[:, :, 3, 4] = 1.0
    h = 1e-6
    slope = (value(x + h * along) - value(x - h * along)) / (2 * h)
    assert float(slope) == pytest.approx(float((exact * along).sum()), rel=1e-4)


def test_l2_steps_are_differentiated_through() -> None:
    clf, x = toy_clf(), 0.2 + 0.6 * toy_images(2)
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    x, rng = x.double(), SampleRNG.rows(2)
    ttc = TTC(norm="l2", eps=Fraction(2), alpha=Fraction(1, 2), steps=3, tau=ALWAYS, beta=0.5)

    def value(at: Tensor) -> Tensor:
        return ttc.apply(clf)(at, rng)[:, 0].sum()

    leaf = x.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(value(leaf), leaf)
    (bpda,) = torch.autograd.grad(ttc.surrogate(clf, None, "bpda")(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    slope = float((value(x + h * along) - value(x - h * along)) / (2 * h))
    assert slope == pytest.approx(float((exact * along).sum()), rel=1e-4)
    assert slope != pytest.approx(float((bpda * along).sum()), rel=1e-2)


@pytest.mark.parametrize("tower", ["conv", "attention"])
def test_smooth_keeps_the_value_and_bends_the_gradient(tower: str) -> None:
    clf, x, rng = toy_clf(tower=tower), toy_images(4).requires_grad_(True), SampleRNG.rows(4)
    ttc = TTC(tau=ALWAYS)
    out = {n: ttc.surrogate(clf, None, n)(x, rng) for n in ("bpda", "smooth")}
    torch.testing.assert_close(out["bpda"], out["smooth"], rtol=0, atol=1e-5)
    grads = {n: torch.autograd.grad(o.logsumexp(1).sum(), x)[0] for n, o in out.items()}
    assert bool(torch.isfinite(grads["smooth"]).all())
    cosine = torch.cosine_similarity(grads["bpda"].flatten(1), grads["smooth"].flatten(1))
    assert float(cosine.max()) < 0.999


def test_penalty_is_the_missing_drift() -> None:
    clf, x, rng = toy_clf(), toy_images(8), SampleRNG.rows(8)
    drift = TTC().drift(clf, x, rng)
    ttc = TTC(tau=float(drift.median()))
    cost = ttc.penalty(clf)
    torch.testing.assert_close(cost(x, rng), (1.1 * ttc.tau - drift).clamp(min=0))
    torch.testing.assert_close(ttc.penalty(clf, margin=0.5)(x, rng), (ttc.tau + 0.5 - drift).clamp(min=0))
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(cost(leaf, rng).sum(), leaf)
    step = (x - 1e-3 * grad.sign()).clamp(0, 1)
    lower = ttc.drift(clf, step, rng) > drift
    judged = cost(x, rng) > 0
    assert bool(lower[judged].all())
    assert float(grad[~judged].abs().max()) == 0


# what must not happen


def test_flags_survive_a_tower_that_fails_midway() -> None:
    class Fails(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            if self.calls == 5:
                raise RuntimeError("out of memory")
            return torch.tanh(x.flatten(1)) @ self.w

    tower = Fails().eval()
    clf = clf_of(tower, size=2)
    Fails.calls = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        TTC(tau=ALWAYS, steps=4).apply(clf)(toy_images(2, size=2), SampleRNG.rows(2))
    assert tower.w.requires_grad
    assert tower.w.grad is None
    assert not tower.training
    assert torch.is_grad_enabled()


def test_runs_where_autograd_is_off() -> None:
    clf, x, rng = toy_clf(), toy_images(4), SampleRNG.rows(4)
    ttc = TTC(tau=ALWAYS)
    want = ttc.apply(clf)(x, rng)
    with torch.inference_mode():
        got = ttc.apply(clf)(x * 1.0, rng)
    torch.testing.assert_close(got.clone(), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": Fraction(-1, 255)}, "eps must not be negative"),
        ({"eps": 4}, r"eps must be in \(0, 1\], got 4; write 4/255"),
        ({"alpha": 0}, "alpha must be positive, got 0; write 1/255"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"tau": 0.0}, r"tau must be positive, got 0.0; find it with calibrate"),
        ({"tau": float("nan")}, "tau must be a number, got nan"),
        ({"norm": "l1"}, "unknown norm 'l1'; did you mean"),
        ({"clean_offset": "none"}, "unknown clean_offset 'none'"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTC(**fields)


def test_bad_images_and_names() -> None:
    clf = toy_clf()
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        TTC().apply(clf)(toy_images(2) - 0.5, SampleRNG.rows(2))
    with pytest.raises(ValueError, match="images must be 8 x 8"):
        TTC().apply(clf)(toy_images(2, size=16), SampleRNG.rows(2))
    with pytest.raises(ValueError, match="unknown surrogate of TTC 'bdpa'; did you mean 'bpda'"):
        TTC().surrogate(clf, None, "bdpa")
    with pytest.raises(ValueError, match="rng carries 3 sample ids but x has 2 rows"):
        TTC().apply(clf)(toy_images(2), SampleRNG.rows(3))


def test_reference_preset_is_the_published_one() -> None:
    assert TTC(preset="reference") == TTC()
    constants = {"eps": "4/255", "alpha": "1/255", "tau": 0.2, "steps": 2, "beta": 2.0, "clean_offset": "noise"}
    assert all(str(getattr(TTC(), k)) == str(v) for k, v in constants.items())
    assert TTC(preset="reference", tau=0.3).tau == 0.3
