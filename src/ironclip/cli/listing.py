"""``ironclip list``: what there is, under which names."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ironclip.cli import options as o
from ironclip.core.check import check_choice
from ironclip.core.spec import full_text
from ironclip.registry import ATTACK_PRESETS, ATTACKS, DEFENSES, locate

MODELS = (
    ("lite", "EfficientNet-Lite0 + MiniLM, 224 px; ConSE embedding with a ridge head; embedded (extra lite)"),
    ("lite:conse", "the same without any training of ours"),
    ("tiny", "CLIP architecture, 64 px, trained on shapes; embedded"),
    ("hf:NAME", "CLIP or SigLIP by hub name or local folder, through transformers"),
    ("open_clip:NAME[/TAG]", "open_clip models by name, hub name or local folder (extra open-clip)"),
)
WIDE = 200
KINDS = ("models", "data", "attacks", "defenses", "presets")


def listing(
    kind: Annotated[str, typer.Argument(help="models, data, attacks, defenses or presets")],
    audit: Annotated[bool, typer.Option("--audit", help="data: check class names and prompts for known traps")] = False,
    as_json: o.Json = False,
) -> int:
    """List models, data sets, attacks, defenses or shipped matrices."""
    check_choice(kind, KINDS, "list")
    rows = _audit() if kind == "data" and audit else _ROWS[kind]()
    if as_json:
        print(json.dumps({"rows": rows}))
        return 0
    console = Console(file=sys.stdout)
    shown = list(rows[0]) if rows else ["nothing found"]
    if kind == "defenses" and console.width < WIDE:
        shown = ["name", "title", "paradigm", "fit", "paper"]
    table = Table(show_lines=False)
    for column in shown:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row[c])) for c in shown))
    console.print(table)
    if rows and len(shown) < len(rows[0]):
        console.print("every field and its default: the same command with --json, or a wider terminal")
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _models() -> list[dict[str, Any]]:
    return [{"name": name, "what": what} for name, what in MODELS]


def _data() -> list[dict[str, Any]]:
    from ironclip.data import known_data

    return [dataclasses.asdict(info) for info in known_data()]


def _audit() -> list[dict[str, Any]]:
    from ironclip.data import audit as audit_names

    return [r if isinstance(r, dict) else dataclasses.asdict(r) for r in audit_names()]


def _attacks() -> list[dict[str, Any]]:
    rows = [{"name": name, "spec": full_text(locate(target)())} for name, target in ATTACKS.items()]
    return rows + [
        {"name": preset, "spec": full_text(locate(ATTACKS[base])(preset=inner))}
        for preset, (base, inner) in ATTACK_PRESETS.items()
    ]


def _defenses() -> list[dict[str, Any]]:
    rows = []
    for name, target in DEFENSES.items():
        cls = locate(target)
        info = cls.info
        rows.append(
            {
                "name": name,
                "title": info.title,
                "paradigm": info.paradigm,
                "kind": info.kind,
                "randomized": info.randomized,
                "fit": info.needs_state,
                "spec": full_text(cls()),
                "paper": info.paper,
            }
        )
    return rows


def _presets() -> list[dict[str, Any]]:
    from ironclip.evaluation.matrix import load_matrix, shipped

    return [{"name": name, "title": load_matrix(name).title} for name in shipped()]


_ROWS = {"models": _models, "data": _data, "attacks": _attacks, "defenses": _defenses, "presets": _presets}
