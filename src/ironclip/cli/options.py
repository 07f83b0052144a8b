"""Options that several commands share, named once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Vlm = Annotated[str, typer.Option("--vlm", help="model spec: lite, lite:conse, tiny, hf:NAME, open_clip:NAME")]
Data = Annotated[str, typer.Option("--data", help="data specs, comma separated: photos, shapes, folder:PATH, pets")]
Defenses = Annotated[str, typer.Option("--defenses", help="names or specs, comma separated, or all")]
Attacks = Annotated[str, typer.Option("--attacks", help="attack specs, comma separated: table2-pgd10, PGD(eps=4/255)")]
Threat = Annotated[str, typer.Option("--threat", help="static, graybox, adaptive, blackbox; comma separated")]
Limit = Annotated[int | None, typer.Option("--limit", help="images per data set (nested subsets)")]
Seed = Annotated[int, typer.Option("--seed", help="seed of every random stream")]
State = Annotated[Path | None, typer.Option("--state", help="folder of fitted states")]
Store = Annotated[Path, typer.Option("--store", help="folder of results, reused and resumed")]
Out = Annotated[Path | None, typer.Option("--out", help="folder for the report")]
Executor = Annotated[str, typer.Option("--executor", help="serial, process, ray, ray:auto, ray:HOST:PORT (a cluster)")]
Workers = Annotated[int, typer.Option("--workers", help="processes of --executor process, tasks of ray")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="images at once; results do not depend on it")]
Precision = Annotated[str, typer.Option("--precision", help="of the attack: fp32 or bf16 (re-checked in fp32)")]
Prompts = Annotated[str | None, typer.Option("--prompts", help="prompt set id, or one template with {}")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, progress on standard error")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave unreadable images out and count them")]
Budget = Annotated[str, typer.Option("--budget", help="adaptive budget: smoke, quick, short, standard, full")]
AdaptiveLimit = Annotated[int | None, typer.Option("--adaptive-limit", help="images per data set under adaptive")]
Space = Annotated[str, typer.Option("--space", help="where budgets apply: model-input, native:32, file:256")]
