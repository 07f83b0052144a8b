"""One model on one data set: what every cell of a table block shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG
from ironclip.core.space import Space
from ironclip.core.spec import full_text
from ironclip.core.types import Attack, Defense, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.types import Dataset
from ironclip.evaluation.recipes import Budget
from ironclip.evaluation.store import Store


class Progress(Protocol):
    """Where a run says how far it is; ``work`` is in images times passes, as estimated beforehand."""

    def start(self, text: str, work: float) -> None: ...

    def advance(self, work: float) -> None: ...

    def done(self) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def start(self, text: str, work: float) -> None:
        """Nothing."""

    def advance(self, work: float) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A defense with its fitted state and both as text."""

    defense: Defense
    state: State | None = None

    @property
    def text(self) -> str:
        """Spec with every field."""
        return full_text(self.defense)

    @property
    def state_hash(self) -> str:
        """SHA-256 of the state, empty without one."""
        if not self.state:
            return ""
        sha = hashlib.sha256()
        for key, value in sorted(self.state.items()):
            sha.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Block:
    """Everything that the cells of one (model, data set) block need.

    ``clf`` answers in fp32 and its answers count; ``fast`` is the same classifier at the attack's precision. ``shard``:
    (i, w) of w workers, each doing every w-th sample of the subset. ``relatives``: the same classes on other models,
    for examples that are made there and shown here.
    """

    vlm: VLM
    data: Dataset
    clf: ZeroShot
    fast: ZeroShot
    store: Store
    budget: Budget
    seed: int = 0
    batch_size: int = 16
    precision: str = "fp32"
    gallery: int = 4
    shard: tuple[int, int] = (0, 1)
    progress: Progress = field(default_factory=Silent)
    relatives: tuple[ZeroShot, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where images go."""
        return self.vlm.device

    def rng(self, ids: list[str]) -> SampleRNG:
        """The streams of some samples."""
        return SampleRNG.of(self.seed, ids)

    def key(self, **more: Any) -> dict[str, Any]:
        """What every result of this block depends on."""
        return {
            "vlm": self.vlm.name,
            "weights": self.vlm.weights_hash,
            "data": self.data.name,
            "recipe": self.data.recipe,
            "prompts": self.clf.prototype_hash,
            "seed": self.seed,
            **self._space,
            **more,
        }

    @property
    def _space(self) -> dict[str, str]:
        """Named in keys only where it is not the model's input: the names of older results stay."""
        return {} if self.vlm.space == Space() else {"space": str(self.vlm.space)}

    def adv_fields(self, clf: ZeroShot, attack: Attack) -> dict[str, Any]:
        """What the examples that ``attack`` makes for ``clf`` depend on; the defense is not part of it."""
        return {
            "weights": clf.vlm.weights_hash,
            "recipe": self.data.recipe,
            "prompts": clf.prototype_hash,
            "attack": full_text(attack),
            "revision": getattr(attack, "revision", 0),
            "seed": self.seed,
            "precision": self.precision,
            "salt": "",
            **self._space,
        }

    def batches(self, missing: set[str], whole: bool = False) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """This worker's share of the missing samples, in subset order: x, mapped labels y, ids.

        ``whole``: for defenses that couple a batch, the batches of the full subset that have anything missing.
        """
        i, w = self.shard
        ids = self.data.ids
        if whole:
            chunks = [range(s, min(s + self.batch_size, len(ids))) for s in range(0, len(ids), self.batch_size)]
            picked = [list(c) for n, c in enumerate(chunks) if n % w == i and any(ids[j] in missing for j in c)]
        else:
            mine = [j for j in range(len(ids)) if j % w == i and ids[j] in missing]
            picked = [mine[s : s + self.batch_size] for s in range(0, len(mine), self.batch_size)]
        for chunk in picked:
            for x, y, names in self.data.batches(len(chunk), chunk):
                yield x.to(self.device), self.clf.labels(y.to(self.device)), names
