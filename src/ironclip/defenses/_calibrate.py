"""Thresholds from unlabelled clean images: what gated defenses share when they are fitted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG


def image_batches(data: Iterable[Any], seed: int = 0) -> Iterator[tuple[Tensor, SampleRNG]]:
    """Batches of pixels with their streams, from whatever holds images.

    ``data``: one tensor (n, 3, h, w); an iterable of such batches, or of tuples that begin with one and may end with
    the sample ids; or a data set with ``batches``. Images without ids are named by their position.
    """
    if isinstance(data, Tensor):
        data = data.split(64)
    elif hasattr(data, "batches"):
        data = data.batches(64)
    seen = 0
    for batch in data:
        x = batch if isinstance(batch, Tensor) else batch[0]
        ids = None if isinstance(batch, Tensor) else batch[-1]
        named = isinstance(ids, (list, tuple)) and len(ids) == x.shape[0]
        yield x, SampleRNG.of(seed, ids if named else range(seen, seen + x.shape[0]))  # type: ignore[arg-type]
        seen += x.shape[0]


def quantile_of(
    values: Callable[[Tensor, SampleRNG], Tensor], data: Iterable[Any], quantile: float, seed: int
) -> float:
    """The quantile of ``values(x, rng)`` (b,) over all images, to four significant digits.

    Raises ValueError for a quantile outside (0, 1) and for no images.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}; write 0.95")
    with torch.no_grad():
        parts = [values(x, rng).flatten().cpu() for x, rng in image_batches(data, seed)]
    found = torch.cat(parts) if parts else torch.zeros(0)
    if found.numel() == 0:
        raise ValueError("calibration needs clean images, got none; pass at least 20, 256 are better")
    return float(f"{float(torch.quantile(found.double(), quantile)):.4g}")


RECONSTRUCTED = "its formula was not available, only a reconstruction exists; write reconstruction=True or leave it out"
"""Why ``reconstruction=False`` is refused."""


def threshold(own: float | None, state: Mapping[str, Tensor] | None, name: str, usual: float, spec: str) -> float:
    """The threshold ``name`` of a defense: the spec's, else the fitted state's, else ``usual`` with a warning that says
    how to calibrate."""
    if own is not None:
        return own
    if state is not None:
        if name not in state:
            raise ValueError(f"the state of {spec} must hold {name!r}, it holds {', '.join(state) or 'nothing'}")
        return float(state[name])
    warnings.warn(
        f"{spec} is not calibrated for this model and takes {name}={usual}; write {name}= with the value of "
        f"{spec}().calibrate(clf, clean_images)",
        stacklevel=3,
    )
    return usual
