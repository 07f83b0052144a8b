"""MMCoA written out in float64, pair by pair, from the formulas of the method note.

Both towers and the logarithm of the temperature are trained. The sentences come in as tokens, attacked ones chosen by
``word_attack``, which scores whole sentences one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def unit(v: Tensor) -> Tensor:
    return v / (v * v).sum().sqrt()


def unit_rows(x: Tensor) -> Tensor:
    return torch.stack([unit(row) for row in x])


def cross_entropy(z: Sequence[Tensor], target: int) -> Tensor:
    top = max(float(v.detach()) for v in z)
    return top + torch.stack([(v - top).exp() for v in z]).sum().log() - z[target]


def contrast(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Both directions, each a mean over the batch, added."""
    n = len(images)
    s = [[scale * (images[i] * texts[j]).sum() for j in range(n)] for i in range(n)]
    rows = torch.stack([cross_entropy(s[i], i) for i in range(n)]).sum() / n
    columns = torch.stack([cross_entropy([s[i][j] for i in range(n)], j) for j in range(n)]).sum() / n
    return rows + columns


def divergence(e: Tensor, other: Tensor) -> float:
    """KL of the softmaxes over the entries of two embeddings."""
    p, q = (torch.exp(v - v.max()) for v in (e, other))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def word_attack(
    encode: Callable[[str], Tensor], sentence: str, candidates: Sequence[Sequence[str]], forbidden: Sequence[str]
) -> str:
    """One word exchanged: the most important one that has a candidate, by the candidate that goes farthest."""
    words, e = sentence.split(" "), encode(sentence)

    def put(j: int, w: str) -> str:
        behind = words[j][len(words[j].rstrip(".")) :]
        return " ".join([*words[:j], w + behind, *words[j + 1 :]])

    weight = [divergence(e, encode(put(j, "[UNK]"))) for j in range(len(words))]
    for j in sorted(range(len(words)), key=lambda j: -weight[j]):
        options = [put(j, c) for c in candidates[j]]
        scored = [(divergence(e, encode(t)), t) for t in options if t not in forbidden]
        best = max(scored, default=(0.0, sentence), key=lambda pair: pair[0])
        if best[0] > 0:
            return best[1]
    return sentence


def step(
    image: nn.Module,
    text: Callable[[nn.Module, str], Tensor],
    text_tower: nn.Module,
    x: Tensor,
    y: list[int],
    start: Tensor,
    sentences: Sequence[str],
    attack_text: Callable[[Callable[[str], Tensor], str], str],
    mean: Tensor,
    std: Tensor,
    scale: float,
    *,
    eps: float,
    alpha: float,
    steps: int,
    lam_i: float,
    lam_t: float,
    leak: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch and its gradient by name; towers come in as they are and are copied in float64."""
    image, text_tower = (copy.deepcopy(m).double().eval().requires_grad_(True) for m in (image, text_tower))
    x, start, mean, std = x.double(), start.double(), mean.double(), std.double()
    log_scale = torch.tensor(scale).double().log().requires_grad_(True)

    def pictures(v: Tensor) -> Tensor:
        return unit_rows(image((v - mean) / std))

    def sentence(t: str) -> Tensor:
        return unit(text(text_tower, t))

    table = torch.stack([sentence(t) for t in sentences])
    names, params = ["log_scale"], [log_scale]
    for prefix, module in (("image.", image), ("text.", text_tower)):
        for name, p in module.named_parameters():
            names.append(prefix + name)
            params.append(p)

    def attacked_loss(v: Tensor, of: Tensor, s: Tensor) -> Tensor:
        u = pictures(v)
        return torch.stack([cross_entropy([s * (u[i] * t).sum() for t in of], y[i]) for i in range(len(u))])

    delta = (x + start).clamp(0, 1) - x
    leaked = torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        leaf = delta.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(attacked_loss(x + leaf, table.detach(), log_scale.detach().exp()).sum(), leaf)
        if leak:
            leaked = leaked + attacked_loss(x + delta, table, log_scale.exp()).mean()
        delta = (delta + alpha * torch.sign(g)).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    with torch.no_grad():
        changed = [attack_text(sentence, sentences[label]) for label in y]
    clean = torch.stack([sentence(sentences[label]) for label in y])
    moved = torch.stack([sentence(t) for t in changed])
    s = log_scale.exp()
    value = lam_i * contrast(pictures(x + delta), clean, s) + lam_t * contrast(pictures(x), moved, s) + leaked
    grads = torch.autograd.grad(value, params, allow_unused=True)
    return value.detach(), {n: g for n, g in zip(names, grads, strict=True) if g is not None}
