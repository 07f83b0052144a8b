"""Batches of a fine-tuning run: which images a step sees, their random streams, what is remembered of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol

import torch
from torch import Tensor

from ironclip.core.check import check_images, check_labels
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.training.batches import Labelled, order
from ironclip.training.team import Team


class Source(Labelled, Protocol):
    """Training images: any data set of this library, or several through ``ironclip.data.joined``.

    A source of something else, such as stored features, has ``check(x)`` too, which refuses what cannot be used.
    """

    @property
    def ids(self) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """``x``: (b, 3, h, w) pixels in [0, 1]. ``y``: (b,) rows of the class weights. ``rng``: one stream per image that
    follows from (seed, sample, step). ``step``: -1 in validation. ``places``: of the images in the data set. ``own``:
    (b, k) the classes of the set that an image comes from. ``cached``: rows of what the method remembers of the clean
    images.
    """

    x: Tensor
    y: Tensor
    ids: list[str]
    rng: SampleRNG
    step: int
    places: list[int]
    own: Tensor
    cached: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x.shape[0]


class Feed:
    """Training and held-out batches of ``data`` for the label space of ``clf``.

    Raises ValueError for an empty or one-class set where ``labels`` matter, other image sizes, names that do not fit.
    """

    def __init__(
        self, clf: ZeroShot, data: Source, loop: Loop, seed: int, labels: bool = True, team: Team | None = None
    ) -> None:
        self.clf, self.data, self.loop, self.seed = clf, data, loop, seed
        self.memory: dict[str, Tensor] = {}
        self.team = team or Team()
        n = len(data)
        if n < 1:
            raise ValueError(f"{data.name} is empty; training needs images")
        if labels:
            check_classes(clf, data)
            device = clf.vlm.device
            self.spaces = torch.tensor(getattr(data, "spaces", None) or [0] * len(clf.label_map), device=device)
            self.member = torch.zeros(int(self.spaces.max()) + 1, clf.k, dtype=torch.bool, device=device)
            self.member[self.spaces, torch.tensor(clf.label_map, device=device)] = True
        self.labels = labels
        key = [sha256(f"{seed}\nhold-out\n{s}".encode()).digest() for s in data.ids]
        self.held = sorted(sorted(range(n), key=key.__getitem__)[: min(loop.hold_out, n // 5)])
        out = set(self.held)
        self.rows = [i for i in range(n) if i not in out]

    def parts(self, step: int) -> Iterator[Batch]:
        """The ``loop.accumulate`` parts of a step's batch, of each this process's share."""
        at = order(self.seed, step, self.loop.batch_size, len(self.rows))
        size = self.loop.batch_size // self.loop.accumulate
        for start in range(0, len(at), size):
            yield self.batch(self.team.share([self.rows[i] for i in at[start : start + size]]), step)

    def validation(self) -> Iterator[Batch]:
        """The held-out images, the same streams each time."""
        size = self.loop.batch_size // self.loop.accumulate
        for start in range(0, len(self.held), size):
            yield self.batch(self.held[start : start + size], -1)

    def batch(self, places: list[int], step: int) -> Batch:
        """Read, check and name some images."""
        x, y, ids = next(iter(self.data.batches(len(places), places)))
        device, size = self.clf.vlm.device, self.clf.vlm.image_size
        check: Callable[[Tensor], None] | None = getattr(self.data, "check", None)
        check_images(x, size) if check is None else check(x)
        x, rng = x.to(device), SampleRNG.of(self.seed, ids).fold("fit").at(step + 1)
        if self.labels:
            check_labels(y, len(places), len(self.clf.label_map))
            y, raw = self.clf.labels(y.to(device)), y.to(device)
            own = self.member[self.spaces[raw]]
        else:
            y = torch.full((len(places),), -1, device=device)
            own = torch.ones(len(places), self.clf.k, dtype=torch.bool, device=device)
        rows = torch.tensor(places)
        return Batch(x, y, ids, rng, step, places, own, {k: v[rows].to(device) for k, v in self.memory.items()})

    def remembering(self, batch: Batch, values: dict[str, Tensor]) -> Batch:
        """The batch with values that were computed for it now."""
        return replace(batch, cached={**batch.cached, **values})


def check_classes(clf: ZeroShot, data: Source) -> None:
    """Refuse data whose labels are not those of the classifier, or that show one class only. Raises ValueError."""
    names = list(data.class_names)
    if len(names) != len(clf.label_map) or any(clf.class_names[r] != n for n, r in zip(names, clf.label_map)):  # noqa: B905
        raise ValueError(
            f"the classifier was built for {len(clf.label_map)} classes that are not the {len(names)} of {data.name}; "
            "write ZeroShot.build(vlm, data.class_names, data.templates)"
        )
    labels = getattr(data, "labels", None)
    if labels is None:
        raise ValueError(f"{data.name} has no labels, and this method learns from labels; FARE does without")
    if len({clf.label_map[y] for y in labels}) < 2:
        raise ValueError(f"{data.name} shows a single class; training needs images of at least 2")
