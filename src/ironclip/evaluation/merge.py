"""Results of several machines in one store: cells, examples and what belongs to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ironclip.evaluation.store import FORMAT, Store, StoreError, write_atomic
from ironclip.evaluation.verify import LEFTOVER, verify

DOCUMENTS = ("gallery", "probes", "checks", "draws")
"""Kinds of JSON documents that are merged. Timings (``cost``) are not: milliseconds of two machines do not compare."""


@dataclass
class Merged:
    """What came in: new cells, cells that grew, unfinished ones, rows, shards of examples, other files. ``differ``:
    samples of a cell that both stores have and that were answered differently; ours are kept."""

    cells: int = 0
    grown: int = 0
    unfinished: int = 0
    rows: int = 0
    examples: int = 0
    files: int = 0
    differ: int = 0

    def numbers(self) -> dict[str, int]:
        """As a dictionary."""
        return asdict(self)


def merge(root: str | Path, others: list[Store]) -> Merged:
    """Take from ``others`` what the store at ``root`` does not have; doing it twice changes nothing, a killed one goes
    on. The store is made if there is none.

    Raises StoreError for a store of another format, a damaged one, or ``root`` among the others, before anything is
    written.
    """
    for other in others:
        if other.root.resolve() == Path(root).resolve():
            raise StoreError(f"{other.root} cannot be merged into itself; name another store")
        found = json.loads((other.root / "store.json").read_text())["format"]
        if found != FORMAT:
            raise StoreError(
                f"store {other.root} has format {found}, this ironclip writes {FORMAT}; merge stores of one format"
            )
        bad = [p for p in verify(other) if p.todo != LEFTOVER]
        if bad:
            more = f" ({len(bad) - 1} more: ironclip store verify --store {other.root})" if len(bad) > 1 else ""
            raise StoreError(f"{bad[0]}{more}")
    into, done = Store(root), Merged()
    for other in others:
        _cells(into, other, done)
        _examples(into, other, done)
        _others(into, other, done)
    return done


def _cells(into: Store, other: Store, done: Merged) -> None:
    folder = other.root / "cells"
    names = {p.name.partition(".")[0] for p in folder.glob("[!.]*") if not p.name.endswith(".error.json")}
    for digest in sorted(names):
        theirs = other.footer(digest)
        target = into.cell_path(digest)
        parts = list((into.root / "cells" / f"{digest}.parts").glob("[!.]*.parquet"))
        if theirs and not target.exists() and not parts and not (folder / f"{digest}.parts").exists():
            _copy(other.cell_path(digest), target)
            done.cells += 1
            done.rows += len(other.rows(digest))
            continue
        ours = {r["sample_id"]: r for r in into.rows(digest)}
        rows = other.rows(digest)
        new = [r for r in rows if r["sample_id"] not in ours]
        done.differ += sum(_answer(r) != _answer(ours[r["sample_id"]]) for r in rows if r["sample_id"] in ours)
        footer = into.footer(digest) or theirs
        known = bool(into.footer(digest))
        if new:
            into.add_rows(digest, new, other.tally(digest))
            done.rows += len(new)
        if footer and (new or not known):
            into.finish(digest, footer)
        if new or (footer and not known):
            done.grown += known
            done.cells += bool(footer) and not known
            done.unfinished += not footer
    for file in sorted(folder.glob("[!.]*.error.json")):
        mine = into.root / "cells" / file.name
        if not into.cell_path(file.name.partition(".")[0]).exists() and not mine.exists():
            _copy(file, mine)
            done.files += 1


def _answer(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("pred", "correct", "robust"))


def _examples(into: Store, other: Store, done: Merged) -> None:
    have: dict[str, set[str]] = {}
    for shard in sorted((other.root / "adv").glob("*/[!.]*.safetensors")):
        key = shard.parent.name
        if key not in have:
            mine = sorted((into.root / "adv" / key).glob("[!.]*.safetensors"))
            have[key] = {i for p in mine for i in _ids(p)}
        ids = set(_ids(shard))
        if not ids <= have[key]:
            _copy(shard, into.root / "adv" / key / shard.name)
            have[key] |= ids
            done.examples += 1


def _ids(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        found: list[str] = json.loads((file.metadata() or {})["ids"])
    return found


def _others(into: Store, other: Store, done: Merged) -> None:
    files = [p for kind in DOCUMENTS for p in (other.root / kind).glob("[!.]*.json")]
    files += (other.root / "text").glob("[!.]*.safetensors")
    for file in sorted(files):
        mine = into.root / file.relative_to(other.root)
        if not mine.exists():
            _copy(file, mine)
            done.files += 1


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda p: shutil.copyfile(source, p))
