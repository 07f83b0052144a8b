"""AGC (reconstruction): along the great circle towards the surest augmented view, as far as the image seems attacked.

"Adaptive geodesic correction", arXiv 2605.15584 (2026). Known are: one reliable augmentation's feature as an anchor on
the sphere, a move along the great circle, a step size per image. The formulas were not available. Ours are: the four
views, the choice by entropy, and the step min(1, (1 - cos) / tau). No figure of this file reproduces a published one.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_images
from ironclip.core.filters import gaussian_blur
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.sphere import drift_between, move
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import RECONSTRUCTED, Gated, Threshold
from ironclip.defenses._descriptions import entropy


@method
class AGC(Gated):
    """Four views: centre ``crop`` (share of the side), ``blur`` (pixels, 5 x 5), zero padding by ``pad`` (share of the
    side, each edge), Gaussian noise of ``sigma`` (pixel units). The view whose class posterior has the least entropy
    gives the anchor a; the feature z moves the share min(1, (1 - cos(z, a)) / ``tau``) of the angle towards it.

    ``tau``: the 95th percentile of 1 - cos(z, a) over clean images, from ``calibrate`` (write it into the spec) or
    ``fit`` (a state); without either 0.2, with a warning. Costs 5 forwards. The choice of the view is a jump; all else
    is smooth, so gradients through it are the right attack. Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="agc",
        title="AGC (reconstruction)",
        paradigm="training-free",
        kind="averaging",
        paper="arXiv 2605.15584 (reconstruction)",
        code="https://github.com/lizhiwei23/AGC",
        randomized=True,
    )
    THRESHOLD: ClassVar[Threshold] = Threshold("tau", 0.95, ("crop", "blur", "pad", "sigma"), usual=0.2)
    LABELS: ClassVar[bool] = True  # the surest view is that of the classes

    crop: float = 0.8
    blur: float = 1.0
    pad: float = 0.1
    sigma: float = 0.1
    tau: float | None = None
    reconstruction: bool = True

    def __post_init__(self) -> None:
        if not self.reconstruction:
            raise ValueError(f"AGC: {RECONSTRUCTED}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie in (0, 1], got {self.crop}; write 0.8")
        for name, usual in (("blur", 1.0), ("pad", 0.1), ("sigma", 0.1)):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; write {usual}")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}; find it with calibrate(clf, clean_images)")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The correcting classifier; randomised by its noise, images independent of each other."""
        tau = self.settled(clf, state).tau
        assert tau is not None
        return Defended(clf, partial(self._encode, clf, tau), randomized=self.sigma > 0)

    def views(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(4, b, 3, h, w): cropped, blurred, padded, noised."""
        size, s = x.shape[-2:], x.shape[-1]
        side, edge = max(1, round(self.crop * s)), round(self.pad * s)
        top = (s - side) // 2
        near = _resized(x[:, :, top : top + side, top : top + side], size)
        far = _resized(F.pad(x, (edge,) * 4), size)
        noisy = x
        if self.sigma > 0:
            noise = rng_or_rows(rng, x, "agc").fold("agc").normal_like(x)
            noisy = (x + self.sigma * noise).clamp(0.0, 1.0)
        return torch.stack([near, gaussian_blur(x, self.blur), far, noisy])

    def drift(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) 1 - cos between the image's feature and its anchor."""
        return drift_between(*self._pair(clf, x, rng))

    def _pair(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None) -> tuple[Tensor, Tensor]:
        """(b, d) features of the images and of their surest views."""
        check_images(x, clf.vlm.image_size)
        shown = self.views(x, rng)
        features = clf.vlm.encode_image(torch.cat([x, *shown])).unflatten(0, (5, x.shape[0]))
        z, others = features[0], features[1:]
        with torch.no_grad():
            surest = entropy(clf.head(others)).argmin(dim=0)
        return z, others.gather(0, surest[None, :, None].expand(1, -1, z.shape[1]))[0]

    def _encode(self, clf: ZeroShot, tau: float, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        z, a = self._pair(clf, x, rng)
        return move(z, a, (drift_between(z, a) / tau).clamp(max=1.0), "geodesic")


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=True, align_corners=False).clamp(0.0, 1.0)
