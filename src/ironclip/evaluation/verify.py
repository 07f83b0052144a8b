"""Is a store sound? Every file read to its last byte, every name compared with what it must be; nothing is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ironclip.core.spec import digest
from ironclip.evaluation.store import FORMAT, LEVELS, Store, checksum

DAMAGED = "delete it and run the command that made it again"
LEFTOVER = "left by a killed run, or being written now; ironclip store gc --delete removes it"


@dataclass(frozen=True)
class Problem:
    """A file of a store that is not as it must be, and what to do."""

    path: Path
    what: str
    todo: str = DAMAGED

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.todo}"


def verify(store: Store) -> list[Problem]:
    """Everything that is wrong with a store, by path; empty for a sound one.

    Cells and parts: readable, named by the digest of their key (parts: of their sample ids), sample ids present and
    unique. Examples: readable, checksum and names right, perturbations inside the attack's budget. Other files:
    readable. Files under temporary names are what a killed run left behind.
    """
    found = [p for cell in _files(store, "cells", "*.parquet") for p in _cell(cell)]
    found += [p for part in _files(store, "cells", "*.parts/*.parquet") for p in _part(part)]
    found += [p for shard in _files(store, "adv", "*/*.safetensors") for p in _shard(shard)]
    found += [p for file in _files(store, "text", "*.safetensors") for p in _tensors(file)[1]]
    found += [p for file in sorted(store.root.rglob("[!.]*.json")) for p in _document(file)]
    found += [Problem(p, "half-written", LEFTOVER) for p in sorted(store.root.rglob(".*.tmp"))]
    return found


def info(store: Store) -> dict[str, Any]:
    """What a store holds: cells by threat, models, data sets, defenses, examples, open and failed cells, bytes."""
    feet = [store.footer(d) for d in store.digests()]
    open_cells = unfinished(store)
    size = {p.name: sum(f.stat().st_size for f in (p, *p.rglob("*")) if f.is_file()) for p in store.root.iterdir()}
    return {
        "store": str(store.root),
        "format": FORMAT,
        "cells": dict(sorted(Counter(f["threat"] for f in feet).items())),
        "rows": sum(pq.read_metadata(store.cell_path(d)).num_rows for d in store.digests()),
        "unfinished": len(open_cells),
        "failed": len(store.errors()),
        **{k: sorted({f[k] for f in feet}) for k in ("vlm", "data", "defense")},
        "ironclip": sorted({f["versions"]["ironclip"] for f in feet}),
        "examples": sum(1 for _ in _files(store, "adv", "*/*.safetensors")),
        "bytes": {**dict(sorted(size.items())), "total": sum(size.values())},
    }


def unfinished(store: Store) -> list[str]:
    """Digests of cells that have rows but are not whole: what the next run goes on with."""
    folders = [p for p in (store.root / "cells").glob("*.parts") if any(p.glob("[!.]*.parquet"))]
    return sorted(d for p in folders if not store.cell_path(d := p.name.removesuffix(".parts")).exists())


def _files(store: Store, kind: str, pattern: str) -> Iterator[Path]:
    return (p for p in sorted((store.root / kind).glob(pattern)) if not p.name.startswith("."))


def _table(path: Path) -> tuple[pa.Table | None, list[Problem]]:
    try:
        table = pq.read_table(path, memory_map=False, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as err:
        return None, [Problem(path, f"cannot be read ({' '.join(str(err).split())})")]
    if "sample_id" not in table.column_names:
        return None, [Problem(path, "has no column sample_id")]
    ids = table["sample_id"].to_pylist()
    twice = len(ids) - len(set(ids))
    bad = [Problem(path, f"{twice} of {len(ids)} sample ids are there twice")] if twice else []
    bad += [Problem(path, "has rows without a sample id")] if None in ids else []
    return table, bad


def _cell(path: Path) -> list[Problem]:
    table, bad = _table(path)
    if table is None:
        return bad
    try:
        key = json.loads((table.schema.metadata or {})[b"ironclip"])["key"]
    except (KeyError, ValueError, TypeError):
        return [*bad, Problem(path, "does not say what cell it is")]
    if digest(key) != path.stem:
        bad.append(Problem(path, f"holds the cell {digest(key)}: renamed or changed"))
    return bad


def _part(path: Path) -> list[Problem]:
    table, bad = _table(path)
    if table is None:
        return bad
    name = digest(sorted(table["sample_id"].to_pylist()))[:16]
    return bad if name == path.stem else [*bad, Problem(path, "is not named after its samples: renamed or changed")]


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[Problem]]:
    try:
        return load_file(path), []
    except (SafetensorError, OSError) as err:
        return {}, [Problem(path, f"cannot be read ({err})")]


def _shard(path: Path) -> list[Problem]:
    data, bad = _tensors(path)
    if bad:
        return bad
    with safe_open(path, "pt") as file:
        said: dict[str, str] = file.metadata() or {}
    try:
        ids: list[str] = json.loads(said["ids"])
        fields: dict[str, Any] | None = json.loads(said.get("key", "null"))
    except (KeyError, ValueError):
        return [Problem(path, "does not say whose examples it holds")]
    if digest(sorted(ids))[:24] != path.stem or len(set(ids)) != len(ids):
        bad.append(Problem(path, "is not named after its samples: renamed or changed"))
    if fields is not None and digest(fields) != path.parent.name:
        bad.append(Problem(path, f"belongs to {digest(fields)}: moved or changed"))
    if any(len(v) != len(ids) for v in data.values()):
        bad.append(Problem(path, f"has {len(ids)} sample ids and another number of examples"))
    elif "sha256" in said and checksum(data) != said["sha256"]:
        bad.append(Problem(path, "has changed since it was written (checksum)"))
    elif not _within(data, fields):
        bad.append(Problem(path, "leaves the budget of its attack"))
    return bad


def _within(data: dict[str, torch.Tensor], fields: dict[str, Any] | None) -> bool:
    """Do l_inf perturbations stay inside eps? Where no attack is named, inside the pixel range."""
    from ironclip.registry import build_attack

    attack: Any = build_attack(fields["attack"]) if fields else None
    linf = attack is not None and getattr(attack, "norm", "linf") == "linf"
    most = float(Fraction(attack.eps)) if linf else 1.0
    radius = data["radius"]
    codes = int(data["delta"].abs().max()) if data["delta"].numel() else 0
    return bool(torch.isfinite(radius).all()) and float(radius.max()) <= most + 1e-6 and codes <= LEVELS


def _document(path: Path) -> list[Problem]:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        return [Problem(path, f"cannot be read ({err})")]
    return []
