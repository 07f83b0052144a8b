"""Preprocessing equals torchvision's, and the stored reference notices a change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ironclip.data import preprocess as module
from ironclip.data.preprocess import (
    check_preprocessing,
    parse_recipe,
    preprocess,
    recipe_id,
    reference_checksum,
    reference_images,
)

RECIPES = [recipe_id(kind, size) for kind in ("clip", "ttc") for size in (32, 64, 224, 336)]


def test_recipe_ids() -> None:
    assert recipe_id("clip", 224) == "resize224-bicubic-crop224"
    assert recipe_id("ttc", 224) == "resize256-bilinear-crop224"
    assert recipe_id("none", 64) == "none"
    assert parse_recipe(recipe_id("ttc", 336)) == (384, "bilinear", 336)


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_torchvision(recipe: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    short, name, crop = parse_recipe(recipe)
    theirs = transforms.Compose(
        [
            transforms.Resize(short, transforms.InterpolationMode(name)),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
        ]
    )
    for image in reference_images():
        assert torch.equal(preprocess(image, recipe), theirs(image))


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = reference_images()[4]
    assert image.size == (224, 224)
    pixels = preprocess(image, "resize224-bicubic-crop224")
    assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_reference_agrees(recipe: str) -> None:
    check_preprocessing.cache_clear()
    check_preprocessing(recipe)


@pytest.mark.parametrize(
    "change",
    [
        lambda self, size, _filter: _RESIZE(self, size, Image.Resampling.BOX),
        lambda self, size, _filter: _RESIZE(self, size, Image.Resampling.BILINEAR, reducing_gap=1.0),
        lambda self, size, f: _RESIZE(self, size, f).point(lambda v: min(v + 2, 255)),
    ],
    ids=["filter", "shortcut", "level"],
)
def test_another_resize_stops_the_run(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    check_preprocessing.cache_clear()
    monkeypatch.setattr(Image.Image, "resize", change)
    with pytest.raises(RuntimeError, match=r"differs from the stored reference by \d+/255 .* allowed 1/255"):
        check_preprocessing("resize224-bicubic-crop224")
    check_preprocessing.cache_clear()


_RESIZE = Image.Image.resize


def test_reference_sees_a_shift_of_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    here = reference_checksum("resize64-bicubic-crop64")
    true = module.to_tensor
    monkeypatch.setattr(module, "to_tensor", lambda image: true(image).roll(1, dims=2))
    off = np.abs(reference_checksum("resize64-bicubic-crop64").astype(int) - here.astype(int))
    assert (off.max(axis=(1, 2, 3)) > 1).all()


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="recipe must be one of clip, ttc, none, got 'squash'"):
        recipe_id("squash", 224)
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match="size must be a whole number of pixels"):
            recipe_id("clip", size)  # type: ignore[arg-type]
    for recipe in ("resize200-bicubic-crop224", "resize224-nearest-crop224", "none"):
        with pytest.raises(ValueError, match="recipe must read"):
            parse_recipe(recipe)
