"""``ironclip attack``: adversarial images as files, with a record beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.cli.progress import Bar


def attack(
    out: Annotated[Path, typer.Option("--out", help="folder for the images and record.json")],
    vlm: o.Vlm = "lite",
    data: o.Data = "photos",
    attacks: Annotated[str, typer.Option("--attacks", help="one attack spec")] = "PGD(eps=4/255)",
    defenses: Annotated[str, typer.Option("--defenses", help="attack through this defense")] = "none",
    limit: o.Limit = None,
    seed: o.Seed = 0,
    state: o.State = None,
    device: o.Device = "cpu",
    batch_size: o.BatchSize = 16,
    precision: o.Precision = "fp32",
    prompts: o.Prompts = None,
    space: o.Space = "model-input",
    format: Annotated[str, typer.Option("--format", help="png (8-bit, judged again) or float (exact, .npy)")] = "png",
    skip_bad: o.SkipBad = False,
    as_json: o.Json = False,
) -> int:
    """Attack images and write them: PNG on the 8-bit lattice and judged again, or exact floats."""
    from ironclip.evaluation.export import export_attack

    with Bar() as bar:
        record = export_attack(
            vlm,
            data,
            attacks,
            defenses,
            out,
            limit=limit,
            seed=seed,
            state=state,
            device=device,
            batch_size=batch_size,
            precision=precision,
            prompts=prompts,
            space=space,
            form=format,
            skip_bad=skip_bad,
            progress=bar,
        )
    if as_json:
        print(json.dumps(record))
    else:
        s = record["summary"]
        print(
            f"{s['n']} images, {s['clean_correct']} right before, {s['adv_correct']} right after "
            f"{record['attack']} through {record['defense']}; {record['form']} files and record.json in {out}"
        )
    if record["summary"]["lost_by_rounding"]:
        print(
            f"note: {record['summary']['lost_by_rounding']} successes were lost by rounding to 8 bits", file=sys.stderr
        )
    return 0
