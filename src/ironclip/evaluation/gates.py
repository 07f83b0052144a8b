"""Gates: what the undefended model must look like before any defense is measured on it.

A gate holds an anchor, measured or published before: clean accuracy and accuracy on the attacked images. A run that is
elsewhere has a set-up fault far more often than a discovery, so it stops before the first defense and names the likely
causes. The static cell that a gate needs is one that the table needs too: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ironclip.core.check import unknown
from ironclip.evaluation.job import Job
from ironclip.evaluation.stats import wilson
from ironclip.registry import build_attack

CLEAN, ROBUST = 1.0, 2.0
"""Points by which a figure may miss its anchor whatever its interval says."""


class GateError(ValueError):
    """The undefended model is not where its anchor says."""


@dataclass(frozen=True)
class Gate:
    """Anchor of ``vlm`` on ``data``, in percent: ``clean``, and ``robust`` on images attacked by ``attack``.

    ``robust`` counts as published tables do, clean or not. ``source``: where the figures come from.
    """

    vlm: str
    data: str
    clean: float
    source: str
    attack: str = "table2-pgd10"
    robust: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("clean", self.clean), ("robust", self.robust)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 100):
                raise ValueError(f"gate for {self.data}: {name} must be in percent, 0 to 100, got {value!r}")
        if not self.source:
            raise ValueError(f"gate for {self.data}: source is empty; write where its figures come from")
        if not hasattr(build_attack(self.attack), "eps"):
            raise ValueError(f"gate for {self.data}: attack {self.attack!r} has no eps; write one inside a ball")

    @property
    def text(self) -> str:
        """The anchor in one line."""
        robust = "" if self.robust is None else f", {self.robust:g} under {self.attack}"
        return f"{self.vlm} on {self.data}: clean {self.clean:g}{robust} ({self.source})"


def gates_from(name: str, tables: Sequence[Mapping[str, Any]], vlm: Any) -> tuple[Gate, ...]:
    """Gates of a matrix file; those that name no model are for ``vlm``. Raises ValueError naming the gate."""
    known = tuple(f.name for f in fields(Gate))
    if isinstance(tables, Mapping):
        raise ValueError(f"{name}: gates are a list of tables, got one table; write [[gate]] in double brackets")
    made = []
    for i, table in enumerate(tables):
        label = f"{name} gate {i + 1}"
        for key in table:
            if key not in known:
                raise ValueError(f"{label}: {unknown('field', key, known)}")
        values = {"vlm": vlm, **table}
        missing = [k for k in ("vlm", "data", "clean", "source") if not values.get(k) and values.get(k) != 0]
        if missing:
            raise ValueError(f"{label}: {', '.join(missing)} missing; a gate has {', '.join(known)}")
        made.append(Gate(**values))
    return tuple(made)


def gates_of(gates: Sequence[Gate], job: Job) -> tuple[Gate, ...]:
    """Those for the model and the data sets of a job."""
    return tuple(g for g in gates if g.vlm == job.vlm and g.data in job.data)


def pass_gates(job: Job, execute: Callable[[Job], Mapping[str, Any]]) -> None:
    """Measure the undefended model behind every gate of a job. Raises GateError for the first one that fails."""
    for gate in job.gates:
        alone = replace(
            job,
            data=(gate.data,),
            defenses=("none",),
            attacks=(gate.attack,),
            threat=("static",),
            costs=False,
            gates=(),
        )
        results = execute(alone)
        for error in results["errors"]:
            raise GateError(
                f"the undefended {gate.vlm} on {gate.data} could not be measured for its gate: {error['error']}. "
                "No defense was run; run the same command again, or write ironclip run MATRIX --no-gates"
            )
        for row in results["rows"]:
            problem = misses(gate, row["clean"], row["adv_accuracy"], row["n"])
            if problem:
                raise GateError(problem)


def misses(gate: Gate, clean: float, robust: float, n: int) -> str:
    """What is wrong, or an empty text. ``clean`` and ``robust`` of n images, in percent.

    A figure passes within 1 point (clean) or 2 points (robust) of its anchor, or where its 95 % Wilson interval holds
    the anchor: a small ``--limit`` does not trip a gate.
    """
    off = [
        f"{name} {ours:.1f} [{lo:.1f}, {hi:.1f}], anchor {anchor:g}"
        for name, ours, anchor, within in (("clean", clean, gate.clean, CLEAN), ("robust", robust, gate.robust, ROBUST))
        if anchor is not None
        for lo, hi in [_interval(ours, n)]
        if abs(ours - anchor) > within and not lo <= anchor <= hi
    ]
    if not off:
        return ""
    likely = _causes(gate, clean, robust, off[0].startswith("clean"))
    return (
        f"the undefended {gate.vlm} on {gate.data} is not where it should be (n = {n}): {'; '.join(off)} "
        f"({gate.source}). Likely: {likely}. No defense was run; if the anchor does not hold for "
        "your set-up, write ironclip run MATRIX --no-gates"
    )


def _causes(gate: Gate, clean: float, robust: float, clean_off: bool) -> str:
    if clean_off and clean < gate.clean / 2:
        return "labels in another order than the class names, or another prompt set"
    if clean_off:
        return "plain GELU where the weights need QuickGELU, another resize or crop, another prompt set or split"
    if gate.robust is not None and robust > gate.robust:
        return "an attack that is too weak: budget in another space, fewer steps, or gradients cut off on the way"
    return "an attack that is stronger than the anchor's: best iterate instead of the last one, or more steps"


def _interval(percent: float, n: int) -> tuple[float, float]:
    lo, hi = wilson(min(n, max(0.0, percent * n / 100)), n)
    return 100 * lo, 100 * hi
