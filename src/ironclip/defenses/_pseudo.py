"""Labels from the model itself, where there are none: ours, after UPL (Huang, Chu, Wei 2022, arXiv 2204.03649).

The undefended classifier with its hand-written prompts names each clean image; images of which it is sure are kept.
What it gets wrong is learned wrong: such prompts can be more robust than the hand-written ones, hardly more accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.core.spec import digest
from ironclip.core.zeroshot import ZeroShot
from ironclip.training.feed import Source

TOGETHER = 32


@dataclass(frozen=True, eq=False)
class Relabelled:
    """Some samples of ``source``, at ``places``, with other ``labels``; a source of training images again."""

    source: Source
    places: list[int]
    labels: list[int]
    class_names: list[str]

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.source.name

    @property
    def ids(self) -> list[str]:
        """Sample ids of what was kept."""
        return [self.source.ids[i] for i in self.places]

    @property
    def manifest_hash(self) -> str:
        """Of the set, and of what was made of it."""
        return digest([self.source.manifest_hash, self.places, self.labels])

    @property
    def recipe(self) -> str:
        """The preprocessing of the set."""
        return getattr(self.source, "recipe", "")

    @property
    def check(self) -> Callable[[Tensor], None] | None:
        """How the source checks what it gives, where that is not pixels."""
        return getattr(self.source, "check", None)

    def __len__(self) -> int:
        return len(self.places)

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """As of any data set; the source's own labels are not looked at."""
        order = list(range(len(self)) if indices is None else indices)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            x, _, ids = next(iter(self.source.batches(len(part), [self.places[i] for i in part])))
            yield x, torch.tensor([self.labels[i] for i in part]), ids


def pseudo_labelled(clf: ZeroShot, data: Source, confidence: float) -> Relabelled:
    """The images of which ``clf`` is sure, under its own labels. One pass over the clean images, no text.

    Raises ValueError where fewer than two classes are left.
    """
    values, rows = [], []
    for x, _, _ in data.batches(TOGETHER):
        with torch.no_grad():
            best = clf(x.to(clf.vlm.device)).softmax(dim=1).max(dim=1)
        values.append(best.values.cpu())
        rows.append(best.indices.cpu())
    if not values:
        raise ValueError(f"{data.name} is empty; training needs images")
    return chosen(clf, data, torch.cat(values), torch.cat(rows), confidence)


def chosen(clf: ZeroShot, data: Source, values: Tensor, rows: Tensor, confidence: float) -> Relabelled:
    """The samples whose softmax value (n,) reaches ``confidence``, labelled by the class (n,). Raises ValueError."""
    kept = (values >= confidence).nonzero().flatten().tolist()
    seen = {int(rows[i]) for i in kept}
    if len(seen) < 2:
        raise ValueError(
            f"labels=pseudo keeps {len(kept)} of {len(data)} images of {data.name} at confidence {confidence:g}, of "
            f"{len(seen)} classes; training needs 2: write a lower confidence (the median is "
            f"{float(values.median()):.2g}) or name more images"
        )
    first = {row: label for label, row in reversed(list(enumerate(clf.label_map)))}
    names = [clf.class_names[row] for row in clf.label_map]
    return Relabelled(data, kept, [first[int(rows[i])] for i in kept], names)
