"""Which defenses of a run can stand on a model, with their fitted states, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ironclip.core.spec import to_text
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._calibrate import Gated
from ironclip.evaluation.block import Entry
from ironclip.evaluation.states import find_state
from ironclip.registry import DEFENSES, build_defense

if TYPE_CHECKING:
    from ironclip.evaluation.job import Job


def applicable(job: Job, clf: ZeroShot, data: str, absent_model: str = "") -> tuple[list[Entry], list[dict[str, Any]]]:
    """The defenses that can be run on this model, and those that cannot, each with its reason: no transformer tower, no
    fitted state, a state of another backbone, a diffusion model or its library not at hand. Raises that reason if the
    job has one defense only. ``absent_model``: the one that ``clf`` stands in for, whose states are others.
    """
    entries: list[Entry] = []
    absent: list[dict[str, Any]] = []
    model, weights = (absent_model, "") if absent_model else (clf.vlm.name, clf.vlm.weights_hash)
    for spec in job.defenses:
        defense = build_defense(spec)
        try:
            entry = Entry(defense, load_state(job, defense, model, weights))
            entry.defense.apply(clf, entry.state)
        except (ValueError, FileNotFoundError, ImportError) as err:
            if len(job.defenses) == 1:
                raise
            info = defense.info
            names = {"defense": info.name, "defense_spec": to_text(defense), "title": info.title}
            reason = " ".join(str(err).split())
            absent.append({"vlm": clf.vlm.name, "data": data, **names, "paradigm": info.paradigm, "reason": reason})
        else:
            entries.append(entry)
    return entries, absent


def load_state(job: Job, spec: Any, model: str, weights: str) -> State | None:
    """The fitted state of a defense from the folder ``--state``, or the package's zoo where none is named: where the
    defense needs one, and where its spec leaves a threshold open that was calibrated there.
    ``weights``: the hash of those of ``model``.

    Raises ValueError naming the file and the command that makes it.
    """
    defense = build_defense(spec)
    name = defense.info.name
    gated = isinstance(defense, Gated)
    if isinstance(defense, Gated) and (job.state is None or not defense.is_open):
        return None
    if not gated and not getattr(defense, "needs_state", defense.info.needs_state):
        return None
    path = find_state(job.state, defense, weights)
    if path is None and not gated:
        where = "the zoo that ships" if job.state is None else f"--state {job.state}"
        raise ValueError(
            f"{name} must be fitted first: no {name}.safetensors for this spec and model in {where}; "
            f"run ironclip fit {to_text(defense)!r} --vlm {model} and pass its folder as --state"
        )
    return None if path is None else load_file(path)


def expand_defenses(names: Iterable[Any]) -> tuple[Any, ...]:
    """``all`` becomes every registered defense; repeated entries count once."""
    out: list[Any] = []
    for name in names:
        out += DEFENSES if name == "all" else [name]
    return tuple(dict.fromkeys(out))
