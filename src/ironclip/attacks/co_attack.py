"""Co-Attack: captions first, then the image away from itself and from the attacked captions, then captions again.

Zhang et al. 2022 (arXiv 2206.09391). The image climbs the divergence (softmax over the entries of an embedding) from
its own clean embedding plus ``weight`` times that from the embeddings of its attacked captions; their mean, where an
image has several. The last step starts from the clean captions again, as published.
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
class CoAttack:
    """Image steps inside a ball of ``eps``; ``alpha`` defaults to 2.5 eps / steps. ``weight``: of the captions.

    Costs 1 + steps + 1 forwards and steps backwards an image, 1 forward more for the captions' last step.
    """

    name: ClassVar[str] = "co_attack"
    revision: ClassVar[int] = 1

    eps: Fraction = Fraction(2, 255)
    alpha: Fraction | None = None
    steps: int = 10
    norm: str = "linf"
    start: str = "uniform"
    weight: float = 3.0
    returned: str = "best"

    def __post_init__(self) -> None:
        check_fields(self, steps=0)
        if not self.weight >= 0:
            raise ValueError(f"weight must be 0 or more, got {self.weight}; published is 3")
        if self.start == "zero":
            raise ValueError("the divergence from the clean embedding has no gradient there; use start=uniform")

    @torch.no_grad()
    def __call__(
        self, vlm: VLM, x: Tensor, captions: Sequence[Sequence[str]], words: TextAttack, *, rng: SampleRNG
    ) -> PairResult:
        """Attack b images and their captions. Raises ValueError for images or captions that do not fit."""
        check_pairs(vlm, x, captions)
        clean = vlm.encode_image(x)
        sets, counts = text_sets(vlm, reword(vlm, captions, words, clean))
        own = torch.arange(sets.shape[1], device=x.device)[None] < counts[:, None]

        def goal(e: Tensor, rows: Tensor) -> Tensor:
            texts = (divergence(sets[rows], e) * own[rows]).sum(dim=1) / counts[rows]
            return divergence(clean[rows], e[:, 0]) + self.weight * texts

        alpha = float(self.alpha or Fraction(5, 2 * max(self.steps, 1)) * self.eps)
        run = Ascent(float(self.eps), alpha, self.steps, self.norm, self.start, best=self.returned == "best")
        result = climb_embedding(vlm, x, goal, run, rng.fold("co_attack"))
        moved = reword(vlm, captions, words, vlm.encode_image(result.x_adv))
        return PairResult(result.x_adv, moved, result.forwards + 2, result.backwards)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) over the last dimension, (..., d) and (..., d) to (...)."""
    p, q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
