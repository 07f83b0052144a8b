"""``ironclip leaderboard``: a folder of pages from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ironclip.cli import options as o
from ironclip.evaluation.store import Store


def leaderboard(
    store: o.Store = Path("store"),
    out: Annotated[Path, typer.Option("--out", help="folder of the pages")] = Path("leaderboard"),
) -> int:
    """Write a leaderboard that opens offline: ranks by H over R*, a page and per-sample records for each entry."""
    from ironclip.report.leaderboard import write_leaderboard

    if not (store / "store.json").exists():
        raise ValueError(f"{store} is no store; pass --store FOLDER, filled by ironclip bench or run")
    print(write_leaderboard(Store(store), out)[0])
    return 0
