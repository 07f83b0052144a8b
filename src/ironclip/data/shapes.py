"""`shapes`: a procedural, captioned image set of any size.

For the `tiny` model, pre-training and tests. Pixels are rounded to 8 bits, as in an image file. An image is the same
whichever others are drawn with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ironclip.data.drawing import column, draw
from ironclip.data.imageset import ImageSet, sample_id
from ironclip.data.manifest import Options
from ironclip.data.prompts import choose_prompts
from ironclip.data.scenes import (
    VERSION,
    Draws,
    Scene,
    class_names,
    draws,
    generators,
    held_out_names,
    labels,
    split_of,
)

_CHUNK = 32  # images drawn at once: small enough for the cache


class Rendered(NamedTuple):
    """`x`: (n, 3, size, size) float32 in [0, 1], multiples of 1/255; `y`: (n,) int64; and n of each."""

    x: Tensor
    y: Tensor
    captions: list[str]
    scenes: list[Scene]


def render(indices: Sequence[int], split: str = "train", seed: int = 0, size: int = 64) -> Rendered:
    """Draw the scenes `indices` of a split; any index of 0 or more is valid, so a training stream never ends.

    `seed` names another world of scenes; the data sets use 0. `size` is the side in pixels, 8 or more.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be 8 pixels or more, got {size!r}")
    indices = [int(i) for i in indices]
    out = torch.empty(len(indices), 3, size, size)
    captions: list[str] = []
    scenes: list[Scene] = []
    for start in range(0, len(indices), _CHUNK):
        part = indices[start : start + _CHUNK]
        streams = generators(part, split, seed)
        d = draws(part, split, streams)
        image = draw(d, size)
        grain = np.stack([np.frombuffer(g.bytes(6 * size * size), np.uint8) for g in streams])
        image += _grain(grain.reshape(len(part), 2, 3, size, size), d)
        pixels = (image.clip(0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        out[start : start + len(part)] = torch.from_numpy(pixels).to(torch.float32).div(255)
        captions += [d.caption(k) for k in range(len(part))]
        scenes += [d.scene(k) for k in range(len(part))]
    return Rendered(out, torch.tensor(labels(indices, split), dtype=torch.int64), captions, scenes)


def _grain(noise: np.ndarray, d: Draws) -> np.ndarray:
    """Triangular sensor noise, of 1 to 5 per cent at most, from two bytes a value."""
    total = noise[:, 0].astype(np.int16) + noise[:, 1] - np.int16(255)
    return total.astype(np.float32) * column(d.u[:, 7] * 0.04 + 0.01, 4) / np.float32(255)


@dataclass(frozen=True)
class ShapesReader:
    split: str
    size: int

    def __call__(self, rows: Sequence[int]) -> Tensor:
        return render(rows, self.split, 0, self.size).x


@dataclass(frozen=True, eq=False)
class ShapesSet(ImageSet):
    """`shapes` as a `Dataset`, with captions and attributes. `held_out` are the names never shown in
    training.
    """

    split: str = "test"
    held_out: tuple[str, ...] = ()

    def scene(self, i: int) -> Scene:
        """Attributes of sample i."""
        return self._draws(i).scene(0)

    def caption(self, i: int) -> str:
        """One caption of sample i, the same that `render` returns."""
        return self._draws(i).caption(0)

    def captions(self, i: int) -> list[str]:
        """Ten captions of sample i, all true."""
        return self.scene(i).captions()

    def _draws(self, i: int) -> Draws:
        row = [self.rows[i]]
        return draws(row, self.split, generators(row, self.split, 0))


def load_shapes(split: str, options: Options) -> ShapesSet:
    """Open `shapes:SPLIT`. The hash in an id is that of the recipe line, from which the pixels follow."""
    total = split_of(split).length
    chosen = choose_prompts(options.prompts, "shapes", class_names(), default="generic")
    rows = list(range(total))
    y = labels(rows, split)
    lines = [f"{VERSION}:{split}:0:{i}" for i in rows]
    return ShapesSet(
        name="shapes" if split == "test" else f"shapes:{split}",
        class_names=chosen.names,
        templates=chosen.templates,
        prompt_set=chosen.id,
        recipe="none",
        size=options.size,
        labels=y,
        ids=[
            sample_id(sha256(line.encode()).hexdigest(), f"{split}/{i:06d}", y[i])
            for i, line in zip(rows, lines, strict=True)
        ],
        read=ShapesReader(split, options.size),
        rows=rows,
        split=split,
        held_out=tuple(held_out_names()),
    )
