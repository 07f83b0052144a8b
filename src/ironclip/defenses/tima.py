"""TIMA (reconstruction): class texts pushed apart, images trained with margins that follow the texts.

Ma, Liu, Cheng, 2024, arXiv 2405.17678; with Li at AAAI 2026, doi 10.1609/aaai.v40i29.39603. No code is public and the
full text was not at hand: the structure is that of the abstracts, every formula is our reconstruction, and what the
authors leave open is a field. No figure of theirs can be claimed for it.

Image side: cross-entropy on attacked images whose wrong classes get a margin, and distillation from the clean image of
the original model. Text side: hyperspherical energy of the class texts, held back by distillation through the original
image features. Whatever is called tuned text is used at inference too, unless ``deploy=original``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.core.check import check_choice, check_eps
from ironclip.core.loop import Loop
from ironclip.core.spec import full_text, method
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._tima import NAMES, Terms, bytes_of, cosine_margins, start_of, tuned_weights
from ironclip.defenses._train import RECIPE, USUAL, FineTuned, cast_source, prompted
from ironclip.training.feed import Batch, Feed
from ironclip.training.finetune import Plan, Session

WORDS: dict[str, tuple[str, ...]] = {
    "text": ("map", "table", "tower"),
    "rows": ("unit", "free"),
    "margin": ("distance", "similarity", "constant", "asam"),
    "margin_in": ("cosine", "logit", "angle"),
    "distill": ("kl", "reverse_kl", "l2", "cosine"),
    "teacher": ("clean", "adversarial"),
    "attack_loss": ("ce", "margin", "full"),
    "attack_text": ("tuned", "original"),
    "order": ("joint", "alternating"),
    "energy": ("stabilised", "raw"),
    "deploy": ("tuned", "original"),
    "label_space": ("joined", "per_set"),
}


@method
class TIMA(FineTuned):
    """``eps``, ``alpha``, ``steps``, ``norm``, ``start``: the inner attack, see ``PGD``.

    The eight open choices:
    1. ``text``: one linear ``map`` I + A for all texts, so that new classes get one; a ``table`` of free rows, which
       refuses classes it has not seen; or the text ``tower``.
    2. ``margin``: ``distance``, ``similarity``, ``constant``, or ``asam``, which adds ``m0`` (measured on held-out
       images where None: by how much margins fall from eps to ``eps_target``). ``m``: its size, entering as
       ``margin_in``: cosine, logit or angle in radians. ``margin_to_text``: the margin loss moves texts too.
    3. ``distill``: kl or reverse_kl of logits at ``kd_scale`` (None: the model's), l2 or cosine of embeddings.
    4. ``teacher``: the original model sees the clean or the attacked image. The latter costs F more.
    5. ``attack_loss``: ce, with the margin, or full (margin and distillation); ``attack_text``: tuned or original.
    6. ``order``: joint, or alternating steps of image and text; text steps cost no image tower.
    7. ``energy``: stabilised or raw, of ``power``.
    8. ``rows``: texts are normalised (unit) or keep the length they get (free).

    ``w_e``, ``w_i``, ``w_t``, ``w_s``: weights of energy, of text distillation through images, of image distillation,
    of the correlation of text cosines with the original ones. ``text_lr``: of the text side, on the loop's schedule.
    ``deploy``: class texts at inference. ``template``, ``label_space``, ``recipe``, ``mix_alpha``: as in ``TeCoA``.
    Costs steps (F + B) + 3 F per image and step, and F once an image; ``tower`` 3 T more.
    """

    info: ClassVar[Info] = Info(
        name="tima",
        title="TIMA (reconstruction)",
        paradigm="training-time",
        kind="finetuned",
        paper="Ma et al., AAAI 2026, arXiv 2405.17678",
        needs_state=True,
        changes_weights=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"template": "This is a photo of a {}", "text_lr": 1e-3, "recipe": "reference"},
        "wide": {"eps": Fraction(4, 255), "steps": 10},
    }
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": USUAL,
        "reference": Loop(
            steps=50_000, batch_size=256, lr=1e-5, warmup=1000, optimizer="sgd", momentum=0.9, hold_out=256
        ),
    }

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction = Fraction(1, 255)
    steps: int = 2
    norm: str = "linf"
    start: str = "uniform"
    text: str = "map"
    text_lr: float = 1e-4
    rows: str = "unit"
    w_e: float = 1.0
    energy: str = "stabilised"
    power: float = 2.0
    w_i: float = 1.0
    w_t: float = 1.0
    w_s: float = 0.0
    distill: str = "kl"
    kd_scale: float | None = None
    teacher: str = "clean"
    margin: str = "distance"
    m: float = 0.05
    m0: float | None = None
    eps_target: Fraction = Fraction(4, 255)
    margin_in: str = "cosine"
    margin_to_text: bool = False
    attack_loss: str = "ce"
    attack_text: str = "tuned"
    order: str = "joint"
    deploy: str = "tuned"
    template: str = ""
    label_space: str = "joined"
    recipe: str = "default"
    mix_alpha: float = 1.0

    def __post_init__(self) -> None:
        self.settle()
        object.__setattr__(self, "eps_target", check_eps(self.eps_target, self.norm, "eps_target"))
        for name, valid in WORDS.items():
            check_choice(getattr(self, name), valid, name)
        for name in ("w_e", "w_i", "w_t", "w_s", "m"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; write 0 to leave it out")
        for name in ("power", "text_lr", "kd_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rows == "free" and self.text == "tower":
            raise ValueError("rows=free needs text=map or text=table: a tower's features have no length of their own")
        if self.attack_loss == "full" and self.teacher == "adversarial":
            raise ValueError("attack_loss=full needs teacher=clean; the other would attack the teacher as well")
        if self.margin == "asam" and self.eps_target <= self.eps:
            raise ValueError(f"eps_target must be above eps={self.eps} for margin=asam, got {self.eps_target}")
        if self.order == "alternating" and not self.w_e + self.w_i + self.w_s:
            raise ValueError("order=alternating has nothing to do for the texts; set w_e, w_i or w_s above 0")

    def plan(self, clf: ZeroShot, loop: Loop) -> Plan:
        """Attack and losses on this model, which is the teacher. Raises ValueError for too few classes."""
        clf, inner = prompted(clf, self.template), self.inner
        terms, tower = Terms(self, clf), self.text == "tower"
        if self.w_s and clf.k < 3:
            raise ValueError(f"w_s needs at least 3 classes, got {clf.k}; write w_s=0")

        def turns(batch: Batch) -> tuple[bool, bool]:
            both = self.order == "joint" or batch.step < 0
            return both or batch.step % 2 == 0, both or batch.step % 2 == 1

        def attack(student: VLM, batch: Batch) -> Tensor:
            if not turns(batch)[0]:
                return batch.x
            text = batch.cached["text"].detach() if self.attack_text == "tuned" else clf.weights
            return inner(lambda x: terms.attacked(student.encode_image(x), text, batch), batch.x, batch.rng)

        def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            (image, texts), text = turns(batch), batch.cached["text"]
            found = [terms.of_text(text, batch)] if texts else []
            if image:
                found.append(terms.of_image(student.encode_image(x_adv), x_adv, text, batch))
            values = [value for value, _ in found if value is not None]
            return sum(values[1:], values[0]), {k: v for _, told in found for k, v in told.items()}

        return Plan(
            clf,
            attack,
            loss,
            remember=(lambda x: {"clean": clf.vlm.encode_image(x)}) if terms.needs_clean else None,
            logits=lambda student, x: clf.head(student.encode_image(x), terms.texts(student)),
            towers=("image", "text") if tower else ("image",),
            marks={NAMES: bytes_of(clf.class_names)},
            extra=start_of(self.text, clf.weights),
            rates={"text." if tower else "extra.": self.text_lr / loop.lr},
            prepare=lambda student, batch: {"text": terms.texts(student)},
        )

    def fit(
        self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0, session: Session | None = None
    ) -> State:
        """As for every fine-tuned method; ``margin=asam`` measures its offset first, where none was given."""
        if self.margin != "asam" or self.m0 is not None:
            return FineTuned.fit(self, clf, data, loop=loop, seed=seed, session=session)
        used = loop or self.loop()
        m0 = self.measured_offset(prompted(clf, self.template), data, used, seed)
        state = replace(self, m0=m0).fit(clf, data, loop=used, seed=seed, session=session)
        return {**state, RECIPE: bytes_of([self._trained_as()]), "tima.m0": torch.tensor([m0])}

    def measured_offset(self, clf: ZeroShot, data: Any, loop: Loop, seed: int) -> float:
        """Mean over held-out training images of the cosine margin at ``eps`` minus that at ``eps_target``.

        On the original model; the wider attack makes 10 steps of a quarter of its budget. Raises ValueError where
        nothing is held out.
        """
        feed, falls = Feed(clf, cast_source(data), loop, seed), list[Tensor]()
        wide = replace(self.inner, eps=self.eps_target, alpha=self.eps_target / 4, steps=10)
        for batch in feed.validation():
            falls.append(cosine_margins(clf, self.inner, batch) - cosine_margins(clf, wide, batch))
        if not falls:
            raise ValueError("margin=asam measures m0 on held-out images, and none are; set hold_out, or m0=0.02")
        return max(round(float(torch.cat(falls).mean()), 6), 0.0)

    def _trained_as(self) -> str:
        return full_text(replace(self, mix_alpha=1.0, deploy="tuned"))

    def fitted(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The fitted image tower and the tuned class texts. Raises ValueError for classes that a table has not seen."""
        made = FineTuned.fitted(self, clf, state)
        assert state is not None
        if self.deploy == "original":
            return replace(made, weights=clf.weights)
        return replace(made, weights=tuned_weights(self.text, self.rows, made, clf, state, self.mix_alpha))
