"""FPT-Noise (reconstruction): each image its own noise strength, found from how its feature drifts, then TTE.

arXiv 2510.20856 (2025). Known are: a noise strength per image, a threshold on the rate at which the feature changes
over the noise levels, a stability threshold, and test-time transformation ensembling at the end. The formulas were not
available. Ours are: the levels, that the strength is the first level after which a step changes the feature by less
than ``rate`` of the largest step, and that images whose feature moves by less than ``stable`` get no noise. No figure
of this file reproduces a published one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_images
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.sphere import drift_between
from ironclip.core.types import Info, State
from ironclip.core.views import Scored
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import RECONSTRUCTED, Gated, Threshold
from ironclip.defenses.tte import TTE


@method
class FPTNoise(Gated):
    """Noise of ``levels`` strengths up to ``sigma`` (pixel units), the same draw at each, tells how an image drifts.

    The drift 1 - cos between the plain feature and that at ``sigma`` decides whether it is noised at all: above
    ``stable``, the 95th percentile over clean images, from ``calibrate`` or ``fit``; without either 0.1, with a
    warning. ``rate``: share of the largest change per level below which the feature counts as settled. The image,
    noised or not, is then scored by TTE with ``crops`` crops and ``pad``.

    Costs 1 + ``levels`` forwards and TTE's 2 (1 + crops). The choice of the strength is a jump; gradients pass through
    the noised views. Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="fpt_noise",
        title="FPT-Noise (reconstruction)",
        paradigm="training-free",
        kind="averaging",
        paper="arXiv 2510.20856 (reconstruction)",
        randomized=True,
    )
    THRESHOLD: ClassVar[Threshold] = Threshold("stable", 0.95, ("sigma",), usual=0.1)

    sigma: float = 0.1
    levels: int = 4
    rate: float = 0.5
    stable: float | None = None
    crops: int = 4
    pad: int = 4
    reconstruction: bool = True

    def __post_init__(self) -> None:
        if not self.reconstruction:
            raise ValueError(f"FPT-Noise: {RECONSTRUCTED}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}; write 0.1 (pixels in [0, 1])")
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}; write 4")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate}; write 0.5")
        TTE(crops=self.crops, pad=self.pad)

    def apply(self, clf: ZeroShot, state: State | None = None) -> Scored:
        """The noising classifier; randomised, images independent of each other."""
        return Scored(clf, partial(self._logits, clf, self._limit(clf, state)), randomized=True)

    def strengths(self, clf: ZeroShot, x: Tensor, limit: float, rng: SampleRNG | None = None) -> Tensor:
        """(b,) noise strength of each image, 0 where its drift is at most ``limit``."""
        z = self._walk(clf, x, rng)
        return chosen(z, self._sigmas(z), limit, self.rate)

    def drift(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) 1 - cos between the features without noise and at ``sigma``."""
        check_images(x, clf.vlm.image_size)
        noise = rng_or_rows(rng, x, "fpt_noise").fold("fpt_noise").normal_like(x)
        both: Tensor = clf.vlm.encode_image(torch.cat([x, (x + self.sigma * noise).clamp(0.0, 1.0)]))
        return drift_between(*both.chunk(2))

    def gated(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None, state: State | None = None) -> Tensor:
        """(b,) True where the image is noised."""
        return self.drift(clf, x, rng) > self._limit(clf, state)

    def penalty(self, clf: ZeroShot, state: State | None = None) -> Callable[[Tensor, SampleRNG | None], Tensor]:
        """``(x, rng) -> (b,)``: relu(drift - 0.9 stable); staying under it an attack meets TTE alone."""
        goal = 0.9 * self._limit(clf, state)

        def cost(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            return F.relu(self.drift(clf, x, rng) - goal)

        return cost

    def _limit(self, clf: ZeroShot, state: State | None) -> float:
        limit = self.settled(clf, state).stable
        assert limit is not None
        return limit

    def _sigmas(self, like: Tensor) -> Tensor:
        return self.sigma * torch.arange(1, self.levels + 1).to(like) / self.levels

    def _walk(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None) -> Tensor:
        """(levels + 1, b, d) features without noise and at every level."""
        check_images(x, clf.vlm.image_size)
        noise = rng_or_rows(rng, x, "fpt_noise").fold("fpt_noise").normal_like(x)
        with torch.no_grad():
            rows = [x, *((x + s * noise).clamp(0.0, 1.0) for s in self._sigmas(x).tolist())]
            return torch.stack([clf.vlm.encode_image(r) for r in rows])

    def _logits(self, clf: ZeroShot, limit: float, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        rng = rng_or_rows(rng, x, "fpt_noise")
        strength = self.strengths(clf, x.detach(), limit, rng).view(-1, 1, 1, 1)
        noised = (x + strength * rng.fold("fpt_noise").normal_like(x)).clamp(0.0, 1.0)
        logits: Tensor = TTE(crops=self.crops, pad=self.pad).apply(clf)(noised, rng.fold("fpt_noise", "views"))
        return logits


def chosen(z: Tensor, sigmas: Tensor, limit: float, rate: float) -> Tensor:
    """(b,) strengths from features ``z`` (levels + 1, b, d) without noise and at ``sigmas`` (levels,).

    The first level whose next step is under ``rate`` of the largest, else the last; 0 where the last drift is at most
    ``limit``."""
    change = torch.stack([drift_between(a, b).sqrt() for a, b in zip(z[1:], z[:-1], strict=True)])
    last = torch.ones_like(change[:1], dtype=torch.bool)
    settled = torch.cat([change[1:] < rate * change.amax(dim=0), last])
    first = settled.to(torch.uint8).argmax(dim=0)
    return torch.where(drift_between(z[0], z[-1]) > limit, sigmas[first], torch.zeros_like(sigmas[first]))
