"""``ironclip query``: SQL over a store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ironclip.cli import options as o

EXAMPLES = "\n\n".join(
    (
        "Examples:",
        '[bold]ironclip query "select data, defense, threat, n, clean, robust from cells order by robust desc"[/bold]',
        '[bold]ironclip query "select defense, broken_by, count(*) from rows group by all"[/bold]',
        '[bold]ironclip query --csv "select sample_id, label, pred from rows where outcome < 0.5"[/bold]',
        '[bold]ironclip query "describe rows"[/bold] (the columns; also "describe cells")',
    )
)


def query(
    sql: Annotated[str, typer.Argument(help="one SELECT over the views rows and cells")],
    store: o.Store = Path("store"),
    as_csv: Annotated[bool, typer.Option("--csv", help="comma-separated values on standard output")] = False,
    as_json: o.Json = False,
) -> int:
    """Ask a store with SQL (DuckDB): [bold]rows[/bold] has a line per image and cell, [bold]cells[/bold] one per cell.

    Finished cells only; nothing is written. [bold]outcome[/bold] in rows is the share of draws on which an image stays
    right; [bold]clean[/bold] and [bold]robust[/bold] in cells are percent.
    """
    from ironclip.evaluation.query import query as ask

    if as_csv and as_json:
        raise ValueError("--csv and --json exclude each other; write one of them")
    table = ask(store, sql)
    if as_json:
        print(json.dumps({"columns": table.column_names, "rows": [_plain(r) for r in table.to_pylist()]}, default=str))
    elif as_csv:
        _csv(table)
    else:
        _print(table)
    return 0


def _plain(value: Any) -> Any:
    """NaN and infinity have no JSON: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _csv(table: Any) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow(";".join(map(str, v)) if isinstance(v, list) else v for v in row.values())


def _print(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(show_lines=False)
    for name in table.column_names:
        shown.add_column(name, overflow="fold")
    for row in table.to_pylist():
        shown.add_row(*(Text(_text(v)) for v in row.values()))
    Console(file=sys.stdout).print(shown)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
