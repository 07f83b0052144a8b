"""``ironclip bench``: the table, from options or from a shipped matrix."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ironclip.cli import options as o
from ironclip.cli.progress import Bar
from ironclip.evaluation.job import Job
from ironclip.evaluation.matrix import job_from, load_matrix
from ironclip.evaluation.results import exit_status
from ironclip.evaluation.run import evaluate_jobs

DEFAULTS: dict[str, Any] = {
    "vlm": "lite",
    "data": "photos",
    "defenses": "none,noise,ttc,clipure",
    "attacks": "table2-pgd10",
    "threat": "static,adaptive",
}


def bench(
    vlm: o.Vlm = "",
    data: o.Data = "",
    defenses: o.Defenses = "",
    attacks: o.Attacks = "",
    threat: o.Threat = "",
    limit: o.Limit = None,
    adaptive_limit: o.AdaptiveLimit = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed of every random stream [default: 0]")] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="smoke, quick, short, standard, full [default: standard]")
    ] = "",
    preset: Annotated[
        str, typer.Option("--preset", help="a shipped matrix; the default without --vlm and --data")
    ] = "",
    state: o.State = None,
    store: o.Store = Path("store"),
    out: o.Out = None,
    executor: o.Executor = "serial",
    workers: o.Workers = 2,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps [default: cpu]")] = "",
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="images at once [default: 16]")] = None,
    precision: Annotated[str, typer.Option("--precision", help="of the attack: fp32 or bf16 [default: fp32]")] = "",
    prompts: o.Prompts = None,
    space: Annotated[
        str,
        typer.Option("--space", help="of budgets: model-input, native:32, file:256 [default: model-input]"),
    ] = "",
    skip_bad: o.SkipBad = False,
    as_json: o.Json = False,
) -> int:
    """Measure defenses: clean, static, graybox and adaptive accuracy with intervals, cost and flags."""
    changes: dict[str, Any] = {
        "vlm": vlm or None,
        "data": data or None,
        "defenses": defenses or None,
        "attacks": attacks or None,
        "threat": threat or None,
        "limit": limit,
        "adaptive_limit": adaptive_limit,
        "seed": seed,
        "budget": budget or None,
        "state": None if state is None else str(state),
        "device": device or None,
        "batch_size": batch_size,
        "precision": precision or None,
        "prompts": prompts,
        "space": space or None,
        "skip_bad": True if skip_bad else None,
    }
    if preset or not (vlm or data):
        matrix = load_matrix(preset or "quick", **changes)
        return tabulate(list(matrix.jobs), store, out, executor, workers, as_json, list(matrix.notes))
    values = {**DEFAULTS, **{k: v for k, v in changes.items() if v is not None}}
    return tabulate([job_from("bench", values)], store, out, executor, workers, as_json, [])


def tabulate(
    jobs: list[Job], store: Path, out: Path | None, executor: str, workers: int, as_json: bool, notes: list[str]
) -> int:
    """Run the jobs, print the table or the JSON object, write the report; returns the exit status."""
    command = shlex.join(["ironclip", *sys.argv[1:]])
    with Bar() as bar:
        results = evaluate_jobs(jobs, store, executor=executor, workers=workers, progress=bar, command=command)
    results["notes"] = [*notes, *results["notes"]]
    if as_json:
        print(json.dumps(results))
    else:
        from rich.console import Console

        from ironclip.report.tables import terminal

        console = Console()
        for part in terminal(results):
            console.print(part)
    if out is not None:
        from ironclip.report import write_all

        paths = write_all(results, out)
        print(f"report: {paths[0]}", file=sys.stderr)
    for error in results["errors"]:
        print(f"failed: {error['data']} {error['defense']} {error['threat']}: {error['error']}", file=sys.stderr)
    return exit_status(results)
