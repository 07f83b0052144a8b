"""AOM (reconstruction): one step of the image feature towards the mean feature of its noised copies.

Tong, Lai, Pan, Yin, "On the Zero-shot Adversarial Robustness of Vision-Language Models: A Truly Zero-shot and
Training-free Approach", CVPR 2025. Neither its full text nor any code was at hand. Known are: Gaussian noise, features
of noised copies as anchors, a single step in embedding space, nothing trained. Ours are: sigma, the number of draws,
the step's length, cutting to [0, 1], averaging unit features, and the optional gate, whose idea (attacked features
move more under *strong* noise) is that of arXiv 2606.03730. No figure of this file reproduces a published one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.sphere import angle_between, coefficients, drift_between, move, unit_or
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import Gated, Threshold

ROWS = 64
"""Noised copies are encoded together up to this many images."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """``z``: (b, d) unit features of the images; ``copies``: (b, draws, d) unit features of noised copies, by draw."""

    z: Tensor
    copies: Tensor

    def anchor(self, draws: int | None = None) -> Tensor:
        """(b, d) unit mean of the first ``draws`` copies; where they cancel out the feature itself, with a warning."""
        return unit_or(
            self.copies[:, :draws].mean(dim=1), self.z, "noised copies that cancel out; they stay as they are"
        )


@method
class AOM(Gated):
    """Feature z moved along its path to the anchor a: chord ``z + lam (a - z)``, normalised, or the great circle.

    ``sigma``: standard deviation of the noise, pixel units; copies are cut to [0, 1]. ``draws``: copies of each image.
    ``lam``: 0 is the plain model, 1 the anchor alone, more goes past it. ``path``: ``chord`` or ``geodesic``, the same
    ends at another pace. ``antithetic``: copies in pairs of opposite noise. ``gate="high_noise_drift"``: only
    images whose drift 1 - cos(z, a) at noise ``gate_sigma`` exceeds ``threshold`` are moved; the threshold is the 95th
    percentile over clean images, from ``calibrate`` (write it into the spec) or ``fit`` (a state).

    Costs ``draws`` + 1 forwards (``draws`` where lam = 1 leaves no use for the plain image), with a gate of another
    sigma ``draws`` more. Smooth in the pixels but for the cut and the gate's jump: gradients through it, averaged over
    fresh draws, are the right attack. An anchor straight opposite to z leaves no path; such images take the anchor,
    with a warning. Raises ValueError for bad fields and images, and for a gate without a threshold.
    """

    info: ClassVar[Info] = Info(
        name="aom",
        title="AOM (reconstruction)",
        paradigm="training-free",
        kind="averaging",
        paper="Tong et al. 2025, CVPR (reconstruction)",
        randomized=True,
    )
    THRESHOLD: ClassVar[Threshold] = Threshold("threshold", 0.95, ("gate_sigma", "draws", "antithetic"))

    sigma: float = 0.1
    draws: int = 8
    lam: float = 1.0
    path: str = "chord"
    antithetic: bool = False
    gate: str = "off"
    gate_sigma: float = 0.1
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.path, ("chord", "geodesic"), "path")
        check_choice(self.gate, ("off", "high_noise_drift"), "gate")
        for name, value in (("sigma", self.sigma), ("gate_sigma", self.gate_sigma)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}; write 0.1 (pixels in [0, 1])")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}; write 8")
        if self.gate != "off" and self.gate_sigma == 0:
            raise ValueError("gate_sigma must be positive, without noise nothing drifts; write 0.1")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The corrected classifier; randomised unless sigma or lam is 0, images independent of each other."""
        if clf.weights.shape[1] != clf.vlm.dim:
            raise ValueError(f"class weights have {clf.weights.shape[1]} dimensions, {clf.vlm.name} has {clf.vlm.dim}")
        limit = self._limit(clf, state) if self.gate != "off" and self._moves else -inf
        return Defended(clf, partial(self._encode, clf.vlm, limit), randomized=self._moves)

    def encodings(self, vlm: VLM, x: Tensor, rng: SampleRNG, sigma: float | None = None) -> Encoded:
        """The image and its noised copies through the tower, packed together: all that any lam, path or smaller number
        of draws needs. The draws of every sigma are the same ones, scaled."""
        made = self._through(vlm, x, rng, self.sigma if sigma is None else sigma, plain=True)
        return Encoded(made[:, 0], made[:, 1:])

    def sweep(
        self,
        clf: ZeroShot,
        x: Tensor,
        rng: SampleRNG | None = None,
        sigmas: Sequence[float] = (4 / 255, 8 / 255, 16 / 255, 0.1, 38 / 255),
        lams: Sequence[float] = (0.5, 1.0, 1.5, 2.5),
        draws: Sequence[int] | None = None,
    ) -> dict[tuple[float, float, int], Tensor]:
        """Logits (b, k) of the ungated method for every (sigma, lam, draws), from one encoding per sigma.

        ``draws``: numbers of copies up to ``self.draws``. Scores are combined from those of z and a; no feature is
        moved. Choose constants on one held-out set and freeze them. Raises ValueError for more draws than there are.
        """
        check_images(x, clf.vlm.image_size)
        counts = (self.draws,) if draws is None else tuple(draws)
        if any(not 1 <= n <= self.draws for n in counts):
            raise ValueError(f"draws must lie in 1..{self.draws}, got {counts}; write AOM(draws={max(counts)})")
        rng = rng_or_rows(rng, x, "aom")
        out: dict[tuple[float, float, int], Tensor] = {}
        with torch.no_grad():
            for sigma in sigmas:
                made = self.encodings(clf.vlm, x, rng, sigma)
                plain = clf.head(made.z)
                for n in counts:
                    a = made.anchor(n)
                    scores, angle = clf.head(a), angle_between(made.z, a)
                    for lam in lams:
                        of_z, of_a = coefficients(angle, lam, self.path)
                        out[sigma, lam, n] = of_z[:, None] * plain + of_a[:, None] * scores
        return out

    def drift(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) 1 - cos(z, a) at ``gate_sigma``."""
        check_images(x, clf.vlm.image_size)
        made = self.encodings(clf.vlm, x, rng_or_rows(rng, x, "aom"), self.gate_sigma)
        return drift_between(made.z, made.anchor())

    def gated(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None, state: State | None = None) -> Tensor:
        """(b,) True where the image is judged attacked and moved; everywhere without a gate."""
        if self.gate == "off":
            return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        return self.drift(clf, x, rng) > self._limit(clf, state)

    def calibrate(self, clf: ZeroShot, data: Iterable[Any], quantile: float | None = None, seed: int = 0) -> float:
        """As of every gated defense (``_calibrate.py``). Raises ValueError without a gate, too."""
        if self.gate == "off":
            raise ValueError("AOM(gate=off) has no threshold; write AOM(gate=high_noise_drift)")
        return super().calibrate(clf, data, quantile, seed)

    @property
    def is_open(self) -> bool:
        """Is there a gate whose threshold is left to calibration?"""
        return self.gate != "off" and self.threshold is None

    @property
    def penalty(self) -> Callable[..., Callable[[Tensor, SampleRNG | None], Tensor]]:
        """With a gate: ``penalty(clf, state)`` is ``(x, rng) -> (b,)``, relu(drift - 0.9 threshold); staying under it
        an attack meets the undefended model. Without a gate there is no such attribute."""
        if self.gate == "off":
            raise AttributeError("AOM(gate=off) has no gate to evade")
        return self._penalty

    def _penalty(self, clf: ZeroShot, state: State | None = None) -> Callable[[Tensor, SampleRNG | None], Tensor]:
        goal = 0.9 * self._limit(clf, state)

        def cost(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            return F.relu(self.drift(clf, x, rng) - goal)

        return cost

    @property
    def _moves(self) -> bool:
        return self.sigma > 0 and self.lam != 0

    def _limit(self, clf: ZeroShot, state: State | None) -> float:
        limit = self.settled(clf, state).threshold
        assert limit is not None
        return limit

    def _through(self, vlm: VLM, x: Tensor, rng: SampleRNG, sigma: float, plain: bool) -> Tensor:
        """(b, plain + draws, d) unit features of the image itself, where asked for, and of its noised copies."""
        stream, b = rng.fold("aom"), x.shape[0]
        wanted = [-1] * plain + list(range(self.draws))
        together = max(1, ROWS // max(b, 1))
        rows = []
        for first in range(0, len(wanted), together):
            part = [x if i < 0 else self._copy(x, stream, sigma, i) for i in wanted[first : first + together]]
            rows.append(vlm.encode_image(torch.cat(part)).unflatten(0, (len(part), b)))
        return torch.cat(rows).transpose(0, 1)

    def _copy(self, x: Tensor, stream: SampleRNG, sigma: float, i: int) -> Tensor:
        side = -1.0 if self.antithetic and i % 2 else 1.0
        noise = stream.at(i // 2 if self.antithetic else i).normal_like(x)
        return (x + side * sigma * noise).clamp(0.0, 1.0)

    def _encode(self, vlm: VLM, limit: float, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, vlm.image_size)
        if not self._moves:
            return vlm.encode_image(x)
        rng = rng_or_rows(rng, x, "aom")
        if self.gate == "off" and self.lam == 1:
            copies = self._through(vlm, x, rng, self.sigma, plain=False)
            mean = copies.mean(dim=1)
            if not bool((mean.detach().norm(dim=1) < 1e-6).any()):
                return F.normalize(mean, dim=-1)
        made = self.encodings(vlm, x, rng)
        moved = move(made.z, made.anchor(), self.lam, self.path)
        if self.gate == "off":
            return moved
        strong = made if self.gate_sigma == self.sigma else self.encodings(vlm, x, rng, self.gate_sigma)
        with torch.no_grad():
            attacked = drift_between(strong.z, strong.anchor()) > limit
        return torch.where(attacked[:, None], moved, made.z)
