"""Budgets on the data set's own pixels: the resize is differentiated, the file rounded, the keys differ."""

from __future__ import annotations

import pytest
import torch

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.space import Space
from ironclip.core.zeroshot import ZeroShot


def pixels(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_words_and_wording() -> None:
    assert str(Space.parse("native:32")) == "native:32"
    assert str(Space.parse("model-input")) == "model-input"
    for text in ("native", "file:4", "native:99999", "pixels:32", ""):
        with pytest.raises(ValueError, match=r"space must be model-input, native:SIZE or file:SIZE .* write native:32"):
            Space.parse(text)


def test_input_is_resized_within_the_gradient_and_stays_in_the_box() -> None:
    x = pixels(32).requires_grad_()
    out = Space.parse("native:32").to_input(x, 64)
    assert out.shape == (2, 3, 64, 64)
    assert bool(((out >= 0) & (out <= 1)).all())
    assert float(torch.autograd.grad(out.sum(), x)[0].abs().sum()) > 0
    same = pixels(64)
    assert Space().to_input(same, 64) is same
    assert torch.equal(Space.parse("native:64").to_input(same, 64), same)


def test_file_rounds_and_passes_the_gradient_through() -> None:
    x = (torch.tensor([0.2, 0.5]).repeat(24).reshape(1, 3, 4, 4) + 0.0007).requires_grad_()
    out = Space("file", 4).to_input(x, 4)
    torch.testing.assert_close(out * 255, (x * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_a_model_in_native_space_is_the_model_behind_a_resize() -> None:
    vlm = ironclip.load("tiny")
    small = vlm.in_space("native:32")
    x = pixels(32)
    torch.testing.assert_close(small.encode_image(x), vlm.encode_image(Space.parse("native:32").to_input(x, 64)))
    assert small.name == f"{vlm.name}@native:32"
    assert small.image_size == 32
    assert vlm.image_size == 64
    assert small.weights_hash == vlm.weights_hash
    assert vlm.in_space("model-input") is vlm
    with pytest.raises(ValueError, match="already stands in native:32"):
        small.in_space("file:32")


def test_defense_and_attack_work_on_native_pixels() -> None:
    vlm = ironclip.load("tiny").in_space("native:32")
    clf = ZeroShot.build(vlm, ["red circle", "blue square"])
    x, rng = pixels(32), SampleRNG.of(0, ["a", "b"])
    defended = ironclip.build("noise").apply(clf)
    result = ironclip.build("PGD(eps=4/255, steps=2)")(defended, x, torch.tensor([0, 1]), rng=rng)
    assert result.x_adv.shape == x.shape
    assert float((result.x_adv - x).abs().max()) <= 4 / 255 + 1e-6


def test_results_of_different_spaces_have_different_names() -> None:
    common = {"vlm": "tiny", "data": "shapes", "attacks": "FGSM(eps=4/255)", "limit": 4, "costs": False, "gallery": 0}
    rows = {s: ironclip.evaluate(space=s, **common)["rows"][0] for s in ("model-input", "native:32", "file:32")}
    assert len({r["digest"] for r in rows.values()}) == 3
    assert rows["native:32"]["vlm"] == "tiny-v1@native:32"
    with pytest.raises(ValueError, match=r"space must be model-input"):
        ironclip.evaluate(space="native", **common)
