"""``ironclip run``: a matrix file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.cli.bench import tabulate
from ironclip.evaluation.matrix import load_matrix


def run(
    matrix: Annotated[str, typer.Argument(help="a TOML file, or the name of a shipped matrix")],
    limit: o.Limit = None,
    seed: Annotated[int | None, typer.Option("--seed", help="replaces the matrix's seed")] = None,
    store: o.Store = Path("store"),
    out: o.Out = None,
    executor: o.Executor = "serial",
    workers: o.Workers = 2,
    as_json: o.Json = False,
) -> int:
    """Run every block of a matrix file; a killed run goes on where it stopped."""
    loaded = load_matrix(matrix, limit=limit, seed=seed)
    return tabulate(list(loaded.jobs), store, out, executor, workers, as_json, list(loaded.notes))
