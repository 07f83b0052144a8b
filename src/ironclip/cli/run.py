"""``ironclip run``: a matrix file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.cli.bench import tabulate
from ironclip.cli.stopping import at_most
from ironclip.evaluation.matrix import load_matrix


def run(
    matrix: Annotated[str, typer.Argument(help="a TOML file, or the name of a shipped matrix")],
    limit: o.Limit = None,
    seed: Annotated[int | None, typer.Option("--seed", help="replaces the matrix's seed")] = None,
    state: o.State = None,
    device: Annotated[str | None, typer.Option("--device", help="replaces the matrix's device")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="replaces the matrix's")] = None,
    store: o.Store = Path("store"),
    out: o.Out = None,
    executor: o.Executor = "serial",
    workers: o.Workers = 2,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", help="stop then with status 130; the same command goes on")
    ] = None,
    as_json: o.Json = False,
) -> int:
    """Run every block of a matrix file; a killed run goes on where it stopped."""
    folder = None if state is None else str(state)
    loaded = load_matrix(matrix, limit=limit, seed=seed, state=folder, device=device, batch_size=batch_size)
    with at_most(max_hours):
        return tabulate(list(loaded.jobs), store, out, executor, workers, as_json, list(loaded.notes))
