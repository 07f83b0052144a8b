"""Embedding attacks: no labels, no start at the clean image, stronger than noise on every sample."""

from __future__ import annotations

import pytest
import torch
from attack_toys import Conv, Linear, images, labels_of, tensor

from ironclip.attacks.feature import FeaturePGD
from ironclip.core.ball import norms
from ironclip.core.losses import feat_cos, feat_l2, feat_tgt
from ironclip.core.rng import SampleRNG
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
