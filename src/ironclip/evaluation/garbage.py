"""What a store no longer needs: half-written files, merged parts, examples and pictures that no cell refers to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ironclip.core.spec import digest
from ironclip.evaluation.store import Store
from ironclip.evaluation.verify import unfinished


@dataclass(frozen=True)
class Waste:
    """A file or folder that may go, why, and its bytes."""

    path: Path
    why: str
    size: int


def garbage(store: Store, *, hours: float = 24.0, with_unfinished: bool = False) -> tuple[list[Waste], list[str]]:
    """What may go, and notes about what is kept although nobody seems to need it.

    Nothing that was touched in the last ``hours`` is garbage: another run may be using it. Rows of unfinished cells are
    what an interrupted run goes on with: garbage only ``with_unfinished``. Examples are garbage if no finished cell
    says that it used them; while there are unfinished cells, which do not say so, all examples stay.
    """
    if hours < 0:
        raise ValueError(f"hours must not be negative, got {hours}; write --older 24")
    newest = time.time() - 3600 * hours
    waste = [Waste(p, "half-written", _size(p)) for p in sorted(store.root.rglob(".*.tmp"))]
    waste += [Waste(p, "rows that the finished cell holds", _size(p)) for p in _merged_parts(store)]
    open_cells = unfinished(store)
    if with_unfinished:
        folders = [store.root / "cells" / f"{d}.parts" for d in open_cells]
        waste += [Waste(p, "rows of an unfinished cell", _size(p)) for p in folders]
    alive = set(store.digests()) | (set() if with_unfinished else set(open_cells))
    for kind in ("gallery", "probes"):
        files = sorted((store.root / kind).glob("[!.]*.json"))
        waste += [Waste(p, f"{kind} of no cell", _size(p)) for p in files if p.stem.partition("-")[0] not in alive]
    examples, notes = _examples(store, [] if with_unfinished else open_cells)
    waste += examples
    return [w for w in waste if _touched(w.path) <= newest], notes


def collect(waste: list[Waste]) -> int:
    """Delete what ``garbage`` found; returns the bytes that are free now."""
    for w in waste:
        files = sorted(w.path.iterdir()) if w.path.is_dir() else [w.path]
        for file in files:
            file.unlink(missing_ok=True)
        if w.path.is_dir():
            with contextlib.suppress(OSError):  # another run has just added to it
                w.path.rmdir()
    return sum(w.size for w in waste)


def _examples(store: Store, open_cells: list[str]) -> tuple[list[Waste], list[str]]:
    used, silent = _used(store)
    idle = [p for p in sorted((store.root / "adv").glob("[!.]*")) if p.is_dir() and p.name not in used]
    if idle and (open_cells or silent):
        why = [f"{len(open_cells)} unfinished cells"] * bool(open_cells)
        why += [f"{silent} cells of an older ironclip, which do not say what they used,"] * bool(silent)
        return [], [f"{len(idle)} sets of examples are kept: {' and '.join(why)} may need them"]
    return [Waste(p, "examples that no cell used", _size(p)) for p in idle], []


def _used(store: Store) -> tuple[set[str], int]:
    """Folders of examples that finished cells used, and how many cells do not say."""
    used: set[str] = set()
    silent = 0
    for d in store.digests():
        foot = store.footer(d)
        if "examples" in foot:
            used.update(foot["examples"])
        elif foot["threat"] == "static":
            used.add(digest(static_fields(foot["key"])))
        elif foot["threat"] != "clean":
            silent += 1
    return used, silent


def static_fields(key: dict[str, Any]) -> dict[str, Any]:
    """The key of the examples behind a static cell, from the key of the cell."""
    names = {n: n for n in ("weights", "recipe", "prompts", "attack", "seed", "precision", "space") if n in key}
    return {new: key[old] for new, old in names.items()} | {"revision": key["rev"], "salt": ""}


def _merged_parts(store: Store) -> Iterator[Path]:
    """Parts all of whose samples are in the finished cell: what is left when a run is killed while merging."""
    for folder in sorted((store.root / "cells").glob("*.parts")):
        done = store.cell_path(folder.name.removesuffix(".parts"))
        if done.exists():
            have = set(pq.read_table(done, columns=["sample_id"])["sample_id"].to_pylist())
            for part in sorted(folder.glob("[!.]*.parquet")):
                if have.issuperset(pq.read_table(part, columns=["sample_id"])["sample_id"].to_pylist()):
                    yield part


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))


def _touched(path: Path) -> float:
    """When a file, or the newest file of a folder, was written."""
    return max((p.stat().st_mtime for p in (path.iterdir() if path.is_dir() else [path])), default=0.0)
