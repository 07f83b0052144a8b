"""LAAT in float64: anchors by turning the centre onto the first axis and back, training one image at a time.

Nothing of the package's anchors, loop, attack or loss is used; starts come in as numbers.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from reference.tecoa_literal import loss as cross_entropy
from reference.tecoa_literal import perturbation
from torch import Tensor, nn


def turning(centre: np.ndarray) -> np.ndarray:
    """A rotation that takes the unit vector to (1, 0, ..., 0): one plane after the other, from the last axis on."""
    d = len(centre)
    whole, at = np.eye(d), centre.copy()
    for i in range(d - 1, 0, -1):
        angle = math.atan2(at[i], at[i - 1])
        plane = np.eye(d)
        plane[i - 1, i - 1] = plane[i, i] = math.cos(angle)
        plane[i - 1, i], plane[i, i - 1] = math.sin(angle), -math.sin(angle)
        at, whole = plane @ at, plane @ whole
    return whole


def expanded(training: Tensor, features: Tensor) -> Tensor:
    """Anchors (c, d) of features by the training classes' centre and widest angle."""
    unit = [[t / np.linalg.norm(t) for t in rows.double().numpy()] for rows in (training, features)]
    mean = np.mean(unit[0], axis=0)
    turn = turning(mean / np.linalg.norm(mean))
    widest = max(math.acos(min(1.0, float((turn @ v)[0]))) for v in unit[0])
    out = []
    for v in unit[1]:
        w = turn @ v
        angle = math.acos(min(1.0, float(w[0])))
        new = angle / widest * math.pi / 2
        w[1:] *= math.sin(new) / math.sin(angle) if angle > 0 else 1.0
        w[0] = math.cos(new)
        out.append(turn.T @ w)
    return torch.from_numpy(np.stack(out))


def smoothness(u: Tensor, v: Tensor) -> Tensor:
    """Minus the mean cosine of unit rows."""
    return -sum((a * b).sum() for a, b in zip(u, v, strict=True)) / len(u)


def train(
    tower: nn.Module,
    batches: list[tuple[Tensor, Tensor, Tensor]],
    anchors: Tensor,
    tau: float,
    smooth: float,
    mean: Tensor,
    std: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    lr: float,
    drop_at: int,
    momentum: float,
    decay: float,
) -> dict[str, Tensor]:
    """Weights after SGD over ``batches`` of (x, y, start); the rate is a tenth from step ``drop_at`` on."""
    tower = copy.deepcopy(tower).double().eval().requires_grad_(True)
    anchors, mean, std = anchors.double(), mean.double(), std.double()

    def encode(x: Tensor) -> Tensor:
        return torch.stack([r / (r * r).sum().sqrt() for r in tower((x - mean) / std)])

    velocity = {k: torch.zeros_like(p) for k, p in tower.named_parameters()}
    for step, (x, y, start) in enumerate(batches):
        x = x.double()
        x_adv = x + perturbation(encode, x, y, anchors, 1 / tau, start.double(), eps, alpha, steps)
        value = cross_entropy(encode(x_adv), anchors, y, 1 / tau) + smooth * smoothness(encode(x), encode(x_adv))
        names, params = zip(*tower.named_parameters(), strict=True)
        grads = torch.autograd.grad(value, params)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                velocity[name] = momentum * velocity[name] + g + decay * p
                p -= lr * (0.1 if step >= drop_at else 1.0) * velocity[name]
    return {k: v.detach() for k, v in tower.state_dict().items()}
