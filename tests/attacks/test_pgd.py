"""FGSM and PGD against values worked out by hand, on models whose optimum is known."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from attack_toys import Constant, Conv, Fixed, Linear, Noisy, images, labels_of, tensor, two_class
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks.feature import FeaturePGD
from ironclip.attacks.pgd import FGSM, PGD
from ironclip.core.ball import NORMS, norms, project, start_delta
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted, eot
from ironclip.registry import build_attack

EPS = Fraction(4, 255)
R8 = SampleRNG.of(0, [f"s{i}" for i in range(8)])


@pytest.fixture(scope="module")
def conv() -> Conv:
    return Conv()


# FGSM


def test_fgsm_raises_the_margin_of_a_linear_model_by_eps_times_l1() -> None:
    w = tensor(3, 8, 8)
    clf, x = two_class(w), images(8)
    y = torch.zeros(8, dtype=torch.long)
    before = margin(clf(x), y)
    result = FGSM(eps=EPS, loss="margin")(clf, x, y, rng=R8)
    torch.testing.assert_close(result.loss - before, (float(EPS) * w.abs().sum()).expand(8), rtol=1e-4, atol=1e-4)
    assert (result.forwards.tolist(), result.backwards.tolist()) == ([2] * 8, [1] * 8)


def test_fgsm_moves_every_pixel_with_gradient_by_eps_and_no_other() -> None:
    w = tensor(3, 8, 8)
    w[:, :4] = 0
    clf, x = two_class(w), images(8)
    delta = FGSM(eps=EPS)(clf, x, labels_of(clf, x), rng=R8).x_adv - x
    assert not delta[:, :, :4].any()
    torch.testing.assert_close(delta[:, :, 4:].abs(), torch.full_like(delta[:, :, 4:], float(EPS)), atol=1e-7, rtol=0)


def test_fgsm_random_start_lies_in_half_the_ball_and_one_step_stays_in_the_whole() -> None:
    clf, x = two_class(tensor(3, 8, 8)), images(8)
    result = FGSM(eps=EPS, start="uniform")(clf, x, labels_of(clf, x), rng=R8)
    delta = (result.x_adv - x).abs()
    assert float(delta.max()) <= float(EPS) + 1e-7
    assert float(delta.min()) >= float(EPS) / 2 - 1e-6


def test_fgsm_never_beats_pgd(conv: Conv) -> None:
    x = images(64)
    y, rng = labels_of(conv, x), SampleRNG.rows(64)
    one, ten = FGSM(eps=EPS)(conv, x, y, rng=rng), PGD(eps=EPS, steps=10)(conv, x, y, rng=rng)
    assert one.success.sum() <= ten.success.sum() + 2
    assert ten.success.sum() > 20


# PGD, hand checks (a) to (g)


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_model_is_solved_in_two_eps_over_alpha_steps_from_any_start(seed: int) -> None:
    clf, x = two_class(tensor(3, 8, 8)), images(8)
    y = torch.zeros(8, dtype=torch.long)
    best = FGSM(eps=EPS, loss="margin")(clf, x, y, rng=R8).loss
    run = PGD(eps=EPS, alpha=EPS / 4, steps=8, loss="margin", start="uniform", returned="last")
    torch.testing.assert_close(run(clf, x, y, rng=replace(R8, seed=seed)).loss, best, rtol=1e-5, atol=1e-5)
    early = PGD(eps=EPS, alpha=EPS / 4, steps=6, loss="margin", start="uniform", returned="last")
    assert bool((early(clf, x, y, rng=replace(R8, seed=seed)).loss < best - 1e-3).all())


def test_a_l2_reaches_the_exact_optimum_of_a_linear_model() -> None:
    w = tensor(3, 8, 8)
    clf, x = two_class(w), images(8, low=0.4, high=0.6)
    y = torch.zeros(8, dtype=torch.long)
    result = PGD(eps=Fraction(1, 2), norm="l2", loss="margin", alpha="1/10", steps=60)(clf, x, y, rng=R8)
    want = margin(clf(x), y) + 0.5 * w.norm()
    torch.testing.assert_close(result.loss, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_b_budget_and_box_hold(conv: Conv, norm: str) -> None:
    x = images(8, low=0.0, high=1.0)
    eps = {"linf": EPS, "l2": Fraction(1, 4), "l1": Fraction(2)}[norm]
    out = PGD(eps=eps, norm=norm, steps=7)(conv, x, labels_of(conv, x), rng=R8).x_adv
    slack = 1e-7 if norm == "linf" else 1e-6
    assert bool((norms(out - x, norm) <= float(eps) + slack).all())
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_c_no_steps_return_the_start(conv: Conv, start: str) -> None:
    x = images(8)
    result = PGD(eps=EPS, steps=0, start=start)(conv, x, labels_of(conv, x), rng=R8)
    delta = start_delta(x, float(EPS), "linf", start, R8.fold("pgd", 0).fold("start"))
    assert torch.equal(result.x_adv, (x + delta).clamp(0, 1))
    assert result.forwards.tolist() == [1] * 8
    assert result.backwards.tolist() == [0] * 8


def test_d_budget_zero_returns_x(conv: Conv) -> None:
    x = images(8)
    assert torch.equal(PGD(eps=0)(conv, x, labels_of(conv, x), rng=R8).x_adv, x)


def test_e_batch_one_and_64_give_the_same_perturbation(conv: Conv) -> None:
    x = images(64)
    y, rng = labels_of(conv, x), SampleRNG.rows(64)
    whole = PGD(eps=EPS, steps=10)(conv, x, y, rng=rng)
    for i in (0, 17, 63):
        one = PGD(eps=EPS, steps=10)(conv, x[i : i + 1], y[i : i + 1], rng=rng[[i]])
        torch.testing.assert_close(one.x_adv[0], whole.x_adv[i], atol=1e-6, rtol=0)


def test_f_best_loss_never_falls_with_more_steps(conv: Conv) -> None:
    x = images(8)
    y = labels_of(conv, x)
    losses = [PGD(eps=EPS, alpha=EPS, steps=n, loss="margin")(conv, x, y, rng=R8).loss for n in (0, 1, 2, 3, 5, 8, 13)]
    for a, b in pairwise(losses):
        assert bool((b >= a).all())
    assert bool((losses[-1] > losses[0]).all())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8), ("linf", 2.0)])
def test_g_quadratic_toy_converges_to_the_projection_of_its_centre(norm: str, eps: float) -> None:
    x, c = images(4), images(4, seed=5, low=-0.2, high=1.2)
    flat = c.flatten(1)

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        return -(z - flat[rows]).square().sum(1)

    clf = Fixed(lambda v: v.flatten(1))
    alpha = 0.004 if norm == "linf" else 0.01
    run = Ascent(eps, alpha, 400, norm)
    result = ascend(clf, x, loss, lambda z, rows: torch.zeros(len(rows), dtype=torch.bool), run, R8[:4])
    if norm == "linf":
        want = project(c, x, eps, norm)
        torch.testing.assert_close(result.x_adv, want, atol=1.5 * alpha, rtol=0)
    else:
        inside = c.clamp(0, 1)
        want = project(inside, x, eps, norm)
        assert float(norms(result.x_adv - want, "l2").max()) < 0.1
        assert bool((-result.loss <= (want - c).square().flatten(1).sum(1) * 1.02).all())


# the rest


def test_margin_with_offset_50_is_the_plain_margin(conv: Conv) -> None:
    x = images(8)
    y = labels_of(conv, x)
    run = Ascent(float(EPS), float(EPS), 10, best=False)

    def offset(z: Tensor, rows: Tensor) -> Tensor:
        return -(50 - margin(z, y[rows])).relu()

    def fooled(z: Tensor, rows: Tensor) -> Tensor:
        return z.argmax(1) != y[rows]

    plain = build_attack("table2-cw")(conv, x, y, rng=R8)
    run = replace(run, eps=1 / 255, alpha=1 / 255)
    other = ascend(conv, x, offset, fooled, run, R8.fold("pgd", 0))
    assert bool((plain.loss.abs() < 50).all())
    assert torch.equal(plain.x_adv, other.x_adv)


def test_round_stays_on_the_lattice_inside_the_ball_and_is_judged_again(conv: Conv) -> None:
    x = (images(8, low=0.0, high=1.0) * 255).round() / 255
    y = labels_of(conv, x)
    result = PGD(eps=EPS, quantise="round", steps=10)(conv, x, y, rng=R8)
    k = result.x_adv * 255
    assert float((k - k.round()).abs().max()) < 1e-4
    assert float((result.x_adv - x).abs().max()) <= float(EPS) + 1e-7
    assert torch.equal(result.success, labels_of(conv, result.x_adv) != y)
    assert result.forwards.tolist() == [12] * 8
    assert "8-bit re-checked" in result.notes
    plain = PGD(eps=EPS, steps=10)(conv, x, y, rng=R8)
    assert result.success.sum() >= plain.success.sum() - 1
    halves = PGD(eps=Fraction(3, 510), quantise="round", steps=5)(conv, x, y, rng=R8)
    assert float((halves.x_adv - x).abs().max()) <= 1 / 255 + 1e-7


def test_round_refuses_a_budget_without_lattice_points(conv: Conv) -> None:
    x = (images(8) * 255).floor() / 255 + 0.5 / 255
    with pytest.raises(ValueError, match="eps=1/600 holds no 8-bit value around some pixels; use quantise=none"):
        PGD(eps=Fraction(1, 600), quantise="round", steps=1)(conv, x, labels_of(conv, x), rng=R8)


def test_round_never_leaves_the_budget_of_images_between_levels(conv: Conv) -> None:
    x = (images(8) * 255).floor() / 255 + 0.0007 / 255
    out = PGD(eps=Fraction(1, 255), quantise="round", steps=4)(conv, x, labels_of(conv, x), rng=R8).x_adv
    assert float((out - x).abs().max()) <= 1 / 255 + 1e-6


def test_fooled_samples_may_leave_without_changing_the_others(conv: Conv) -> None:
    x = images(32)
    y, rng = labels_of(conv, x), SampleRNG.rows(32)
    full = PGD(eps=Fraction(2, 255), steps=20, trace=True)(conv, x, y, rng=rng)
    cut = PGD(eps=Fraction(2, 255), steps=20, policy="first_success", trace=True)(conv, x, y, rng=rng)
    assert torch.equal(full.success, cut.success)
    assert 4 <= int(cut.success.sum()) <= 28
    torch.testing.assert_close(full.x_adv[~cut.success], cut.x_adv[~cut.success], atol=1e-6, rtol=0)
    assert bool((cut.forwards[cut.success] < 21).any())
    assert bool((cut.forwards[~cut.success] == 21).all())
    assert cut.trace is not None
    assert bool(cut.trace["loss"].isnan().any())
    view = counted(conv)
    again = PGD(eps=Fraction(2, 255), steps=20, policy="first_success")(view, x, y, rng=rng)
    assert view.count.forwards == int(again.forwards.sum())


def test_random_and_batch_coupled_classifiers_never_shrink() -> None:
    clf = Noisy(Conv(), 0.01)
    x = images(8)
    y = labels_of(clf, x)
    result = PGD(eps=Fraction(8, 255), steps=5, policy="first_success")(eot(clf, 2), x, y, rng=R8)
    assert result.forwards.tolist() == [12] * 8
    assert result.backwards.tolist() == [10] * 8


def test_restarts_are_merged_per_sample(conv: Conv) -> None:
    x = images(32)
    y, rng = labels_of(conv, x), SampleRNG.rows(32)
    base = PGD(eps=Fraction(1, 255), steps=3, loss="margin")
    run = Ascent(1 / 255, float(base.step_size), 3)
    singles = []
    for i in range(3):
        singles.append(
            ascend(conv, x, lambda z, r: margin(z, y[r]), lambda z, r: z.argmax(1) != y[r], run, rng.fold("pgd", i))
        )
    merged = replace(base, restarts=3)(conv, x, y, rng=rng)
    assert torch.equal(merged.success, torch.stack([s.success for s in singles]).any(0))
    torch.testing.assert_close(merged.loss, torch.stack([s.loss for s in singles]).amax(0))
    assert merged.forwards.tolist() == [12] * 32
    torch.testing.assert_close(margin(conv(merged.x_adv), y), merged.loss, atol=1e-5, rtol=1e-5)
    few = replace(base, restarts=3, policy="first_success")(conv, x, y, rng=rng)
    assert torch.equal(few.success, merged.success)
    assert bool((few.forwards[few.success] < 12).any())
    assert bool((few.forwards[~few.success] == 12).all())


class BlindSpot:
    """Rows with a dark first pixel have their label in third place, where dlr is constant; others do not."""

    def __init__(self) -> None:
        self.w = tensor(4, 192, seed=3)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        z = (x.flatten(1)[:, None] * self.w).sum(-1) * 0.01
        third = torch.tensor([0.0, 2.0, 5.0, -9.0])
        first = torch.tensor([5.0, 2.0, 0.0, -9.0])
        return z + torch.where(x[:, 0, 0, :1] < 0.5, third, first)


def test_dlr_falls_back_for_the_single_samples_without_gradient() -> None:
    clf, x = BlindSpot(), images(4)
    x[:2, 0, 0, 0], x[2:, 0, 0, 0] = 0.1, 0.9
    y = torch.zeros(4, dtype=torch.long)
    attack = PGD(eps=EPS, loss="dlr", steps=5)
    result = attack(clf, x, y, rng=R8[:4])
    assert result.zero_grad.tolist() == [True, True, False, False]
    assert result.forwards.tolist() == [7, 7, 6, 6]
    assert result.backwards.tolist() == [6, 6, 5, 5]
    assert result.notes == ("zero gradients: margin used on some samples",)
    assert result.success.tolist() == [True, True, False, False]
    torch.testing.assert_close(result.loss[:2], margin(clf(result.x_adv), y)[:2])
    alone = attack(clf, x[2:], y[2:], rng=R8[2:4])
    assert torch.equal(alone.x_adv, result.x_adv[2:])
    assert alone.notes == ()


def test_dlr_with_two_classes_is_the_margin_and_says_so() -> None:
    clf, x = Linear(2), images(4)
    y = labels_of(clf, x)
    a = PGD(eps=EPS, loss="dlr", steps=3)(clf, x, y, rng=R8[:4])
    b = PGD(eps=EPS, loss="margin", steps=3)(clf, x, y, rng=R8[:4])
    assert torch.equal(a.x_adv, b.x_adv)
    assert a.notes == ("dlr needs 3 classes, got 2: margin used instead",)


def test_targeted_losses_reach_their_class(conv: Conv) -> None:
    x = images(8)
    target = (labels_of(conv, x) + 1) % 10
    attack = PGD(eps=Fraction(32, 255), loss="margin_t", steps=30)
    result = attack(conv, x, labels_of(conv, x), rng=R8, target=target)
    assert bool((result.loss > 0).all())
    with pytest.raises(ValueError, match="loss 'margin_t' needs target classes"):
        attack(conv, x, target, rng=R8)
    with pytest.raises(ValueError, match="loss 'ce' takes no target; use ce_t, margin_t or dlr_t"):
        PGD()(conv, x, target, rng=R8, target=target)
    with pytest.raises(ValueError, match=r"target must lie in 0..9 for 10 classes, got 10..10"):
        attack(conv, x, labels_of(conv, x), rng=R8, target=target * 0 + 10)


def test_nan_logits_are_refused_by_name() -> None:
    clf = Fixed(lambda v: v.flatten(1)[:, :3] / 0)
    with pytest.raises(ValueError, match="the classifier returned NaN or infinite logits"):
        PGD(steps=1)(clf, images(2), torch.tensor([0, 1]), rng=SampleRNG.rows(2))


def test_trace_and_late_gain_describe_the_run() -> None:
    clf, x = two_class(tensor(3, 8, 8)), images(4)
    y = torch.zeros(4, dtype=torch.long)
    slow = PGD(eps=EPS, alpha=EPS / 100, steps=20, loss="margin", start="zero", trace=True)(clf, x, y, rng=R8[:4])
    assert slow.trace is not None
    assert {k: tuple(v.shape) for k, v in slow.trace.items()} == dict.fromkeys(slow.trace, (20, 4))
    torch.testing.assert_close(slow.late_gain, torch.full((4,), 0.1), atol=1e-3, rtol=0)
    done = PGD(eps=EPS, alpha=EPS / 2, steps=20, loss="margin", start="zero")(clf, x, y, rng=R8[:4])
    assert done.late_gain.tolist() == [0] * 4
    flat = PGD(eps=EPS, steps=4)(Constant((0.0, 1.0)), x, y, rng=R8[:4])
    assert flat.late_gain.tolist() == [0] * 4


PRESETS = {
    "table2-pgd10": (Fraction(1, 255), Fraction(1, 255), 10, "ce", "uniform", "last"),
    "table2-cw": (Fraction(1, 255), Fraction(1, 255), 10, "margin", "uniform", "last"),
    "tecoa": (Fraction(2, 255), Fraction(1, 255), 5, "ce", "uniform", "last"),
    "pmg": (Fraction(1, 255), Fraction(1, 255), 10, "ce", "uniform", "last"),
    "rtpt": (Fraction(4, 255), Fraction(1, 255), 7, "ce", "uniform", "last"),
    "apt": (Fraction(4, 255), Fraction(1, 255), 100, "ce", "uniform", "last"),
    "csr": (Fraction(1, 255), Fraction(1, 1020), 10, "ce", "uniform", "last"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_published_constants(name: str) -> None:
    a = build_attack(name)
    assert isinstance(a, PGD)
    assert (a.eps, a.step_size, a.steps, a.loss, a.start, a.returned) == PRESETS[name]
    assert (a.restarts, a.policy, a.norm, a.momentum) == (1, "max_loss", "linf", 0.0)


def test_step_of_relative_presets_follows_eps() -> None:
    assert build_attack("rtpt").step_size == Fraction(1, 255)  # type: ignore[attr-defined]
    assert PGD(eps=Fraction(1, 255), preset="rtpt").step_size == Fraction(1, 1020)
    assert PGD(eps=EPS).step_size == EPS / 16
    fare = build_attack("fare-train")
    assert isinstance(fare, FeaturePGD)
    assert (fare.eps, fare.alpha, fare.steps, fare.momentum) == (Fraction(2, 255), Fraction(1, 255), 10, 0.9)


def test_gradients_that_share_memory_are_not_written_to() -> None:
    """The gradient of a sum is one number seen everywhere; the label ranks third, so dlr gives way to the margin."""
    clf = Fixed(lambda v: v.sum((1, 2, 3))[:, None] * 0.01 + torch.tensor([0.0, 2.0, 5.0, -9.0]))
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    result = PGD(eps=EPS, loss="dlr", steps=2)(clf, x, y, rng=SampleRNG.rows(3))
    assert bool(result.zero_grad.all())
    assert bool(result.success.all())
