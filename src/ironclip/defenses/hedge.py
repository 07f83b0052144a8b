"""Hedge Defense: attack every class at once, so that the true one, being the stiffest, is left.

Wu, Pan, Shen, Gu, Zhao, Li, Cai, He, Liu 2021, "Attacking Adversarial Attacks as A Defense" (arXiv 2106.04938). Number
of steps, step size and radius were not at hand: 20 steps of 2/255 inside 8/255 are ours. Croce et al. 2022 (arXiv
2202.13711) find no robustness that lasts against an attacker who knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.core.check import as_fraction, check_choice, check_eps, check_images
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._walk import sign_walk, walked


@method
class Hedge:
    """``steps`` sign steps of size ``alpha`` up the sum of the cross-entropies of all classes, within ``eps``.

    ``eps``, ``alpha``: l_inf, pixel units; pixels stay in [0, 1]. Starts at the image: deterministic. ``steps`` + 1
    forwards and ``steps`` backwards. A sign has derivative zero: attack the surrogates. Raises ValueError for bad
    fields and images.
    """

    info: ClassVar[Info] = Info(
        name="hedge",
        title="Hedge Defense",
        paradigm="training-free",
        kind="counterattack",
        paper="Wu et al. 2021, arXiv 2106.04938",
    )
    surrogates: ClassVar[tuple[str, ...]] = ("bpda", "smooth")

    eps: Fraction = Fraction(8, 255)
    alpha: Fraction = Fraction(2, 255)
    steps: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", check_eps(self.eps))
        object.__setattr__(self, "alpha", as_fraction(self.alpha, "alpha"))
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}; write 2/255")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; write 20")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The classifier behind the steps; images independent of each other."""
        return self._defended(clf, "exact")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "bpda") -> Defended:
        """The same values. ``bpda``: the steps are a constant; ``smooth``: unrolled, tanh(10 g / mean|g|) for signs."""
        check_choice(name, self.surrogates, "surrogate of Hedge")
        return self._defended(clf, name)

    def _defended(self, clf: ZeroShot, how: str) -> Defended:
        def moved(p: Tensor, kappa: float | None) -> Tensor:
            return sign_walk(
                lambda q: all_classes(clf(q)), p, self.steps, float(self.alpha), float(self.eps), kappa=kappa
            )

        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            return walked(moved, x, how)

        return Defended(clf, partial(_encode, clf, seen), seen=seen)


def all_classes(logits: Tensor) -> Tensor:
    """(b, k) to (b,): the sum over c of the cross-entropy of class c."""
    return logits.shape[1] * torch.logsumexp(logits, dim=1) - logits.sum(dim=1)


def _encode(clf: ZeroShot, seen: Callable[..., Tensor], x: Tensor, rng: SampleRNG | None = None) -> Tensor:
    check_images(x, clf.vlm.image_size)
    return clf.vlm.encode_image(seen(x, rng))
