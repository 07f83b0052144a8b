"""Attacks on the embedding: no labels, no prompts, so they carry over to every head on top of the encoder.

Schlarmann et al. 2024 (FARE, arXiv 2402.12336) train against this attack with momentum 0.9 and 10 steps; that is the
preset ``fare-train``. Our default has more steps, a smaller step and returns the best point. ``level=tokens`` turns all
patch tokens away instead of the pooled embedding, for models that read the tokens (VEAttack 2025, arXiv 2505.17440):
preset ``veattack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks._fields import check_fields
from ironclip.attacks._tally import value
from ironclip.core.check import check_choice, check_images, check_labels
from ironclip.core.grad import Fn, draws_of
from ironclip.core.losses import FEATURE
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier, prediction
from ironclip.core.views import base_of, eot


@method
class FeaturePGD:
    """Pushes the image's embedding away from its clean one (``feat_l2``, ``feat_cos``) or towards ``target``.

    ``feat_l2`` reads the raw embedding, ``feat_cos`` and ``feat_tgt`` only its direction. ``level``: ``image``, or
    ``tokens`` for the mean over the patch tokens of the same loss. The gradient of the first two is exactly zero at the
    clean image, so ``start=zero`` is refused for them. Costs 1 F for the clean embedding and steps (F + B) + 1 F.

    Called with a zero-shot classifier or anything built on one; ``y`` only decides ``success``. A defense that ends in
    an embedding (``core.views.Defended``) is attacked through it, averaged over the draws of an ``eot`` view; other
    classifiers on the raw embedding of their model.
    """

    name: ClassVar[str] = "feature_pgd"
    revision: ClassVar[int] = 2
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fare-train": {
            "eps": Fraction(2, 255),
            "alpha": Fraction(1, 255),
            "steps": 10,
            "momentum": 0.9,
            "returned": "last",
        },
        "veattack": {"level": "tokens", "loss": "feat_cos", "steps": 100},
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction | None = None
    steps: int = 40
    norm: str = "linf"
    loss: str = "feat_l2"
    start: str = "uniform"
    momentum: float = 0.0
    returned: str = "best"
    level: str = "image"

    def __post_init__(self) -> None:
        check_fields(self, losses=("feat_l2", "feat_cos", "feat_tgt"), steps=0)
        check_choice(self.level, ("image", "tokens"), "level")
        if self.start == "zero" and self.loss != "feat_tgt":
            raise ValueError(f"{self.loss} has zero gradient at the clean image; use start=uniform")

    @torch.no_grad()
    def __call__(
        self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG, target: Tensor | None = None
    ) -> AttackResult:
        """Attack one batch; ``target``: (b, d) embeddings to reach, or (b, p, d) for tokens, for ``feat_tgt`` only."""
        check_images(x)
        k = base_of(clf, "k")
        check_labels(y, x.shape[0], k if isinstance(k, int) else None)
        encode = self._encoder(clf)
        if (target is None) == (self.loss == "feat_tgt"):
            raise ValueError("target embeddings (b, d) belong to loss=feat_tgt and to no other loss")
        stream = rng.fold("feature_pgd")
        goal = value(encode, x, lambda e: e.new_zeros(len(e)), stream.fold("clean"))[0] if target is None else target
        if self.level == "tokens" and goal.ndim != 3:
            raise ValueError(f"level=tokens needs target tokens (b, p, d), got {tuple(goal.shape)}")
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

        def loss(e: Tensor, rows: Tensor) -> Tensor:
            return apart(self.loss, e, goal[rows])

        def never(e: Tensor, rows: Tensor) -> Tensor:
            return torch.zeros(len(rows), dtype=torch.bool, device=e.device)

        result = ascend(encode, x, loss, never, run, rng.fold("feature_pgd"))
        hit = prediction(value(clf, result.x_adv, lambda z: z[:, 0], stream.fold("judge"))[0]) != y
        forwards = result.forwards + (draws_of(encode) if target is None else 0) + draws_of(clf)
        return replace(result, success=hit, forwards=forwards)

    def _encoder(self, clf: Classifier) -> Fn:
        """What is attacked: the defense's own embedding, else the raw one of the model, or its patch tokens."""
        vlm, inner = base_of(clf, "vlm"), base_of(clf, "encode")
        if vlm is None or base_of(clf, "head") is None:
            raise ValueError("a feature attack needs a classifier with an image encoder, such as ZeroShot")
        if self.level == "tokens":
            return lambda pixels, _rng: vlm.patch_tokens(pixels)
        if inner is None:
            return lambda pixels, _rng: vlm.encode_image(pixels, normalize=False)
        return eot(lambda pixels, rng=None: inner(pixels, rng), draws_of(clf))


def apart(loss: str, e: Tensor, goal: Tensor) -> Tensor:
    """(b,) loss of embeddings (b, d), or its mean over tokens (b, p, d)."""
    if e.ndim == 2:
        return FEATURE[loss](e, goal)
    return FEATURE[loss](e.flatten(0, 1), goal.flatten(0, 1)).view(e.shape[:2]).mean(dim=1)
