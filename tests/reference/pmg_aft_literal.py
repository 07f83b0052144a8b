"""PMG-AFT's loss in float64, one image and one class at a time, and its SGD, from the mathematics of the method note.

``code=True`` is what the published code does: cosines instead of scaled logits, divergences summed over the batch.
"""

from __future__ import annotations

import copy
import math

import torch
from reference import tecoa_literal
from torch import Tensor, nn


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Probabilities of one image."""
    top = max(float(v.detach()) for v in logits)
    weights = [(v - top).exp() for v in logits]
    total = torch.stack(weights).sum()
    return [w / total for w in weights]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    """Sum over classes of p log(p / q)."""
    return torch.stack([a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)]).sum()


def loss(
    adv: Tensor, taught: Tensor, clean: Tensor, text: Tensor, y: Tensor, *,
    scale: float, a: float, b: float, code: bool = False,
) -> Tensor:  # fmt: skip
    """CE + a KL(teacher || student) + b KL(clean || student) of unit rows; ``text``: (k, d) rows."""
    scale = 1.0 if code else scale
    general = clear = adv.new_zeros(())
    for i in range(len(adv)):
        p0, p, pc = (softmax([scale * (u[i] * t).sum() for t in text]) for u in (taught, adv, clean))
        general, clear = general + kl(p0, p), clear + kl(pc, p)
    share = 1.0 if code else 1.0 / len(adv)
    return tecoa_literal.loss(adv, text, y, scale) + a * share * general + b * share * clear


def train(
    tower: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]], text: Tensor, scale: float, mean: Tensor,
    std: Tensor, *, eps: float, alpha: float, steps: int, lr: float, warmup: int, momentum: float,
    a: float, b: float, code: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights after SGD over ``batches`` of (x, y, start)."""
    teacher = copy.deepcopy(tower).double().eval().requires_grad_(False)
    student = copy.deepcopy(tower).double().eval().requires_grad_(True)
    text, mean, std = text.double(), mean.double(), std.double()
    velocity = {k: torch.zeros_like(p) for k, p in student.named_parameters()}
    for step, (x, y, start) in enumerate(batches):
        x, start = x.double(), start.double()

        def encode(v: Tensor, net: nn.Module = student) -> Tensor:
            return tecoa_literal.features(net, v, mean, std)

        delta = tecoa_literal.perturbation(encode, x, y, text, 1.0 if code else scale, start, eps, alpha, steps)
        value = loss(
            encode(x + delta), encode(x + delta, teacher), encode(x), text, y, scale=scale, a=a, b=b, code=code
        )
        names, params = zip(*student.named_parameters(), strict=True)
        grads = torch.autograd.grad(value, params)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                velocity[name] = momentum * velocity[name] + g
                p -= tecoa_literal.rate(step, lr, warmup, len(batches)) * velocity[name]
    assert math.isfinite(float(value.detach()))
    return {k: v.detach() for k, v in student.state_dict().items()}
