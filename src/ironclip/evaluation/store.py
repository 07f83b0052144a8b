"""Files are the database: adversarial examples by content, one Parquet file per cell, everything atomic.

Layout below the store's folder::

    store.json                         format version
    adv/<key>/<shard>.safetensors      adversarial examples of one attack on one classifier, some samples each
    cells/<digest>.parquet             finished rows of a cell, one row per sample; footer: cell, versions, cost
    cells/<digest>.parts/*.parquet     rows of batches not merged yet (what survives a kill)
    cells/<digest>.error.json          why a cell failed
    text/<key>.safetensors             class weights
    gallery/<digest>.json              a few images of a cell, for the report

A file appears under its name only when it is complete, so a killed run leaves nothing half-written, and two runs on one
store at worst do the same batch twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ironclip.core.spec import digest as digest_of

FORMAT = 1
LEVELS = 32767


class StoreError(ValueError):
    """A store that cannot be used as it is; the message says what to do."""


def open_store(root: str | Path) -> Store:
    """An existing store; nothing is created. Raises StoreError for a folder that is none."""
    if not (Path(root) / "store.json").exists():
        raise StoreError(f"{root} is no store; pass --store FOLDER, or run ironclip bench --store {root} first")
    return Store(root)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Run ``write(temporary)`` beside ``path`` and rename; on any failure the temporary file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet with a checksum per page, so that ``ironclip store verify`` sees every flipped bit."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


class Store:
    """One folder of results. Raises StoreError for a store of a newer format or a folder that is something else."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        marker = self.root / "store.json"
        if marker.exists():
            found = json.loads(marker.read_text())
            if not isinstance(found, dict) or "format" not in found:
                raise StoreError(f"{marker} is not a store's marker file; pass another --store folder")
            if found["format"] > FORMAT:
                raise StoreError(
                    f"store {self.root} was written in format {found['format']}, this ironclip reads format {FORMAT}; "
                    "upgrade ironclip or pass another --store folder"
                )
        else:
            if self.root.exists() and any(p for p in self.root.iterdir() if not p.name.startswith(".")):
                raise StoreError(f"{self.root} is not empty and is no ironclip store; pass a new --store folder")
            write_atomic(marker, lambda p: p.write_text(json.dumps({"format": FORMAT, "tool": "ironclip"}) + "\n"))

    # cells -----------------------------------------------------------------------------------------------------------

    def cell_path(self, digest: str) -> Path:
        """Where a finished cell's rows are."""
        return self.root / "cells" / f"{digest}.parquet"

    def rows(self, digest: str) -> list[dict[str, Any]]:
        """All rows of a cell so far, merged and not merged, one per sample id; unreadable leftovers are refused."""
        files = sorted((self.root / "cells" / f"{digest}.parts").glob("[!.]*.parquet"))
        done = self.cell_path(digest)
        rows: dict[str, dict[str, Any]] = {}
        for file in ([done] if done.exists() else []) + files:
            try:
                table = pq.read_table(file, memory_map=False)
            except FileNotFoundError:  # another run merged the parts meanwhile
                return self.rows(digest)
            except (pa.ArrowInvalid, OSError) as err:
                raise StoreError(f"{file} is damaged ({err}); delete it and run the command again") from err
            for row in table.to_pylist():
                rows.setdefault(row["sample_id"], row)
        return list(rows.values())

    def footer(self, digest: str) -> dict[str, Any]:
        """What the cell was and how it was run; empty while it is not finished."""
        path = self.cell_path(digest)
        if not path.exists():
            return {}
        meta = pq.read_schema(path).metadata or {}
        found: dict[str, Any] = json.loads(meta.get(b"ironclip", b"{}"))
        return found

    def tally(self, digest: str) -> dict[str, float]:
        """Tower passes and images of the batches that were counted, summed over the parts and the finished file."""
        files = sorted((self.root / "cells" / f"{digest}.parts").glob("[!.]*.parquet"))
        sums: dict[str, float] = dict(self.footer(digest).get("tally", {}))
        for file in files:
            try:
                meta = pq.read_schema(file).metadata or {}
            except FileNotFoundError:  # another run merged the parts meanwhile
                return self.tally(digest)
            for key, value in json.loads(meta.get(b"tally", b"{}")).items():
                sums[key] = sums.get(key, 0) + value
        return sums

    def add_rows(self, digest: str, rows: Sequence[dict[str, Any]], tally: dict[str, float] | None = None) -> None:
        """Write the rows of one batch, and what the batch cost as a whole."""
        if rows:
            name = digest_of(sorted(r["sample_id"] for r in rows))[:16]
            table = pa.Table.from_pylist(list(rows))
            table = table.replace_schema_metadata({"tally": json.dumps(tally or {})})
            part = self.root / "cells" / f"{digest}.parts" / f"{name}.parquet"
            write_atomic(part, lambda p: write_table(table, p))

    def finish(self, digest: str, footer: dict[str, Any]) -> None:
        """Merge what there is into the one file of the cell, footer included, and drop the parts."""
        rows = sorted(self.rows(digest), key=lambda r: r["sample_id"])
        if not rows:
            return
        parts = self.root / "cells" / f"{digest}.parts"
        merged = sorted(parts.glob("[!.]*.parquet"))
        footer = {**footer, "tally": self.tally(digest)}
        table = pa.Table.from_pylist(rows)
        table = table.replace_schema_metadata({"ironclip": json.dumps(footer)})
        write_atomic(self.cell_path(digest), lambda p: write_table(table, p))
        for file in merged:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone already, or another run has just added to it
            parts.rmdir()
        (self.root / "cells" / f"{digest}.error.json").unlink(missing_ok=True)

    def fail(self, digest: str, cell: dict[str, Any], error: str, traceback: str) -> None:
        """Record why a cell failed."""
        text = json.dumps({"cell": cell, "error": error, "traceback": traceback}, indent=1)
        write_atomic(self.root / "cells" / f"{digest}.error.json", lambda p: p.write_text(text))

    def errors(self) -> list[dict[str, Any]]:
        """Recorded failures of cells that have not succeeded since."""
        return [json.loads(p.read_text()) for p in sorted((self.root / "cells").glob("*.error.json"))]

    def digests(self) -> list[str]:
        """Digests of all finished cells."""
        return sorted(p.stem for p in (self.root / "cells").glob("[!.]*.parquet"))

    # small things ----------------------------------------------------------------------------------------------------

    def tensors(self, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors by key, made once."""
        path = self.root / kind / f"{key}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)
        made = {k: v.detach().cpu().contiguous() for k, v in make().items()}
        write_atomic(path, lambda p: save_file(made, p))
        return made

    def put_json(self, kind: str, key: str, value: Any) -> None:
        """A JSON document by key."""
        write_atomic(self.root / kind / f"{key}.json", lambda p: p.write_text(json.dumps(value)))

    def get_json(self, kind: str, key: str) -> Any:
        """The document, or None."""
        path = self.root / kind / f"{key}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def documents(self, kind: str, prefix: str = "") -> list[Any]:
        """All JSON documents of a kind whose key begins with ``prefix``, by key."""
        return [json.loads(p.read_text()) for p in sorted((self.root / kind).glob(f"{prefix}*.json"))]

    def adversarial(self, fields: dict[str, Any]) -> AdvSet:
        """The adversarial examples that ``fields`` describe; their digest names the folder."""
        return AdvSet(self.root / "adv" / digest_of(fields), fields)


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of named tensors, by name."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class AdvSet:
    """Adversarial examples of one attack: perturbations in 16-bit fixed point relative to each sample's
    largest entry.

    The budget is kept; the rounding error is at most that entry / 65,534. ``encode`` then ``decode`` is what a fresh
    run uses too, so fresh and stored examples are the same bits.
    """

    def __init__(self, folder: Path, fields: dict[str, Any] | None = None) -> None:
        self.folder, self.fields = folder, fields
        self.where: dict[str, tuple[Path, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read which samples the shards hold; an unreadable shard counts as missing and is removed."""
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                with safe_open(file, "pt") as f:
                    ids = json.loads((f.metadata() or {}).get("ids", "[]"))
            except (SafetensorError, OSError, ValueError):
                file.unlink(missing_ok=True)
                continue
            for i, sample in enumerate(ids):
                self.where.setdefault(sample, (file, i))

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that are not stored yet."""
        return [i for i in ids if i not in self.where]

    @staticmethod
    def encode(x: Tensor, x_adv: Tensor, radius: Tensor) -> Tensor:
        """(b, 3, h, w) int16 perturbations in units of ``radius / 32767``; ``radius``: (b,) largest entries."""
        unit = radius.double().clamp(min=1e-12).view(-1, 1, 1, 1) / LEVELS
        return ((x_adv - x).double() / unit).round().clamp(-LEVELS, LEVELS).to(torch.int16)

    @staticmethod
    def decode(x: Tensor, code: Tensor, radius: Tensor) -> Tensor:
        """Back to pixels in [0, 1]."""
        unit = radius.double().to(x.device).view(-1, 1, 1, 1) / LEVELS
        return (x + (code.to(x.device).double() * unit).to(x.dtype)).clamp(0.0, 1.0)

    def put(self, ids: Sequence[str], code: Tensor, columns: dict[str, Tensor]) -> None:
        """One shard, atomically."""
        file = self.folder / f"{digest_of(sorted(ids))[:24]}.safetensors"
        data = {"delta": code.cpu().contiguous()} | {k: v.detach().cpu().contiguous() for k, v in columns.items()}
        said = {"ids": json.dumps(list(ids)), "key": json.dumps(self.fields), "sha256": checksum(data)}
        write_atomic(file, lambda p: save_file(data, p, metadata=said))
        for i, sample in enumerate(ids):
            self.where[sample] = (file, i)

    def get(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """``delta`` and the columns of the given samples, in their order."""
        found: dict[str, list[Tensor]] = {}
        by_file: dict[Path, list[int]] = {}
        for sample in ids:
            by_file.setdefault(self.where[sample][0], [])
        opened = {file: load_file(file) for file in by_file}
        for sample in ids:
            file, i = self.where[sample]
            for name, value in opened[file].items():
                found.setdefault(name, []).append(value[i])
        return {name: torch.stack(values) for name, values in found.items()}
