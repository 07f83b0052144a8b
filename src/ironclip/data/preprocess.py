"""Preprocessing recipes: resize the short side, crop the centre, all in Pillow; and the check that they do as
recorded.

The same image gives other pixels under bilinear and bicubic filters, with and without anti-aliasing, so a
recipe has an id that is part of every result. `clip` = "resize{S}-bicubic-crop{S}" (CLIP, open_clip, CoOp);
`ttc` = "resize{R}-bilinear-crop{S}" with R = 256 at S = 224 (TeCoA, TTC); `none` = images rendered at the
wanted size. Both equal torchvision's Resize, CenterCrop and ToTensor on Pillow images exactly.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
KINDS = ("clip", "ttc", "none")
_ID = re.compile(r"resize(\d+)-(bicubic|bilinear)-crop(\d+)")
_STORED = "preprocess_reference.npz"


def recipe_id(kind: str, size: int) -> str:
    """`kind`: "clip", "ttc" or "none"; `size`: side of the square result in pixels."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a whole number of pixels, 1 or more, got {size!r}")
    if kind == "clip":
        return f"resize{size}-bicubic-crop{size}"
    if kind == "ttc":
        return f"resize{round(size * 256 / 224)}-bilinear-crop{size}"
    if kind == "none":
        return "none"
    raise ValueError(f"recipe must be one of {', '.join(KINDS)}, got {kind!r}")


def parse_recipe(recipe: str) -> tuple[int, str, int]:
    """(short side, filter, crop) of a recipe id other than "none"."""
    match = _ID.fullmatch(recipe)
    if not match or int(match[3]) > int(match[1]) or int(match[3]) < 1:
        raise ValueError(f'recipe must read "resize224-bicubic-crop224" with crop <= resize, got {recipe!r}')
    return int(match[1]), match[2], int(match[3])


def preprocess(image: Image.Image, recipe: str) -> Tensor:
    """An RGB image of any size to (3, S, S) float32 in [0, 1]."""
    short, name, crop = parse_recipe(recipe)
    width, height = image.size
    if min(width, height) != short:
        new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(new, FILTERS[name])
        width, height = image.size
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    if (width, height) != (crop, crop):
        image = image.crop((left, top, left + crop, top + crop))
    return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image to (3, h, w) float32 in [0, 1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def reference_images() -> list[Image.Image]:
    """Sixteen RGB images made by whole-number arithmetic: tall, wide, square, small and large, smooth and
    noisy.
    """
    sizes = [(64, 64), (32, 32), (97, 131), (131, 97), (224, 224), (256, 256), (300, 200), (200, 300)]
    sizes += [(333, 250), (250, 333), (481, 321), (224, 301), (257, 224), (96, 96), (500, 120), (640, 427)]
    images = []
    for k, (width, height) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width].astype(np.uint32)
        noise = (
            x * np.uint32(2654435761) + y * np.uint32(2246822519) + np.uint32(k * 3266489917 % 2**32)
        ) >> np.uint32(9)
        smooth = (x * np.uint32(3 + k)) // np.uint32(2) + y * np.uint32(2)
        checks = ((x // np.uint32(5 + k)) ^ (y // np.uint32(7))) & np.uint32(1)
        planes = (smooth % 256, (noise ^ (noise >> np.uint32(7))) % 256, checks * np.uint32(200) + noise % 32)
        images.append(Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)))
    return images


def reference_checksum(recipe: str) -> np.ndarray:
    """What `recipe` makes of the reference images: (16, 3, 8, 17) uint8, sampled on a fixed grid with its
    means.

    Columns 0-15 are single pixels (so that a shift or another filter shows), the last column the mean of the
    row band.
    """
    out = np.empty((16, 3, 8, 17), dtype=np.uint8)
    for k, image in enumerate(reference_images()):
        pixels = (preprocess(image, recipe).numpy() * 255).round().astype(np.uint8)
        side = pixels.shape[-1]
        rows = (np.arange(8) * 2 + 1) * side // 16
        columns = ((np.arange(16) * 2 + 1) * side // 32 + k) % side
        out[k, :, :, :16] = pixels[:, rows][:, :, columns]
        bands = np.stack([b.mean(axis=(1, 2)) for b in np.array_split(pixels.astype(np.float64), 8, axis=1)], axis=1)
        out[k, :, :, 16] = bands.round().astype(np.uint8)
    return out


@lru_cache(maxsize=32)
def check_preprocessing(recipe: str) -> None:
    """Raise RuntimeError when `recipe` moves any stored reference value by more than 1/255.

    Values are stored for 64, 224 and 336 pixels; another size is checked through the 224-pixel recipe of its
    kind.
    """
    name = parse_recipe(recipe)[1]
    with resources.files("ironclip.data").joinpath(_STORED).open("rb") as file:
        stored = dict(np.load(file))
    key = recipe if recipe in stored else recipe_id("clip" if name == "bicubic" else "ttc", 224)
    off = np.abs(reference_checksum(key).astype(np.int16) - stored[key].astype(np.int16))
    if off.max() > 1:
        image = int(off.max(axis=(1, 2, 3)).argmax())
        raise RuntimeError(
            f"preprocessing {key} differs from the stored reference by {off.max()}/255 on image {image}, "
            f"allowed 1/255: this Pillow ({PIL.__version__}) resizes "
            "differently, so results would not be comparable; install another Pillow release"
        )


def store_reference(path: str) -> None:
    """Write the stored values (maintainers only; bump the package version when they change)."""
    ids = [recipe_id(kind, size) for kind in ("clip", "ttc") for size in (64, 224, 336)]
    np.savez_compressed(path, **{i: reference_checksum(i) for i in ids})  # type: ignore[arg-type]
