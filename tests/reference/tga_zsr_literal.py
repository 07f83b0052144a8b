"""TGA-ZSR written out in float64 with enlarged maps formed pixel by pixel, from the mathematics of the method note.

Nothing of the package's loop, attack, maps or loss is used; cross-entropy, attack and schedule are those of TeCoA.
"""

from __future__ import annotations

import copy
import math

import torch
from reference.tecoa_literal import loss as cross_entropy
from reference.tecoa_literal import perturbation, rate
from torch import Tensor, nn


def scores(tokens: Tensor, text: Tensor, normalise: str) -> Tensor:
    """(p,) of one image: tokens (1 + p, d), text (d,) of any length."""
    t = text / (text * text).sum().sqrt()
    found = []
    for p in range(1, len(tokens)):
        total = tokens.new_zeros(())
        for d in range(tokens.shape[1]):
            size = tokens.new_ones(())
            if normalise == "token":
                size = sum(tokens[q, d] ** 2 for q in range(len(tokens))).sqrt()
            if normalise == "feature":
                size = (tokens[p] * tokens[p]).sum().sqrt()
            total = total + tokens[p, d] / size * t[d]
        found.append(total)
    return torch.stack(found)


def enlarge(values: Tensor, size: int) -> Tensor:
    """(p,) on a square grid to (size, size): bilinear between the centres of the cells, edges repeated."""
    side = math.isqrt(len(values))
    grid = values.view(side, side)
    rows = []
    for i in range(size):
        for j in range(size):
            ends = []
            for at in (i, j):
                place = min(max((at + 0.5) * side / size - 0.5, 0.0), side - 1.0)
                low = math.floor(place)
                ends.append((low, min(low + 1, side - 1), place - low))
            (a, b, u), (c, d, v) = ends
            top = (1 - v) * grid[a, c] + v * grid[a, d]
            bottom = (1 - v) * grid[b, c] + v * grid[b, d]
            rows.append((1 - u) * top + u * bottom)
    return torch.stack(rows).view(size, size)


def attention(tokens: Tensor, text: Tensor, size: int, normalise: str, extremes: str) -> Tensor:
    """(size, size) map of one image, from 0 to 1 before (``patches``) or after (``pixels``) it is enlarged."""
    raw = scores(tokens, text, normalise)
    if extremes == "patches":
        return enlarge((raw - raw.min()) / (raw.max() - raw.min()), size)
    wide = enlarge(raw, size)
    return (wide - wide.min()) / (wide.max() - wide.min())


def distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Of two enlarged maps."""
    d = (a - b).flatten()
    if kind == "l2":
        return (d * d).sum().sqrt()
    if kind == "l1":
        return d.abs().sum() / len(d)
    return 1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def train(
    tower: nn.Module,
    batches: list[tuple[Tensor, Tensor, Tensor]],
    text: Tensor,
    scale: float,
    mean: Tensor,
    std: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    refinement: float,
    constraint: float,
    normalise: str,
    extremes: str,
    kind: str,
    size: int,
    lr: float,
    warmup: int,
    momentum: float,
) -> dict[str, Tensor]:
    """Weights after SGD over ``batches`` of (x, y, start); ``tower.tokens`` gives (b, 1 + p, d)."""
    frozen = copy.deepcopy(tower).double().eval().requires_grad_(False)
    tower = copy.deepcopy(tower).double().eval().requires_grad_(True)
    text, mean, std = text.double(), mean.double(), std.double()

    def encode(x: Tensor) -> Tensor:
        rows = tower((x - mean) / std)
        return torch.stack([r / (r * r).sum().sqrt() for r in rows])

    def map_of(net: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        tokens = net.tokens((image[None] - mean) / std)[0]
        return attention(tokens, text[int(label)], size, normalise, extremes)

    velocity = {k: torch.zeros_like(p) for k, p in tower.named_parameters()}
    for step, (x, y, start) in enumerate(batches):
        x = x.double()
        x_adv = x + perturbation(encode, x, y, text, scale, start.double(), eps, alpha, steps)
        value = cross_entropy(encode(x_adv), text, y, scale)
        for i in range(len(x)):
            held = map_of(frozen, x[i], y[i])
            value = value + refinement / len(x) * distance(map_of(tower, x_adv[i], y[i]), held, kind)
            if step > 0:  # at first the maps are equal: the kink of the norm, whose derivative is taken as 0
                value = value + constraint / len(x) * distance(map_of(tower, x[i], y[i]), held, kind)
        names, params = zip(*tower.named_parameters(), strict=True)
        grads = torch.autograd.grad(value, params)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                velocity[name] = momentum * velocity[name] + g
                p -= rate(step, lr, warmup, len(batches)) * velocity[name]
    return {k: v.detach() for k, v in tower.state_dict().items()}
