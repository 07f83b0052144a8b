"""TIMA written out in float64, pair by pair and image by image, from the formulas of the method note.

Default choices: a map for the texts, unit rows, stabilised energy of power 2, distance margins added to cosines, KL
distillation with the clean image for a teacher, an attack on plain cross-entropy, joint steps.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

W_E, W_I, W_T, M = 1.0, 1.0, 1.0, 0.05


def unit(v: Tensor) -> Tensor:
    return v / (v * v).sum().sqrt()


def unit_rows(x: Tensor) -> Tensor:
    return torch.stack([unit(row) for row in x])


def softmax(z: list[Tensor]) -> list[Tensor]:
    top = max(float(v.detach()) for v in z)
    parts = [(v - top).exp() for v in z]
    total = torch.stack(parts).sum()
    return [p / total for p in parts]


def cross_entropy(z: list[Tensor], y: int) -> Tensor:
    return -softmax(z)[y].log()


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return torch.stack([a * (a / b).log() for a, b in zip(p, q, strict=True)]).sum()


def energy(text: Tensor, power: float = 2.0, raw: bool = False) -> Tensor:
    total, k = text.new_zeros(()), len(text)
    for i in range(k):
        for j in range(k):
            if i != j:
                d = ((text[i] - text[j]) ** 2).sum().sqrt()
                total = total + (d**-power if raw else 1 / (1 + d**power))
    return total / (k * (k - 1))


def margins(text: Tensor, m: float) -> list[list[float]]:
    text, k = text.detach(), len(text)
    d = [[float(((text[i] - text[j]) ** 2).sum().sqrt()) for j in range(k)] for i in range(k)]
    most = max(max(row) for row in d)
    return [[m * v / most for v in row] for row in d]


def cosines(u: Tensor, text: Tensor) -> list[Tensor]:
    return [(u * t).sum() for t in text]


def text_loss(text: Tensor, first: Tensor, clean: Tensor, scale: float) -> Tensor:
    """E and the text distillation through the original features of the clean images."""
    kd = text.new_zeros(())
    for u in clean:
        p = softmax([scale * c for c in cosines(u, first)])
        q = softmax([scale * c for c in cosines(u, text)])
        kd = kd + kl(p, q)
    return W_E * energy(text) + W_I * kd / len(clean)


def image_loss(u: Tensor, text: Tensor, clean: Tensor, y: list[int], scale: float, m: float = M) -> Tensor:
    """The margin loss and the image distillation; the texts are constants here."""
    text = text.detach()
    table, total = margins(text, m), u.new_zeros(())
    for i in range(len(u)):
        z = [scale * (c + table[y[i]][k]) for k, c in enumerate(cosines(u[i], text))]
        teacher = softmax([scale * c for c in cosines(clean[i], text)])
        student = softmax([scale * c for c in cosines(u[i], text)])
        total = total + cross_entropy(z, y[i]) + W_T * kl(teacher, student)
    return total / len(u)


def train(
    tower: nn.Module,
    batches: list[tuple[Tensor, list[int], Tensor]],
    first: Tensor,
    scale: float,
    mean: Tensor,
    std: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    lr: float,
    text_lr: float,
    momentum: float,
    m: float = M,
) -> tuple[dict[str, Tensor], Tensor]:
    """Tower and map after SGD over (x, y, start), the learning rates falling as a cosine from the first step."""
    original = copy.deepcopy(tower).double().eval().requires_grad_(False)
    tower = copy.deepcopy(original).requires_grad_(True)
    first, mean, std = first.double(), mean.double(), std.double()
    a = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, requires_grad=True)
    params = [a, *tower.parameters()]
    velocity = [torch.zeros_like(p) for p in params]

    def encode(net: nn.Module, x: Tensor) -> Tensor:
        return unit_rows(net((x - mean) / std))

    for step, (x, y, start) in enumerate(batches):
        x, start = x.double(), start.double()
        text = torch.stack([unit(t + a @ t) for t in first])
        with torch.no_grad():
            clean = encode(original, x)
        delta = (x + start).clamp(0, 1) - x
        for _ in range(steps):
            leaf = delta.clone().requires_grad_(True)
            u = encode(tower, x + leaf)
            ce = [cross_entropy([scale * c for c in cosines(u[i], text.detach())], y[i]) for i in range(len(u))]
            (g,) = torch.autograd.grad(torch.stack(ce).sum(), leaf)
            delta = (delta + alpha * torch.sign(g)).clamp(-eps, eps)
            delta = (x + delta).clamp(0, 1) - x
        value = image_loss(encode(tower, x + delta), text, clean, y, scale, m) + text_loss(text, first, clean, scale)
        grads = torch.autograd.grad(value, params)
        fall = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                velocity[i] = momentum * velocity[i] + g
                p -= fall * (text_lr if i == 0 else lr) * velocity[i]
    return {k: v.detach() for k, v in tower.state_dict().items()}, a.detach()
