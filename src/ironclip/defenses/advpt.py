"""AdvPT: learned vectors in the class prompts, aligned with a bank of attacked image features that is built once.

Zhang, Ma, Wang, Qiu, Wang, Jiang, Sang, ECCV 2024, arXiv 2311.11261. Every training image is attacked without its label
through the frozen image tower, its features are stored, and the context is tuned on them by cross-entropy: no image
passes through the network, or is even opened, after that. The model's tower is an ordinary one, so an attacker who
knows the prompts still wins at 1/255; the published gain is over attackers who see neither prompts nor labels. Part of
it is supervised tuning: compare with ``AdvPT(eps=0)``, the same on clean features.

Our default differs from the published bank, which ``preset=reference`` has. That one starts in [0, eps] and moves 1.25
eps in all, so a pixel whose gradient stays negative mostly stops short of -eps, and it knows one budget. Ours starts on
both sides, moves 2.5 eps so that every start reaches every corner, and holds the clean image and two small budgets. A
budget that leaves nothing of the class in the features teaches noise: on ``tiny``, where label-free attacks at 4/255
leave 0 %, banks with 8/255 cost most of the clean accuracy, in either form. In both the seed decides everything, what a
stored bank depends on is stored with it, and the published head's code path that trains on clean images is not there.
``labels=pseudo`` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import as_fraction, check_choice, check_eps
from ironclip.core.loop import Loop
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._bank import OBJECTIVES, Bank, bank_of, build_rows, load_bank
from ironclip.defenses._learned import NAME, VECTORS, LearnedPrompt, trainable
from ironclip.defenses._pseudo import chosen
from ironclip.defenses._train import cast_source
from ironclip.training.feed import Batch, Source, check_classes
from ironclip.training.finetune import Plan, Session, finetune
from ironclip.training.select import frozen

BANK = "bank.safetensors"


@method
class AdvPT(LearnedPrompt):
    """``eps``: budgets of the bank, one or several; 0 is the clean image. ``steps`` sign steps of ``rel_alpha`` eps
    (None: 2.5 / steps) from a ``start`` that is symmetric or one_sided raise ``objective``: kl (between the softmaxes
    of the raw features, published), feat_l2 or feat_cos. ``clean``: the clean features are trained on, too. The loss of
    a step is the mean over images and their kinds. Other fields: see ``LearnedPrompt``.

    The bank costs 1 + e (steps + 1) F and e steps B of the image tower an image; training costs none, and one forward
    and backward of the text tower over the classes a step.
    """

    info: ClassVar[Info] = Info(
        name="advpt",
        title="AdvPT",
        paradigm="training-time",
        kind="prompt",
        paper="Zhang et al., ECCV 2024, arXiv 2311.11261",
        code="github.com/jiamingzhang94/Adversarial-Prompt-Tuning",
        needs_state=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "eps": (Fraction(8, 255),), "rel_alpha": Fraction(1, 8), "start": "one_sided", "clean": False,
            "tokens": 32, "recipe": "reference",
        }
    }  # fmt: skip
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": Loop(steps=300, batch_size=128, lr=2e-3, warmup=10, clip_norm=1.0, hold_out=0),
        "reference": Loop(
            steps=5000, batch_size=32, lr=2e-3, optimizer="sgd", momentum=0.9, weight_decay=5e-4, warmup=50,
            schedule="epochs", hold_out=0,
        ),
    }  # fmt: skip

    eps: tuple[Fraction, ...] = (Fraction(1, 255), Fraction(2, 255))
    steps: int = 10
    rel_alpha: Fraction | None = None
    start: str = "symmetric"
    objective: str = "kl"
    clean: bool = True
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
        given = self.eps if isinstance(self.eps, (tuple, list)) else (self.eps,)
        budgets = tuple(sorted({check_eps(e) for e in given}))
        if not budgets:
            raise ValueError("eps names no budget; write eps=8/255 or eps=(1/255, 8/255)")
        object.__setattr__(self, "eps", budgets)
        if self.rel_alpha is not None:
            object.__setattr__(self, "rel_alpha", as_fraction(self.rel_alpha, "rel_alpha"))
            if self.rel_alpha <= 0:
                raise ValueError(f"rel_alpha must be positive, got {self.rel_alpha}; write 1/4")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}; eps=0 is the control without attack")
        check_choice(self.start, ("symmetric", "one_sided"), "start")
        check_choice(self.objective, OBJECTIVES, "objective")
        self._check_fields()

    @property
    def alphas(self) -> list[float]:
        """The step of each budget, in pixel units."""
        return [float(e * (self.rel_alpha or Fraction(5, 2 * self.steps))) for e in self.eps]

    def facts(self, clf: ZeroShot, data: Source, seed: int) -> dict[str, Any]:
        """All that a bank depends on; ``clf`` with its image tower."""
        return {
            "data": {"images": len(data), "manifest_hash": data.manifest_hash},
            "preprocessing": {"recipe": getattr(data, "recipe", ""), "size": clf.vlm.image_size},
            "model": {"name": clf.vlm.name, "weights": clf.vlm.weights_hash},
            "attack": {
                "norm": "linf", "eps": [str(e) for e in self.eps], "steps": self.steps, "alpha": self.alphas,
                "start": self.start, "objective": self.objective,
            },
            "seed": seed,
        }  # fmt: skip

    def bank(self, clf: ZeroShot, data: Any, *, seed: int = 0, session: Session | None = None) -> Bank:
        """The bank of ``data``: that in the session's folder, or a new one, which is stored there.

        Raises ValueError for images that cannot be used, and for a stored bank of other data, model, attack or seed.
        """
        source, clf = cast_source(data), self.towered(clf)
        facts = self.facts(clf, source, seed)
        path = None if session is None or session.folder is None else session.folder / BANK
        if path is not None and session is not None and session.resume and path.exists():
            return load_bank(path, source, facts)
        budgets, score = [float(e) for e in self.eps], OBJECTIVES[self.objective]
        with frozen(trainable(clf.vlm)):
            rows = build_rows(clf, source, budgets, self.steps, self.alphas, self.start, score, seed)
        made = bank_of(rows, source, facts)
        if path is not None and session is not None and session.team.leads:
            made.save(path)
        return made

    def tuning(self, clf: ZeroShot, seed: int = 0) -> Plan:
        """How the prompts of ``clf``'s classes are tuned on rows of a bank; no method here calls the image tower."""
        prompts = self.prompts(clf)

        def prepare(student: VLM, _batch: Batch) -> dict[str, Tensor]:
            return {"texts": prompts.features(student.get_parameter(VECTORS))}

        def attack(_student: VLM, batch: Batch) -> Tensor:
            return (batch.x if self.clean else batch.x[:, 1:]).flip(1)  # the strongest kind first

        def loss(_student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            kinds = x_adv.shape[1]
            z = clf.head(F.normalize(x_adv, dim=-1).flatten(0, 1), batch.cached["texts"])
            y = batch.y.repeat_interleave(kinds)
            right = (z.detach().argmax(dim=1) == y).float().view(-1, kinds)[:, 0].mean()
            return F.cross_entropy(z, y), {"robust_acc": right}

        def logits(student: VLM, x: Tensor) -> Tensor:
            return clf.head(F.normalize(x[:, 0], dim=-1), prompts.features(student.get_parameter(VECTORS)))

        extra = {NAME: prompts.initial(seed, self.init_std, self.init)}
        return Plan(clf, attack, loss, logits=logits, towers=(), extra=extra, prepare=prepare)

    def fit(
        self,
        clf: ZeroShot,
        data: Any,
        *,
        loop: Loop | None = None,
        seed: int = 0,
        session: Session | None = None,
        bank: Bank | None = None,
    ) -> State:
        """Build or take up the bank of ``data`` (``bank``: one that was built before), then tune the prompts on it.

        Returns the context vectors and whose they are; the model is left as it was. Raises ValueError for data, banks
        or settings that cannot be used, RuntimeError where training diverges at once.
        """
        used, source, towered = loop or self.loop(), cast_source(data), self.towered(clf)
        if self.labels == "true":
            check_classes(clf, source)
        with frozen(trainable(clf.vlm)):
            plan = self.tuning(towered, seed)
            made = bank or self.bank(clf, source, seed=seed, session=session)
            made.fits(clf)
            stored: Source = made
            if self.labels == "pseudo":
                best = towered.head(F.normalize(made.rows[:, 0].to(clf.vlm.device), dim=-1)).softmax(dim=1).max(dim=1)
                stored = chosen(towered, made, best.values.cpu(), best.indices.cpu(), self.confidence)
            learned = finetune(plan, stored, loop=used, seed=seed, recipe=self._trained_as(), session=session)
        return self._finished(clf, learned)
