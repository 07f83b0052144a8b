"""Which images and captions a step sees: a function of (seed, step) alone, so that nothing needs to be remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG


class Labelled(Protocol):
    """Labelled images in batches, as every data set of this library gives them."""

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def manifest_hash(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]: ...


class Images(Labelled, Protocol):
    """What validation needs: templates too."""

    @property
    def templates(self) -> list[str]: ...


class Captioned(Images, Protocol):
    """What training needs on top: true captions of every image."""

    def captions(self, i: int) -> list[str]: ...


def order(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Places of the images of a step: a fresh permutation of all n each time that all were seen."""
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    shuffled = {e: SampleRNG.of(seed, ["order"]).at(e).generator(0).permutation(n) for e in epochs}
    return [int(shuffled[p // n][p % n]) for p in range(first, first + batch_size)]


def pick_captions(data: Captioned, rows: Sequence[int], seed: int, step: int) -> list[str]:
    """One caption an image; which one follows from (seed, step, image)."""
    offered = [data.captions(i) for i in rows]
    draw = SampleRNG.of(seed, [f"caption/{i}" for i in rows]).at(step).uniform().tolist()
    return [texts[int(u * len(texts))] for texts, u in zip(offered, draw, strict=True)]


def content_hash(x: Tensor, captions: Sequence[Sequence[str]]) -> str:
    """SHA-256 (hex) of images (n, 3, h, w) in [0, 1], as bytes, and their captions: ids say nothing of a renderer."""
    digest = hashlib.sha256((x * 255).round().to(torch.uint8).contiguous().numpy().tobytes())
    digest.update(json.dumps(captions, ensure_ascii=True).encode())
    return digest.hexdigest()
