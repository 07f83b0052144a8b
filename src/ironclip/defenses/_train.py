"""What defenses that fine-tune a tower share: the inner attack, the fitted model, ``fit`` / ``fitted`` / ``apply``.

A method is a ``@method`` class over ``FineTuned`` with its hyperparameters, ``LOOPS`` and ``plan``; see docs/adding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.ball import NORMS, STARTS, project, start_delta, unit_step
from ironclip.core.check import as_fraction, check_choice, check_eps
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import full_text
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._inner import inner_gradient
from ironclip.training.feed import Source
from ironclip.training.finetune import Plan, Session, finetune

BASE, RECIPE, MEAN, STD = "base.sha256", "fit.recipe", "norm.mean", "norm.std"
FINEST = Fraction(1, 2**23)


@dataclass(frozen=True)
class Inner:
    """The attack inside training: projected ascent, last iterate, one restart, no parameter gradients, n (F + B).

    The fields are those of ``PGD``; ``momentum`` adds up unit steps (RobustVLM's form: under linf it moves only pixels
    of zero gradient), and ``box_start=False`` lets the random start leave the pixel box for the first step. Raises
    ValueError for fields that cannot stand, RuntimeError for a gradient that is not finite (published code turns it
    into zero and trains on).
    """

    eps: Fraction
    alpha: Fraction
    steps: int
    norm: str = "linf"
    start: str = "uniform"
    momentum: float = 0.0
    box_start: bool = True

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        check_choice(self.start, STARTS, "start")
        for name, value in (("eps", check_eps(self.eps, self.norm)), ("alpha", as_fraction(self.alpha, "alpha"))):
            object.__setattr__(self, name, value)
        if 0 < self.eps < FINEST:
            raise ValueError(f"eps={self.eps} is finer than float32 pixels; write at least 1/8388608, or 0")
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if self.steps and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}; write 1/255")

    def __call__(self, objective: Callable[[Tensor], Tensor], x: Tensor, rng: SampleRNG) -> Tensor:
        """Raise ``objective``: pixels to values (b,), from ``x`` (b, 3, h, w) inside the ball."""
        eps, x = float(self.eps), x.detach()
        if eps == 0:
            return x
        at, velocity = x + start_delta(x, eps, self.norm, self.start, rng.fold("start")), None
        at = at.clamp_(0.0, 1.0) if self.box_start else at
        for step in range(self.steps):
            grad = inner_gradient(objective, at)
            if not bool(torch.isfinite(grad).all()):
                raise RuntimeError(f"the attack's gradient is not finite at its step {step + 1}: lower the lr")
            move = unit_step(grad, self.norm)
            if self.momentum:
                move = move if velocity is None else unit_step(self.momentum * velocity + move, self.norm)
                velocity = move.clone()
            at = project(move.mul_(float(self.alpha)).add_(at), x, eps, self.norm)
        return at


def cross_entropy(clf: ZeroShot, student: VLM, y: Tensor, own: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Pixels to cross-entropies (b,): what TeCoA and most of its heirs attack. ``own``: see ``logits``."""
    return lambda x: F.cross_entropy(logits(clf, student.encode_image(x), own), y, reduction="none")


def logits(clf: ZeroShot, features: Tensor, own: Tensor | None = None) -> Tensor:
    """(b, k) scaled cosines of unit features with the class weights; classes outside ``own`` (b, k) cannot win."""
    out = clf.head(features)
    return out if own is None else out.masked_fill(~own, -1e4)


def prompted(clf: ZeroShot, template: str) -> ZeroShot:
    """The classifier with one prompt per class, encoded now; as it is for an empty template."""
    if not template:
        return clf
    made = ZeroShot.build(clf.vlm, clf.class_names, [template], merge_duplicates=False)
    return replace(made, label_map=clf.label_map, scale=clf.scale)


def renormalised(vlm: VLM, mean: Tensor, std: Tensor) -> VLM:
    """The model with other pixel statistics in front of its image tower."""
    new = vlm.with_state({})
    for name, values in (("mean", mean), ("std", std)):
        new._buffers[name] = values.to(vlm.get_buffer(name)).view(1, 3, 1, 1)
    return new


def fingerprint(vlm: VLM) -> Tensor:
    """SHA-256 of the weights as a tensor (32,) of bytes."""
    return torch.tensor(list(bytes.fromhex(vlm.weights_hash)), dtype=torch.uint8)


def check_base(vlm: VLM, state: State) -> None:
    """Refuse a state that was fitted on another model. Raises ValueError."""
    base = state.get(BASE)
    if base is not None and not torch.equal(base.cpu(), fingerprint(vlm)):
        told = bytes(base.tolist()).hex()[:12]
        raise ValueError(
            f"the state was fitted on a backbone with weights {told}..., {vlm.name} has {vlm.weights_hash[:12]}...; "
            "fit it again on this model, or load the model it was fitted on"
        )


def finetuned(clf: ZeroShot, state: State, mix_alpha: float = 1.0) -> ZeroShot:
    """The classifier with fitted towers: (1 - a) of the clean weights and a of the fitted ones.

    Class weights are encoded again where the text tower was trained. Raises ValueError for a state of another backbone.
    """
    vlm = clf.vlm
    check_base(vlm, state)
    weights = {k: v.float() for k, v in state.items() if k.split(".", 1)[0] in ("image", "text")}
    if mix_alpha != 1.0:
        own = vlm.state_dict()
        weights = {
            k: torch.lerp(own[k].float().cpu(), v.cpu(), mix_alpha) if k in own and own[k].shape == v.shape else v
            for k, v in weights.items()
        }
    new = vlm.with_state(weights)
    if MEAN in state:
        new = renormalised(new, state[MEAN], state[STD])
    if any(k.startswith("text.") for k in weights):
        made = ZeroShot.build(new, clf.class_names, clf.templates, merge_duplicates=False)
        return replace(made, label_map=clf.label_map, scale=clf.scale)
    return clf.with_vlm(new)


USUAL = Loop(steps=1000, batch_size=32, lr=1e-4, weight_decay=1e-4, warmup=70, clip_norm=1.0)
"""The loop that the fine-tuning methods start from."""


def as_bytes(text: str) -> Tensor:
    """Text as a tensor of a state."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def checked_state(state: State | None, name: str, recipe: str) -> State:
    """A state that the spec ``recipe`` made. Raises ValueError without one, and for one of other hyperparameters."""
    if state is None:
        raise ValueError(f"{name} must be fitted first; run ironclip fit {name!r}, or pass state=defense.fit(...)")
    told = bytes(state[RECIPE].tolist()).decode() if RECIPE in state else recipe
    if told != recipe:
        raise ValueError(f"the state was fitted by {told}, not by {recipe}; write the former")
    return state


class FineTuned:
    """``fit``, ``fitted`` and ``apply`` for a method with ``plan(clf, loop) -> Plan``.

    The class brings ``info``, ``LABELS`` (False where it reads none: then ``clf`` needs no class weights), fields
    ``recipe`` (a name in ``LOOPS``, used where no loop is given), ``mix_alpha`` and those of ``Inner``; its
    ``__post_init__`` calls ``settle``. Fields ``label_space`` and ``template`` are checked where it has them.
    """

    info: ClassVar[Info]
    LOOPS: ClassVar[Mapping[str, Loop]]
    LABELS: ClassVar[bool] = True
    eps: Fraction
    alpha: Fraction
    steps: int
    norm: str
    start: str
    recipe: str
    mix_alpha: float

    @property
    def inner(self) -> Inner:
        """The attack inside training."""
        return Inner(self.eps, self.alpha, self.steps, self.norm, self.start)

    def settle(self) -> None:
        """Check the fields that these methods share and keep budgets as fractions. Raises ValueError."""
        inner = self.inner
        object.__setattr__(self, "eps", inner.eps)
        object.__setattr__(self, "alpha", inner.alpha)
        check_choice(self.recipe, self.LOOPS, "recipe")
        check_choice(getattr(self, "label_space", "joined"), ("joined", "per_set"), "label_space")
        if not 0 <= self.mix_alpha <= 1:
            raise ValueError(
                f"mix_alpha must lie in [0, 1], got {self.mix_alpha}: 0 is the clean model, 1 the fitted one"
            )
        template = getattr(self, "template", "")
        if template and template.count("{}") != 1:
            raise ValueError(f"template needs exactly one {{}}, got {template!r}; write 'This is a photo of a {{}}'")

    def plan(self, clf: ZeroShot, loop: Loop) -> Plan:
        """The attack and the loss on this model."""
        raise TypeError(f"{type(self).__name__} must define plan(clf, loop)")

    def loop(self) -> Loop:
        """The recipe's loop."""
        return self.LOOPS[self.recipe]

    def fit(
        self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0, session: Session | None = None
    ) -> State:
        """Train on ``data``, whose labels are those of ``clf``; the model is left as it was.

        Returns the tensors of the towers that changed, the fingerprint of the model and the spec. Raises ValueError
        for data or settings that cannot be used, RuntimeError where training diverges before its first checkpoint.
        """
        used, source = loop or self.loop(), cast_source(data)
        made = self.plan(clf, used)
        state = finetune(made, source, loop=used, seed=seed, recipe=self._trained_as(), session=session)
        return {**state, BASE: fingerprint(clf.vlm), RECIPE: as_bytes(self._trained_as())}

    def _trained_as(self) -> str:
        """The spec without what does not touch the weights."""
        return full_text(replace(self, mix_alpha=1.0))  # type: ignore[type-var]

    def fitted(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The classifier with the fitted weights: what a graybox attacker holds.

        Raises ValueError without a state, and for one of another backbone or of other hyperparameters.
        """
        return finetuned(clf, checked_state(state, self.info.name, self._trained_as()), self.mix_alpha)

    def apply(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The same: fine-tuned weights are the whole defense."""
        return self.fitted(clf, state)


def cast_source(data: Any) -> Source:
    """Refuse what is no data set. Raises ValueError."""
    if not all(hasattr(data, name) for name in ("name", "ids", "manifest_hash", "batches")):
        raise ValueError(f"data must be an open data set such as ironclip.load_data(...), got {type(data).__name__}")
    source: Source = data
    return source
