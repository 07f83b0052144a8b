"""Data sets that a run names and that are not on this machine: all of them at once, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ironclip.data import hub
from ironclip.data.named import missing, tv_folder
from ironclip.data.survey import SETS, NamedSet

if TYPE_CHECKING:
    from ironclip.evaluation.job import Job


def named_set_of(spec: object) -> NamedSet | None:
    """The named set behind ``pets``, ``tv:pets`` or ``pets:train``, None for other specs."""
    parts = spec.strip().split(":") if isinstance(spec, str) else [""]
    name = parts[1] if parts[0] == "tv" and len(parts) > 1 else parts[0]
    return SETS.get(name)


def missing_sets(jobs: Sequence[Job]) -> list[NamedSet]:
    """Named sets of the jobs that are neither below IRONCLIP_DATA nor in the hub's cache, each once."""
    gone = {}
    for job in jobs:
        for spec in job.data:
            row = named_set_of(spec)
            if row is not None and tv_folder(row, None) is None and (spec.startswith("tv:") or not hub.cached(row)):
                gone[row.name] = row
    return list(gone.values())


def refuse_missing(jobs: Sequence[Job]) -> None:
    """Raises FileNotFoundError with a table of what is missing and the command that gets each."""
    gone = missing_sets(jobs)
    if gone:
        raise FileNotFoundError(missing(gone, None))
