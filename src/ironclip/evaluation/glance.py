"""A store that is only looked at: what a dry run needs, written nowhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ironclip.core.spec import digest
from ironclip.evaluation.store import Store


class Glance(Store):
    """A store, or a folder that may become one, whose answers are kept in memory only."""

    def __init__(self, root: str | Path) -> None:
        if (Path(root) / "store.json").exists():
            super().__init__(root)
        self.root = Path(root)

    def tensors(self, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stored ones, else made now."""
        path = self.root / kind / f"{key}.safetensors"
        with contextlib.suppress(SafetensorError, OSError):
            return load_file(path)
        return make()

    def put_json(self, kind: str, key: str, value: Any) -> None:
        """Nothing."""

    def samples(self, cell: str) -> set[str]:
        """Sample ids that a cell holds so far."""
        files = [self.cell_path(cell), *(self.root / "cells" / f"{cell}.parts").glob("[!.]*.parquet")]
        found: set[str] = set()
        for file in files:
            with contextlib.suppress(OSError):
                found.update(pq.read_table(file, columns=["sample_id"])["sample_id"].to_pylist())
        return found

    def attacked(self, fields: dict[str, Any]) -> set[str]:
        """Sample ids of which there are adversarial examples."""
        found: set[str] = set()
        for file in (self.root / "adv" / digest(fields)).glob("[!.]*.safetensors"):
            with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(file, "pt") as opened:
                found.update(json.loads((opened.metadata() or {}).get("ids", "[]")))
        return found
