"""Defenses that look robust and are not: each hides its gradient or its verdict in one classic way.

They follow the protocol and say honestly what kind they are, so an adaptive evaluation that leaves any of them standing
is itself broken. None defends anything.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot


def planted(name: str, kind: str, randomized: bool = False) -> Info:
    """The record of a planted defense."""
    return Info(name, name, "training-free", kind, "planted: breaks under an adaptive attack", randomized=randomized)


@method
class DetachedGradient:
    """The classifier on ``x.detach()``: no gradient at all. Falls to BPDA with the identity and to any transfer."""

    info: ClassVar[Info] = planted("detached_gradient", "transform")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        def encode(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x)
            return clf.vlm.encode_image(x.detach())

        return Defended(clf, encode)


@method
class EightBit:
    """Rounds pixels to ``levels`` steps: the gradient is zero everywhere. Falls to BPDA with the identity."""

    info: ClassVar[Info] = planted("eight_bit", "transform")
    surrogates: ClassVar[tuple[str, ...]] = ("identity",)

    levels: int = 255

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        return self._defended(clf, straight=False)

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "identity") -> Defended:
        check_choice(name, self.surrogates, "surrogate of EightBit")
        return self._defended(clf, straight=True)

    def _defended(self, clf: ZeroShot, straight: bool) -> Defended:
        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x)
            rounded = (x * self.levels).round() / self.levels
            return x + (rounded - x).detach() if straight else rounded

        return Defended(clf, lambda x, rng: clf.vlm.encode_image(seen(x, rng)), seen=seen)


@method
class RandomNoise:
    """One huge Gaussian draw per call: one gradient says little and one lucky verdict says nothing.

    Falls to gradients averaged over draws; an attack that stops at the first draw that fools is fooled itself.
    """

    info: ClassVar[Info] = planted("random_noise", "averaging", randomized=True)

    sigma: float = 0.2

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x)
            stream = rng_or_rows(rng, x, "random_noise").fold("random_noise")
            return (x + self.sigma * stream.normal_like(x)).clamp(0.0, 1.0)

        return Defended(clf, lambda x, rng: clf.vlm.encode_image(seen(x, rng)), randomized=True, seen=seen)


@method
class SignUnroll:
    """Repaints the image from grey with sign steps until its features match: the prediction stays, but what depends on
    the pixels passes ``sign``, whose derivative is zero, however honestly the steps are unrolled. Falls to BPDA.
    """

    info: ClassVar[Info] = planted("sign_unroll", "counterattack")
    surrogates: ClassVar[tuple[str, ...]] = ("bpda",)

    steps: int = 12
    alpha: float = 0.03

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        return self._defended(clf, straight=False)

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "bpda") -> Defended:
        check_choice(name, self.surrogates, "surrogate of SignUnroll")
        return self._defended(clf, straight=True)

    def _defended(self, clf: ZeroShot, straight: bool) -> Defended:
        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x)
            painted = self._paint(clf.vlm, x.detach() if straight else x)
            return x + (painted - x).detach() if straight else painted

        return Defended(clf, lambda x, rng: clf.vlm.encode_image(seen(x, rng)), seen=seen)

    def _paint(self, vlm: VLM, x: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.set_grad_enabled(keep):
            goal = vlm.encode_image(x)
            canvas = torch.full_like(x, 0.5)
        for i in range(self.steps):
            with torch.enable_grad():
                leaf = canvas if canvas.requires_grad else canvas.requires_grad_(True)
                distance = (vlm.encode_image(leaf) - goal).square().sum()
                (grad,) = torch.autograd.grad(distance, leaf, create_graph=keep)
            with torch.set_grad_enabled(keep):
                canvas = (leaf - self.alpha * (1 - i / self.steps) * grad.sign()).clamp(0.0, 1.0)
        return canvas if keep else canvas.detach()
