"""Embedding attacks: no labels, no start at the clean image, stronger than noise on every sample."""

from __future__ import annotations

import pytest
import torch
from attack_toys import Conv, Linear, images, labels_of, tensor
from torch import Tensor, nn

from ironclip.attacks.feature import FeaturePGD
from ironclip.core.ball import norms
from ironclip.core.losses import feat_cos, feat_l2, feat_tgt
from ironclip.core.rng import SampleRNG
from ironclip.core.views import Defended, eot
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

R8 = SampleRNG.rows(8)


@pytest.fixture(scope="module")
def clf() -> ZeroShot:
    vlm = VLM.wrap(Conv(k=6).eval(), lambda names: torch.cat([tensor(1, 6, seed=len(n)) for n in names]), 8)
    return ZeroShot.build(vlm, ["a", "bb", "ccc"], ("{}",))


@pytest.mark.parametrize("loss", ["feat_l2", "feat_cos"])
def test_beats_noise_of_equal_norm_on_every_sample(clf: ZeroShot, loss: str) -> None:
    x = images(8)
    y = labels_of(clf, x)
    fn = {"feat_l2": feat_l2, "feat_cos": feat_cos}[loss]
    result = FeaturePGD(eps="4/255", steps=10, loss=loss)(clf, x, y, rng=R8)
    with torch.no_grad():
        clean = clf.vlm.encode_image(x, normalize=False)
        for seed in range(5):
            noise = (x + 4 / 255 * tensor(8, 3, 8, 8, seed=seed).sign()).clamp(0, 1)
            assert bool((result.loss >= fn(clf.vlm.encode_image(noise, normalize=False), clean)).all())
        torch.testing.assert_close(fn(clf.vlm.encode_image(result.x_adv, normalize=False), clean), result.loss)
    assert torch.equal(result.success, labels_of(clf, result.x_adv) != y)


@pytest.mark.parametrize("loss", ["feat_l2", "feat_cos"])
def test_the_clean_image_is_refused_as_a_start(loss: str) -> None:
    with pytest.raises(ValueError, match=f"{loss} has zero gradient at the clean image; use start=uniform"):
        FeaturePGD(loss=loss, start="zero")


def test_labels_change_nothing_but_success(clf: ZeroShot) -> None:
    x = images(8)
    y = labels_of(clf, x)
    a, b = (FeaturePGD(eps="4/255", steps=4)(clf, x, lab, rng=R8) for lab in (y, (y + 1) % 3))
    assert torch.equal(a.x_adv, b.x_adv)
    assert not torch.equal(a.success, b.success)


def test_a_target_embedding_is_reached_in_a_wide_ball(clf: ZeroShot) -> None:
    x = images(8)
    with torch.no_grad():
        target = clf.vlm.encode_image(images(8, seed=50), normalize=False)
    result = FeaturePGD(eps=1, alpha="1/50", steps=150, loss="feat_tgt", start="zero")(
        clf, x, labels_of(clf, x), rng=R8, target=target
    )
    assert bool((result.loss > 0.9).all())
    with torch.no_grad():
        torch.testing.assert_close(feat_tgt(clf.vlm.encode_image(result.x_adv), target), result.loss)
    assert result.forwards.tolist() == [152] * 8


def test_momentum_keeps_the_budget_and_costs_are_named(clf: ZeroShot) -> None:
    x = images(8)
    result = FeaturePGD(preset="fare-train")(clf, x, labels_of(clf, x), rng=R8)
    assert float(norms(result.x_adv - x).max()) <= 2 / 255 + 1e-7
    assert result.forwards.tolist() == [1 + 10 + 1 + 1] * 8
    assert result.backwards.tolist() == [10] * 8


def test_what_is_refused(clf: ZeroShot) -> None:
    x = images(2)
    y, rng = labels_of(clf, x), SampleRNG.rows(2)
    with pytest.raises(ValueError, match="a feature attack needs a classifier with an image encoder, such as ZeroShot"):
        FeaturePGD()(Linear(3), x, y, rng=rng)
    with pytest.raises(ValueError, match=r"target embeddings \(b, d\) belong to loss=feat_tgt and to no other loss"):
        FeaturePGD(loss="feat_tgt")(clf, x, y, rng=rng)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        FeaturePGD(alpha=0)


class Tokens(nn.Module):
    """A pooled embedding, and patch tokens that move while it stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Conv(k=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x.roll(2 * i, -1)) for i in range(5)], dim=1)


def test_tokens_are_turned_away_one_by_one() -> None:
    vlm = VLM.wrap(Tokens().eval(), lambda names: torch.cat([tensor(1, 6, seed=len(n)) for n in names]), 8)
    clf, x = ZeroShot.build(vlm, ["a", "bb", "ccc"], ("{}",)), images(8)
    y = labels_of(clf, x)
    attack = FeaturePGD(preset="veattack", eps="4/255", steps=10)
    assert (attack.level, attack.loss) == ("tokens", "feat_cos")
    result = attack(clf, x, y, rng=R8)
    with torch.no_grad():
        clean, moved = (vlm.patch_tokens(v) for v in (x, result.x_adv))
        by_hand = torch.stack([feat_cos(moved[:, i], clean[:, i]) for i in range(4)]).mean(0)
        torch.testing.assert_close(by_hand, result.loss)
        for seed in range(3):
            noise = (x + 4 / 255 * tensor(8, 3, 8, 8, seed=seed).sign()).clamp(0, 1)
            other = vlm.patch_tokens(noise)
            assert bool(
                (result.loss >= torch.stack([feat_cos(other[:, i], clean[:, i]) for i in range(4)]).mean(0)).all()
            )
    assert float(norms(result.x_adv - x).max()) <= 4 / 255 + 1e-7
    towards = FeaturePGD(eps=1, alpha="1/50", steps=30, loss="feat_tgt", level="tokens", start="zero")
    with torch.no_grad():
        target = vlm.patch_tokens(images(8, seed=50))
    assert bool((towards(clf, x, y, rng=R8, target=target).loss > feat_cos(clean, target) - 1).all())
    with pytest.raises(ValueError, match=r"level=tokens needs target tokens \(b, p, d\), got \(8, 6\)"):
        towards(clf, x, y, rng=R8, target=target[:, 0])


def test_a_defended_embedding_is_attacked_through_the_defense(clf: ZeroShot) -> None:
    """A defense that turns every image upside down: its own embedding moves, and averaged draws are counted."""
    x = images(8)

    def encode(v: Tensor, rng: SampleRNG | None = None) -> Tensor:
        assert rng is not None
        return clf.vlm.encode_image((v + 0.01 * rng.fold("n").normal_like(v)).flip(-2))

    defended = Defended(clf, encode, randomized=True)
    y = labels_of(defended, x)
    result = FeaturePGD(eps="4/255", steps=5)(eot(defended, 3), x, y, rng=R8)
    plain = FeaturePGD(eps="4/255", steps=5)(clf, x, y, rng=R8)
    with torch.no_grad():
        here, there = (feat_l2(encode(r.x_adv, R8), encode(x, R8)) for r in (result, plain))
    assert bool((here > there).all())
    assert result.forwards.tolist() == [3 * (1 + 5 + 1 + 1)] * 8


def test_models_without_tokens_are_named(clf: ZeroShot) -> None:
    with pytest.raises(ValueError, match="exposes no patch tokens"):
        FeaturePGD(level="tokens", steps=1)(clf, images(8), torch.zeros(8, dtype=torch.long), rng=R8)
