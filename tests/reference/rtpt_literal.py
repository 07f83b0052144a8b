"""R-TPT as its note states it: one image, float64, loops, no shared graph, AdamW written out; views handed in.

Nothing here comes from the package. ``features``: (v, d) unit features of one image's views. ``text``: maps the context
vectors (m, w) to the (k, d) unit features of the classes, differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Text = Callable[[Tensor], Tensor]


def probabilities(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    logits = scale * texts @ features
    shifted = torch.exp(logits - logits.max())
    return shifted / shifted.sum()


def entropy(q: Tensor) -> Tensor:
    return -sum(p * torch.log(p) for p in q if p.item() > 0)


def confident(features: Tensor, texts: Tensor, scale: float, share: float) -> list[int]:
    values = [float(entropy(probabilities(f, texts, scale))) for f in features]
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return order[: math.floor(share * len(values))]


def view_weights(cosines: Tensor, neighbours: int, temperature: float, threshold: bool = False) -> Tensor:
    scores = []
    for v in range(len(cosines)):
        others = [
            float(cosines[v, u]) for u in range(len(cosines)) if (float(cosines[v, u]) < 1.0 if threshold else u != v)
        ]
        nearest = sorted(others, reverse=True)[:neighbours]
        scores.append(math.fsum(nearest) / len(nearest))
    top = max(scores)
    raw = [math.exp((s - top) / temperature) for s in scores]
    return torch.tensor([r / math.fsum(raw) for r in raw], dtype=torch.float64)


def tuned_context(
    features: Tensor, text: Text, start: Tensor, scale: float, share: float, steps: int, lr: float
) -> tuple[Tensor, list[Tensor]]:
    """The context after the steps and the gradient of each."""
    p = start.clone()
    m, s = torch.zeros_like(p), torch.zeros_like(p)
    chosen = confident(features, text(p).detach(), scale, share)
    grads = []
    for t in range(1, steps + 1):
        leaf = p.clone().requires_grad_(True)
        texts = text(leaf)
        loss = sum(entropy(probabilities(features[v], texts, scale)) for v in chosen) / len(chosen)
        loss.backward()
        g = leaf.grad.clone()
        grads.append(g)
        p = p * (1 - lr * 0.01)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**t)) / (torch.sqrt(s / (1 - 0.999**t)) + 1e-8)
    return p.detach(), grads


def logits(
    features: Tensor,
    text: Text,
    start: Tensor,
    scale: float,
    share: float = 0.1,
    steps: int = 1,
    lr: float = 5e-3,
    neighbours: int = 20,
    temperature: float = 0.01,
    threshold: bool = False,
) -> Tensor:
    p, _ = tuned_context(features, text, start, scale, share, steps, lr)
    texts = text(p).detach()
    w = view_weights(features @ features.T, neighbours, temperature, threshold)
    total = torch.zeros(len(texts), dtype=torch.float64)
    for weight, f in zip(w, features, strict=True):
        total = total + weight * (scale * texts @ f)
    return total
