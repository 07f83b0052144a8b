"""Attacks on the embedding: no labels, no prompts, so they carry over to every head on top of the encoder.

Schlarmann et al. 2024 (FARE, arXiv 2402.12336) train against this attack with momentum 0.9 and 10 steps; that is the
preset ``fare-train``. Our default has more steps, a smaller step and returns the best point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.core.ball import NORMS
from ironclip.core.check import as_fraction, check_choice, check_eps, check_images, check_labels
from ironclip.core.grad import draws_of
from ironclip.core.losses import FEATURE
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier, prediction
from ironclip.core.views import base_of


@method
class FeaturePGD:
    """Pushes the image's embedding away from its clean one (``feat_l2``, ``feat_cos``) or towards ``target``.

    ``feat_l2`` reads the raw embedding, ``feat_cos`` and ``feat_tgt`` only its direction. The gradient of the first two
    is exactly zero at the clean image, so ``start=zero`` is refused for them. Costs 1 F for the clean embedding and
    steps (F + B) + 1 F.

    Called with a zero-shot classifier or anything that has ``vlm``; ``y`` only decides ``success``.
    """

    name: ClassVar[str] = "feature_pgd"
    revision: ClassVar[int] = 1
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fare-train": {
            "eps": Fraction(2, 255),
            "alpha": Fraction(1, 255),
            "steps": 10,
            "momentum": 0.9,
            "returned": "last",
        },
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction | None = None
    steps: int = 40
    norm: str = "linf"
    loss: str = "feat_l2"
    start: str = "uniform"
    momentum: float = 0.0
    returned: str = "best"

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        check_choice(self.loss, ("feat_l2", "feat_cos", "feat_tgt"), "loss")
        check_choice(self.returned, ("best", "last"), "returned")
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", as_fraction(self.alpha, "alpha"))
            if self.alpha <= 0:
                raise ValueError(f"alpha must be positive, got {self.alpha}; write 1/255")
        if self.start == "zero" and self.loss != "feat_tgt":
            raise ValueError(f"{self.loss} has zero gradient at the clean image; use start=uniform")
        check_choice(self.start, ("zero", "uniform", "volume", "surface"), "start")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")

    @torch.no_grad()
    def __call__(
        self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG, target: Tensor | None = None
    ) -> AttackResult:
        """Attack one batch; ``target``: (b, d) embeddings to reach, for ``feat_tgt`` only."""
        check_images(x)
        k = base_of(clf, "k")
        check_labels(y, x.shape[0], k if isinstance(k, int) else None)
        vlm, head = base_of(clf, "vlm"), base_of(clf, "head")
        if vlm is None or head is None:
            raise ValueError("a feature attack needs a classifier with an image encoder, such as ZeroShot")
        if (target is None) == (self.loss == "feat_tgt"):
            raise ValueError("target embeddings (b, d) belong to loss=feat_tgt and to no other loss")
        with torch.no_grad():
            goal = vlm.encode_image(x, normalize=False) if target is None else target
        alpha = self.alpha or Fraction(5, 2 * max(self.steps, 1)) * self.eps
        run = Ascent(
            eps=float(self.eps),
            alpha=float(alpha),
            steps=self.steps,
            norm=self.norm,
            start=self.start,
            momentum=self.momentum,
            momentum_form="unit",
            best=self.returned == "best",
        )

        def encode(pixels: Tensor, _rng: SampleRNG | None) -> Tensor:
            out: Tensor = vlm.encode_image(pixels, normalize=False)
            return out

        def loss(e: Tensor, rows: Tensor) -> Tensor:
            return FEATURE[self.loss](e, goal[rows])

        def never(e: Tensor, rows: Tensor) -> Tensor:
            return torch.zeros(len(rows), dtype=torch.bool, device=e.device)

        result = ascend(encode, x, loss, never, run, rng.fold("feature_pgd"))
        with torch.no_grad():
            hit = prediction(clf(result.x_adv, rng.fold("feature_pgd", "judge"))) != y
        forwards = result.forwards + (1 if target is None else 0) + draws_of(clf)
        return replace(result, success=hit, forwards=forwards)
