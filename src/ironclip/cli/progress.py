"""A progress bar with ETA on standard error."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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


class Steps:
    """A bar over the steps of a training run, to be called as ``progress(step, steps, metrics)``."""

    def __init__(self, what: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        clock = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self.bars = Progress(*columns, *clock, console=Console(file=sys.stderr), transient=True)
        self.what, self.held_out = what, ""
        self.task: TaskID | None = None

    def __enter__(self) -> Steps:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """``step`` of ``steps`` is done."""
        if self.task is None:  # steps done by an earlier process say nothing about the speed of this one
            self.task = self.bars.add_task(self.what, total=steps, completed=step - 1)
        shown = {"val_accuracy": "val", "val_clean": "clean", "val_robust": "robust"}
        if any(k in metrics for k in shown):
            self.held_out = "".join(f", {word} {metrics[k]:.1f} %" for k, word in shown.items() if k in metrics)
        loss = f": loss {metrics['loss']:.3f}" if "loss" in metrics else ""
        text = f"{self.what}{loss}{self.held_out}"
        self.bars.update(self.task, completed=step, description=text)
