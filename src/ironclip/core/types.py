"""The small protocols that connect models, attacks, defenses and the evaluation.

Shapes are part of the type: ``b`` images, ``k`` classes, ``d`` embedding dimensions, ``n`` texts, ``l`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ironclip.core.loop import Loop as Loop

if TYPE_CHECKING:
    from ironclip.core.rng import SampleRNG
    from ironclip.core.zeroshot import ZeroShot

Images = Float[Tensor, "b 3 h w"]
Labels = Int[Tensor, "b"]
Features = Float[Tensor, "b d"]
Logits = Float[Tensor, "b k"]

State = dict[str, Tensor]
"""What a fitted defense learned: named tensors, safetensors in and out."""

Paradigm = Literal["baseline", "training-time", "test-time adaptation", "training-free"]
Threat = Literal["static", "graybox", "adaptive", "blackbox"]
THREATS: tuple[Threat, ...] = ("static", "graybox", "adaptive", "blackbox")


@dataclass(frozen=True)
class Info:
    """What the tables and the adaptive attacker need to know about a defense.

    ``kind`` names the row of the adaptive recipe table (``evaluation/recipes.py``); ``randomized`` defenses are judged
    on fresh draws; ``batchwise`` ones let the images of a batch influence each other, so the batch is part of the
    recipe; ``needs_state`` ones must be fitted before ``apply``.
    """

    name: str
    title: str
    paradigm: Paradigm
    kind: str
    paper: str
    code: str = ""
    randomized: bool = False
    batchwise: bool = False
    needs_state: bool = False
    changes_weights: bool = False
    towers: tuple[str, ...] = ("any",)


@runtime_checkable
class Classifier(Protocol):
    """Pixels in [0, 1] to logits with the temperature applied. ``rng`` names the samples in the rows of ``x``."""

    def __call__(self, x: Images, rng: SampleRNG | None = None) -> Logits: ...


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack call returns; every field but ``trace`` and ``notes`` has one entry per image.

    ``x_adv``: (b, 3, h, w) pixels in [0, 1] within the budget. ``success``: the returned image is misclassified.
    ``loss``: loss of the returned image, ``final_loss``: loss of the last iterate. ``forwards`` / ``backwards``: calls
    of the attacked classifier (a defense may spend several tower passes in each). ``zero_grad``: the gradient was
    entirely zero at some step. ``zero_pixels``: mean share of pixels with zero gradient. ``late_gain``: share of the
    total loss gain that came in the last tenth of the steps. ``trace``: per step loss, gradient norm, zero share and
    step size, each (steps, b). ``notes``: facts about the run, such as a loss that was replaced.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    final_loss: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_grad: Tensor
    zero_pixels: Tensor
    late_gain: Tensor
    trace: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass whose fields are the hyperparameters. Maximises a loss inside the budget."""

    name: ClassVar[str]

    def __call__(self, clf: Classifier, x: Images, y: Labels, *, rng: SampleRNG) -> AttackResult: ...


@runtime_checkable
class Defense(Protocol):
    """A frozen dataclass with ``info``; ``apply`` returns a new classifier and changes nothing."""

    info: ClassVar[Info]

    def apply(self, clf: ZeroShot, state: State | None = None) -> Classifier: ...


@runtime_checkable
class Surrogate(Protocol):
    """A defense with steps of zero or useless gradient offers differentiable stand-ins, by name.

    ``surrogates`` lists the names; ``surrogate(clf, state, name)`` returns a classifier whose forward value is the
    defense's own, or close to it, and whose gradient is useful.
    """

    surrogates: ClassVar[tuple[str, ...]]

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "bpda") -> Classifier: ...


@runtime_checkable
class Trainable(Protocol):
    """A defense that learns: ``fit`` returns the state, nothing is stored on the object."""

    def fit(self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0) -> State: ...


def prediction(logits: Logits) -> Labels:
    """Class with the highest logit; the lowest index among exactly equal ones."""
    best = logits.max(dim=-1, keepdim=True).values
    return (logits == best).to(torch.uint8).argmax(dim=-1)
