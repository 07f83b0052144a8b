"""``ironclip run``: a matrix file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.cli.bench import tabulate
from ironclip.cli.plan import show_plan
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print cells, passes and what is missing, then end")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="with --dry-run: time the model and print hours")] = False,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", help="stop then with status 130; the same command goes on")
    ] = None,
    no_gates: Annotated[
        bool, typer.Option("--no-gates", help="run even where the undefended model misses the matrix's anchors")
    ] = False,
    as_json: o.Json = False,
) -> int:
    """Run every block of a matrix file; a killed run goes on where it stopped.

    With --dry-run nothing is run, written or fetched: the cells, what of them is stored, how many passes of the image
    tower the rest takes, and which models, data sets and fitted states are missing.

    Where the matrix has gates, the undefended model is measured first; if it misses its anchor, nothing else is run
    (status 2).
    """
    folder = None if state is None else str(state)
    loaded = load_matrix(
        matrix,
        gates=not no_gates,
        limit=limit,
        seed=seed,
        state=folder,
        device=device,
        batch_size=batch_size,
    )
    if measure and not dry_run:
        raise ValueError("--measure belongs to --dry-run; write --dry-run --measure")
    if dry_run:
        for gate in dict.fromkeys(g for job in loaded.jobs for g in job.gates):
            print(f"gate: {gate.text}", file=sys.stderr)
        return show_plan(list(loaded.jobs), store, measure, as_json)
    with at_most(max_hours):
        return tabulate(list(loaded.jobs), store, out, executor, workers, as_json, list(loaded.notes))
