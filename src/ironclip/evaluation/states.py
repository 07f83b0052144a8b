"""Where fitted states lie: a folder that the user names, or the zoo that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ironclip.core.spec import full_text
from ironclip.core.types import Defense


def find_state(folder: str | Path | None, defense: Defense, weights: str) -> Path | None:
    """The state of a defense: ``FOLDER/NAME.safetensors``, or in a folder below it one whose manifest ``NAME.json`` has
    the same recipe and model.

    ``weights``: hash of the model's weights. Without a folder the package's zoo is searched. None if there is none.
    """
    base = Path(str(resources.files("ironclip") / "zoo")) if folder is None else Path(folder)
    name = defense.info.name
    own = base / f"{name}.safetensors"
    if own.exists():
        return own
    for record in sorted(base.glob(f"*/{name}.json")) + sorted(base.glob(f"*/*/{name}.json")):
        made = read_manifest(record)
        same = made.get("recipe") == full_text(defense) and made.get("weights") == weights
        if same and record.with_suffix(".safetensors").exists():
            return record.with_suffix(".safetensors")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as a dictionary. Raises ValueError where the file is none."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ValueError(f"{path} is not a manifest of a fitted state ({err}); fit it again or remove it") from err
    if not isinstance(made, dict):
        raise ValueError(f"{path} is not a manifest of a fitted state: expected an object, got {type(made).__name__}")
    return made
