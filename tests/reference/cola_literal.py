"""COLA as its note writes it: one image, one class, one view at a time, float64. Nothing comes from the package.

``views``: (n, d) unit features of one image, the plain view first; ``texts``: per class a list of unit features (d,).
"""

from __future__ import annotations

import math

import torch


def project(v: torch.Tensor, texts: list[list[torch.Tensor]], rank: int) -> torch.Tensor:
    z = torch.stack([t for row in texts for t in row], dim=1)
    u, _, _ = torch.linalg.svd(z, full_matrices=False)
    u = u[:, :rank]
    return u @ (u.T @ v)


def entropy(logits: list[float]) -> float:
    top = max(logits)
    total = math.fsum(math.exp(v - top) for v in logits)
    p = [math.exp(v - top) / total for v in logits]
    return -math.fsum(q * math.log(q) for q in p if q > 0)


def weigh(entropies: list[float], sign: float, temperature: float) -> list[float]:
    raw = [sign * h / temperature for h in entropies]
    top = max(raw)
    total = math.fsum(math.exp(r - top) for r in raw)
    return [math.exp(r - top) / total for r in raw]


def text_entropy(mean_logits: list[float], y: int, own: float) -> float:
    return entropy([own if i == y else v for i, v in enumerate(mean_logits)])


def sinkhorn(cost, a, b, eps: float = 0.1, iterations: int = 100, tol: float = 1e-2):
    """The scaling form with plain exponentials; the plan as nested lists."""
    n, m = len(a), len(b)
    kernel = [[math.exp(-cost[i][j] / eps) for j in range(m)] for i in range(n)]
    r, c = [1.0] * n, [1.0] * m
    for _ in range(iterations):
        before = r
        r = [a[i] / math.fsum(kernel[i][j] * c[j] for j in range(m)) for i in range(n)]
        c = [b[j] / math.fsum(kernel[i][j] * r[i] for i in range(n)) for j in range(m)]
        if math.fsum(abs(x - y) for x, y in zip(r, before, strict=True)) / n < tol:
            break
    return [[r[i] * kernel[i][j] * c[j] for j in range(m)] for i in range(n)]


def distances(
    views: torch.Tensor, texts: list[list[torch.Tensor]], scale: float, rank: int, sign: float = -1.0,
    temperature: float = 0.5, eps: float = 0.1, iterations: int = 100, tol: float = 1e-2,
) -> list[float]:  # fmt: skip
    """Sinkhorn transport cost of one image to every class."""
    means = [sum(row) / len(row) for row in texts]
    means = [v / v.norm() for v in means]
    a = weigh([entropy([scale * float(x @ t) for t in means]) for x in views], sign, temperature)
    single = [[scale * float(views[0] @ t) for t in row] for row in texts]
    mean_logits = [math.fsum(row) / len(row) for row in single]
    out = []
    for y, row in enumerate(texts):
        b = weigh([text_entropy(mean_logits, y, own) for own in single[y]], sign, temperature)
        cost = []
        for x in views:
            inside = project(x, texts, rank)
            cost.append([1 - float(inside @ z) / float(inside.norm()) for z in row])
        if len(a) == 1 or len(b) == 1:
            plan = [[p * q for q in b] for p in a]
        else:
            plan = sinkhorn(cost, a, b, eps, iterations, tol)
        out.append(math.fsum(plan[i][j] * cost[i][j] for i in range(len(a)) for j in range(len(b))))
    return out
