"""Thresholds from unlabelled clean images: what gated defenses share, ``calibrate``, ``fit`` and the state."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ironclip.core.rng import SampleRNG
from ironclip.core.spec import to_text
from ironclip.core.types import Loop, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._train import BASE, RECIPE, check_base, fingerprint


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
    values: Callable[[Tensor, SampleRNG], Tensor], data: Iterable[Any], quantile: float, seed: int, usual: float = 0.95
) -> float:
    """The quantile of ``values(x, rng)`` (b,) over all images, to four significant digits.

    Raises ValueError for a quantile outside (0, 1) and for no images.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}; write {usual}")
    with torch.no_grad():
        parts = [values(x, rng).flatten().cpu() for x, rng in image_batches(data, seed)]
    found = torch.cat(parts) if parts else torch.zeros(0)
    if found.numel() == 0:
        raise ValueError("calibration needs clean images, got none; pass at least 20, 256 are better")
    return float(f"{float(torch.quantile(found.double(), quantile)):.4g}")


RECONSTRUCTED = "its formula was not available, only a reconstruction exists; write reconstruction=True or leave it out"
"""Why ``reconstruction=False`` is refused."""


@dataclass(frozen=True)
class Threshold:
    """``field`` of a defense is the ``quantile`` of its ``drift`` over clean images, and hangs on the fields ``of``.

    ``usual``: what stands in for it where nobody calibrated, with a warning; None where nothing can.
    """

    field: str
    quantile: float
    of: tuple[str, ...]
    usual: float | None = None


class Gated:
    """``calibrate``, ``fit`` and the threshold of a defense that gates or scales by how far a feature drifts.

    The class brings ``THRESHOLD`` and ``drift(clf, x, rng) -> (b,)``; ``LABELS``: does the drift read class weights?
    A spec whose threshold is the default leaves it open: a calibrated state fills it in, any other value stands.
    """

    THRESHOLD: ClassVar[Threshold]
    LABELS: ClassVar[bool] = False

    def drift(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b,) what the threshold is compared with."""
        raise TypeError(f"{type(self).__name__} must define drift(clf, x, rng)")

    @property
    def is_open(self) -> bool:
        """Does the spec leave the threshold to calibration?"""
        name = self.THRESHOLD.field
        default = next(f.default for f in fields(self) if f.name == name)  # type: ignore[arg-type]
        assert default is not MISSING
        return bool(getattr(self, name) == default)

    def calibrate(self, clf: ZeroShot, data: Iterable[Any], quantile: float | None = None, seed: int = 0) -> float:
        """The threshold for this model: the quantile (the method's own unless given) of the drift of clean images.

        ``data``: a tensor (n, 3, h, w), batches of them, or a data set; no labels are read, and none of the images
        should be in the test. At least 20, 256 are better. Four significant digits, to be written into a spec. Raises
        ValueError for a quantile outside (0, 1), bad images, and no images.
        """
        share = self.THRESHOLD.quantile if quantile is None else quantile
        return quantile_of(lambda x, rng: self.drift(clf, x, rng), data, share, seed, self.THRESHOLD.quantile)

    def fit(self, clf: ZeroShot, data: Iterable[Any], *, loop: Loop | None = None, seed: int = 0) -> State:
        """``calibrate`` as a state: the threshold, whose it is and for which noise; ``loop`` is not read."""
        found = torch.tensor([self.calibrate(clf, data, seed=seed)], dtype=torch.float64)
        told = torch.tensor(list(self._calibrated_as().encode()), dtype=torch.uint8)
        return {self.THRESHOLD.field: found, BASE: fingerprint(clf.vlm), RECIPE: told}

    def calibrated(self, state: State) -> Self:
        """The same defense with the state's threshold written into its spec. Raises ValueError for a state of another
        defense or another noise."""
        name = self.THRESHOLD.field
        if name not in state:
            raise ValueError(
                f"the state of {type(self).__name__} must hold {name!r}, it holds {', '.join(state) or 'nothing'}"
            )
        told = bytes(state[RECIPE].tolist()).decode() if RECIPE in state else self._calibrated_as()
        if told != self._calibrated_as():
            raise ValueError(f"the state was calibrated for {told}, not for {self._calibrated_as()}; calibrate again")
        return replace(self, **{name: float(f"{float(state[name]):.6g}")})  # type: ignore[type-var]

    def settled(self, clf: ZeroShot, state: State | None = None) -> Self:
        """The defense as it runs on this model: its own threshold, else the state's, else the usual one with a warning
        that is given once per model. Raises ValueError where there is none, and for a state of another backbone."""
        if not self.is_open:
            return self
        if state is not None:
            check_base(clf.vlm, state)
            return self.calibrated(state)
        name, usual, who = self.THRESHOLD.field, self.THRESHOLD.usual, type(self).__name__
        how = (
            f"run {self._command(clf.vlm)} and write the {name}= that it prints, or take {who}().calibrate(clf, "
            "clean_images)"
        )
        if usual is None:
            raise ValueError(f"{to_text(self)} needs a {name} for {clf.vlm.name}: {how}")
        if not self._found_on(clf.vlm) and (who, clf.vlm.name) not in _told:
            _told.add((who, clf.vlm.name))
            warnings.warn(f"{who} is not calibrated for {clf.vlm.name} and takes {name}={usual}; {how}", stacklevel=3)
        return replace(self, **{name: usual})  # type: ignore[type-var]

    def _found_on(self, vlm: VLM) -> bool:
        """Was the usual threshold found on this very model?"""
        return False

    def _calibrated_as(self) -> str:
        """What the drift depends on, as text."""
        parts = (f"{f}={getattr(self, f)}" for f in self.THRESHOLD.of)
        return f"{type(self).__name__}({', '.join(parts)})"

    def _command(self, vlm: VLM) -> str:
        spec = shlex.quote(to_text(self).removesuffix("()"))
        model = vlm.name.partition("@")[0]
        return f"ironclip fit {spec} --vlm {'tiny' if model.startswith('tiny-') else model} --data folder:PATH/train"


_told: set[tuple[str, str]] = set()
