"""Every loss against the hand checks of its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attack_toys import tensor

from ironclip.core import losses
from ironclip.core.losses import TARGETED, UNTARGETED, ce, cosine, dlr, dlr_t, margin, top_two_gap, usable, with_target

Z, Y, T = tensor(6, 7, seed=1), torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([6, 0, 1, 2, 3, 4])


def grad_of(fn: object, z: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    leaf = z.clone().requires_grad_(True)
    return torch.autograd.grad(fn(leaf, *args).sum(), leaf)[0]  # type: ignore[operator]


@pytest.mark.parametrize("name", [*UNTARGETED, *TARGETED])
def test_one_value_per_sample_from_that_sample_alone(name: str) -> None:
    loss = with_target(name, T if name in TARGETED else None)
    whole = loss(Z, Y)
    assert whole.shape == (6,)
    for i in range(6):
        one = with_target(name, T[i : i + 1] if name in TARGETED else None)(Z[i : i + 1], Y[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1])


@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "ce_t", "margin_t", "dlr_t", "entropy"])
def test_shift_invariance(name: str) -> None:
    loss = with_target(name, T if name in TARGETED else None)
    torch.testing.assert_close(loss(Z + 3.0, Y), loss(Z, Y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dlr", "dlr_t"])
def test_dlr_does_not_see_a_positive_scale(name: str) -> None:
    loss = with_target(name, T if name in TARGETED else None)
    torch.testing.assert_close(loss(100 * Z, Y), loss(Z, Y), atol=1e-5, rtol=1e-5)


def test_ce_and_its_gradient() -> None:
    torch.testing.assert_close(ce(Z, Y), F.cross_entropy(Z, Y, reduction="none"))
    g = grad_of(ce, Z, Y)
    torch.testing.assert_close(g, Z.softmax(1) - F.one_hot(Y, 7))
    torch.testing.assert_close(g.sum(1), torch.zeros(6), atol=1e-6, rtol=0)


def test_margin_is_positive_exactly_when_misclassified() -> None:
    assert torch.equal(margin(Z, Y) > 0, Z.argmax(1) != Y)
    g = grad_of(margin, Z, Y)
    assert (g != 0).sum(1).tolist() == [2] * 6
    assert g.sum(1).tolist() == [0] * 6
    assert bool((g.gather(1, Y[:, None]) == -1).all())


def test_margin_of_two_equal_prompts_is_zero_with_zero_gradient() -> None:
    shared = tensor(4, 1, seed=3).requires_grad_(True)
    z = torch.cat([shared, shared, shared - 1], dim=1)
    value = margin(z, torch.zeros(4, dtype=torch.long))
    assert value.tolist() == [0] * 4
    assert not torch.autograd.grad(value.sum(), shared)[0].any()
    assert top_two_gap(z).tolist() == [0] * 4


def test_dlr_by_hand_and_its_blind_spot() -> None:
    z, y = torch.tensor([[3.0, 2.0, 5.0, 1.0]]), torch.tensor([1])
    assert dlr(z, y).item() == 1.0
    assert not grad_of(dlr, z, y).any(), "label ranks third: constant 1"
    assert dlr(z, torch.tensor([2])).item() == pytest.approx(-(5 - 3) / (5 - 2))
    assert dlr_t(z, torch.tensor([2]), torch.tensor([3])).item() == pytest.approx(-(5 - 1) / (5 - (2 + 1) / 2))


def test_targeted_losses_by_hand() -> None:
    z, y, t = torch.tensor([[1.0, 2.0, 0.0, -1.0]]), torch.tensor([1]), torch.tensor([0])
    assert losses.margin_t(z, y, t).item() == -1
    assert losses.ce_t(z, y, t).item() == pytest.approx(-float(z.logsumexp(1)) + 1)
    g = grad_of(lambda a: losses.ce_t(a, y, t), z)
    assert g[0, 0] > 0
    assert bool((g[0, 1:] < 0).all())


def test_label_free_losses() -> None:
    flat, peaked = torch.zeros(1, 4), torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    y = torch.tensor([0])
    assert losses.entropy(flat, y).item() == pytest.approx(math.log(4))
    assert losses.entropy(peaked, y).item() == pytest.approx(0, abs=1e-6)
    assert losses.lse(flat, y).item() == pytest.approx(-math.log(4))
    assert bool((grad_of(losses.lse, flat, y) < 0).all()), "raising it lowers every logit"
    assert torch.equal(losses.entropy(Z, Y), losses.entropy(Z, T))


def test_feature_losses_and_the_zero_gradient_trap() -> None:
    e0 = tensor(3, 5, seed=2)
    for fn in (losses.feat_l2, losses.feat_cos):
        assert fn(e0, e0).abs().max() < 1e-6
        assert grad_of(fn, e0, e0).abs().max() < 1e-6
    assert losses.feat_l2(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item() == 5
    torch.testing.assert_close(losses.feat_cos(3 * e0, e0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.feat_tgt(-e0, e0), -torch.ones(3))
    texts = torch.stack([e0, -e0], dim=1)
    torch.testing.assert_close(losses.set_nce(e0, texts), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.set_nce(e0, e0), -torch.ones(3))


def test_caption_losses() -> None:
    logits, tokens = tensor(2, 4, 9, seed=5), torch.tensor([[1, 2, 3, -100], [4, -100, -100, -100]])
    p = logits.log_softmax(-1)
    want = torch.stack([-(p[0, 0, 1] + p[0, 1, 2] + p[0, 2, 3]), -p[1, 0, 4]])
    torch.testing.assert_close(losses.nll(logits, tokens), want)
    torch.testing.assert_close(losses.nll_t(logits, tokens), -want)


def test_too_few_classes_fall_back_and_say_so() -> None:
    assert usable("dlr", 3) == ("dlr", ())
    assert usable("dlr", 2) == ("margin", ("dlr needs 3 classes, got 2: margin used instead",))
    assert usable("dlr_t", 3) == ("margin_t", ("dlr_t needs 4 classes, got 3: margin_t used instead",))
    with pytest.raises(ValueError, match="an attack needs at least 2 classes, got 1; pass more class names"):
        usable("ce", 1)
    with pytest.raises(ValueError, match="dlr needs at least 3 classes, got 2; use margin"):
        dlr(Z[:, :2], Y % 2)
    with pytest.raises(ValueError, match=r"loss 'ce_t' needs target classes; pass target=\(b,\) labels"):
        with_target("ce_t", None)
    with pytest.raises(ValueError, match="unknown loss 'cee'; did you mean 'ce'"):
        with_target("cee", None)


def test_cosine_of_gradients() -> None:
    a = tensor(10)
    assert cosine(a, 2 * a).item() == pytest.approx(1)
    assert cosine(a, torch.zeros(10)).item() == 0
