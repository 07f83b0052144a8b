"""What a data set is: pixels in [0, 1], integer labels, stable sample ids, class names and templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image. `x`: (3, size, size) float32 in [0, 1]; `y`: class index; `id`: stable sample id."""

    x: Tensor
    y: int
    id: str


class Dataset(Protocol):
    """A labelled image set at one input size; see `load_data` for how to get one.

    `name`: canonical spec, `load_data(name)` opens the same set. `class_names[y]` names label y. Each of
    `templates` has exactly one "{}". `recipe` names the preprocessing, `prompt_set` the prompts. `ids[i]` is
    the first 16 hex digits of the SHA-256 of the decoded RGB bytes, the relative path and the label, joined
    by ":". `manifest_hash` is the SHA-256 of the ids in order. `skipped` counts bad images left out on
    request.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    prompt_set: str
    recipe: str
    size: int
    labels: list[int]
    ids: list[str]
    skipped: int

    @property
    def manifest_hash(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def subset(self, n: int | None, seed: int = 0) -> Dataset: ...

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[str]]]: ...


@dataclass(frozen=True)
class DataInfo:
    """One row of `ironclip list data`."""

    name: str
    title: str
    kind: str  # embedded, procedural, folder, survey (one of its nine) or named
    classes: int | None  # None: depends on the folder
    traps: str
    licence: str
    available: bool
    how_to_get: str
