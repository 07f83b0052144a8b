"""What defenses share that tune prompts for each image: views, entropies, the optimiser, the classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ironclip.core.grad import wants_graph
from ironclip.core.hooks import class_token_only, replaced_output
from ironclip.core.prompts import SoftPrompts, replaced_tokens
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

ROWS = 64
"""Views that are made and encoded together: on CPUs more of them leave the cache and are slower."""
WEIGHT_DECAY = 0.01
"""Of the published procedures, which leave their optimiser's default."""
TINY = 1e-8
"""The optimiser's guard against division by zero."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """A defense with class weights of its own for every image: ``score`` maps pixels to logits."""

    base: ZeroShot
    score: Callable[[Tensor, SampleRNG | None], Tensor]
    randomized: bool = True
    batchwise: bool = False

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.score(x, rng)


class Texts:
    """The prompts of a classifier's classes: ``soft`` where they are tuned, and their features before any tuning.

    The features are encoded at the first use, once. Raises ValueError where the model's prompts cannot be tuned.
    """

    def __init__(self, clf: ZeroShot, template: str, tuned: bool = True) -> None:
        self.clf, self.template = clf, template
        self.soft = SoftPrompts.of(clf.vlm, clf.class_names, template) if tuned else None
        self._features: Tensor | None = None

    @property
    def initial(self) -> Tensor:
        """(k, d) unit features of the template's own words."""
        if self._features is None:
            with torch.inference_mode(False), torch.no_grad():
                if self.soft is not None:
                    self._features = self.soft.features(self.soft.initial)
                else:
                    self._features = self.clf.vlm.encode_text([self.template.format(n) for n in self.clf.class_names])
        return self._features


def encode_views(vlm: VLM, x: Tensor, v: int, views: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """(b, v, d) unit features of all views of x, ``ROWS`` at a time; ``views(x, part)``: some of them (b, p, 3, h, w).

    With gradients, more views than that are computed again on the way back instead of being kept.
    """
    b = x.shape[0]
    together = max(1, ROWS // max(b, 1))

    def some(x: Tensor, part: slice) -> Tensor:
        made = views(x, part)
        with class_token_only(vlm.image):
            return vlm.encode_image(made.flatten(0, 1)).unflatten(0, made.shape[:2])

    parts = [slice(i, min(i + together, v)) for i in range(0, v, together)]
    if wants_graph(x) and len(parts) > 1:
        out = [checkpoint(some, x, p, use_reentrant=False, preserve_rng_state=False) for p in parts]
    else:
        out = [some(x, p) for p in parts]
    return torch.cat(out, dim=1)


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the last axis."""
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def most_confident(logits: Tensor, n: int) -> Tensor:
    """(b, n) indices of the views with the lowest entropy, the lower index first among equal ones; (b, v, k) in."""
    return entropies(logits.detach()).sort(dim=1, stable=True).indices[:, :n]


def picked(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (b, n) of (b, v, d)."""
    return values.gather(1, index.to(values.device).unsqueeze(-1).expand(-1, -1, values.shape[-1]))


@dataclass
class AdamW:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101) with the usual constants, elementwise, so that images never mix.

    The first step from rest is ``(1 - lr * 0.01) p - lr g / (|g| + 1e-8)``: the signs of the gradient count.
    """

    lr: float
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    t: int = 0

    def step(self, p: Tensor, g: Tensor) -> Tensor:
        """The next p."""
        self.t += 1
        self.first = 0.9 * self.first + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g.square()
        mean, square = self.first / (1 - 0.9**self.t), self.second / (1 - 0.999**self.t)
        return p * (1 - self.lr * WEIGHT_DECAY) - self.lr * mean / (square.sqrt() + TINY)


def along(g: Tensor, lr: float) -> Tensor:
    """A step of a sign step's length (per image, axis 0) along the gradient itself: what its backward pass borrows."""
    flat = g.flatten(1)
    size = flat.norm(dim=1).clamp(min=1e-30).view(-1, *[1] * (g.ndim - 1))
    return -lr * flat.shape[1] ** 0.5 * g / size


TEXT_LENGTH = 40
"""Positions of the published text tower, cut from 77."""


def full_texts(soft: SoftPrompts, prompts: Tensor) -> Tensor:
    """(k, d) unit features for one (depth, m, w) set of prompts, as published: nothing shared, nothing cut off."""
    vlm, ids = soft.vlm, soft.ids
    if vlm.causal:
        width = min(TEXT_LENGTH, int(vlm.facts.get("max_tokens", TEXT_LENGTH)))
        ids = torch.cat([ids, ids[:, -1:].expand(-1, max(width - ids.shape[1], 0))], dim=1)
    with torch.no_grad():
        embeds = vlm.embed_tokens(ids)
    context = prompts[0].expand(len(ids), -1, -1)
    embeds = torch.cat([embeds[:, : soft.start], context, embeds[:, soft.start + soft.m :]], dim=1)
    for count in vlm._counts:
        count.texts += len(ids)
    many = prompts.expand(len(ids), -1, -1, -1)
    blocks = getattr(vlm.text, "blocks", [])
    with replaced_output(vlm.token_embedding, embeds), replaced_tokens(blocks, many, soft.start):
        return F.normalize(vlm.text(ids), dim=-1)
