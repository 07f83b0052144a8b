"""Input filters: values from their definitions, derivatives, and surrogates."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import purify_literal
from toys import toy_clf, toy_images

import ironclip
from ironclip.defenses.purify import FILTERS, Purify
from ironclip.evaluation.recipes import BUDGETS
from ironclip.evaluation.threat import composition


@pytest.mark.parametrize(
    ("purify", "literal"),
    [
        (Purify(radius=60), lambda p: purify_literal.low_pass(p, 60 * 8 / 224)),
        (Purify(filter="median"), lambda p: purify_literal.median(p, 3)),
        (Purify(filter="blur", sigma=0.7), lambda p: purify_literal.blur(p, 0.7)),
        (Purify(filter="bits", bits=3), lambda p: purify_literal.bits(p, 3)),
    ],
)
def test_equals_the_literal_transcription(purify: Purify, literal) -> None:
    x = toy_images(2)
    got = purify.pixels(x)
    assert float((got - x).abs().max()) > 0.01
    for i in range(2):
        for c in range(3):
            torch.testing.assert_close(got[i, c].double(), literal(x[i, c].double()), rtol=0, atol=1e-6)


def test_jpeg_is_the_real_thing() -> None:
    x = toy_images(2, size=24)
    got = Purify(filter="jpeg", quality=60).pixels(x)
    for i in range(2):
        file = io.BytesIO()
        raw = np.round(x[i].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(raw).save(file, format="JPEG", quality=60, subsampling=2)
        want = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize(
    "purify",
    [Purify(radius=1000), Purify(filter="blur", sigma=0), Purify(filter="median", window=1)],
)
def test_identity_settings_are_the_plain_model(purify: Purify) -> None:
    clf, x = toy_clf(), toy_images(4)
    torch.testing.assert_close(purify.apply(clf)(x), clf(x), rtol=0, atol=1e-4)


def test_eight_bits_leave_eight_bit_images_alone() -> None:
    x = (toy_images(4) * 255).round() / 255
    torch.testing.assert_close(Purify(filter="bits", bits=8).pixels(x), x)


@pytest.mark.parametrize("name", ["low_pass", "blur", "median"])
def test_gradient_matches_finite_differences(name: str) -> None:
    clf = toy_clf()
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    defended = Purify(filter=name, radius=50).apply(clf)
    x = 0.4 + 0.2 * torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # no ties
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(defended(leaf)[:, 0].sum(), leaf)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-7
    up, down = (defended(x + s * h * along)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["jpeg", "bits", "median"])
def test_surrogate_keeps_the_value_and_lets_the_gradient_past(name: str) -> None:
    clf, x = toy_clf(size=16), toy_images(3, size=16).requires_grad_(True)
    purify = Purify(filter=name)
    view = purify.surrogate(clf, None, "identity")
    torch.testing.assert_close(view(x), purify.apply(clf)(x))
    with torch.no_grad():
        pixels = purify.pixels(x.detach())
    (grad,) = torch.autograd.grad(view(x)[:, 0].sum(), x)
    leaf = pixels.requires_grad_(True)
    (plain,) = torch.autograd.grad(clf(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(grad, plain)


def test_compositions_reach_past_every_filter() -> None:
    for name in FILTERS:
        purify = Purify(filter=name)
        members = [m.view for m in composition(purify, BUDGETS["standard"])]
        assert "through" in members
        assert "bpda" in members
        assert ("surrogate:identity" in members) == bool(purify.surrogates)
    with pytest.raises(ValueError, match="unknown surrogate of Purify 'identity'"):
        Purify().surrogate(toy_clf(), None, "identity")


def test_cost_is_one_forward() -> None:
    clf, x = toy_clf(), toy_images(4)
    with clf.vlm.counting() as count, torch.no_grad():
        Purify(filter="jpeg").apply(clf)(x)
    assert (count.forwards, count.backwards) == (4, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Purify(filter=wavelet)", "unknown filter 'wavelet'"),
        ("Purify(radius=-1)", "radius must not be negative, got -1.0; write 40"),
        ("Purify(quality=0)", r"quality must lie in 1..100, got 0; write 75"),
        ("Purify(window=2)", "window must be odd and positive, got 2; write 3"),
        ("Purify(bits=9)", r"bits must lie in 1..8, got 9; write 5"),
        ("Purify(sigma=-1)", "sigma must not be negative"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)
