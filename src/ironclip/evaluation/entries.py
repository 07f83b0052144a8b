"""Which defenses of a run can stand on a model, with their fitted states, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ironclip.core.spec import to_text
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import Gated
from ironclip.evaluation.block import Entry
from ironclip.registry import DEFENSES, build_defense

if TYPE_CHECKING:
    from ironclip.evaluation.run import Job


def applicable(job: Job, clf: ZeroShot, data: str) -> tuple[list[Entry], list[dict[str, Any]]]:
    """The defenses that can be run on this model, and those that cannot, each with its reason: no transformer tower, no
    fitted state, a state of another backbone. Raises that reason as ValueError if the job has one defense only.
    """
    entries: list[Entry] = []
    absent: list[dict[str, Any]] = []
    for spec in job.defenses:
        defense = build_defense(spec)
        try:
            entry = Entry(defense, load_state(job, defense))
            entry.defense.apply(clf, entry.state)
        except ValueError as err:
            if len(job.defenses) == 1:
                raise
            info = defense.info
            names = {"defense": info.name, "defense_spec": to_text(defense), "title": info.title}
            reason = " ".join(str(err).split())
            absent.append({"vlm": clf.vlm.name, "data": data, **names, "paradigm": info.paradigm, "reason": reason})
        else:
            entries.append(entry)
    return entries, absent


def load_state(job: Job, spec: Any) -> State | None:
    """The fitted state of a defense from the folder ``--state``: where the defense needs one, and where its spec leaves
    a threshold open that was calibrated there.

    Raises ValueError naming the file and the command that makes it.
    """
    defense = build_defense(spec)
    name = defense.info.name
    path = Path(job.state or "") / f"{name}.safetensors"
    there = job.state is not None and path.exists()
    if isinstance(defense, Gated):
        return load_file(path) if there and defense.is_open else None
    if not getattr(defense, "needs_state", defense.info.needs_state):
        return None
    if not there:
        raise ValueError(
            f"{name} must be fitted first: no {path.name} in --state {job.state}; run ironclip fit {name!r}"
        )
    return load_file(path)


def expand_defenses(names: Iterable[Any]) -> tuple[Any, ...]:
    """``all`` becomes every registered defense; repeated entries count once."""
    out: list[Any] = []
    for name in names:
        out += DEFENSES if name == "all" else [name]
    return tuple(dict.fromkeys(out))
