"""Attacks made to carry over to other models: momentum, diverse inputs and translation invariance in one loop.

Dong et al. 2018 (MI, arXiv 1710.06081), Xie et al. 2019 (DI, arXiv 1803.06978), Dong et al. 2019 (TI, arXiv
1904.02884). The three are fields that combine; ``core.views.ensemble`` makes several models one classifier. We differ
in resizing smoothly (bilinear) and image by image, so that results do not depend on company.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.core.losses import UNTARGETED
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier
from ironclip.core.views import Eot


@method
class Transfer:
    """Iterated FGSM with momentum ``mi``, input diversity ``di`` and gradient smoothing ``ti``.

    ``alpha``: step, or None for eps / steps. ``mi``: share of the old direction that is kept; gradients are divided by
    their mean magnitude first; 0 is plain PGD. ``di``: probability with which an image is resized to between ``di_low``
    of its side and all of it and padded with zeros at random, afresh at every step; 0 leaves images alone. ``ti``: side
    of the Gaussian kernel (``ti_sigma``) that smooths the gradient, odd; 0 or 1 leaves it alone. Returns the last
    point, judged by the classifier itself. Costs steps (F + B) + 1 F.

    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "transfer"
    revision: ClassVar[int] = 1
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mi-fgsm": {},
        "di-fgsm": {"mi": 0.0, "di": 0.5},
        "ti-fgsm": {"mi": 0.0, "ti": 15},
        "mi-di-ti": {"di": 0.5, "ti": 15},
    }

    eps: Fraction = Fraction(4, 255)
    alpha: Fraction | None = None
    steps: int = 10
    norm: str = "linf"
    loss: str = "ce"
    start: str = "zero"
    mi: float = 1.0
    di: float = 0.0
    di_low: float = 0.9
    ti: int = 0
    ti_sigma: float = 3.0

    def __post_init__(self) -> None:
        check_fields(self, losses=UNTARGETED, steps=1, mi=0)
        if not (0 <= self.di <= 1 and 0 < self.di_low <= 1):
            raise ValueError(f"di must be in [0, 1] and di_low in (0, 1], got {self.di} and {self.di_low}")
        if self.ti < 0 or (self.ti and self.ti % 2 == 0) or self.ti_sigma <= 0:
            raise ValueError(f"ti must be 0 or an odd side and ti_sigma positive, got {self.ti} and {self.ti_sigma}")

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Attack one batch."""
        goal = Objective(self.loss, x, y)
        alpha = self.alpha if self.alpha is not None else self.eps / self.steps
        smooth = partial(smoothed, kernel=gaussian(self.ti, self.ti_sigma).to(x)) if self.ti > 1 else None
        run = Ascent(
            eps=float(self.eps),
            alpha=float(alpha),
            steps=self.steps,
            norm=self.norm,
            start=self.start,
            momentum=self.mi,
            best=False,
            smooth=smooth,
        )
        view = diverse(clf, self.di, self.di_low)
        result = ascend(view, x, goal, goal.fooled, run, rng.fold("transfer"), goal.rescue, judge=clf)
        return replace(result, notes=(*goal.notes, *result.notes))


@dataclass(frozen=True, eq=False)
class Diverse:
    """``base`` behind random resizing and padding; ``p``: probability, ``low``: smallest share of the side."""

    base: Classifier
    p: float
    low: float

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        rng = rng_or_rows(rng, x, "input diversity")
        h, w = x.shape[-2:]
        least = max(int(self.low * min(h, w)), 1)
        rows = []
        for image, (use, size, top, left) in zip(x, rng.fold("di").uniform(4).tolist(), strict=True):
            if use < self.p:
                side = least + int(size * (min(h, w) - least + 1))
                sh, sw = h * side // min(h, w), w * side // min(h, w)
                t, q = int(top * (h - sh + 1)), int(left * (w - sw + 1))
                image = F.interpolate(image[None], (sh, sw), mode="bilinear", align_corners=False)[0]
                image = F.pad(image, (q, w - sw - q, t, h - sh - t))
            rows.append(image)
        return self.base(torch.stack(rows) if rows else x, rng)


def diverse(clf: Classifier, p: float, low: float = 0.9) -> Classifier:
    """Input diversity in front of a classifier; inside the draws of an ``eot`` view; p = 0 is the classifier itself."""
    if p == 0:
        return clf
    return Eot(Diverse(clf.base, p, low), clf.draws) if isinstance(clf, Eot) else Diverse(clf, p, low)


def gaussian(side: int, sigma: float) -> Tensor:
    """(side, side) Gaussian kernel that sums to 1."""
    line = torch.exp(-0.5 * ((torch.arange(side) - (side - 1) / 2) / sigma).square())
    kernel = line[:, None] * line
    return kernel / kernel.sum()


def smoothed(grad: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of (b, 3, h, w) convolved with the kernel, zero outside."""
    c = grad.shape[1]
    return F.conv2d(grad, kernel.expand(c, 1, *kernel.shape), padding=kernel.shape[0] // 2, groups=c)
