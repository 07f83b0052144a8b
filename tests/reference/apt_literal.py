"""APT written out in float64: one class at a time at the full context, one image at a time, the optimiser by hand.

Nothing of the package's prompts, attack, loss or loop is used; starts come in as numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pieces = tuple[list[int], list[int], list[int]]


def pieces(bare: list[int], full: list[int], end: int) -> Pieces:
    """Of "x NAME" and "x NAME.", each [begin, x, ..., end, ...]: begin, the name's tokens, full stop and end."""
    name = bare[2 : bare.index(end)]
    return full[:1], name, full[2 + len(name) : full.index(end) + 1]


def class_feature(text: Any, parts: Pieces, vectors: Tensor, position: str, context: int, end: int) -> Tensor:
    """(d,) unit feature of one class through all ``context`` positions of a CLIP text tower of transformers."""
    model = text.text_model
    table = model.embeddings.token_embedding.weight
    begin, name, tail = parts
    cut = {"end": len(vectors), "middle": len(vectors) // 2, "front": 0}[position]
    rows = [table[t] for t in begin]
    rows += list(vectors[:cut]) + [table[t] for t in name] + list(vectors[cut:])
    rows += [table[t] for t in tail]
    last = len(rows) - 1
    rows += [table[end]] * (context - len(rows))
    hidden = (torch.stack(rows) + model.embeddings.position_embedding.weight[:context])[None]
    mask = torch.full((context, context), -math.inf, dtype=hidden.dtype).triu(1)
    hidden = model.encoder(inputs_embeds=hidden, attention_mask=mask[None, None]).last_hidden_state
    out = text.text_projection(model.final_layer_norm(hidden)[0, last])
    return out / (out * out).sum().sqrt()


def class_features(
    text: Any, parts: Sequence[Pieces], vectors: Tensor, position: str, context: int, end: int
) -> Tensor:
    """(k, d); ``vectors`` (m, w) for all classes or (k, m, w)."""
    tower = copy.deepcopy(text).double()
    own = [vectors[i] if vectors.ndim == 3 else vectors for i in range(len(parts))]
    return torch.stack([class_feature(tower, p, v, position, context, end) for p, v in zip(parts, own, strict=True)])


def image_features(tower: Any, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(b, d) unit rows, one image after the other."""
    rows = [tower((image[None] - mean) / std)[0] for image in x]
    return torch.stack([row / (row * row).sum().sqrt() for row in rows])


def cross_entropy(u: Tensor, texts: Tensor, y: Sequence[int], scale: float) -> Tensor:
    """Mean over images of logsumexp minus the true logit."""
    total = u.new_zeros(())
    for row, label in zip(u, y, strict=True):
        logits = scale * (texts @ row)
        total = total + logits.logsumexp(0) - logits[label]
    return total / len(u)


def perturbed_images(
    encode: Callable[[Tensor], Tensor], texts_of: Callable[[Tensor], Tensor], vectors: Tensor, x: Tensor,
    y: Sequence[int], scale: float, start: Tensor, eps: float, alpha: float, steps: int, prompt_lr: float = 0.0,
) -> Tensor:  # fmt: skip
    """x' after ``steps`` sign steps; with ``prompt_lr`` the vectors climb after each, and are then forgotten."""
    delta, climbing = (x + start).clamp(0, 1) - x, vectors.detach().clone()
    for _ in range(steps):
        leaf, own = (x + delta).requires_grad_(True), climbing.clone().requires_grad_(True)
        value = cross_entropy(encode(leaf), texts_of(own), y, scale)
        to_pixels, to_vectors = torch.autograd.grad(value, (leaf, own), allow_unused=True)
        delta = (delta + alpha * torch.sign(to_pixels)).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
        if prompt_lr:
            climbing = climbing + prompt_lr * to_vectors
    return (x + delta).detach()


def train(
    encode: Callable[[Tensor], Tensor], texts_of: Callable[[Tensor], Tensor], vectors: Tensor,
    batches: Sequence[tuple[Tensor, Sequence[int], Tensor]], scale: float, *, eps: float, alpha: float, steps: int,
    rates: Sequence[float], momentum: float, decay: float, constant: Tensor | None = None, prompt_lr: float = 0.0,
) -> Tensor:  # fmt: skip
    """Vectors after SGD over ``batches`` of (x, y, start). ``constant``: texts that the attack sees instead."""
    v = vectors.double()
    velocity = torch.zeros_like(v)
    for step, (x, y, start) in enumerate(batches):
        seen = texts_of if constant is None else (lambda _v: constant)
        x_adv = perturbed_images(encode, seen, v, x.double(), y, scale, start.double(), eps, alpha, steps, prompt_lr)
        own = v.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(cross_entropy(encode(x_adv).detach(), texts_of(own), y, scale), own)
        grad = grad + decay * v
        velocity = grad if step == 0 else momentum * velocity + grad
        v = v - rates[step] * velocity
    return v


def epoch_rate(epoch: int, base: float, epochs: int) -> float:
    """The published schedule."""
    return 1e-5 if epoch == 0 else 0.5 * base * (1 + math.cos(math.pi * (epoch - 1) / epochs))
