"""Per-sample losses that attacks maximise: logits (b, k) or features (b, d) in, values (b,) out.

Attacks differentiate the SUM over the batch, never the mean: a mean shrinks every gradient by the batch size and
underflows in half precision, where its sign becomes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import unknown

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, ``logsumexp(z) - z_y``."""
    return F.cross_entropy(z, y, reduction="none")


def margin(z: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus true logit; positive exactly when misclassified."""
    return _best_other(z, y) - _at(z, y)


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690). Needs at least 3 classes.

    Zero gradient where the label ranks third: attacks that use it must watch for that and fall back to ``margin``.
    """
    _need(z, 3, "dlr")
    top = z.topk(3, dim=1).values
    return -(_at(z, y) - _best_other(z, y)) / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


def dlr_t(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio. Needs at least 4 classes."""
    _need(z, 4, "dlr_t")
    top = z.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return -(_at(z, y) - _at(z, target)) / scale.clamp(min=1e-12)


def ce_t(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Minus the cross-entropy of the target."""
    return -ce(z, target)


def margin_t(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Target logit minus true logit."""
    return _at(z, target) - _at(z, y)


def lse(z: Tensor, y: Tensor) -> Tensor:
    """``logsumexp(z)`` with the sign that lowers every logit: label free."""
    return -z.logsumexp(dim=1)


def entropy(z: Tensor, y: Tensor) -> Tensor:
    """Entropy of the softmax: label free."""
    logp = z.log_softmax(dim=1)
    return -(logp.exp() * logp).sum(dim=1)


def feat_l2(e: Tensor, e0: Tensor) -> Tensor:
    """Squared distance of two embeddings. Its gradient is zero at the clean image: start elsewhere."""
    return (e - e0).square().flatten(1).sum(dim=1)


def feat_cos(e: Tensor, e0: Tensor) -> Tensor:
    """One minus the cosine of two embeddings; blind to their length. Zero gradient at the clean image."""
    return 1 - F.cosine_similarity(e.flatten(1), e0.flatten(1), dim=1)


def feat_tgt(e: Tensor, target: Tensor) -> Tensor:
    """Cosine with a target embedding, of an image or a text."""
    return F.cosine_similarity(e.flatten(1), target.flatten(1), dim=1)


def set_nce(e: Tensor, texts: Tensor) -> Tensor:
    """Minus the summed cosine with a set of matching captions; ``texts``: (b, m, d) or (b, d)."""
    texts = texts.unsqueeze(1) if texts.ndim == 2 else texts
    return -F.cosine_similarity(e.unsqueeze(1), texts, dim=2).sum(dim=1)


def nll(token_logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of a caption or answer; ``token_logits`` (b, l, v), ``tokens`` (b, l), -100 ignored."""
    per_token = F.cross_entropy(token_logits.transpose(1, 2), tokens, ignore_index=-100, reduction="none")
    return per_token.sum(dim=1)


def nll_t(token_logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihood of a target string, to be raised."""
    return -nll(token_logits, tokens)


UNTARGETED: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr, "lse": lse, "entropy": entropy}
TARGETED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce_t": ce_t,
    "margin_t": margin_t,
    "dlr_t": dlr_t,
}
FEATURE: dict[str, Loss] = {
    "feat_l2": feat_l2,
    "feat_cos": feat_cos,
    "feat_tgt": feat_tgt,
    "set_nce": set_nce,
}
MIN_CLASSES = {"dlr": 3, "dlr_t": 4}


def check_loss(name: str, table: Iterable[str]) -> None:
    """Raise ValueError unless ``name`` is one of the losses of the table."""
    if name not in table:
        raise ValueError(unknown("loss", name, table))


def usable(name: str, k: int) -> tuple[str, tuple[str, ...]]:
    """The loss to use with ``k`` classes and a note if it is not the one asked for.

    Too few classes for dlr (3) or dlr_t (4) fall back to the margin with the same target. Raises ValueError for k < 2.
    """
    if k < 2:
        raise ValueError(f"an attack needs at least 2 classes, got {k}; pass more class names")
    need = MIN_CLASSES.get(name, 2)
    if k >= need:
        return name, ()
    other = "margin_t" if name.endswith("_t") else "margin"
    return other, (f"{name} needs {need} classes, got {k}: {other} used instead",)


def with_target(name: str, target: Tensor | None) -> Loss:
    """A two-argument loss from an untargeted name, or from a targeted one and the classes (b,) to reach."""
    if name in TARGETED:
        if target is None:
            raise ValueError(f"loss {name!r} needs target classes; pass target=(b,) labels")
        fn, goal = TARGETED[name], target
        return lambda z, y: fn(z, y, goal)
    check_loss(name, {**UNTARGETED, **TARGETED})
    return UNTARGETED[name]


def _at(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None]).squeeze(1)


def _best_other(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], float("-inf")).max(dim=1).values


def _need(z: Tensor, k: int, name: str) -> None:
    if z.shape[1] < k:
        raise ValueError(f"{name} needs at least {k} classes, got {z.shape[1]}; use margin")


def top_two_gap(z: Tensor) -> Tensor:
    """(b,) distance between the two highest logits; ties are gaps of at most 1e-6."""
    top = z.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two flattened tensors, 0 where one is zero; for comparing gradient estimates."""
    a, b = a.flatten(), b.flatten()
    size = a.norm() * b.norm()
    return torch.dot(a, b) / size if size > 0 else torch.zeros((), dtype=a.dtype)
