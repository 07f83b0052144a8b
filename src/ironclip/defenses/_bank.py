"""A bank of attacked image features: every training image attacked once, without labels, and never looked at again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ironclip.core.ball import project
from ironclip.core.check import check_images
from ironclip.core.losses import feat_cos, feat_l2
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import digest
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._inner import inner_gradient
from ironclip.training.config import differences
from ironclip.training.feed import Source

TOGETHER = 32
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bank:
    """``rows``: (n, 1 + e, d) float32 raw features of each image: clean, then under each budget, ascending.

    A source of training data for the loop, which then never opens an image. ``facts``: what the rows depend on.
    """

    rows: Tensor
    labels: list[int]
    ids: list[str]
    class_names: list[str]
    name: str
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        if self.rows.ndim != 3 or not len(self.rows) == len(self.labels) == len(self.ids):
            raise ValueError(
                f"a bank has rows (n, 1 + e, d) with a label and an id each, got {tuple(self.rows.shape)}, "
                f"{len(self.labels)} labels and {len(self.ids)} ids"
            )
        if not len(self.rows):
            raise ValueError(f"{self.name} is empty; training needs images")
        self.check(self.rows)
        if not 0 <= min(self.labels) <= max(self.labels) < len(self.class_names):
            raise ValueError(
                f"labels must lie in 0..{len(self.class_names) - 1}, got {min(self.labels)}..{max(self.labels)}"
            )

    @property
    def manifest_hash(self) -> str:
        """Of everything that the rows depend on."""
        return digest(self.facts)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, x: Tensor) -> None:
        """Refuse features that have no direction. Raises ValueError."""
        if not bool(torch.isfinite(x).all()) or bool((x.norm(dim=-1) == 0).any()):
            raise ValueError("the bank holds NaN, infinite or all-zero features; build it again")

    def fits(self, clf: ZeroShot) -> None:
        """Refuse a bank of features of another width than the class weights. Raises ValueError."""
        if self.rows.shape[-1] != clf.vlm.dim:
            raise ValueError(
                f"the bank has features of {self.rows.shape[-1]} dimensions, {clf.vlm.name} has {clf.vlm.dim}; "
                "it was made for another backbone"
            )

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Rows (b, 1 + e, d), labels and ids, paired as they were built."""
        order = list(range(len(self)) if indices is None else indices)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            yield self.rows[part], torch.tensor([self.labels[i] for i in part]), [self.ids[i] for i in part]

    def save(self, path: Path) -> None:
        """Rows and facts as safetensors, whole or not at all; labels and ids stay with the data."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        save_file({"rows": self.rows.cpu().contiguous()}, aside, metadata={"bank": json.dumps(self.facts)})
        os.replace(aside, path)


def load_bank(path: Path, data: Source, facts: dict[str, Any]) -> Bank:
    """A stored bank. Raises ValueError where it is damaged or was built of other data, model, attack or seed."""
    try:
        with safe_open(path, "pt") as file:
            told, rows = json.loads((file.metadata() or {}).get("bank", "{}")), file.get_tensor("rows")
    except (SafetensorError, ValueError) as err:
        raise ValueError(f"{path} is no bank of features ({err}); delete it, or write --no-resume") from err
    other = differences(told, facts)
    if other:
        raise ValueError(
            f"{path} was built otherwise: {'; '.join(other)}. Give the same, name another --out, or build it again "
            "with --no-resume"
        )
    return bank_of(rows, data, facts)


def bank_of(rows: Tensor, data: Source, facts: dict[str, Any]) -> Bank:
    """The rows with the labels (0 where the data has none), ids and names of the data."""
    labels = list(getattr(data, "labels", None) or [0] * len(data))
    return Bank(rows, labels, list(data.ids), list(data.class_names), data.name, facts)


def build_rows(
    clf: ZeroShot, data: Source, budgets: Sequence[float], steps: int, alphas: Sequence[float], start: str,
    objective: Objective, seed: int,
) -> Tensor:  # fmt: skip
    """(n, 1 + e, d): each image's clean features, and those of its attacked copies.

    Costs 1 + e (steps + 1) F and e steps B of the image tower an image. Independent of how images are batched.
    """
    vlm, out = clf.vlm, list[Tensor]()

    def encode(pixels: Tensor) -> Tensor:
        return vlm.encode_image(pixels, normalize=False)

    for x, _, ids in data.batches(TOGETHER):
        check_images(x, vlm.image_size)
        x, rng = x.to(vlm.device), SampleRNG.of(seed, ids).fold("bank")
        with torch.no_grad():
            clean = encode(x)
        kinds = [clean]
        for i, (eps, alpha) in enumerate(zip(budgets, alphas, strict=True)):
            if eps == 0:
                kinds.append(clean)
                continue
            low = 0.0 if start == "one_sided" else -1.0
            delta = eps * rng.fold(i).uniform_like(x, low, 1.0)
            first = x + delta if start == "one_sided" else (x + delta).clamp(0.0, 1.0)
            at = ascent(lambda v, c=clean: objective(encode(v), c), x, first, eps, alpha, steps)  # type: ignore[misc]
            with torch.no_grad():
                kinds.append(encode(at))
        out.append(torch.stack(kinds, dim=1).float().cpu())
    if not out:
        raise ValueError(f"{data.name} is empty; training needs images")
    return torch.cat(out)


def ascent(
    objective: Callable[[Tensor], Tensor], x: Tensor, first: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """``steps`` sign steps of ``alpha`` from the point ``first``, each put back into the ball and the pixel box."""
    at = first
    for step in range(steps):
        grad = inner_gradient(objective, at)
        if not bool(torch.isfinite(grad).all()):
            raise RuntimeError(f"the attack's gradient is not finite at its step {step + 1}")
        at = project(at + alpha * grad.sign(), x, eps, "linf")
    return project(at, x, eps, "linf")


def kl(e: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax clean || softmax e) over the coordinates of raw features, (b,). Zero, gradient too, at e = clean."""
    logp = clean.log_softmax(dim=1)
    return (logp.exp() * (logp - e.log_softmax(dim=1))).sum(dim=1)


OBJECTIVES: dict[str, Objective] = {"kl": kl, "feat_l2": feat_l2, "feat_cos": feat_cos}
