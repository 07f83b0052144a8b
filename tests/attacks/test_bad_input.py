"""What cannot be attacked is refused in words, or marked: no attack may take nonsense for robustness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import Constant, Conv, Fixed, images, labels_of
from torch import Tensor

from ironclip.attacks.pgd import PGD
from ironclip.core.grad import NoGradientError, loss_and_grad
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import straight_through
from ironclip.registry import build_attack

X = images(4)
RNG = SampleRNG.rows(4)
GRADIENT = [
    "PGD(steps=3)",
    "FGSM()",
    "APGD(steps=3)",
    "APGD(steps=3, loss=dlr)",
    "APGDT(steps=3, targets=2)",
    "FABT(steps=3, targets=2)",
    "CW(steps=3, search=2)",
    "Transfer(steps=3)",
    "Universal(epochs=2)",
]
ASKING = ["Square(queries=6)", "RayS(queries=6)", "RandomPoints(points=3)"]
ROW = "AutoAttack(members=('APGD(steps=3)', 'Square(queries=3)'))"


class Five:
    """Says that it has five classes and returns ``columns`` logits."""

    k = 5

    def __init__(self, columns: int) -> None:
        self.body = Conv(columns)

    def __call__(self, x: Tensor, rng: Any = None) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("columns", [4, 6])
@pytest.mark.parametrize("text", [*GRADIENT, "Square(queries=6)", "RayS(queries=6)", ROW])
def test_a_wrong_number_of_columns(text: str, columns: int) -> None:
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"the classifier has 5 classes but returned \(4, {columns}\)"):
        build_attack(text)(Five(columns), X, y, rng=RNG)


@pytest.mark.parametrize("text", [*GRADIENT, *ASKING, ROW])
def test_nan_logits(text: str) -> None:
    clf, y = Fixed(lambda x: Conv()(x) * float("nan")), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="the classifier returned NaN or infinite logits"):
        build_attack(text)(clf, X, y, rng=RNG)


@pytest.mark.parametrize(
    "text", ["PGD(steps=3)", "APGD(steps=3)", "Transfer(steps=3)", "Square(queries=6)", "RandomPoints(points=3)", ROW]
)
def test_probabilities_are_named(text: str) -> None:
    conv = Conv(scale=0.5)
    clf = Fixed(lambda x: conv(x).softmax(dim=1))
    said = build_attack(text)(clf, X, labels_of(conv, X), rng=RNG).notes
    assert "probabilities: every row sums to 1; return logits, their gradients vanish less" in said
    assert not any("probabilities" in n for n in build_attack(text)(conv, X, labels_of(conv, X), rng=RNG).notes)


@pytest.mark.parametrize("text", [t for t in GRADIENT if not t.startswith(("CW", "FABT"))])
def test_a_constant_is_flagged_as_without_gradient(text: str) -> None:
    result = build_attack(text)(Constant((2.0, 1.0, 0.0, 0.5)), X, torch.zeros(4, dtype=torch.long), rng=RNG)
    assert bool(result.zero_grad.all())
    assert not bool(result.success.any())
    assert result.zero_pixels.tolist() == [1.0] * 4


@pytest.mark.parametrize("text", ["PGD(steps=3, loss=ce_t)", "PGD(steps=3, loss=dlr_t)", "PGD(steps=3, loss=margin_t)"])
def test_a_target_that_is_the_label(text: str) -> None:
    y = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"target equals the label in rows \[1, 3\]; a target must be another class"):
        build_attack(text)(Conv(), X, y, rng=RNG, target=torch.tensor([1, 1, 0, 3]))


def test_queries_and_budgets() -> None:
    for name in ("Square", "RayS"):
        with pytest.raises(ValueError, match=r"queries .*at least 1.* got 0"):
            build_attack(f"{name}(queries=0)")
    for name in ("PGD", "APGD", "APGDT", "FABT", "Square", "RayS", "Transfer", "FeaturePGD", "RandomPoints", "FGSM"):
        with pytest.raises(ValueError, match=r"eps must be in \(0, 1\], got 4; write 4/255"):
            build_attack(f"{name}(eps=4)")


def test_fewer_classes_than_a_loss_needs() -> None:
    y = torch.zeros(4, dtype=torch.long)
    two, three = Conv(2), Conv(3)
    assert build_attack("APGD(steps=2, loss=dlr)")(two, X, y, rng=RNG).notes == (
        "dlr needs 3 classes, got 2: margin used instead",
    )
    assert (
        "dlr_t needs 4 classes, got 3: margin_t used instead"
        in build_attack("APGDT(steps=2)")(three, X, y, rng=RNG).notes
    )
    with pytest.raises(ValueError, match="an attack needs at least 2 classes, got 1; pass more class names"):
        build_attack("PGD(steps=2)")(Conv(1), X, y, rng=RNG)


@pytest.mark.parametrize("text", [*GRADIENT, "AutoAttack(members=('APGD(steps=3)',))"])
@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (lambda x: Conv()(x.detach()).detach(), "carries no gradient to the pixels .* attack its surrogate"),
        (lambda x: Conv()(torch.from_numpy(x.numpy())), "takes the pixels out of autograd .NumPy, PIL."),
    ],
    ids=["detached", "numpy"],
)
def test_no_gradient_says_what_to_use_instead(text: str, hidden: Any, words: str) -> None:
    clf = Fixed(hidden)
    with pytest.raises(NoGradientError, match=words):
        build_attack(text)(clf, X, labels_of(Conv(), X), rng=RNG)


@pytest.mark.parametrize("text", ASKING)
def test_attacks_that_only_ask_need_no_gradient(text: str) -> None:
    conv = Conv()
    clf = Fixed(lambda x: conv(torch.from_numpy(x.numpy())))
    assert build_attack(text)(clf, X, labels_of(conv, X), rng=RNG).backwards.tolist() == [0] * 4


def test_bpda_gets_through_numpy() -> None:
    conv = Conv()
    clf = straight_through(Fixed(lambda x: conv(torch.from_numpy(x.numpy().copy()))), conv)
    y = labels_of(conv, X)
    ours, plain = (PGD(eps="2/255", steps=5)(c, X, y, rng=RNG) for c in (clf, conv))
    assert torch.equal(ours.success, plain.success)
    g = loss_and_grad(clf, X, lambda z: margin(z, y), RNG)
    torch.testing.assert_close(g.grad, loss_and_grad(conv, X, lambda z: margin(z, y), RNG).grad)


def test_another_runtime_error_stays_what_it_was() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        PGD(steps=1)(Fixed(broken), X, torch.zeros(4, dtype=torch.long), rng=RNG)
