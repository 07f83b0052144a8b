"""TAPT's loss and step as its note states them: one image, float64, loops over views, tokens and layers.

Nothing here comes from the package. ``read``: maps prompts (a dict of tensors) to the logits (s, k) of the selected
views and the list of their block inputs (s, M, D), differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Read = Callable[[dict[str, Tensor]], tuple[Tensor, list[Tensor]]]


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max())
    return e / e.sum()


def mean_entropy(logits: Tensor) -> Tensor:
    q = sum(softmax(z) for z in logits) / len(logits)
    return -(q * torch.log(q)).sum()


def alignment(inputs: list[Tensor], mean: Tensor, var: Tensor, rule: str, layers: int, kept: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(layers):
        h = inputs[layer][:, :kept]
        s, tokens, width = h.shape
        gap_mean = gap_var = torch.zeros((), dtype=torch.float64)
        for t in range(tokens):
            mu = sum(h[v, t] for v in range(s)) / s
            spread = sum((h[v, t] - mu) ** 2 for v in range(s)) / (s - 1 if rule == "paper" else s)
            gap_mean = gap_mean + (mu - mean[layer, t]).abs().sum()
            gap_var = gap_var + (spread - var[layer, t]).abs().sum()
        if rule == "paper":
            total = total + (gap_mean + gap_var) / layers
        else:
            total = total + 100 / 9 * 0.5 * (gap_mean + gap_var) / (tokens * width)
    return total


def one_step(
    read: Read, prompts: dict[str, Tensor], references: list, alpha: float, lr: float, rule: str, layers: int, kept: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Prompts after the step, the gradient, the loss; ``references``: (mean, var) under both sets of prompts."""
    leaves = {k: v.clone().requires_grad_(True) for k, v in prompts.items()}
    logits, inputs = read(leaves)
    loss = mean_entropy(logits)
    for weight, (mean, var) in zip((alpha, 1 - alpha), references, strict=True):
        loss = loss + weight * alignment(inputs, mean, var, rule, layers, kept)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    moved = {}
    for k, p in prompts.items():
        m, s = 0.1 * grads[k] / (1 - 0.9), 0.001 * grads[k] ** 2 / (1 - 0.999)
        moved[k] = p * (1 - lr * 0.01) - lr * m / (torch.sqrt(s) + 1e-8)
    return moved, grads, loss.item()


def selected(logits: Tensor, share: float) -> list[int]:
    entropies = []
    for z in logits:
        q = softmax(z)
        entropies.append(float(-(q * torch.log(q.clamp(min=1e-300))).sum()))
    return sorted(range(len(entropies)), key=lambda i: (entropies[i], i))[: math.floor(share * len(entropies))]
