"""APT: a few learned vectors in the class prompts, tuned on attacked images; both towers stay as they are.

Li, Guan, Qiu, Spratling, CVPR 2024, arXiv 2403.01849. Cross-entropy on attacked images alone, gradients to the context
alone. All robustness comes from the image tower: on a plain CLIP no prompt can stop an attacker who knows it, and much
of the published gain is what few-shot labels give class embeddings anyway. Use a robust tower (a robust checkpoint as
the model, or ``tower=FILE``), and compare with ``APT(eps=0)`` on the same tower, which is CoOp (arXiv 2109.01134).

Where we differ from the published code, also in ``preset=reference``: class features are computed once a step and serve
attack and update; the perturbation is kept inside the pixel box as well as in the ball, so none of it is spent outside;
everything is fp32 (the code's fp16 gradients underflow and some pixels never move), and bf16 training attacks, too (its
``amp`` trains on clean images); the seed decides start values, crops and order; crops are cut bilinearly from the image
at the model's size. The defaults of loop, budget and crops are ours. ``labels=pseudo`` is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.augment import crop_views, draw_crops
from ironclip.core.ball import project, start_delta
from ironclip.core.check import as_fraction, check_choice
from ironclip.core.context import Context
from ironclip.core.loop import Loop
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._learned import NAME, VECTORS, LearnedPrompt, trainable
from ironclip.defenses._pseudo import pseudo_labelled
from ironclip.defenses._train import Inner, cast_source, prompted
from ironclip.training.feed import Batch
from ironclip.training.finetune import Plan, Session, finetune
from ironclip.training.select import frozen


@method
class APT(LearnedPrompt):
    """``eps``, ``alpha`` (None: 2/3 eps), ``steps``, ``start``: the linf attack inside training, see ``PGD``.

    ``attack``: what it sees, on_the_fly (the present prompts), constant (``template``, encoded once) or perturbed (the
    prompts climb with the pixels by ``prompt_lr`` times the mean gradient, and are then put back; images of a part of a
    batch share them). ``augment``: none, or crops (random resized crops of 8 to 100 % and flips, as published). Other
    fields: see ``LearnedPrompt``. The published preset has 4/255; its 50 epochs are those of 16 shots of 100 classes,
    so give ``--steps`` for other data. A step costs steps (F + B) + F of the image tower an image and one forward and
    backward of the text tower over the classes; ``perturbed`` makes that steps + 1.
    """

    info: ClassVar[Info] = Info(
        name="apt",
        title="APT",
        paradigm="training-time",
        kind="prompt",
        paper="Li et al., CVPR 2024, arXiv 2403.01849",
        code="github.com/TreeLLi/APT",
        needs_state=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"eps": Fraction(4, 255), "augment": "crops", "recipe": "reference"},
        "one_word": {"tokens": 1},
    }
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": Loop(steps=300, batch_size=32, lr=2e-3, warmup=10, clip_norm=1.0, hold_out=0),
        "reference": Loop(
            steps=2500, batch_size=32, lr=2e-3, optimizer="sgd", momentum=0.9, weight_decay=5e-4, warmup=50,
            schedule="epochs", hold_out=0,
        ),
    }  # fmt: skip

    eps: Fraction = Fraction(1, 255)
    alpha: Fraction | None = None
    steps: int = 3
    start: str = "uniform"
    attack: str = "on_the_fly"
    prompt_lr: float = 2e-3
    template: str = "a photo of a {}"
    augment: str = "none"
    tokens: int = 16
    position: str = "end"
    context: str = "unified"
    init: str = ""
    init_std: float = 0.02
    tower: str = ""
    labels: str = "true"
    confidence: float = 0.5
    recipe: str = "default"

    def __post_init__(self) -> None:
        if self.alpha is not None:
            object.__setattr__(self, "alpha", as_fraction(self.alpha, "alpha"))
        object.__setattr__(self, "eps", self.inner.eps)
        check_choice(self.attack, ("on_the_fly", "constant", "perturbed"), "attack")
        check_choice(self.augment, ("none", "crops"), "augment")
        if self.prompt_lr <= 0:
            raise ValueError(f"prompt_lr must be positive, got {self.prompt_lr}; write 0.002")
        if self.template.count("{}") != 1:
            raise ValueError(f"template needs exactly one {{}}, got {self.template!r}; write 'a photo of a {{}}'")
        self._check_fields()

    @property
    def inner(self) -> Inner:
        """The attack inside training."""
        usual = Fraction(2, 3) * as_fraction(self.eps) or Fraction(1, 255)
        return Inner(self.eps, usual if self.alpha is None else self.alpha, self.steps, "linf", self.start)

    def plan(self, clf: ZeroShot, loop: Loop, seed: int = 0) -> Plan:
        """Attack and tune the prompts of ``clf``'s classes. Warns where the steps do not reach the ball's surface."""
        inner, clf = self.inner, self.towered(clf)
        if self.steps * inner.alpha < inner.eps:
            warnings.warn(f"{self.steps} steps of {inner.alpha} cannot reach eps={inner.eps}", stacklevel=2)
        prompts = self.prompts(clf)
        hand = prompted(clf, self.template).weights if self.attack == "constant" else None

        def prepare(student: VLM, _batch: Batch) -> dict[str, Tensor]:
            return {"texts": prompts.features(student.get_parameter(VECTORS))}

        def attack(student: VLM, batch: Batch) -> Tensor:
            x = batch.x if self.augment == "none" or batch.step < 0 else cropped(batch)
            if self.attack == "perturbed":
                start = student.get_parameter(VECTORS).detach()
                return climb_both(clf, student, prompts, start, inner, self.prompt_lr, replace(batch, x=x))
            texts = batch.cached["texts"].detach() if hand is None else hand
            return inner(
                lambda v: F.cross_entropy(clf.head(student.encode_image(v), texts), batch.y, reduction="none"),
                x,
                batch.rng,
            )

        def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                u = student.encode_image(x_adv)
            z = clf.head(u, batch.cached["texts"])
            right = (z.detach().argmax(dim=1) == batch.y).float().mean()
            return F.cross_entropy(z, batch.y), {"robust_acc": right}

        def logits(student: VLM, x: Tensor) -> Tensor:
            return clf.head(student.encode_image(x), prompts.features(student.get_parameter(VECTORS)))

        extra = {NAME: prompts.initial(seed, self.init_std, self.init)}
        return Plan(clf, attack, loss, logits=logits, towers=(), extra=extra, prepare=prepare)

    def fit(
        self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0, session: Session | None = None
    ) -> State:
        """Tune the prompts on ``data``; the model is left as it was. Returns the context vectors and whose they are.

        Raises ValueError for data or settings that cannot be used, RuntimeError where training diverges at once.
        """
        used, source = loop or self.loop(), cast_source(data)
        with frozen(trainable(clf.vlm)):
            made = self.plan(clf, used, seed)
            if self.labels == "pseudo":
                source = pseudo_labelled(made.clf, source, self.confidence)
            learned = finetune(made, source, loop=used, seed=seed, recipe=self._trained_as(), session=session)
        return self._finished(clf, learned)


def cropped(batch: Batch) -> Tensor:
    """One random crop of each image, resized to its size and flipped half the time, from the batch's streams."""
    crops = draw_crops(batch.rng.fold("augment"), 1, (batch.x.shape[-2], batch.x.shape[-1]))
    return crop_views(batch.x, crops)[:, 0].clamp(0.0, 1.0)


def climb_both(
    clf: ZeroShot, student: VLM, prompts: Context, vectors: Tensor, inner: Inner, lr: float, batch: Batch
) -> Tensor:
    """Attacked images where after each step the prompts climb, too: ``vectors`` + lr * gradient of the mean loss."""
    eps, x = float(inner.eps), batch.x
    if eps == 0:
        return x
    at = (x + start_delta(x, eps, "linf", inner.start, batch.rng.fold("start"))).clamp_(0.0, 1.0)
    for step in range(inner.steps):
        with torch.inference_mode(False), torch.enable_grad():
            leaf, own = at.detach().clone().requires_grad_(True), vectors.detach().clone().requires_grad_(True)
            z = clf.head(student.encode_image(leaf), prompts.features(own))
            pixels, words = torch.autograd.grad(F.cross_entropy(z, batch.y, reduction="sum"), (leaf, own))
        if not bool(torch.isfinite(pixels).all() and torch.isfinite(words).all()):
            raise RuntimeError(f"the attack's gradient is not finite at its step {step + 1}: lower the lr")
        at = project(pixels.sign().mul_(float(inner.alpha)).add_(at), x, eps, "linf")
        vectors = vectors + lr / len(batch) * words
    return at
