"""Compositions: the union per image, survivors only, and a result that names its members."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from attack_toys import Conv, Linear, Noisy, images, labels_of
from torch import Tensor

from ironclip.attacks.autoattack import MEMBERS, STANDARD, AutoAttack
from ironclip.attacks.square import Square
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted, eot
from ironclip.registry import build_attack

SMALL = ("APGD(steps=6)", "APGDT(steps=4, targets=2)", "FABT(steps=4, targets=2)", "Square(queries=30)")
EPS = Fraction(2, 255)


@pytest.fixture(scope="module")
def conv() -> Conv:
    return Conv()


def test_union_of_survivors_equals_the_union_of_full_runs(conv: Conv) -> None:
    x = images(40)
    y, rng = labels_of(conv, x), SampleRNG.of(1, [f"s{i}" for i in range(40)])
    y[5] = (y[5] + 1) % 10
    attack = AutoAttack(eps=EPS, members=SMALL)
    result = attack(conv, x, y, rng=rng)
    union = labels_of(conv, x) != y
    for member in attack.members:
        alone = attack.attack(member)(conv, x, y, rng=attack.stream(rng, member))
        assert result.trace is not None
        line = result.trace[member][0]
        ran = ~line.isnan()
        assert torch.equal(ran, ~union), "exactly the survivors run"
        assert torch.equal(line[ran] == 1, alone.success[ran])
        union |= alone.success
    assert torch.equal(result.success, union)
    assert 8 < int(union.sum()) < 40
    assert torch.equal(labels_of(conv, result.x_adv) != y, result.success)
    torch.testing.assert_close(result.loss, margin(conv(result.x_adv), y))
    assert torch.equal(result.x_adv[5], x[5])


def test_result_names_members_outcomes_and_costs(conv: Conv) -> None:
    x = images(12)
    y = labels_of(conv, x)
    view = counted(conv)
    result = AutoAttack(eps=EPS, members=SMALL)(view, x, y, rng=SampleRNG.rows(12))
    assert result.notes[0].startswith("members: APGD(steps=6), APGDT(targets=2, steps=4), FABT(")
    assert result.trace is not None
    for note, member in zip(result.notes[1:5], result.trace, strict=True):
        line = result.trace[member]
        assert note == f"{member}: fooled {int((line == 1).sum())} of {int((~line.isnan()).sum())}"
    assert view.count.forwards == int(result.forwards.sum())
    assert view.count.backwards == int(result.backwards.sum())
    held = ~result.success
    full = 1 + 7 + (1 + 2 * 5) + (1 + 2 * 8) + 31 + 1
    assert bool(held.any())
    assert result.forwards[held].tolist() == [full] * int(held.sum())


def test_wrong_images_cost_two_looks_and_stay(conv: Conv) -> None:
    x = images(3)
    y = (labels_of(conv, x) + 1) % 10
    result = AutoAttack(eps=EPS)(conv, x, y, rng=SampleRNG.rows(3))
    assert torch.equal(result.x_adv, x)
    assert result.forwards.tolist() == [2] * 3
    assert result.notes[1] == "APGD(): fooled 0 of 0"


def test_presets_are_the_published_compositions() -> None:
    assert build_attack("aa-standard") == AutoAttack(members=STANDARD)
    assert STANDARD == ("APGD()", "APGDT()", "FABT()", "Square()")
    rand = build_attack("aa-rand(eps=4/255)")
    assert isinstance(rand, AutoAttack)
    assert (rand.eot, rand.members, rand.eps) == (20, ("APGD()", "APGD(loss=dlr)"), Fraction(4, 255))
    assert build_attack("aa-fast").members == ("APGD()", "APGDT()")  # type: ignore[attr-defined]
    assert build_attack("aa-tecoa").binary == ("APGD()",)  # type: ignore[attr-defined]
    made = AutoAttack(eps=EPS, norm="l2").attack("Square()")
    assert made == Square(eps=EPS, norm="l2", policy="first_success")
    apgd, targeted, fab, square = (MEMBERS[m.removesuffix("()")]() for m in STANDARD)
    assert (apgd.steps, apgd.restarts, apgd.rho, apgd.loss) == (100, 1, 0.75, "ce")
    assert (targeted.steps, targeted.targets, targeted.loss) == (100, 9, "dlr_t")
    assert (fab.steps, fab.targets, fab.alpha_max, fab.eta, fab.beta, fab.restarts) == (100, 9, 0.1, 1.05, 0.9, 1)
    assert (square.queries, square.p, square.rescale, square.loss) == (5000, 0.8, False, "margin")


def test_two_classes_take_the_members_for_two() -> None:
    clf, x = Linear(2), images(4)
    y, rng = labels_of(clf, x), SampleRNG.rows(4)
    attack = AutoAttack(eps=EPS, members=("APGD(steps=3)", "APGD(steps=3, loss=dlr)"), binary=("APGD(steps=3)",))
    assert attack(clf, x, y, rng=rng).notes[0] == "members: APGD(steps=3)"
    assert "loss=dlr" in replace(attack, binary=())(clf, x, y, rng=rng).notes[0]


def test_eot_is_added_once_and_random_success_is_not_looked_at_again(conv: Conv) -> None:
    noisy, x = Noisy(conv, 0.02), images(6)
    y, rng = labels_of(conv, x), SampleRNG.rows(6)
    attack = AutoAttack(eps=EPS, members=("APGD(steps=3)",), eot=3)
    result = attack(noisy, x, y, rng=rng)
    assert set(result.forwards.tolist()) <= {6, 18}
    assert result.forwards.max() == 3 * (1 + 4 + 1)
    own = attack(eot(noisy, 2), x, y, rng=rng)
    assert own.forwards.max() == 2 * (1 + 4 + 1)


class MeanShift:
    """Images of a batch influence each other: the batch mean is taken off."""

    batchwise = True

    def __init__(self, base: Conv) -> None:
        self.base = base

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        z = self.base(x)
        return z - z.mean(0, keepdim=True)


def test_coupled_images_are_always_attacked_whole(conv: Conv) -> None:
    clf, x = MeanShift(conv), images(6)
    y = labels_of(clf, x)
    result = AutoAttack(eps=EPS, members=("APGD(steps=3)", "Square(queries=4)"))(clf, x, y, rng=SampleRNG.rows(6))
    assert result.forwards.tolist() == [1 + 4 + 5 + 1] * 6
    assert result.trace is not None
    assert not any(line.isnan().any() for line in result.trace.values())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"members": ()}, "members is empty"),
        ({"members": "APGD()"}, "members must be a tuple of specs"),
        ({"members": ("APGD(eps=1/255)", "APGD()")}, "names an attack twice"),
        ({"members": ("APGD(eps=2/255)",)}, "must not set eps or norm; set them on AutoAttack"),
        ({"members": ("APDG()",)}, "unknown member 'APDG'; did you mean 'APGD'"),
        ({"members": ("APGD(step=3)",)}, "unknown field of APGD 'step'"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"eot": 0}, "eot must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        AutoAttack(**fields)
    assert words in str(caught.value)
