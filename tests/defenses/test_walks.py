"""Anti-Adversary and Hedge Defense: hand cases, the literal transcriptions, costs and derivatives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import walk_literal
from torch import Tensor
from toys import toy_clf, toy_images, words

import ironclip
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses.anti_adversary import AntiAdversary
from ironclip.defenses.hedge import Hedge, all_classes


def double(clf: ZeroShot) -> ZeroShot:
    return replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())


def two_classes() -> ZeroShot:
    """One pixel; the feature turns with the first channel's value, class a at 0, class b at 90 degrees."""

    def tower(x: Tensor) -> Tensor:
        angle = x[:, 0, 0, 0] * torch.pi / 2
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    clf = ZeroShot.build(VLM.wrap(tower, words(2), 1, std=(0.5,) * 3, scale=2.0), ["a", "b"])
    return replace(clf, weights=torch.eye(2))


def test_anti_adversary_moves_away_from_the_boundary_by_hand() -> None:
    """Normalised value v = 2 x, angle v * 90 degrees, boundary at 45: x = 0.2 answers a and falls, 0.3 answers b."""
    clf = two_classes()
    x = torch.tensor([0.2, 0.3]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert clf(x).argmax(1).tolist() == [0, 1]
    moved = AntiAdversary(alpha=0.04, steps=2).moved(clf, x)[:, 0, 0, 0]
    torch.testing.assert_close(moved, torch.tensor([0.2 - 0.04, 0.3 + 0.04]))
    moved = AntiAdversary(alpha=0.04, steps=2, pixels="raw").moved(clf, x)[:, 0, 0, 0]
    torch.testing.assert_close(moved, torch.tensor([0.2 - 0.08, 0.3 + 0.08]))
    far = AntiAdversary(alpha=0.25, steps=1, pixels="raw")
    assert float(far.moved(clf, x)[0, 0]) == pytest.approx(-0.05)
    assert float(replace(far, box=True).moved(clf, x)[0, 0]) == 0.0


def test_sum_over_all_classes() -> None:
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    want = sum(F.cross_entropy(z, torch.full((4,), c), reduction="none") for c in range(5))
    torch.testing.assert_close(all_classes(z), want)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "defense",
    [AntiAdversary(), AntiAdversary(steps=3, alpha=0.1, pixels="raw", box=True), Hedge(), Hedge(steps=4, eps="1/50")],
)
def test_equals_the_literal_transcription(defense: Any, seed: int) -> None:
    """In float64, so that no sign of a gradient near zero is decided by rounding."""
    clf, x = double(toy_clf(seed)), toy_images(4, seed=seed).double()
    got = defense.apply(clf)(x)
    for i in range(4):

        def classify(image: Tensor) -> Tensor:
            return clf(image[None])[0]

        if isinstance(defense, Hedge):
            moved = walk_literal.hedge(classify, x[i], defense.steps, float(defense.alpha), float(defense.eps))
        else:
            unit = 0.25 if defense.pixels == "normalised" else 1.0
            moved = walk_literal.anti_adversary(classify, x[i], defense.steps, [defense.alpha * unit] * 3, defense.box)
        torch.testing.assert_close(got[i], classify(moved).detach(), rtol=1e-9, atol=1e-9)


def test_hedge_stays_in_ball_and_box_and_raises_its_objective() -> None:
    clf, x = toy_clf(), toy_images(16)
    hedge = Hedge(eps="0.1", alpha="0.02")
    moved = hedge.apply(clf).seen(x)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6
    assert float(moved.min()) >= -1e-6
    assert float(moved.max()) <= 1 + 1e-6
    assert bool((all_classes(clf(moved)) > all_classes(clf(x))).all())


def test_no_steps_is_the_plain_model() -> None:
    clf, x = toy_clf(), toy_images(3)
    for defense in (AntiAdversary(steps=0), Hedge(steps=0), Hedge(eps=0)):
        torch.testing.assert_close(defense.apply(clf)(x), clf(x))


@pytest.mark.parametrize("defense", [AntiAdversary(steps=3), Hedge(steps=3)])
def test_cost(defense: Any) -> None:
    clf, x = toy_clf(), toy_images(5)
    with clf.vlm.counting() as count, torch.no_grad():
        defense.apply(clf)(x)
    assert (count.forwards, count.backwards) == (20, 15)


@pytest.mark.parametrize("defense", [AntiAdversary(), Hedge(steps=3)])
def test_exact_and_bpda_gradients_match_finite_differences_inside_the_box(defense: Any) -> None:
    clf, x = double(toy_clf()), (0.3 + 0.4 * toy_images(2)).double()
    defended, leaf = defense.apply(clf), x.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(defended(leaf)[:, 0].sum(), leaf)
    (bpda,) = torch.autograd.grad(defense.surrogate(clf, None, "bpda")(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(exact, bpda)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-9
    slope = (defended(x + h * along)[:, 0].sum() - defended(x - h * along)[:, 0].sum()) / (2 * h)
    assert float(slope) == pytest.approx(float((exact * along).sum()), rel=1e-3)
    (smooth,) = torch.autograd.grad(defense.surrogate(clf, None, "smooth")(leaf)[:, 0].sum(), leaf)
    assert float((smooth - bpda).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("AntiAdversary(steps=-1)", "steps must not be negative, got -1; write 2"),
        ("AntiAdversary(alpha=0)", "alpha must be positive, got 0.0; write 0.15"),
        ("AntiAdversary(pixels=normal)", "unknown pixels 'normal'; did you mean 'normalised'"),
        ("Hedge(eps=8)", r"eps must be in \(0, 1\], got 8; write 8/255"),
        ("Hedge(alpha=0)", "alpha must be positive, got 0; write 2/255"),
        ("Hedge(steps=-1)", "steps must not be negative, got -1; write 20"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)


def test_published_constants() -> None:
    assert AntiAdversary(preset="reference") == AntiAdversary()
    with pytest.raises(ValueError, match="unknown surrogate of Hedge 'eot'"):
        Hedge().surrogate(toy_clf(), None, "eot")
