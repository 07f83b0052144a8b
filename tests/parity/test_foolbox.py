"""PGD against foolbox with the same start and settings: linf to the last bit, l2 to float noise."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from attack_toys import Conv, images, labels_of
from torch import Tensor

from ironclip.attacks.pgd import PGD
from ironclip.core.ball import start_delta
from ironclip.core.rng import SampleRNG

foolbox = pytest.importorskip("foolbox")
ep = pytest.importorskip("eagerpy")

B = 32
RNG = SampleRNG.of(3, [f"s{i}" for i in range(B)])


def peer(clf: Conv, x: Tensor, y: Tensor, attack: PGD, norm: str) -> Tensor:
    """foolbox's result from our start."""
    base = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    start = x + start_delta(x, float(attack.eps), norm, attack.start, RNG.fold("pgd", 0).fold("start"))

    class FromOurStart(base):  # type: ignore[misc, valid-type]
        def get_random_start(self, x0: object, epsilon: float) -> object:
            return ep.astensor(start)

    run = FromOurStart(abs_stepsize=float(attack.step_size), steps=attack.steps, random_start=True)
    model = foolbox.PyTorchModel(clf.eval(), bounds=(0, 1), device="cpu")
    return run.run(model, x, foolbox.criteria.Misclassification(y), epsilon=float(attack.eps))


@pytest.mark.parametrize("start", ["uniform", "zero"])
@pytest.mark.parametrize("eps", [Fraction(1, 255), Fraction(4, 255), Fraction(1, 10)])
def test_linf_equals_foolbox_to_the_last_bit(eps: Fraction, start: str) -> None:
    clf, x = Conv(), images(B, low=0.0, high=1.0)
    y = labels_of(clf, x)
    attack = PGD(eps=eps, steps=10, start=start, returned="last")
    ours = attack(clf, x, y, rng=RNG)
    theirs = peer(clf, x, y, attack, "linf")
    assert torch.equal(ours.x_adv, theirs)
    assert torch.equal(ours.success, labels_of(clf, theirs) != y)


@pytest.mark.parametrize("start", ["uniform", "zero"])
def test_l2_equals_foolbox_to_float_noise(start: str) -> None:
    """Both normalise the gradient and scale back to the sphere; they guard the division by zero differently."""
    clf, x = Conv(), images(B, low=0.0, high=1.0)
    y = labels_of(clf, x)
    attack = PGD(eps=Fraction(1, 4), norm="l2", steps=10, start=start, returned="last")
    ours = attack(clf, x, y, rng=RNG)
    theirs = peer(clf, x, y, attack, "l2")
    torch.testing.assert_close(ours.x_adv, theirs, atol=2e-6, rtol=0)
    assert torch.equal(ours.success, labels_of(clf, theirs) != y)


def test_best_point_is_never_weaker_than_the_last() -> None:
    clf, x = Conv(), images(B)
    y = labels_of(clf, x)
    best, last = (PGD(eps="2/255", steps=10, returned=r)(clf, x, y, rng=RNG) for r in ("best", "last"))
    assert bool((best.success | ~last.success).all())
