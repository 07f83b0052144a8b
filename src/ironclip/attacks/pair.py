"""Attacks on images and their captions together, which draw each towards where the other is not.

What they share: ``PairAttack`` as the rest of the library sees it, and the climb of an image's embedding away from a
set of features over scaled copies. Methods: ``co_attack.py``, ``sga.py``. Two attacks made apart (Sep-Attack) are what
``evaluation/retrieval.py`` calls joint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks.text import TextAttack
from ironclip.core.check import check_images
from ironclip.core.rng import SampleRNG
from ironclip.core.types import AttackResult
from ironclip.core.vlm import VLM

Goal = Callable[[Tensor, Tensor], Tensor]
"""Unit embeddings (b, s, d) of s scaled copies and the batch rows (b,) they belong to, to what is raised (b,)."""


@dataclass(frozen=True, eq=False)
class PairResult:
    """``x_adv``: (b, 3, h, w); ``captions``: attacked, as given in number and order; ``forwards``, ``backwards``: (b,)
    passes of the image tower, without those of the text tower."""

    x_adv: Tensor
    captions: list[list[str]]
    forwards: Tensor
    backwards: Tensor


@runtime_checkable
class PairAttack(Protocol):
    """A frozen dataclass with hyperparameters; ``words`` is the attack that its steps on captions use."""

    name: ClassVar[str]

    def __call__(
        self, vlm: VLM, x: Tensor, captions: Sequence[Sequence[str]], words: TextAttack, *, rng: SampleRNG
    ) -> PairResult: ...


def check_pairs(vlm: VLM, x: Tensor, captions: Sequence[Sequence[str]]) -> None:
    """Refuse images that are none and captions that are not one list or more an image. Raises ValueError."""
    check_images(x, vlm.image_size)
    if len(captions) != len(x):
        raise ValueError(f"expected a list of captions for each of {len(x)} images, got {len(captions)}")
    for i, own in enumerate(captions):
        if isinstance(own, str) or not own:
            raise ValueError(f"captions of image {i} must be a list of one sentence or more, got {own!r}")


def reword(
    vlm: VLM, captions: Sequence[Sequence[str]], words: TextAttack, away: Tensor | None = None
) -> list[list[str]]:
    """All captions attacked in one call, away from the image embedding (b, d) of each, or from what they were."""
    flat = [t for own in captions for t in own]
    counts = torch.tensor([len(own) for own in captions])
    rows = None if away is None else away.repeat_interleave(counts.to(away.device), dim=0)
    made = iter(words(vlm.encode_text, flat, away=rows).texts)
    return [[next(made) for _ in own] for own in captions]


def text_sets(vlm: VLM, captions: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Unit features of the captions of each image, padded with zeros to (b, t, d), and how many there are (b,)."""
    flat = vlm.encode_text([t for own in captions for t in own])
    counts = torch.tensor([len(own) for own in captions], device=flat.device)
    sets = flat.new_zeros(len(captions), int(counts.max()), flat.shape[1])
    sets[torch.arange(sets.shape[1], device=flat.device)[None] < counts[:, None]] = flat
    return sets, counts


def scaled(x: Tensor, scales: Sequence[float], noise: float, rng: SampleRNG | None) -> list[Tensor]:
    """Copies of x made smaller or larger and back again; those whose scale is not 1 get Gaussian ``noise`` between."""
    out = []
    for i, s in enumerate(scales):
        if s == 1:
            out.append(x)
            continue
        size = max(1, round(x.shape[-2] * s)), max(1, round(x.shape[-1] * s))
        copy = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        if noise and rng is not None:
            copy = (copy + noise * rng.fold("scale", i).normal_like(copy)).clamp(0, 1)
        out.append(F.interpolate(copy, size=x.shape[-2:], mode="bilinear", align_corners=False, antialias=True))
    return out


def climb_embedding(
    vlm: VLM, x: Tensor, goal: Goal, run: Ascent, rng: SampleRNG, scales: Sequence[float] = (1.0,), noise: float = 0.0
) -> AttackResult:
    """Projected gradient ascent of ``goal`` on the embeddings of scaled copies, in one pass of b * s images a step."""

    def encode(pixels: Tensor, stream: SampleRNG | None = None) -> Tensor:
        copies = scaled(pixels, scales, noise, stream)
        return vlm.encode_image(torch.cat(copies)).view(len(copies), len(pixels), -1).transpose(0, 1)

    def never(e: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), dtype=torch.bool, device=e.device)

    return ascend(encode, x, goal, never, run, rng)
