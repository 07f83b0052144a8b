"""Wrap a classifier instead of extending an attack: every view is a classifier again, and attacks cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ironclip.core.grad import forwarded
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier
from ironclip.core.zeroshot import ZeroShot


def base_of(clf: Any, name: str) -> Any:
    """Attribute ``name`` of a view or of the classifier inside it."""
    while not hasattr(clf, name) and hasattr(clf, "base"):
        clf = clf.base
    return getattr(clf, name, None)


@dataclass(frozen=True, eq=False)
class Eot:
    """Expectation over the randomness of ``base``: attacks average loss gradients over ``draws`` draws.

    Called for logits it returns their mean over the draws. Draw i of call j is draw ``j * draws + i`` of the stream.
    """

    base: Classifier
    draws: int

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        rng = rng if rng is not None else SampleRNG.rows(x.shape[0])
        out = self.base(x, rng.at(rng.draw * self.draws))
        for i in range(1, self.draws):
            out = out + self.base(x, rng.at(rng.draw * self.draws + i))
        return out / self.draws


def eot(clf: Classifier, draws: int) -> Classifier:
    """Expectation over transformation with ``draws`` draws (Athalye et al. 2018, arXiv 1707.07397); 1 is identity."""
    if draws < 1:
        raise ValueError(f"eot draws must be at least 1, got {draws}")
    return clf if draws == 1 else Eot(clf, draws)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several classifiers of the same classes as one: mean logits, or with ``turns`` model i in draw i, i + m, ..."""

    models: tuple[Classifier, ...]
    turns: bool = False

    @property
    def randomized(self) -> bool:
        """Does any of the models draw random numbers?"""
        return any(base_of(m, "randomized") for m in self.models)

    @property
    def batchwise(self) -> bool:
        """Do images influence each other in any of the models?"""
        return any(base_of(m, "batchwise") for m in self.models)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        rng = rng if rng is not None else SampleRNG.rows(x.shape[0])
        n = len(self.models)
        if self.turns:
            return self.models[rng.draw % n](x, rng.at(rng.draw // n))
        return torch.stack([m(x, rng) for m in self.models]).mean(0)


def ensemble(classifiers: Iterable[Classifier], of: str = "logits") -> Classifier:
    """Several classifiers as one: attacks raise the loss of the mean ``logits``, or the mean of the ``losses``.

    For attacks that should carry over to a model outside the list (Liu et al. 2017, arXiv 1611.02770). Raises
    ValueError for fewer than two classifiers or another word.
    """
    models = tuple(classifiers)
    if len(models) < 2:
        raise ValueError(f"an ensemble needs at least 2 classifiers, got {len(models)}")
    if of not in ("logits", "losses"):
        raise ValueError(f"of must be logits or losses, got {of!r}")
    return Ensemble(models) if of == "logits" else Eot(Ensemble(models, turns=True), len(models))


@dataclass(frozen=True, eq=False)
class StraightThrough:
    """Forward value of ``base``, gradient of ``backward``: BPDA (Athalye et al. 2018, arXiv 1802.00420)."""

    base: Classifier
    backward: Classifier

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        with torch.no_grad():
            value = self.base(x.detach(), rng)
        soft = self.backward(x, rng)
        return soft + (value - soft).detach()


def straight_through(clf: Classifier, backward: Classifier) -> Classifier:
    """Defended forward, differentiable backward: usually the undefended classifier, or a defense's surrogate."""
    return StraightThrough(clf, backward)


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rounds pixels to k/255 before ``base``, as an 8-bit image file would; the gradient passes straight through."""

    base: Classifier
    levels: int = 255

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.base(forwarded((x * self.levels).round() / self.levels, x), rng)


def quantized(clf: Classifier, levels: int = 255) -> Classifier:
    """The classifier behind rounding to ``levels`` steps per channel."""
    return Quantized(clf, levels)


@dataclass(frozen=True, eq=False)
class Penalised:
    """The classifier with a ``penalty`` (b,) that attacks subtract from their loss: ``L - beta * penalty``."""

    base: Classifier
    cost: Callable[[Tensor, SampleRNG | None], Tensor]
    beta: float

    def penalty(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) weighted penalty of the pixels."""
        return self.beta * self.cost(x, rng)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.base(x, rng)


def penalised(clf: Classifier, cost: Callable[[Tensor, SampleRNG | None], Tensor], beta: float) -> Classifier:
    """For gates and detectors: the attack also keeps ``cost`` (b,) low, for example by staying unnoticed."""
    return Penalised(clf, cost, beta)


@dataclass
class Count:
    """Calls and images seen by a ``counted`` view."""

    forward_calls: int = 0
    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts images forwarded and images whose logits were differentiated."""

    base: Classifier
    count: Count = field(default_factory=Count)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        out = self.base(x, rng)
        self.count.forward_calls += 1
        self.count.forwards += x.shape[0]
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    def _backward(self, grad: Tensor) -> None:
        self.count.backwards += grad.shape[0]


def counted(clf: Classifier) -> Counted:
    """The same classifier with ``.count``."""
    return Counted(clf)


@dataclass(frozen=True, eq=False)
class Defended:
    """A defense that ends in an embedding: ``encode`` maps pixels to unit features, ``base`` scores them.

    Such defenses work in retrieval too, through ``features``. ``randomized`` and ``batchwise`` are as in ``Info``;
    ``seen`` shows the pixels (b, 3, h, w) that the encoder finally reads, where the defense changes pixels.
    """

    base: ZeroShot
    encode: Callable[[Tensor, SampleRNG | None], Tensor]
    randomized: bool = False
    batchwise: bool = False
    seen: Callable[[Tensor, SampleRNG | None], Tensor] | None = None

    def features(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b, d) defended unit features."""
        return self.encode(x, rng)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.base.head(self.encode(x, rng))


@dataclass(frozen=True, eq=False)
class Scored:
    """A defense that ends in scores: ``score`` maps pixels to logits (b, k). Other fields as in ``Defended``."""

    base: ZeroShot
    score: Callable[[Tensor, SampleRNG | None], Tensor]
    randomized: bool = False
    batchwise: bool = False

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.score(x, rng)
