"""One random stream per (seed, sample): results never depend on batch size, order or number of workers.

A stream is a Philox counter-based generator (Salmon et al. 2011) whose 128-bit key is a BLAKE2 hash of the run's seed,
the sample's id, the path of names under which the number is drawn, and the draw index. Integers decide everything, so
the same stream gives the same bits on any device; the numbers are made on the CPU and moved.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def sample_key(sample_id: str | int) -> int:
    """64-bit integer that stands for a sample id in random streams."""
    if isinstance(sample_id, int):
        return sample_id
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class SampleRNG:
    """Random numbers for the rows of a batch, one independent stream per row.

    ``ids``: one integer per row. ``draw``: which of the independent repetitions (EOT draws, fresh draws). ``path``:
    names that keep the uses apart, for example ``("pgd", "start", 0)``.
    """

    seed: int
    ids: tuple[int, ...]
    draw: int = 0
    path: tuple[str | int, ...] = ()

    @classmethod
    def of(cls, seed: int, sample_ids: Sequence[str | int]) -> SampleRNG:
        """Streams for named samples."""
        return cls(seed, tuple(sample_key(s) for s in sample_ids))

    @classmethod
    def rows(cls, b: int, seed: int = 0) -> SampleRNG:
        """Streams for row positions, when nobody says which samples the rows hold."""
        return cls(seed, tuple(range(b)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor | Sequence[int] | slice) -> SampleRNG:
        """The streams of some rows: a boolean mask (b,), integer indices, or a slice."""
        if isinstance(index, slice):
            return replace(self, ids=self.ids[index])
        idx = torch.as_tensor(index)
        if idx.dtype == torch.bool:
            if idx.shape != (len(self.ids),):
                raise ValueError(f"mask must have shape ({len(self.ids)},), got {tuple(idx.shape)}")
            idx = idx.nonzero().flatten()
        return replace(self, ids=tuple(self.ids[i] for i in idx.tolist()))

    def at(self, draw: int) -> SampleRNG:
        """The same samples and purpose, another repetition."""
        return replace(self, draw=draw)

    def fold(self, *names: str | int) -> SampleRNG:
        """An independent sub-stream; the current draw becomes part of the path and counting starts again at 0."""
        return replace(self, path=(*self.path, f"d{self.draw}", *names), draw=0)

    def repeat(self, n: int) -> SampleRNG:
        """Streams for ``n`` views of every image, image-major: rows of ``x.repeat_interleave(n, 0)``."""
        names = [self._row(i).key for i in range(len(self.ids))]
        ids = tuple(sample_key(f"{name}/view{j}") for name in names for j in range(n))
        return SampleRNG(self.seed, ids)

    def _row(self, i: int) -> _Stream:
        return _Stream(f"{self.seed}|{self.ids[i]}|{'/'.join(map(str, self.path))}|{self.draw}")

    def generator(self, i: int) -> np.random.Generator:
        """NumPy generator of row ``i``; a new one, at its start, with every call."""
        return self._row(i).generator()

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(b, *shape) float32 on the CPU, uniform in [low, high), from 24-bit mantissas."""
        out = np.empty((len(self.ids), *shape), dtype=np.float32)
        for i in range(len(self.ids)):
            out[i] = self.generator(i).random(shape, dtype=np.float32)
        return torch.from_numpy(out) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """(b, *shape) float32 on the CPU, standard normal."""
        out = np.empty((len(self.ids), *shape), dtype=np.float32)
        for i in range(len(self.ids)):
            out[i] = self.generator(i).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(out)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(b, *shape) int64 on the CPU, uniform in [low, high)."""
        rows = [self.generator(i).integers(low, high, size=shape) for i in range(len(self.ids))]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def uniform_like(self, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform noise with the shape, device and dtype of ``x``; row i from stream i."""
        self.check_rows(x)
        return self.uniform(*x.shape[1:], low=low, high=high).to(x)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise with the shape, device and dtype of ``x``; row i from stream i."""
        self.check_rows(x)
        return self.normal(*x.shape[1:]).to(x)

    def check_rows(self, x: Tensor) -> None:
        """Refuse a batch whose rows are not the samples of this object."""
        if x.shape[0] != len(self.ids):
            raise ValueError(f"rng carries {len(self.ids)} sample ids but x has {x.shape[0]} rows; pass rng[mask]")


@dataclass(frozen=True)
class _Stream:
    key: str

    def generator(self) -> np.random.Generator:
        digest = hashlib.blake2b(self.key.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


_told: set[str] = set()


def rng_or_rows(rng: SampleRNG | None, x: Tensor, who: str) -> SampleRNG:
    """``rng``, or draw 0 of the row positions when none was passed, which is said once per ``who``."""
    if rng is not None:
        rng.check_rows(x)
        return rng
    if who not in _told:
        _told.add(who)
        warnings.warn(
            f"{who} is random and was called without rng: draw 0 of row positions is used, so an image's result "
            "depends on its row; pass rng=SampleRNG.of(seed, sample_ids)",
            stacklevel=3,
        )
    return SampleRNG.rows(x.shape[0])
