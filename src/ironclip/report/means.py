"""Means over data sets, every set counting the same, from the lines of the single sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ironclip.evaluation.stats import Estimate, mean_of_intervals
from ironclip.report.lines import THREATS, Block, Line, Order, Score, ranked


def means(made: Sequence[Block], macro: Sequence[Mapping[str, Any]], order: Order) -> list[Block]:
    """One block per model and budget with two sets or more: the defenses that were run on all of its sets.

    H is the mean of the sets' H, not the H of the means. The interval of R* is the stratified bootstrap of ``macro``
    where that has it; the others come from the sets' own intervals (`stats.mean_of_intervals`).
    """
    groups: dict[tuple[str, str, str, str], list[Block]] = {}
    for b in made:
        groups.setdefault((b.vlm, b.eps, b.norm, b.extra), []).append(b)
    found = []
    for (vlm, eps, norm, extra), parts in groups.items():
        if len(parts) < 2:
            continue
        per = [{(s.defense, s.spec): s for s in b.lines} for b in parts]
        lines = [_mean_line([p[k] for p in per]) for k in per[0] if all(k in p for p in per)]
        sets = tuple(b.data for b in parts)
        known = [m for m in macro if (m.get("vlm"), m.get("eps"), m.get("norm", norm)) == (vlm, eps, norm)]
        lines = [replace(s, adaptive=_bootstrapped(s, known)) for s in lines]
        facts = _facts(parts)
        facts[:0] = [f"mean of {', '.join(sets)}, each counting the same; H is the mean of the sets' H"]
        if lines:
            found.append(
                Block(vlm, f"mean of {len(sets)} sets", eps, norm, extra, ranked(lines, [], order), facts, sets)
            )
    return found


def _facts(parts: Sequence[Block]) -> list[str]:
    """What holds for all sets once, the rest with the set's name."""
    shared = [f for f in parts[0].facts if all(f in b.facts for b in parts)]
    return shared + [f"{b.data}: {f}" for b in parts for f in b.facts if f not in shared]


def _mean_line(lines: Sequence[Line]) -> Line:
    return replace(
        lines[0],
        clean=_mean([s.clean for s in lines]),
        threats={t: _mean([s.threats[t] for s in lines]) for t in THREATS},
        adaptive=_mean([s.adaptive for s in lines]),
        harmonic=_mean([s.harmonic for s in lines]),
        ms=_average([s.ms for s in lines]),
        forwards=_average([s.forwards for s in lines]),
        backwards=_average([s.backwards for s in lines]),
        flags=tuple(dict.fromkeys(f for s in lines for f in s.flags)),
        fallen=(),
        best=False,
        tie=False,
    )


def _bootstrapped(line: Line, macro: Sequence[Mapping[str, Any]]) -> Score:
    """R* with the bootstrap interval of the entry that speaks of the same mean, if there is one."""
    for m in macro:
        value = line.adaptive.value
        if m.get("defense_spec") == line.spec and value is not None and abs(float(m["robust"]) - value) < 1e-6:
            return Score(value, m.get("robust_lo"), m.get("robust_hi"))
    return line.adaptive


def _mean(scores: Sequence[Score]) -> Score:
    if any(s.unreliable for s in scores):
        return Score(unreliable=True)
    value = _average([s.value for s in scores])
    known = [Estimate(s.value, s.lo, s.hi) for s in scores if None not in (s.value, s.lo, s.hi)]  # type: ignore[arg-type]
    if value is None or len(known) < len(scores):
        return Score(value)
    mean = mean_of_intervals(known)
    return Score(mean.value, mean.lo, mean.hi)


def _average(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
