"""PMG-AFT: TeCoA's loss and two distillation terms, from the original model and from the student's clean prediction.

Wang, Zhang, Yuan, Shan, CVPR 2024, arXiv 2401.04350. With p the softmax over the classes,
``L = CE(x_adv) + a KL(p_original(x_adv) || p(x_adv)) + b KL(p(x) || p(x_adv))``. The direction and reduction of the
divergences are those of the published code, since the paper's text was not at hand.

``preset=reference`` keeps what the published code does, weaknesses included: the temperature cancels out, so all
logits are cosines; the divergences are summed over the batch beside a mean cross-entropy; pixels are normalised by
ImageNet's statistics for student, teacher and evaluation, which is stored with the state and applied with it. The
default uses the model's temperature, means, and the model's own statistics. Nowhere kept: gradients of attack and
teacher that the code accumulates without using, text forwards in every step. Evaluation always has the model's
temperature: at scale 1 a cross-entropy attack is weak.

The teacher is not robust, so its prediction on the adversarial image is partly wrong: ``teacher_view=clean`` distils
its prediction on the clean image instead, which is better founded and computed once per image.
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
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._train import MEAN, STD, USUAL, FineTuned, cross_entropy, logits, prompted, renormalised
from ironclip.training.feed import Batch
from ironclip.training.finetune import Plan

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def divergence(target: Tensor, z: Tensor, direction: str = "target_student") -> Tensor:
    """KL divergence (b,) of the distributions of two sets of logits (b, k), in log-space: KL(target || student)."""
    p, q = target.log_softmax(dim=1), z.log_softmax(dim=1)
    if direction == "student_target":
        p, q = q, p
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


@method
class PMGAFT(FineTuned):
    """``eps`` to ``start``, ``template``, ``label_space``, ``recipe``, ``mix_alpha``: as in TeCoA, whose attack it has.

    ``kl_teacher``, ``kl_clean``: weights of the two divergences. ``logit_scale``: temperature in training, None for the
    model's. ``reduction``: of the divergences over the images of a step, mean or sum. ``direction``: target_student is
    KL(target || student), student_target the other way round, as in an earlier revision of the code. ``detach_clean``:
    the student's clean prediction is a constant. ``teacher_view``: which images the original model sees, adversarial or
    clean. ``statistics``: of the pixel normalisation, model or imagenet. Costs, at two steps, 11 F per image and step;
    9 F with ``detach_clean``.
    """

    info: ClassVar[Info] = Info(
        name="pmg_aft",
        title="PMG-AFT",
        paradigm="training-time",
        kind="finetuned",
        paper="Wang et al., CVPR 2024, arXiv 2401.04350",
        code="github.com/serendipity1122/Pre-trained-Model-Guided-Fine-Tuning-for-Zero-Shot-Adversarial-Robustness",
        needs_state=True,
        changes_weights=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "logit_scale": 1.0,
            "reduction": "sum",
            "statistics": "imagenet",
            "template": "This is a photo of a {}",
            "recipe": "reference",
        },
    }
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": USUAL,
        "reference": Loop(
            steps=3900, batch_size=256, lr=5e-5, warmup=1000, optimizer="sgd", momentum=0.9, hold_out=256
        ),
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction = Fraction(1, 255)
    steps: int = 2
    norm: str = "linf"
    start: str = "uniform"
    kl_teacher: float = 1.0
    kl_clean: float = 1.0
    logit_scale: float | None = None
    reduction: str = "mean"
    direction: str = "target_student"
    detach_clean: bool = False
    teacher_view: str = "adversarial"
    statistics: str = "model"
    template: str = ""
    label_space: str = "joined"
    recipe: str = "default"
    mix_alpha: float = 1.0

    def __post_init__(self) -> None:
        self.settle()
        for name in ("kl_teacher", "kl_clean"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; write 1")
        if self.logit_scale is not None and self.logit_scale <= 0:
            raise ValueError(f"logit_scale must be positive, got {self.logit_scale}; write 100, or None")
        check_choice(self.reduction, ("mean", "sum"), "reduction")
        check_choice(self.direction, ("target_student", "student_target"), "direction")
        check_choice(self.teacher_view, ("adversarial", "clean"), "teacher_view")
        check_choice(self.statistics, ("model", "imagenet"), "statistics")

    def plan(self, clf: ZeroShot, loop: Loop) -> Plan:
        """Attack the cross-entropy; minimise it with both divergences. ``clf``'s image tower is the teacher."""
        clf, marks = prompted(clf, self.template), State()
        if self.statistics == "imagenet":
            marks = {name: torch.tensor(v) for name, v in zip((MEAN, STD), IMAGENET, strict=True)}
            clf = clf.with_vlm(renormalised(clf.vlm, marks[MEAN], marks[STD]))
        if self.logit_scale is not None:
            clf = replace(clf, scale=self.logit_scale)
        inner, teacher = self.inner, clf.vlm.under_autocast(loop.precision)
        weight = loop.batch_size if self.reduction == "sum" else 1
        seen_clean = self.teacher_view == "clean"

        def own(batch: Batch) -> Tensor | None:
            return batch.own if self.label_space == "per_set" else None

        def attack(student: VLM, batch: Batch) -> Tensor:
            return inner(cross_entropy(clf, student, batch.y, own(batch)), batch.x, batch.rng)

        def remember(x: Tensor) -> dict[str, Tensor]:
            return {"teacher": clf.vlm.encode_image(x)}

        def taught(batch: Batch, x_adv: Tensor) -> Tensor:
            with torch.no_grad():
                return logits(clf, batch.cached["teacher"] if seen_clean else teacher.encode_image(x_adv), own(batch))

        def both(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, Tensor | None]:
            """Logits of the adversarial and, where they matter, of the clean images."""
            if not self.kl_clean:
                return logits(clf, student.encode_image(x_adv), own(batch)), None
            if self.detach_clean:
                with torch.no_grad():
                    clean = logits(clf, student.encode_image(batch.x), own(batch))
                return logits(clf, student.encode_image(x_adv), own(batch)), clean
            u = student.encode_image(torch.cat([x_adv, batch.x]))  # no statistics over the batch: exact
            z, clean = u.chunk(2)
            return logits(clf, z, own(batch)), logits(clf, clean, own(batch))

        def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z, clean = both(student, batch, x_adv)
            value = F.cross_entropy(z, batch.y)
            figures = {"ce": value, "robust_acc": (z.detach().argmax(dim=1) == batch.y).float().mean()}
            if self.kl_teacher:
                figures["kl_teacher"] = divergence(taught(batch, x_adv), z, self.direction).mean()
                value = value + self.kl_teacher * weight * figures["kl_teacher"]
            if clean is not None:
                figures["kl_clean"] = divergence(clean, z, self.direction).mean()
                value = value + self.kl_clean * weight * figures["kl_clean"]
            return value, figures

        return Plan(clf, attack, loss, remember=remember if seen_clean and self.kl_teacher else None, marks=marks)
