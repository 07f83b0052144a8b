"""What ``fit_defense`` does otherwise where a defense has a threshold to find and nothing to train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ironclip.core.spec import to_text
from ironclip.defenses._calibrate import Gated

Progress = Callable[[int, int, dict[str, Any]], None]


class Watched:
    """A data set whose reader is told, after each batch, how many images were read."""

    def __init__(self, source: Any, progress: Progress | None) -> None:
        self.source, self.progress = source, progress

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Those of the data set."""
        seen, n = 0, len(self.source)
        for batch in self.source.batches(batch_size):
            yield batch
            seen += batch[0].shape[0]
            if self.progress is not None:
                self.progress(seen, n, {})


def check_plain(defense: Gated, changes: Mapping[str, Any] | None, half: bool) -> None:
    """Refuse what only training has, and a threshold that is already in the spec. Raises ValueError."""
    name, spec = type(defense).__name__, to_text(defense)
    if changes:
        raise ValueError(f"{name} is calibrated, not trained; leave {', '.join(changes)} out")
    if half:
        raise ValueError(f"{name} has one number to store; leave --half out")
    if not defense.is_open:
        if getattr(defense, "gate", None) == "off":
            raise ValueError(f"{spec} has no gate to calibrate; write {name}(gate=high_noise_drift)")
        field = defense.THRESHOLD.field
        raise ValueError(f"{spec} has its {field} already; leave {field}= out to find it again")


def repeats(record: Path, weights: str) -> bool:
    """Was the state beside this manifest calibrated on the same model? Then it may be found again."""
    if not record.exists():
        return False
    made = json.loads(record.read_text(encoding="utf-8"))
    return "spec" in made and made.get("weights") == weights
