"""``ironclip report``: tables and pages again from a store, without a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.evaluation.results import from_store
from ironclip.evaluation.store import Store


def report(
    store: o.Store = Path("store"),
    out: o.Out = None,
    results: Annotated[Path | None, typer.Option("--results", help="a results.json instead of a store")] = None,
    as_json: o.Json = False,
) -> int:
    """Print the table of a store, or write HTML, Markdown, LaTeX, CSV and JSON into --out."""
    if results is not None:
        found = json.loads(results.read_text())
    else:
        if not (store / "store.json").exists():
            raise ValueError(f"{store} is no store; pass --store FOLDER, or --results results.json")
        found = from_store(Store(store))
    if not found["rows"]:
        raise ValueError(f"no finished cells in {results or store}; run ironclip bench --store {store} first")
    if as_json:
        print(json.dumps(found))
    if out is not None:
        from ironclip.report import write_all

        for path in write_all(found, out):
            print(path, file=sys.stderr)
    elif not as_json:
        from rich.console import Console

        from ironclip.report.tables import terminal

        for part in terminal(found):
            Console().print(part)
    return 0
