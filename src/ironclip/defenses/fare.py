"""FARE: fine-tuning of the image tower that keeps every embedding in the ball at the original one. No labels, no text.

Schlarmann, Singh, Croce, Hein, ICML 2024, arXiv 2402.12336. Squared distance (summed over dimensions) of the raw
embedding of an adversarial image to the original tower's embedding of the clean one; the original tower is the teacher
and its embeddings are computed once per image. Every head on top of the encoder is protected.

Where we differ from the published code. Always: a gradient that is not finite stops the run (there NaN becomes 0); the
clean forward of every step, made for logging there, is left out; the teacher is the model that is fitted (there the
OpenAI checkpoint). By default, not in ``preset=reference``: the start is cut to the pixel box; no momentum, which does
nothing in linf but on pixels of zero gradient; the first step is warmed up like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice
from ironclip.core.loop import Loop
from ironclip.core.spec import method
from ironclip.core.types import Info
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._train import USUAL, FineTuned, Inner
from ironclip.training.feed import Batch
from ironclip.training.finetune import Plan


def distance(z: Tensor, goal: Tensor, loss: str = "l2") -> Tensor:
    """(b, d) and (b, d) to (b,): squared l2 or l1 distance, summed over dimensions."""
    apart = z - goal
    return apart.square().sum(dim=1) if loss == "l2" else apart.abs().sum(dim=1)


@method
class FARE(FineTuned):
    """``eps`` to ``start``, ``momentum``, ``box_start``: the inner attack, see ``PGD``; it raises the same distance.

    ``loss``: l2 (squared) or l1. ``normalize``: of unit embeddings instead of raw ones. ``clean_weight``: w in
    ``w L(clean) + (1 - w) L(adversarial)``. ``trades``: the goal is the student's own embedding of the clean image, a
    constant of the step, instead of the teacher's. ``recipe``, ``mix_alpha``: as in TeCoA. Costs steps (F + B) + 3 F
    per image and step and the teacher's F once per image: 23 F at ten steps. ``start=zero`` is refused: there the
    gradient is exactly zero and nothing would ever move.
    """

    info: ClassVar[Info] = Info(
        name="fare",
        title="FARE",
        paradigm="training-time",
        kind="finetuned",
        paper="Schlarmann et al., ICML 2024, arXiv 2402.12336",
        code="github.com/chs20/RobustVLM",
        needs_state=True,
        changes_weights=True,
    )
    LABELS: ClassVar[bool] = False
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"eps": Fraction(4, 255), "momentum": 0.9, "box_start": False, "recipe": "reference"},
    }
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": replace(USUAL, clip_norm=None),
        "reference": Loop(
            steps=20_000,
            batch_size=128,
            lr=1e-5,
            weight_decay=1e-4,
            warmup=1400,
            first_step_full=True,
            hold_out=256,
        ),
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction = Fraction(1, 255)
    steps: int = 10
    norm: str = "linf"
    start: str = "uniform"
    momentum: float = 0.0
    box_start: bool = True
    loss: str = "l2"
    normalize: bool = False
    clean_weight: float = 0.0
    trades: bool = False
    recipe: str = "default"
    mix_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.start == "zero":
            raise ValueError("start=zero has exactly zero gradient while student and teacher agree; use start=uniform")
        self.settle()
        check_choice(self.loss, ("l2", "l1"), "loss")
        if not 0 <= self.clean_weight <= 1:
            raise ValueError(f"clean_weight must lie in [0, 1], got {self.clean_weight}; 0 is the published loss")

    @property
    def inner(self) -> Inner:
        """The attack inside training."""
        return Inner(self.eps, self.alpha, self.steps, self.norm, self.start, self.momentum, self.box_start)

    def plan(self, clf: ZeroShot, loop: Loop) -> Plan:
        """Attack and minimise the distance to the embeddings of ``clf``'s image tower."""
        inner, w = self.inner, self.clean_weight

        def embed(vlm: VLM, x: Tensor) -> Tensor:
            return vlm.encode_image(x, normalize=self.normalize)

        def remember(x: Tensor) -> dict[str, Tensor]:
            return {"teacher": embed(clf.vlm, x)}

        def prepare(student: VLM, batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"goal": embed(student, batch.x)}

        def goal(batch: Batch) -> Tensor:
            return batch.cached["goal" if self.trades else "teacher"]

        def attack(student: VLM, batch: Batch) -> Tensor:
            return inner(lambda x: distance(embed(student, x), goal(batch), self.loss), batch.x, batch.rng)

        def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z = embed(student, x_adv)
            value = distance(z, goal(batch), self.loss).mean()
            figures = {"adversarial": value, "cosine": F.cosine_similarity(z.detach(), goal(batch)).mean()}
            if w:
                clean = distance(embed(student, batch.x), batch.cached["teacher"], self.loss).mean()
                value, figures["clean"] = w * clean + (1 - w) * value, clean
            return value, figures

        return Plan(
            clf,
            attack,
            loss,
            remember=remember if w or not self.trades else None,
            prepare=prepare if self.trades else None,
            labels=False,
        )
