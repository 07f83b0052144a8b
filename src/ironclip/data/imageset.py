"""The one concrete data set: parallel lists of labels and ids, and a function that reads rows of pixels."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ironclip.data.types import Sample

Self = TypeVar("Self", bound="ImageSet")


class Reader(Protocol):
    """Pixels of rows of the underlying store: (n, 3, size, size) float32 in [0, 1]. Picklable, no state that
    changes.
    """

    def __call__(self, rows: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A `Dataset` (see `types.Dataset`). `rows[i]` is the place of sample i in the store behind `read`."""

    name: str
    class_names: list[str]
    templates: list[str]
    prompt_set: str
    recipe: str
    size: int
    labels: list[int]
    ids: list[str]
    read: Reader
    rows: list[int]
    skipped: int = 0

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.ids) == len(self.rows):
            raise ValueError(
                f"{self.name}: labels, ids and rows must have one length, got "
                f"{len(self.labels)}, {len(self.ids)}, {len(self.rows)}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{self.name}: sample ids must be distinct")
        check_templates(self.templates)
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.class_names):
            raise ValueError(f"{self.name}: labels must be in [0, {len(self.class_names)}), got {max(self.labels)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):  # IndexError ends a plain `for sample in data`
            raise IndexError(f"{self.name} has {len(self)} samples, got index {i}")
        return Sample(self.read([self.rows[i]])[0], self.labels[i], self.ids[i])

    @property
    def manifest_hash(self) -> str:
        """SHA-256 (hex) of the sample ids in order, one a line."""
        return hashlib.sha256("".join(f"{s}\n" for s in self.ids).encode()).hexdigest()

    def subset(self: Self, n: int | None, seed: int = 0) -> Self:
        """The first `n` samples in the order of SHA-256(seed, name, sample id), hence subset(100) starts
        subset(1000).

        None keeps the set in manifest order; `n` above the length gives all samples in hashed order.
        """
        if n is None:
            return self
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"limit must be a whole number of samples, 1 or more, got {n!r}")
        return self.take(self._hashed(seed)[:n])

    def shots(self: Self, n: int, seed: int = 0) -> Self:
        """The first `n` samples of every class in the order of `subset`, hence shots(4) lie among shots(16).

        Classes of which the set shows nothing stay classes, which is said in a warning. Raises ValueError where a class
        has fewer than `n`; it is named.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"shots must be a whole number of samples a class, 1 or more, got {n!r}")
        places: list[list[int]] = [[] for _ in self.class_names]
        for i in self._hashed(seed):
            places[self.labels[i]].append(i)
        found = [(len(p), name) for p, name in zip(places, self.class_names, strict=True)]
        short = [c for c in found if 0 < c[0] < n]
        if short:
            least, name = min(short)
            raise ValueError(
                f"{self.name} has fewer than {n} images of {len(short)} of its {len(found)} classes, of {name!r} only "
                f"{least}; write at most --shots {least}"
            )
        empty = [name for count, name in found if not count]
        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            warnings.warn(f"{self.name} has no image of {len(empty)} classes: {shown}", stacklevel=2)
        kept = {i for p in places for i in p[:n]}
        return self.take([i for i in self._hashed(seed) if i in kept])

    def _hashed(self, seed: int) -> list[int]:
        """Places in the order of SHA-256(seed, name, sample id)."""
        key = [hashlib.sha256(f"{seed}\n{self.name}\n{s}".encode()).digest() for s in self.ids]
        return sorted(range(len(self)), key=key.__getitem__)

    def take(self: Self, positions: Sequence[int]) -> Self:
        """The samples at `positions`, in that order."""
        return replace(
            self,
            labels=[self.labels[i] for i in positions],
            ids=[self.ids[i] for i in positions],
            rows=[self.rows[i] for i in positions],
        )

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield (x, y, ids): x (b, 3, size, size) float32 in [0, 1], y (b,) int64; `indices` are places in
        this set.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        order = range(len(self)) if indices is None else indices
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            x = self.read([self.rows[i] for i in part])
            y = torch.tensor([self.labels[i] for i in part], dtype=torch.int64)
            yield x, y, [self.ids[i] for i in part]


def sample_id(content: str, path: str, label: int) -> str:
    """`content` is the hex SHA-256 of the decoded RGB bytes; `path` is relative and uses forward slashes."""
    return f"{content[:16]}:{path}:{label}"


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one template and each has exactly one "{}" and no other
    brace.
    """
    if not templates:
        raise ValueError('expected at least one template such as "a photo of a {}.", got none')
    for t in templates:
        if t.count("{}") != 1 or t.count("{") != 1 or t.count("}") != 1:
            raise ValueError(f'a template must contain exactly one "{{}}" and no other brace, got {t!r}')
