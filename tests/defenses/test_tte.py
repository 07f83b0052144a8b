"""TTE: its views, its mean, and the published code's draws."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from reference import tte_literal
from toys import toy_clf, toy_images

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.views import base_of
from ironclip.defenses import tte as module
from ironclip.defenses.tte import TTE


@pytest.mark.parametrize("tte", [TTE(), TTE(crops=2, pad=1, flip=False), TTE(preset="reference")])
def test_equals_the_literal_transcription(tte: TTE) -> None:
    clf, x, rng = toy_clf(), toy_images(4), SampleRNG.rows(4, 3)
    deep = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    corners = tte._corners(x, rng)
    got = tte.apply(clf)(x, rng)
    for i in range(4):
        places = [tuple(c) for c in corners[i].tolist()]
        want = tte_literal.logits(lambda v: deep(v[None])[0], x[i].double(), places, tte.pad, tte.flip)
        assert float((got[i] - want).abs().max() / want.abs().max()) < 1e-5


def test_no_crops_and_no_flip_is_the_plain_model() -> None:
    clf, x = toy_clf(), toy_images(3)
    defended = TTE(crops=0, flip=False).apply(clf)
    assert torch.equal(defended(x), clf(x))
    assert not base_of(defended, "randomized")


def test_a_crop_by_hand() -> None:
    x = torch.arange(27.0).view(1, 3, 3, 3) / 27
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1))
    cut = module._cut(wide, torch.tensor([[0, 2]]), x.shape[-2:])
    assert torch.equal(cut[0, 0, 1:, :2], x[0, 0, :2, 1:])
    assert float(cut[0, :, 0].abs().max()) == 0
    assert float(cut[0, :, :, 2].abs().max()) == 0


def test_offsets() -> None:
    x, rng = toy_images(200), SampleRNG.rows(200)
    fresh = TTE()._corners(x, rng)
    assert (int(fresh.min()), int(fresh.max())) == (0, 8)
    assert not torch.equal(fresh[:, 0], fresh[:, 1])
    seen = {tuple(TTE(preset="reference", seed=s)._corners(x[:1], None)[0, 0].tolist()) for s in range(300)}
    assert max(max(pair) for pair in seen) == 7, "the published code never draws the largest offset"
    one = TTE(preset="reference", seed=5)._corners(x, rng)
    assert len(set(map(tuple, one.flatten(0, 1).tolist()))) == 1, "one crop for every view of every image"
    assert not base_of(TTE(preset="reference").apply(toy_clf()), "randomized")


@pytest.mark.parametrize(("tte", "views"), [(TTE(), 10), (TTE(crops=3, flip=False), 4), (TTE(crops=0), 2)])
def test_cost_is_one_forward_per_view_however_packed(tte: TTE, views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clf, x, rng = toy_clf(), toy_images(5), SampleRNG.rows(5)
    with clf.vlm.counting() as count, torch.no_grad():
        want = tte.apply(clf)(x, rng)
    assert (count.forwards, count.backwards) == (5 * views, 0)
    monkeypatch.setattr(module, "ROWS", 6)
    torch.testing.assert_close(tte.apply(clf)(x, rng), want)


def test_gradient_matches_finite_differences() -> None:
    clf, rng = toy_clf(), SampleRNG.rows(2)
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    defended, x = TTE(blur=0.7).apply(clf), toy_images(2).double()
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    inside = 0.2 + 0.6 * x
    leaf = inside.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf, rng)[:, 0].sum(), leaf)
    up, down = (defended(inside + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-5)


def test_blur_changes_every_view() -> None:
    x = toy_images(2)
    for plain, soft in zip(TTE(crops=0).views(x), TTE(crops=0, blur=1.0).views(x), strict=True):
        assert float((plain - soft).abs().max()) > 0.05
        assert float(soft.var()) < float(plain.var())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("TTE(crops=-1)", "crops must not be negative, got -1; write 4"),
        ("TTE(pad=0)", "pad must be at least 1 pixel, got 0; write 4"),
        ("TTE(blur=-1)", "blur must not be negative, got -1.0"),
        ("TTE(offsets=new)", "unknown offsets 'new'"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)
