"""``ironclip store``: look after a folder of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ironclip.cli import options as o
from ironclip.evaluation.store import open_store

store_app = typer.Typer(
    name="store",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Look after a store: what it holds, is it sound, what may go, results of other machines.",
)


@store_app.command(epilog="Example: [bold]ironclip store info --store store[/bold]")
def info(store: o.Store = Path("store"), as_json: o.Json = False) -> int:
    """Say what a store holds: cells, models, data sets, defenses, unfinished and failed cells, bytes."""
    from ironclip.evaluation.verify import info as look

    found = look(open_store(store))
    if as_json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        print(f"{key:<11}{_said(key, value)}")
    return 0


@store_app.command(epilog="Example: [bold]ironclip store verify --store store[/bold]")
def verify(store: o.Store = Path("store"), as_json: o.Json = False) -> int:
    """Read every file to its last byte and check its name, samples and checksums; exit status 3 if one is bad."""
    from ironclip.evaluation.verify import verify as check

    bad = check(open_store(store))
    if as_json:
        rows = [{"path": str(p.path), "what": p.what, "todo": p.todo} for p in bad]
        print(json.dumps({"ok": not bad, "problems": rows}))
    else:
        for problem in bad:
            print(problem)
        print(f"{store}: {f'{len(bad)} problems' if bad else 'sound'}")
    return 3 if bad else 0


@store_app.command(epilog="Example: [bold]ironclip store gc --store store --delete[/bold]")
def gc(
    store: o.Store = Path("store"),
    delete: Annotated[bool, typer.Option("--delete", help="really delete; without it only a list is printed")] = False,
    older: Annotated[float, typer.Option("--older", help="leave what was touched in the last so many hours")] = 24.0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="rows of interrupted cells too")] = False,
    as_json: o.Json = False,
) -> int:
    """List what no cell needs any more: half-written files, merged parts, examples and pictures without a cell."""
    from ironclip.evaluation.garbage import collect, garbage

    waste, notes = garbage(open_store(store), hours=older, with_unfinished=unfinished)
    size = collect(waste) if delete else sum(w.size for w in waste)
    if as_json:
        rows = [{"path": str(w.path), "why": w.why, "bytes": w.size} for w in waste]
        print(json.dumps({"deleted": delete, "bytes": size, "waste": rows, "notes": notes}))
        return 0
    for w in waste:
        print(f"{w.path}: {w.why}, {_bytes(w.size)}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    done = "freed" if delete else "would be freed; write --delete to do it" if waste else "to free"
    print(f"{store}: {_bytes(size)} {done}")
    return 0


@store_app.command(epilog="Example: [bold]ironclip store merge node1/store node2/store --store store[/bold]")
def merge(
    others: Annotated[list[Path], typer.Argument(help="stores to take results from; they are not changed")],
    store: o.Store = Path("store"),
    as_json: o.Json = False,
) -> int:
    """Take cells and examples of other stores into --store; what it has already is kept."""
    from ironclip.evaluation.merge import merge as take

    done = take(store, [open_store(p) for p in others])
    if as_json:
        print(json.dumps(done.numbers()))
        return 0
    print(
        f"{store}: {done.cells} cells new, {done.grown} grown, {done.unfinished} unfinished; {done.rows} rows, "
        f"{done.examples} shards of examples, {done.files} other files"
    )
    if done.differ:
        print(
            f"note: {done.differ} samples were answered differently by the other stores; those of {store} are kept",
            file=sys.stderr,
        )
    return 0


def _said(key: str, value: Any) -> str:
    if isinstance(value, dict):
        show = _bytes if key == "bytes" else str
        return ", ".join(f"{k} {show(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
