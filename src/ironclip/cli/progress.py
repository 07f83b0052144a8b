"""A progress bar with ETA on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Shows the cells being worked on, innermost last; a cell's bar leaves when the cell is done."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.stack: list[TaskID] = []
        self.cells = 0

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, text: str, work: float) -> None:
        """A piece of ``work`` begins."""
        self.cells += 1
        self.stack.append(self.bars.add_task(f"cell {self.cells}: {text}", total=max(work, 1e-9)))

    def advance(self, work: float) -> None:
        """Some of it is done."""
        if self.stack:
            self.bars.advance(self.stack[-1], work)

    def done(self) -> None:
        """The newest piece is done."""
        if self.stack:
            task = self.stack.pop()
            self.bars.remove_task(task)
