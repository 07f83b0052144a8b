"""Filters in front of the model: Fourier low-pass, JPEG, median, Gaussian blur, fewer bits.

The oldest idea against adversarial noise (Guo et al. 2018, arXiv 1711.00117; Xu et al. 2018, arXiv 1704.01155) and a
baseline that newer training-free defenses have to beat. It takes away what attacks that do not know it put into high
frequencies; an attack through the filter, or straight past it (BPDA, Athalye et al. 2018, arXiv 1802.00420), does not
put it there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.filters import gaussian_blur, jpeg_file, jpeg_smooth, low_pass, median
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

FILTERS = ("low_pass", "jpeg", "median", "blur", "bits")


@method
class Purify:
    """One filter before the tower.

    ``filter``: ``low_pass`` keeps Fourier coefficients up to ``radius`` cycles per 224 pixels (40 of at most 112 per
    axis); ``jpeg`` writes and reads a real JPEG of ``quality``; ``median`` over ``window`` x ``window`` pixels;
    ``blur`` with a Gaussian of ``sigma`` pixels on 5 x 5; ``bits`` rounds to ``bits`` bits.

    Results are cut to [0, 1]. Costs 1 forward. Low-pass and blur are linear, the median has the derivative of the pixel
    it picks. JPEG has that of its arithmetic with every rounding passed straight through, ``bits`` that of the
    identity; all but the linear ones offer ``identity`` as a surrogate. Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="purify",
        title="Input filter",
        paradigm="training-free",
        kind="transform",
        paper="baseline; Guo et al. 2018, arXiv 1711.00117",
    )

    filter: str = "low_pass"
    radius: float = 40.0
    quality: int = 75
    window: int = 3
    sigma: float = 1.0
    bits: int = 5

    def __post_init__(self) -> None:
        check_choice(self.filter, FILTERS, "filter")
        if self.radius < 0:
            raise ValueError(f"radius must not be negative, got {self.radius}; write 40 (cycles per 224 pixels)")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}; write 75")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window must be odd and positive, got {self.window}; write 3")
        if self.sigma < 0:
            raise ValueError(f"sigma must not be negative, got {self.sigma}; write 1.0 (pixels of the grid)")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 1..8, got {self.bits}; write 5")

    @property
    def surrogates(self) -> tuple[str, ...]:
        """``identity``, where the filter is not linear."""
        return () if self.filter in ("low_pass", "blur") else ("identity",)

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The classifier behind the filter; deterministic, images independent of each other."""
        return _defended(clf, self)

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "identity") -> Defended:
        """The same values with the derivative of no filter at all (BPDA)."""
        check_choice(name, self.surrogates, "surrogate of Purify")
        return _defended(clf, self, straight=True)

    def pixels(self, x: Tensor) -> Tensor:
        """Filtered pixels (b, 3, h, w) in [0, 1], with the derivative described above."""
        match self.filter:
            case "low_pass":
                return low_pass(x, self.radius * min(x.shape[-2:]) / 224).clamp(0.0, 1.0)
            case "blur":
                return gaussian_blur(x, self.sigma).clamp(0.0, 1.0)
            case "median":
                return median(x, self.window)
            case "jpeg":
                real = jpeg_file(x, self.quality)
                return forwarded(real, jpeg_smooth(x, self.quality)) if wants_graph(x) else real
        levels = 2**self.bits - 1
        return forwarded((x.detach() * levels).round() / levels, x)


def _defended(clf: ZeroShot, purify: Purify, straight: bool = False) -> Defended:
    def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, clf.vlm.image_size)
        if not straight:
            return purify.pixels(x)
        with torch.no_grad():
            value = purify.pixels(x)
        return forwarded(value, x)

    return Defended(clf, partial(_encode, clf.vlm, seen), seen=seen)


def _encode(vlm: VLM, seen: Callable[..., Tensor], x: Tensor, rng: SampleRNG | None = None) -> Tensor:
    features: Tensor = vlm.encode_image(seen(x, rng))
    return features
