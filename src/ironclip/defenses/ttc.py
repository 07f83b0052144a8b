"""Test-time counterattack: images whose features barely move under noise are pushed away from where they are.

Xing, Zhao, Sebe 2025 (arXiv 2503.03613). The premise is that features of attacked images are "falsely stable". It does
not hold at every noise level nor on every backbone, and the method falls to attackers who know it (arXiv 2606.06938
reports 2.4 % robust accuracy under BPDA): read its adaptive column, not its static one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import exp
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.ball import start_delta
from ironclip.core.check import as_fraction, check_choice, check_eps, check_images
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import Gated, Threshold
from ironclip.defenses._inner import boxed, counterattack

KAPPA = 10.0
"""Steepness of the tanh that stands in for the sign in the backward pass of the ``smooth`` surrogate."""


@dataclass(frozen=True, eq=False)
class Look:
    """The two forwards before the gate. ``noise``: (b, 3, h, w) random start, not yet cut to the pixel box; ``clean``
    and ``noisy``: (b, d) features, not normalised; ``drift``: (b,); ``rows``: indices of the images judged attacked."""

    noise: Tensor
    clean: Tensor
    noisy: Tensor
    drift: Tensor
    rows: Tensor


@method
class TTC(Gated):
    """Gate by feature drift, then a short ascent on the feature's distance from itself.

    ``eps``: radius of the counterattack and of its random start, pixel units. ``alpha``: step. ``steps``: 0 is plain
    random noise. ``tau``: an image whose relative drift ``||e(x + noise) - e(x)|| / ||e(x)||`` is below it is judged
    attacked. ``beta``: the offsets of all steps are averaged with weights exp(beta i). ``norm``: linf, or l2 (random
    direction, steps along the gradient). ``clean_offset``: what images judged clean receive, ``noise``
    (the random start stays on) or ``zero``.

    The published constants belong to OpenAI's ViT-B/32. Drift depends on the backbone, so elsewhere find ``tau``, the
    5th percentile over unlabelled clean images that are not part of the test: ``ironclip fit TTC --vlm ... --data ...``
    or ``calibrate``, then write the figure into the spec, ``TTC(tau=0.31)``. A state that ``fit`` returns stands in for
    the published 0.2, never for another figure; without either that is said once. Report ``gate`` beside every
    accuracy: where attacked images drift more than clean ones it works against itself, and no ``tau`` helps.

    The defaults are the published constants (``preset="reference"`` pins them). ``clean_offset="zero"`` scores images
    judged clean as they are, at the same cost; it is not the default because the noise alone is much of the defense,
    and because evading the gate then means facing the undefended model. On fine-tuned towers the published code
    measures the drift with the original tower; here there is one tower, and ``tau`` is calibrated on it.

    Called on x: (b, 3, h, w) pixels in [0, 1]. Without gradients 2 forwards for an image judged clean, and
    ``steps`` + 3 forwards and ``steps`` backwards for the others; one more forward of every image with them. Gradients
    are exact: a sign has derivative zero, so only the pixel box and, for l2, the steps themselves bend the identity.
    Raises ValueError for bad fields and images; a feature of length zero counts as clean, with a warning.
    """

    info: ClassVar[Info] = Info(
        name="ttc",
        title="TTC",
        paradigm="training-free",
        kind="counterattack",
        paper="Xing et al. 2025, arXiv 2503.03613",
        code="https://github.com/Sxing2/CLIP-Test-time-Counterattacks",
        randomized=True,
    )
    surrogates: ClassVar[tuple[str, ...]] = ("bpda", "smooth")
    THRESHOLD: ClassVar[Threshold] = Threshold("tau", 0.05, ("eps", "norm"), usual=0.2)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "eps": Fraction(4, 255),
            "alpha": Fraction(1, 255),
            "steps": 2,
            "tau": 0.2,
            "beta": 2.0,
            "norm": "linf",
            "clean_offset": "noise",
        }
    }

    eps: Fraction = Fraction(4, 255)
    alpha: Fraction = Fraction(1, 255)
    steps: int = 2
    tau: float = 0.2
    beta: float = 2.0
    norm: str = "linf"
    clean_offset: str = "noise"

    def __post_init__(self) -> None:
        check_choice(self.norm, ("linf", "l2"), "norm")
        check_choice(self.clean_offset, ("zero", "noise"), "clean_offset")
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        object.__setattr__(self, "alpha", as_fraction(self.alpha, "alpha"))
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}; write 1/255")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; 0 is noise alone")
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}; find it with calibrate(clf, clean_images)")

    @property
    def weights(self) -> list[float]:
        """Weight of the start and of every step's offset; they sum to 1 for any ``beta``."""
        parts = [exp(self.beta * (i - (self.steps if self.beta > 0 else 0))) for i in range(self.steps + 1)]
        return [p / sum(parts) for p in parts]

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The classifier behind the counterattack; randomised, images independent of each other."""
        return self.settled(clf, state)._defended(clf, "exact")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "bpda") -> Defended:
        """The same values with another derivative. ``bpda``: this call's offset is a constant, the gradient is that of
        the model at x + offset. ``smooth``: differentiates through the steps, with tanh(10 g / mean|g|) for the sign.
        """
        check_choice(name, self.surrogates, "surrogate of TTC")
        return self.settled(clf, state)._defended(clf, name)

    def penalty(
        self, clf: ZeroShot, state: State | None = None, margin: float | None = None
    ) -> Callable[[Tensor, SampleRNG | None], Tensor]:
        """``(x, rng) -> (b,)``: relu(tau + margin - drift), zero where the gate takes the image for clean.

        An attack that subtracts it keeps the counterattack from starting. Same draw as the classifier called with the
        same rng; ``margin`` is tau / 10 unless given.
        """
        tau = self.settled(clf, state).tau
        goal = tau * 1.1 if margin is None else tau + margin

        def cost(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            noise = self._noise(x, rng_or_rows(rng, x, "ttc"))
            clean = clf.vlm.encode_image(x, normalize=False)
            return F.relu(goal - _drift(clean, clf.vlm.encode_image(boxed(x, noise), normalize=False)))

        return cost

    def drift(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) relative feature drift under this call's noise."""
        return self._look(clf.vlm, x, rng).drift

    def gate(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None, state: State | None = None) -> Tensor:
        """(b,) True where the image is judged attacked and counterattacked, in the call with the same rng."""
        return self.drift(clf, x, rng) < self.settled(clf, state).tau

    def _found_on(self, vlm: VLM) -> bool:
        """The paper's tower: OpenAI's ViT-B/32."""
        name = vlm.name.lower()
        return "openai" in name and ("vit-b-32" in name or "vit-base-patch32" in name)

    def _defended(self, clf: ZeroShot, how: str) -> Defended:
        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            return self._pixels(clf.vlm, x, self._look(clf.vlm, x, rng), how)

        return Defended(clf, partial(self._encode, clf.vlm, how), randomized=self.eps > 0, seen=seen)

    def _noise(self, x: Tensor, rng: SampleRNG) -> Tensor:
        return start_delta(x.detach(), float(self.eps), self.norm, "uniform", rng.fold("ttc"))

    def _look(self, vlm: VLM, x: Tensor, rng: SampleRNG | None) -> Look:
        check_images(x, vlm.image_size)
        noise = self._noise(x, rng_or_rows(rng, x, "ttc"))
        with torch.no_grad():
            clean = vlm.encode_image(x, normalize=False)
            noisy = vlm.encode_image(boxed(x, noise), normalize=False)
            drift = _drift(clean, noisy)
        return Look(noise, clean, noisy, drift, (drift < self.tau).nonzero().flatten())

    def _encode(self, vlm: VLM, how: str, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        look = self._look(vlm, x, rng)
        if wants_graph(x):
            return vlm.encode_image(self._pixels(vlm, x, look, how))
        with torch.no_grad():
            raw = look.clean if self.clean_offset == "zero" else look.noisy
            if look.rows.numel():
                moved = self._counter(vlm, x, look, "exact")
                raw = raw.index_copy(0, look.rows, vlm.encode_image(moved, normalize=False))
            return F.normalize(raw, dim=-1)

    def _pixels(self, vlm: VLM, x: Tensor, look: Look, how: str) -> Tensor:
        """What the tower finally reads, with the derivative that ``how`` names: exact, bpda or smooth."""
        if how == "bpda":
            return forwarded(self._pixels(vlm, x.detach(), look, "exact"), x)
        out = x if self.clean_offset == "zero" else boxed(x, look.noise)
        return out.index_copy(0, look.rows, self._counter(vlm, x, look, how)) if look.rows.numel() else out

    def _counter(self, vlm: VLM, x: Tensor, look: Look, how: str) -> Tensor:
        """x + weighted offset, of the rows judged attacked."""
        rows, eps, alpha = look.rows, float(self.eps), float(self.alpha)
        kappa = KAPPA if how == "smooth" else None
        return counterattack(
            vlm, x[rows], look.noise[rows], look.clean[rows], eps, alpha, self.norm, self.weights, kappa
        )


def _drift(clean: Tensor, noisy: Tensor) -> Tensor:
    size = clean.norm(dim=1)
    if bool((size == 0).any()):
        warnings.warn("TTC met features of length zero and takes those images for clean", stacklevel=2)
        far = torch.full_like(size, torch.inf)
        return torch.where(size > 0, (noisy - clean).norm(dim=1) / size.clamp(min=1e-30), far)
    return (noisy - clean).norm(dim=1) / size
