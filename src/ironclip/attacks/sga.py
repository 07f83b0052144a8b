"""SGA: set-level guidance between an image at several scales and all of its captions.

Lu et al. 2023 (arXiv 2307.14061). Three steps: captions are moved away from the image, the image away from all of the
moved captions at once, the clean captions again away from the attacked image. Published code scores captions with
features that are not normalised and always takes the last iterate; features are of unit length here, and the best
iterate is returned unless ``returned=last``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks._ascent import Ascent
from ironclip.attacks._fields import check_fields
from ironclip.attacks.pair import PairResult, check_pairs, climb_embedding, reword, text_sets
from ironclip.attacks.text import TextAttack
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.vlm import VLM


@method
class SGA:
    """Image steps of ``alpha`` inside a ball of ``eps`` that lower the cosine to every moved caption, summed.

    ``scales``: copies of the image, noised by ``noise`` where the scale is not 1. Costs 1 + (steps + 1) * s forwards
    and steps * s backwards an image with s scales, 1 forward more for the third step.
    """

    name: ClassVar[str] = "sga"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(2, 255)
    alpha: Fraction | None = Fraction(1, 510)
    steps: int = 10
    norm: str = "linf"
    start: str = "uniform"
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    noise: float = 0.05
    returned: str = "best"

    def __post_init__(self) -> None:
        check_fields(self, steps=0)
        if not self.scales or min(self.scales) <= 0 or max(self.scales) > 4:
            raise ValueError(f"scales must be one number or more in (0, 4], got {self.scales}; write scales=(1.0,)")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], got {self.noise}")

    @torch.no_grad()
    def __call__(
        self, vlm: VLM, x: Tensor, captions: Sequence[Sequence[str]], words: TextAttack, *, rng: SampleRNG
    ) -> PairResult:
        """Attack b images and their captions. Raises ValueError for images or captions that do not fit."""
        check_pairs(vlm, x, captions)
        sets, _ = text_sets(vlm, reword(vlm, captions, words, vlm.encode_image(x)))

        def goal(e: Tensor, rows: Tensor) -> Tensor:
            return -(e @ sets[rows].transpose(1, 2)).sum(dim=(1, 2))

        alpha = float(self.alpha or Fraction(5, 2 * max(self.steps, 1)) * self.eps)
        run = Ascent(float(self.eps), alpha, self.steps, self.norm, self.start, best=self.returned == "best")
        result = climb_embedding(vlm, x, goal, run, rng.fold("sga"), self.scales, self.noise)
        moved = reword(vlm, captions, words, vlm.encode_image(result.x_adv))
        s = len(self.scales)
        return PairResult(result.x_adv, moved, result.forwards * s + 2, result.backwards * s)
