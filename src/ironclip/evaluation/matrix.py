"""A matrix file: blocks of one model and some data sets with the defenses, attacks and threats to cross."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ironclip.core.check import unknown
from ironclip.core.spec import split_list
from ironclip.evaluation.entries import expand_defenses
from ironclip.evaluation.gates import gates_from, gates_of
from ironclip.evaluation.job import Job, validate
from ironclip.evaluation.recipes import budget

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

LISTS = ("data", "defenses", "attacks", "threat", "relatives")
FIELDS = tuple(f.name for f in fields(Job) if f.name != "gates")


@dataclass(frozen=True)
class Matrix:
    """``title`` and ``notes`` for people, ``jobs`` for the machine; file, block and field names as written."""

    name: str
    title: str
    notes: tuple[str, ...]
    jobs: tuple[Job, ...]


def shipped() -> list[str]:
    """Names of the matrices that come with the package."""
    folder = resources.files("ironclip") / "configs"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def load_matrix(where: str | Path, *, gates: bool = True, **changes: Any) -> Matrix:
    """A matrix from a file, or a shipped one by name; ``changes`` override fields of every block.

    A ``[[gate]]`` (``evaluation/gates.py``) goes with every block of its model and data set, unless ``gates`` is off or
    prompts or space are changed, for which its anchor was not measured.
    Raises ValueError for an unknown name or field, an empty list, or a spec that does not stand, naming the block.
    """
    path = Path(where)
    if path.suffix == ".toml":
        if not path.exists():
            raise ValueError(f"no matrix file {path}; shipped matrices: {', '.join(shipped())}")
        text, name = path.read_text(), path.stem
    else:
        if str(where) not in shipped():
            raise ValueError(unknown("preset", str(where), shipped()))
        text = (resources.files("ironclip") / "configs" / f"{where}.toml").read_text()
        name = str(where)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ValueError(f"{where} is not valid TOML: {err}") from err
    blocks, anchors = raw.pop("block", []), gates_from(name, raw.pop("gate", ()), raw.get("vlm"))
    title, notes = str(raw.pop("title", name)), tuple(raw.pop("notes", ()))
    if not blocks:
        raise ValueError(f"{where} has no [[block]]; write one with vlm, data, defenses, attacks and threat")
    jobs = tuple(job_from(f"{name} block {i + 1}", {**raw, **block}, changes) for i, block in enumerate(blocks))
    for i, anchor in enumerate(anchors):
        if changes.get("vlm") is None and changes.get("data") is None and not any(gates_of((anchor,), j) for j in jobs):
            sets = ", ".join(dict.fromkeys(f"{j.vlm} on {d}" for j in jobs for d in j.data))
            raise ValueError(f"{name} gate {i + 1}: no block has {anchor.vlm} on {anchor.data}; blocks have: {sets}")
    if gates and changes.get("prompts") is None and changes.get("space") is None:
        jobs = tuple(replace(job, gates=gates_of(anchors, job)) for job in jobs)
    elif anchors and not gates:
        notes += ("gates were off: the undefended model was not held against its anchors",)
    return Matrix(name, title, notes, jobs)


def job_from(label: str, values: dict[str, Any], changes: dict[str, Any] | None = None) -> Job:
    """A checked job from fields as text or lists; ``label`` opens its error messages. Raises ValueError."""
    for key in values:
        if key not in FIELDS:
            raise ValueError(f"{label}: {unknown('field', key, FIELDS)}")
    merged = {**values, **{k: v for k, v in (changes or {}).items() if v is not None}}
    for key in LISTS:
        if key in merged:
            value = merged[key]
            items = split_list(value) if isinstance(value, str) else list(value)
            merged[key] = tuple(expand_defenses(items) if key == "defenses" else items)
    merged["budget"] = budget(merged.get("budget", "standard"))
    job = Job(**merged)
    try:
        validate(job)
    except ValueError as err:
        raise ValueError(f"{label}: {err}") from err
    return job
