"""One delta for all images."""

from __future__ import annotations

import pytest
import torch
from attack_toys import Conv, Linear, images, labels_of, tensor, two_class

from ironclip.attacks.universal import Universal
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot


def test_all_images_share_one_delta_within_the_budget() -> None:
    clf, x = Conv(), images(20)
    result = Universal(eps="12/255", epochs=4, batch_size=8)(clf, x, labels_of(clf, x), rng=SampleRNG.rows(20))
    delta = result.x_adv - x
    assert torch.allclose(delta, delta[:1].expand_as(delta), atol=1e-6)
    assert float(delta.abs().max()) <= 12 / 255 + 1e-7
    assert result.forwards.tolist() == [5] * 20
    assert result.backwards.tolist() == [4] * 20


def test_linear_model_with_one_label_reaches_the_fgsm_corner() -> None:
    w = tensor(3, 8, 8)
    clf, x = two_class(w, -100.0), images(6)
    y = torch.zeros(6, dtype=torch.long)
    delta = Universal(eps="1/10", epochs=25, batch_size=3)(clf, x, y, rng=SampleRNG.rows(6)).x_adv - x
    torch.testing.assert_close(delta, (0.1 * w.sign()).expand_as(delta), atol=1e-5, rtol=0)


def test_order_of_rows_does_not_matter() -> None:
    clf, x = Linear(4, scale=0.3), images(9)
    y, ids = labels_of(clf, x), [f"s{i}" for i in range(9)]
    mix = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    attack = Universal(eps="4/255", epochs=3, batch_size=4)
    a = attack.fit(clf, x, y, rng=SampleRNG.of(0, ids))
    b = attack.fit(clf, x[mix], y[mix], rng=SampleRNG.of(0, [ids[i] for i in mix]))
    assert torch.equal(a, b)
    assert a.shape == (1, 3, 8, 8)
    assert not torch.equal(a, attack.fit(clf, x, y, rng=SampleRNG.of(1, ids)))


def test_carries_over_to_images_it_was_not_made_on() -> None:
    clf, x = Linear(4, scale=0.5), images(160)
    y = labels_of(clf, x)
    seen, held = slice(0, 80), slice(80, 160)
    delta = Universal(eps="12/255", epochs=15).fit(clf, x[seen], y[seen], rng=SampleRNG.rows(80))
    noise = (12 / 255) * tensor(1, 3, 8, 8, seed=8).sign()
    fooled = [int((labels_of(clf, (x[held] + d).clamp(0, 1)) != y[held]).sum()) for d in (delta, noise)]
    assert fooled[0] > fooled[1] + 8


def test_embeddings_are_pushed_without_labels() -> None:
    vlm = VLM.wrap(Conv(k=6).eval(), lambda names: torch.cat([tensor(1, 6, seed=len(n)) for n in names]), 8)
    clf, x = ZeroShot.build(vlm, ["a", "bb", "ccc"], ("{}",)), images(8)
    y = labels_of(clf, x)
    attack = Universal(eps="16/255", epochs=6, loss="feat_cos")
    result = attack(clf, x, y, rng=SampleRNG.rows(8))
    other = attack(clf, x, (y + 1) % 3, rng=SampleRNG.rows(8))
    assert torch.equal(result.x_adv, other.x_adv)
    with torch.no_grad():
        e0, e = vlm.encode_image(x), vlm.encode_image(result.x_adv)
        noise = vlm.encode_image((x + 16 / 255 * tensor(1, 3, 8, 8).sign()).clamp(0, 1))
    assert float((e * e0).sum(1).mean()) < float((noise * e0).sum(1).mean())
    assert result.forwards.tolist() == [8] * 8
    with pytest.raises(ValueError, match="feat_cos needs a classifier with an image encoder"):
        attack(Linear(3), x, y, rng=SampleRNG.rows(8))
