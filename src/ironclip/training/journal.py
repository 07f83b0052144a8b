"""The folder of a run: its settings, its metrics, the checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ironclip.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_json, write_text
from ironclip.training.config import differences

CHECKPOINTS, METRICS, RUN = "checkpoints", "metrics.jsonl", "run.json"


class Journal:
    """A run's folder. ``recent``: the newest value of every metric.

    ``Journal(folder, settings, resume)`` starts a run or takes one up; ``resume=False`` throws an old one away. Raises
    ValueError where the folder holds a run with other settings: what differs is listed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.folder, self.recent = folder, dict[str, Any]()
        settings = json.loads(json.dumps(settings))
        if not resume:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for name in (METRICS, RUN):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / RUN
        if not record.exists():
            write_json(record, settings)
            return
        told = differences(json.loads(record.read_text(encoding="utf-8")), settings)
        if told:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(told)}. Give them again, name another "
                "--out, or start over with --no-resume"
            )

    def begin(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None; metrics of steps that will be made again are forgotten."""
        point = load_checkpoint(self.folder / CHECKPOINTS)
        self._rewind(-1 if point is None else point.step)
        return point

    def _rewind(self, done: int) -> None:
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a kill cut short
                break
            if entry["step"] <= done:
                kept.append(line)
                self.recent.update(entry)
        write_text(path, "".join(f"{line}\n" for line in kept))

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        self.recent.update(metrics)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self, point: Checkpoint) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.folder / CHECKPOINTS, point)
