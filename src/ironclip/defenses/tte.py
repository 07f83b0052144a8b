"""TTE: mean logits over the image, its mirror image, and shifted crops of both.

Perez, Alfarra, Jeanneret, Rueda, Thabet, Ghanem, Arbelaez 2021, "Enhancing Adversarial Robustness via Test-time
Transformation Ensembling" (arXiv 2107.14110). In the published code every crop is the same one, its offsets are drawn
once per process, and the largest offset never; ``preset="reference"`` does that, the default draws each crop anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.filters import gaussian_blur
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Scored
from ironclip.core.zeroshot import ZeroShot

ROWS = 64
"""Views are encoded together up to this many images."""


@method
class TTE:
    """The image, its mirror (``flip``), ``crops`` crops after zero padding by ``pad`` pixels, and the crops' mirrors.

    ``offsets``: ``fresh`` draws every crop per image and call; ``published`` draws one offset pair from ``seed`` and
    uses it for every crop of every image, which makes the method deterministic. ``blur``: standard deviation in pixels
    of a 5 x 5 Gaussian over every view, 0 for none. The paper crops images of 32 pixels; on larger ones 4 pixels are
    little. Costs one forward per view, (1 + crops) * (1 + flip). Linear views and a mean: differentiable as it is.

    Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="tte",
        title="TTE",
        paradigm="training-free",
        kind="views",
        paper="Perez et al. 2021, arXiv 2107.14110",
        code="https://github.com/juancprzs/TTE",
        randomized=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reference": {"offsets": "published"}}

    crops: int = 4
    pad: int = 4
    flip: bool = True
    blur: float = 0.0
    offsets: str = "fresh"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.offsets, ("fresh", "published"), "offsets")
        if self.crops < 0:
            raise ValueError(f"crops must not be negative, got {self.crops}; write 4, or 0 for the image alone")
        if self.pad < 1:
            raise ValueError(f"pad must be at least 1 pixel, got {self.pad}; write 4")
        if self.blur < 0:
            raise ValueError(f"blur must not be negative, got {self.blur}; write 1.0, or 0 for none")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Scored:
        """The averaging classifier; images independent of each other."""
        return Scored(clf, partial(self._logits, clf), randomized=self.offsets == "fresh" and self.crops > 0)

    def views(self, x: Tensor, rng: SampleRNG | None = None) -> list[Tensor]:
        """The views of a batch, each (b, 3, h, w): image, crops, and the mirrors of all."""
        shown = [x]
        if self.crops:
            wide = F.pad(x, (self.pad,) * 4)
            shown += [_cut(wide, corner, x.shape[-2:]) for corner in self._corners(x, rng).unbind(1)]
        shown += [v.flip(-1) for v in shown] if self.flip else []
        return [gaussian_blur(v, self.blur) for v in shown]

    def _corners(self, x: Tensor, rng: SampleRNG | None) -> Tensor:
        """(b, crops, 2) offsets down and across, in 0..2 pad."""
        if self.offsets == "fresh":
            return rng_or_rows(rng, x, "tte").fold("tte").integers(0, 2 * self.pad + 1, self.crops, 2)
        pair = np.random.default_rng(self.seed).integers(0, 2 * self.pad, size=2)
        return torch.from_numpy(pair).expand(x.shape[0], self.crops, 2)

    def _logits(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, clf.vlm.image_size)
        shown, b = self.views(x, rng), x.shape[0]
        together = max(1, ROWS // max(b, 1))
        total = x.new_zeros(())
        for i in range(0, len(shown), together):
            part = shown[i : i + together]
            total = total + clf(torch.cat(part)).unflatten(0, (len(part), b)).sum(dim=0)
        return total / len(shown)


def _cut(wide: Tensor, corner: Tensor, size: torch.Size) -> Tensor:
    """Windows of ``size`` from padded images at their corners (b, 2)."""
    h, w = size
    rows = [image[:, i : i + h, j : j + w] for image, (i, j) in zip(wide, corner.tolist(), strict=True)]
    return torch.stack(rows) if rows else wide[:, :, :h, :w]
