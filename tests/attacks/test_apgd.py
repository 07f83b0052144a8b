"""Auto-PGD: its schedule, its first step and its laws."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from attack_toys import Conv, Fixed, Linear, Noisy, images, labels_of, tensor, two_class

from ironclip.attacks._apgd import checkpoints
from ironclip.attacks.apgd import APGD, APGDT
from ironclip.attacks.pgd import PGD
from ironclip.core.losses import dlr_t, margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted, eot

EPS = Fraction(4, 255)


@pytest.fixture(scope="module")
def conv() -> Conv:
    return Conv()


@pytest.mark.parametrize(
    ("steps", "marks"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (10, list(range(2, 11))),
        (1, [1]),
    ],
)
def test_checkpoints(steps: int, marks: list[int]) -> None:
    assert checkpoints(steps) == marks


def test_first_step_puts_every_pixel_with_gradient_at_the_boundary(conv: Conv) -> None:
    x = images(8)
    result = APGD(eps=EPS, steps=1, trace=True)(conv, x, labels_of(conv, x), rng=SampleRNG.rows(8))
    assert result.trace is not None
    torch.testing.assert_close(result.trace["step_size"][0], torch.full((8,), 2 * float(EPS)))
    view, seen = Fixed(lambda v: seen.append(v.detach()) or conv(v)), []
    APGD(eps=EPS, steps=1)(view, x, labels_of(conv, x), rng=SampleRNG.rows(8))
    delta = (seen[-1] - x).abs()
    torch.testing.assert_close(delta, torch.full_like(delta, float(EPS)), atol=1e-6, rtol=0)


def test_scaled_loss_gives_the_same_iterates() -> None:
    base = Linear(5, scale=0.2)
    x, rng = images(4), SampleRNG.rows(4)
    y = labels_of(base, x)
    seen: dict[float, list[torch.Tensor]] = {1.0: [], 8.0: []}
    for factor, points in seen.items():
        clf = Fixed(lambda v, points=points, factor=factor: points.append(v.detach()) or base(v) * factor)
        APGD(eps=EPS, steps=12, loss="margin")(clf, x, y, rng=rng)
    assert all(torch.equal(a, b) for a, b in zip(seen[1.0], seen[8.0], strict=True))


def test_constant_loss_halves_the_step_at_every_checkpoint() -> None:
    clf = Fixed(lambda v: torch.tensor([1.0, 0.0, -1.0]) + 0 * v.flatten(1).sum(1, keepdim=True))
    result = APGD(eps=EPS, steps=50, trace=True)(clf, images(2), torch.tensor([0, 0]), rng=SampleRNG.rows(2))
    assert result.trace is not None
    marks = checkpoints(50)
    for i in range(50):
        want = 2 * float(EPS) / 2 ** sum(m <= i for m in marks)
        assert result.trace["step_size"][i].tolist() == pytest.approx([want] * 2)
    assert bool(result.zero_grad.all())


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_loss_never_falls(conv: Conv, loss: str, norm: str) -> None:
    x = images(8)
    eps = EPS if norm == "linf" else Fraction(1, 4)
    result = APGD(eps=eps, norm=norm, loss=loss, steps=20, trace=True)(
        conv, x, labels_of(conv, x), rng=SampleRNG.rows(8)
    )
    assert result.trace is not None
    for a, b in pairwise(result.trace["best_loss"]):
        kept = ~result.zero_grad  # where dlr died the margin goes on, on another scale
        assert bool((b >= a)[kept].all())
    assert not result.zero_grad.any() or loss == "dlr"


def test_solves_a_linear_model_exactly() -> None:
    w = tensor(3, 8, 8)
    clf, x = two_class(w), images(4)
    y = torch.zeros(4, dtype=torch.long)
    result = APGD(eps=EPS, steps=10, loss="margin")(clf, x, y, rng=SampleRNG.rows(4))
    torch.testing.assert_close(result.loss, margin(clf(x), y) + float(EPS) * w.abs().sum(), rtol=1e-4, atol=1e-4)


def test_is_at_least_as_strong_as_pgd(conv: Conv) -> None:
    x = images(48)
    y, rng = labels_of(conv, x), SampleRNG.rows(48)
    auto = APGD(eps=Fraction(2, 255), steps=40)(conv, x, y, rng=rng)
    plain = PGD(eps=Fraction(2, 255), steps=40)(conv, x, y, rng=rng)
    assert auto.success.sum() >= plain.success.sum() - 1
    assert 8 < int(auto.success.sum()) < 40


def test_costs(conv: Conv) -> None:
    x = images(4)
    y = labels_of(conv, x)
    r = APGD(eps=EPS, steps=7, restarts=2)(conv, x, y, rng=SampleRNG.rows(4))
    assert (r.forwards.tolist(), r.backwards.tolist()) == ([16] * 4, [14] * 4)
    noisy = eot(Noisy(conv, 0.01), 3)
    r = APGD(eps=EPS, steps=7, policy="first_success")(noisy, x, y, rng=SampleRNG.rows(4))
    assert (r.forwards.tolist(), r.backwards.tolist()) == ([24] * 4, [21] * 4)
    r = APGDT(eps=EPS, steps=7, targets=3)(conv, x, y, rng=SampleRNG.rows(4))
    assert (r.forwards.tolist(), r.backwards.tolist()) == ([1 + 24] * 4, [21] * 4)
    zero = APGD(eps=EPS, steps=0)(conv, x, y, rng=SampleRNG.rows(4))
    assert (zero.forwards.tolist(), zero.backwards.tolist()) == ([1] * 4, [0] * 4)


@pytest.mark.parametrize("attack", [APGD(eps="2/255", steps=15), APGDT(eps="2/255", steps=10, targets=4)], ids=repr)
def test_dropping_fooled_images_changes_no_flag(conv: Conv, attack: APGD | APGDT) -> None:
    x = images(32)
    y, rng = labels_of(conv, x), SampleRNG.rows(32)
    full = attack(conv, x, y, rng=rng)
    view = counted(conv)
    cut = replace(attack, policy="first_success")(view, x, y, rng=rng)
    assert torch.equal(full.success, cut.success)
    assert 4 < int(cut.success.sum()) < 32
    assert view.count.forwards == int(cut.forwards.sum()) < int(full.forwards.sum())
    torch.testing.assert_close(full.x_adv[~cut.success], cut.x_adv[~cut.success], atol=1e-6, rtol=0)


def test_targets_are_the_best_wrong_classes_and_the_union_wins(conv: Conv) -> None:
    x = images(16)
    y, rng = labels_of(conv, x), SampleRNG.rows(16)
    three = APGDT(eps="2/255", steps=10, targets=3)(conv, x, y, rng=rng)
    one = APGDT(eps="2/255", steps=10, targets=1)(conv, x, y, rng=rng)
    assert bool((three.success | ~one.success).all())
    assert three.notes[-1] == "3 of 9 other classes as targets"
    assert APGDT(eps="2/255", steps=1, targets=50)(conv, x, y, rng=rng).notes == ("9 of 9 other classes as targets",)
    with torch.no_grad():
        second = conv(x).scatter(1, y[:, None], -torch.inf).argmax(1)
        torch.testing.assert_close(one.loss, dlr_t(conv(one.x_adv), y, second), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_few_classes_use_the_margin_towards_the_target(k: int) -> None:
    clf, x = Linear(k), images(4)
    y = labels_of(clf, x)
    a = APGDT(eps=EPS, steps=4)(clf, x, y, rng=SampleRNG.rows(4))
    b = APGDT(eps=EPS, steps=4, loss="margin_t")(clf, x, y, rng=SampleRNG.rows(4))
    assert torch.equal(a.x_adv, b.x_adv)
    assert a.notes[0] == f"dlr_t needs 4 classes, got {k}: margin_t used instead"


def test_images_wrong_from_the_start_cost_one_forward_when_success_is_enough(conv: Conv) -> None:
    x = images(4)
    y = (labels_of(conv, x) + 1) % 10
    r = APGDT(eps=EPS, steps=5, policy="first_success")(conv, x, y, rng=SampleRNG.rows(4))
    assert torch.equal(r.x_adv, x)
    assert r.forwards.tolist() == [1] * 4
    assert bool(r.success.all())


def test_reference_quirk_only_changes_step_sizes(conv: Conv) -> None:
    x = images(32)
    y, rng = labels_of(conv, x), SampleRNG.rows(32)
    base = APGD(eps="1/255", loss="dlr", steps=10, trace=True)
    plain, quirk = base(conv, x, y, rng=rng), replace(base, reference_quirk=True)(conv, x, y, rng=rng)
    assert torch.equal(plain.success, quirk.success)
    assert plain.trace is not None
    assert quirk.trace is not None
    changed = (plain.trace["step_size"] != quirk.trace["step_size"]).any(0)
    assert 0 < int(changed.sum()) < 32


def test_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\), got 1.5; write 0.75"):
        APGD(rho=1.5)
    with pytest.raises(ValueError, match="targets must be at least 1, got 0"):
        APGDT(targets=0)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        APGD(norm="l1")
    with pytest.raises(ValueError, match="unknown loss 'dlr_t'"):
        APGD(loss="dlr_t")
    with pytest.raises(ValueError, match="unknown loss 'ce'; did you mean 'ce_t'"):
        APGDT(loss="ce")
