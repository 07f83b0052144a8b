"""Gaussian noise averaged over several draws: the simplest anchor, and what any randomised defense has to beat.

The idea that features of noised copies point the way back from an attack is that of AOM (Tong et al., CVPR 2025);
averaging decisions over Gaussian noise is randomised smoothing (Cohen et al. 2019, arXiv 1902.02918). Nothing is
certified here: at 4/255 the smoothing radius of any useful sigma is far too small.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_images
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

ROWS = 64
"""Noised copies are encoded together up to this many images, so that single images run at a batch's speed."""


@method
class Noise:
    """Unit features of ``draws`` noised copies, averaged and normalised again.

    ``sigma``: standard deviation of the noise in pixel units, added before mean/std normalisation; copies are cut to
    [0, 1]. Features are averaged, not probabilities: every draw has the same say however sure it is, the gradient does
    not saturate with the softmax, and the result is an embedding that retrieval can use too. Costs ``draws`` forwards.
    Smooth in the pixels but for the cut, so gradients through it, averaged over fresh draws, are the right attack.

    Raises ValueError for a negative ``sigma``, no draws, and bad images.
    """

    info: ClassVar[Info] = Info(
        name="noise",
        title="Noise average",
        paradigm="training-free",
        kind="averaging",
        paper="baseline; cf. Cohen et al. 2019, arXiv 1902.02918",
        randomized=True,
    )

    sigma: float = 0.05
    draws: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma must be at least 0 and finite, got {self.sigma}; write 0.05 (pixels in [0, 1])")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}; write 8")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The averaging classifier; randomised, images independent of each other."""
        return Defended(clf, partial(self._encode, clf.vlm), randomized=self.sigma > 0)

    def _encode(self, vlm: VLM, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, vlm.image_size)
        if self.sigma == 0:
            return vlm.encode_image(x)
        stream = rng_or_rows(rng, x, "noise").fold("noise")
        b = x.shape[0]
        together = max(1, ROWS // max(b, 1))
        total = x.new_zeros(())
        for first in range(0, self.draws, together):
            part = range(first, min(first + together, self.draws))
            copies = [(x + self.sigma * stream.at(i).normal_like(x)).clamp(0.0, 1.0) for i in part]
            features: Tensor = vlm.encode_image(torch.cat(copies))
            total = total + features.view(len(part), b, -1).sum(dim=0)
        return F.normalize(total, dim=-1)
