"""The noise average: its arithmetic, its stream and its derivative."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import toy_clf, toy_images, words

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.views import base_of
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses import noise as module
from ironclip.defenses.noise import Noise


def test_mean_of_unit_features_by_hand() -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    stream = rng.fold("noise")
    total = torch.zeros(3, clf.vlm.dim)
    for i in range(5):
        total += clf.vlm.encode_image((x + 0.2 * stream.at(i).normal_like(x)).clamp(0, 1))
    want = clf.scale * F.normalize(total, dim=1) @ clf.weights.T
    torch.testing.assert_close(Noise(sigma=0.2, draws=5).apply(clf)(x, rng), want)


def test_draws_are_packed_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    want = Noise().apply(clf)(x, rng)
    sizes: list[int] = []
    clf.vlm.image.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[0]))
    for rows, expected in ((64, [24]), (9, [9, 9, 6]), (1, [3] * 8)):
        monkeypatch.setattr(module, "ROWS", rows)
        sizes.clear()
        torch.testing.assert_close(Noise().apply(clf)(x, rng), want)
        assert sizes == expected


def test_no_noise_is_the_plain_classifier_and_not_random() -> None:
    clf, x = toy_clf(), toy_images(3)
    defended = Noise(sigma=0.0).apply(clf)
    assert torch.equal(defended(x), clf(x))
    assert not base_of(defended, "randomized")
    assert base_of(Noise().apply(clf), "randomized")


def test_every_draw_differs_and_other_call_draws_too() -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    one = Noise(draws=1).apply(clf)
    assert not torch.equal(one(x, rng), one(x, rng.at(1)))
    mean = F.normalize(one.features(x, rng) * 2, dim=1)
    assert not torch.allclose(Noise(draws=2).apply(clf).features(x, rng), mean, atol=1e-4)


def test_copies_stay_in_the_pixel_box() -> None:
    seen: list[Tensor] = []

    def tower(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)

    clf = ZeroShot.build(VLM.wrap(tower, words(12), 2), ["a", "b"])
    x = toy_images(4, size=2)
    before = x.clone()
    Noise(sigma=1.0).apply(clf)(x, SampleRNG.rows(4))
    assert float(seen[-1].min()) == 0.0
    assert float(seen[-1].max()) == 1.0
    assert torch.equal(x, before)


def test_the_average_of_a_linear_tower_converges_to_its_feature() -> None:
    """One direction dominates, so unit features are nearly linear: the error falls like 1/sqrt(draws)."""
    clf = ZeroShot.build(VLM.wrap(lambda x: x.flatten(1) + 5.0, words(12), 2), ["a", "b"])
    x, rng = 0.5 + 0.0 * toy_images(200, size=2), SampleRNG.rows(200)
    plain = clf.features(x)
    errors = [
        float((Noise(sigma=0.1, draws=n).apply(clf).features(x, rng) - plain).norm(dim=1).mean()) for n in (1, 16)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)


def test_gradient_matches_finite_differences_for_a_fixed_draw() -> None:
    clf, x = toy_clf(), 0.3 + 0.4 * toy_images(2)
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    rng, defended = SampleRNG.rows(2), Noise(draws=3).apply(clf)
    leaf = x.double().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    up, down = (defended(leaf.detach() + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-3)


def test_cost_is_one_forward_per_draw() -> None:
    clf, x = toy_clf(), toy_images(5)
    with clf.vlm.counting() as count, torch.no_grad():
        Noise(draws=3).apply(clf)(x, SampleRNG.rows(5))
    assert (count.forwards, count.backwards) == (15, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Noise(sigma=-0.1)", r"sigma must be at least 0 and finite, got -0.1; write 0.05"),
        ("Noise(draws=0)", "draws must be at least 1, got 0; write 8"),
        ("Noise(n=8)", "unknown field of Noise 'n'"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)


def test_no_draws_and_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        Noise().apply(toy_clf())(toy_images(2) + 1, SampleRNG.rows(2))
