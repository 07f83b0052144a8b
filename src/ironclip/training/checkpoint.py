"""Checkpoints that are whole or do not count: written aside, renamed into place, hashed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"
FILES = ("model.safetensors", "optimizer.pt")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on. ``step``: steps done."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def save_checkpoint(folder: Path, point: Checkpoint, keep: int = 2) -> Path:
    """Write ``folder/STEP`` (safetensors weights, optimiser state, hashes) and remove all but the newest ``keep``.

    The name appears when the content is complete: a kill at any moment leaves the earlier checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    save_file({k: v.detach().cpu().contiguous() for k, v in point.weights.items()}, aside / FILES[0])
    torch.save(point.optimizer, aside / FILES[1])
    hashes = {name: _sha256(aside / name) for name in FILES}
    write_json(aside / STATE, {"step": point.step, "sha256": hashes})
    final = folder / f"{point.step:08d}"
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    for old in _stored(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Damaged ones are named in a warning and passed over."""
    for path in reversed(_stored(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            wrong = [name for name in FILES if _sha256(path / name) != state["sha256"][name]]
        except (OSError, ValueError, KeyError) as err:
            wrong = [f"{STATE} ({err})"]
        if wrong:
            warnings.warn(
                f"checkpoint {path.name} is damaged ({', '.join(wrong)}); an earlier one is used", stacklevel=2
            )
            continue
        weights, optimizer = load_file(path / FILES[0]), torch.load(path / FILES[1], weights_only=True)
        return Checkpoint(int(state["step"]), weights, optimizer)
    return None


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _stored(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
