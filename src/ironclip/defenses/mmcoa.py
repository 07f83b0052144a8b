"""MMCoA: both towers learn to align attacked images with clean texts and attacked texts with clean images.

Zhou, Bai, Mandic, Zhao, Chen, 2024, arXiv 2404.19287; code ElleZWQ/MMCoA. Two symmetric contrastive losses are added;
an attacked image never meets an attacked text. Trained: the image tower, the text tower and the temperature of the
losses; with ``towers=image`` the text tower stays as it is. The state holds what changed. The classifier keeps its own
temperature, as the published evaluation does: the learned one is stored as ``extra.log_scale``.

Where we differ from the published code (``preset=reference`` has its constants): the attack's gradients stay out of the
update, unless ``leak_attack_grads`` adds those of every attack step, for reproduction only; texts are attacked once a
class, by ``WordSwap`` with the words that ship with the package (``source=hf:bert-base-uncased`` asks BERT, its rows
are those of the words, not of the position before); a text never becomes that of another class (``keep_label``), which
the code does not rule out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.attacks.text import WordSwap
from ironclip.core.check import check_choice
from ironclip.core.loop import Loop
from ironclip.core.spec import method
from ironclip.core.types import Info
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._mmcoa import Sentences, contrastive, scale_of
from ironclip.defenses._train import USUAL, FineTuned
from ironclip.training.feed import Batch
from ironclip.training.finetune import Plan


@method
class MMCoA(FineTuned):
    """``eps``, ``alpha``, ``steps``, ``norm``, ``start``: the attack on images, see ``PGD``, against the texts of all
    classes.

    ``lam_i``, ``lam_t``: weights of attacked images with clean texts and of clean images with attacked texts; 0 leaves
    the attack out as well. ``words``, ``k``, ``source``, ``cased_stops``, ``legacy_offset``: see ``WordSwap``.
    ``keep_label``: attacked texts of another class are not taken. ``towers``: both or image. ``text_rate``: learning
    rate of the text tower as a multiple of the loop's. ``template``: one sentence per class, or empty for the first of
    the classifier's. ``label_space``: classes that the attack on an image may reach, see ``TeCoA``. ``recipe``,
    ``mix_alpha``: as there.

    The losses compare the images of a batch with one another, so they depend on ``batch_size`` and ``accumulate``;
    images of one class share a sentence and are negatives of each other, as published. A batch should show most of the
    classes at once, or the close ones are rarely told apart. Attacked texts lose by far the more at first: with the
    published ``lam_t`` of 0.5 robustness on ``tiny`` fell (held out 70 to 66 % in 15 steps of 64 images) where it rose
    with 0.05 (70 to 78 %), hence the default. Costs steps (F + B) + 6 F per
    image and step; texts: every class once without gradient, candidates of the batch's classes, and their clean and
    attacked sentences with gradient.
    """

    info: ClassVar[Info] = Info(
        name="mmcoa",
        title="MMCoA",
        paradigm="training-time",
        kind="finetuned",
        paper="Zhou et al., arXiv 2404.19287",
        code="github.com/ElleZWQ/MMCoA",
        needs_state=True,
        changes_weights=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "steps": 10,
            "lam_t": 0.5,
            "cased_stops": True,
            "keep_label": False,
            "text_rate": 1.0,
            "template": "This is a photo of a {}",
            "recipe": "reference",
        },
    }
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": replace(USUAL, batch_size=64),
        "reference": Loop(
            steps=5880,
            batch_size=256,
            lr=1e-6,
            weight_decay=0.2,
            schedule="constant",
            optimizer="adam",
            betas=(0.9, 0.98),
            adam_eps=1e-6,
            hold_out=256,
        ),
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction = Fraction(1, 255)
    steps: int = 2
    norm: str = "linf"
    start: str = "uniform"
    lam_i: float = 0.5
    lam_t: float = 0.05
    words: int = 1
    k: int = 10
    source: str = "list"
    cased_stops: bool = False
    legacy_offset: bool = False
    keep_label: bool = True
    towers: str = "both"
    text_rate: float = 0.1
    leak_attack_grads: bool = False
    template: str = ""
    label_space: str = "joined"
    recipe: str = "default"
    mix_alpha: float = 1.0

    def __post_init__(self) -> None:
        self.settle()
        for name in ("lam_i", "lam_t"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; write 0 to leave it out")
        if not self.lam_i + self.lam_t:
            raise ValueError("lam_i and lam_t are both 0: there is nothing to learn")
        if self.text_rate <= 0:
            raise ValueError(f"text_rate must be positive, got {self.text_rate}; write towers=image to keep the texts")
        check_choice(self.towers, ("both", "image"), "towers")
        _ = self.swap  # refuses its bad fields

    @property
    def swap(self) -> WordSwap:
        """The attack on texts."""
        return WordSwap(
            words=self.words,
            k=self.k,
            source=self.source,
            cased_stops=self.cased_stops,
            legacy_offset=self.legacy_offset,
        )

    def plan(self, clf: ZeroShot, loop: Loop) -> Plan:
        """Attacks and loss on this model. Raises ValueError where it has no text tower to train."""
        trained, inner = self.towers == "both", self.inner
        if trained and not (isinstance(clf.vlm.text, nn.Module) and any(True for _ in clf.vlm.text.parameters())):
            raise ValueError(f"the text tower of {clf.vlm.name} has no parameters to train; write towers=image")
        texts = Sentences(self, clf)

        def classify(student: VLM, x: Tensor, of: Tensor, batch: Batch) -> Tensor:
            z = scale_of(student) * student.encode_image(x) @ of.T
            z = z.masked_fill(~batch.own, -1e4) if self.label_space == "per_set" else z
            return F.cross_entropy(z, batch.y, reduction="none")

        def prepare(student: VLM, batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"texts": texts.all_of(student)} if self.lam_i else {}

        def attack(student: VLM, batch: Batch) -> Tensor:
            if not self.lam_i:
                return batch.x
            seen: list[Tensor] = []

            def objective(x: Tensor) -> Tensor:
                seen.append(x.detach())
                return classify(student, x, batch.cached["texts"], batch)

            x_adv = inner(objective, batch.x, batch.rng)
            if self.leak_attack_grads:
                batch.cached.update({f"seen{i}": x for i, x in enumerate(seen)})
            return x_adv

        def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            shown, rows = torch.unique(batch.y, return_inverse=True)
            clean, changed, swapped = texts.pairs(student, shown.tolist(), batch.cached.get("texts"))
            both = [("attacked_images", self.lam_i, x_adv, clean), ("attacked_texts", self.lam_t, batch.x, changed)]
            used = [part for part in both if part[1]]
            features = student.encode_image(torch.cat([x for _, _, x, _ in used])).split(len(batch))
            scale, told, total = scale_of(student), dict[str, Tensor](), clean.new_zeros(())
            for (name, weight, _, of), u in zip(used, features, strict=True):
                told[name] = contrastive(u, of[rows], scale)
                total = total + weight * told[name]
            seen = [x for name, x in batch.cached.items() if name.startswith("seen")]
            if seen:
                of = texts.all_of(student)
                total = total + torch.stack([classify(student, x, of, batch).mean() for x in seen]).sum()
            return total, {**told, "scale": scale, "swapped": total.new_tensor(swapped)}

        def logits(student: VLM, x: Tensor) -> Tensor:
            if not trained:
                return clf.with_vlm(student)(x)
            now = ZeroShot.build(student, clf.class_names, clf.templates, merge_duplicates=False)
            return clf.head(student.encode_image(x), now.weights)

        return Plan(
            clf,
            attack,
            loss,
            logits=logits,
            towers=("image", "text") if trained else ("image",),
            extra={"log_scale": clf.weights.new_tensor(math.log(clf.scale))},
            rates={"text.": self.text_rate},
            prepare=prepare,
        )
