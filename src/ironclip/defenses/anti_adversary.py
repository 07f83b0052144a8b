"""Anti-Adversary: a few steps that make the model surer of what it already says.

Alfarra, Perez, Thabet, Bibi, Torr, Ghanem 2021, "Combating Adversaries with Anti-Adversaries" (arXiv 2103.14347). The
published code acts on normalised pixels in some experiments and on raw ones in others, and its default is no step at
all: both are fields here. Croce et al. 2022 (arXiv 2202.13711) find no robustness against an attacker who knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import Info, State, prediction
from ironclip.core.views import Defended
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._walk import sign_walk, walked


@method
class AntiAdversary:
    """``steps`` sign steps of size ``alpha`` down the cross-entropy of the model's own first answer.

    ``pixels``: ``normalised`` measures alpha after mean/std normalisation, ``raw`` in [0, 1]. ``box``: keep pixels in
    [0, 1]; the published code does not, nor does it bound the sum of the steps. Deterministic; ``steps`` + 1 forwards
    and ``steps`` backwards. A sign has derivative zero: attack the surrogates. ``preset="reference"`` pins the
    published constants, which are the defaults. Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="anti_adversary",
        title="Anti-Adversary",
        paradigm="training-free",
        kind="counterattack",
        paper="Alfarra et al. 2021, arXiv 2103.14347",
        code="https://github.com/MotasemAlfarra/Combating-Adversaries-with-Anti-Adversaries",
    )
    surrogates: ClassVar[tuple[str, ...]] = ("bpda", "smooth")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"steps": 2, "alpha": 0.15, "pixels": "normalised", "box": False}
    }

    steps: int = 2
    alpha: float = 0.15
    pixels: str = "normalised"
    box: bool = False

    def __post_init__(self) -> None:
        check_choice(self.pixels, ("normalised", "raw"), "pixels")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; write 2")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}; write 0.15 (pixels=normalised)")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The classifier behind the steps; images independent of each other."""
        return Defended(clf, partial(self._encode, clf, "exact"))

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "bpda") -> Defended:
        """The same values. ``bpda``: the steps are a constant; ``smooth``: unrolled, tanh(10 g / mean|g|) for signs."""
        check_choice(name, self.surrogates, "surrogate of AntiAdversary")
        return Defended(clf, partial(self._encode, clf, name))

    def moved(self, clf: ZeroShot, x: Tensor, kappa: float | None = None) -> Tensor:
        """The pixels that are finally read; they may lie outside [0, 1] unless ``box``."""
        said: list[Tensor] = []

        def surer(p: Tensor) -> Tensor:
            logits = clf(p)
            if not said:
                said.append(prediction(logits.detach()))
            return -F.cross_entropy(logits, said[0], reduction="none")

        alpha = self.alpha * clf.vlm.get_buffer("std").to(x) if self.pixels == "normalised" else self.alpha
        return sign_walk(surer, x, self.steps, alpha, box=self.box, kappa=kappa)

    def _encode(self, clf: ZeroShot, how: str, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, clf.vlm.image_size)
        return clf.vlm.encode_image(walked(lambda p, kappa: self.moved(clf, p, kappa), x, how))
