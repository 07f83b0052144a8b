"""Means over data sets, every set counting the same, from the lines of the single sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ironclip.evaluation.stats import Estimate, mean_of_intervals
from ironclip.report.lines import THREATS, Block, Line, Order, Score, ranked


def means(made: Sequence[Block], order: Order) -> list[Block]:
    """One block per model and budget with two sets or more: the defenses that were run on all of its sets.

    H is the mean of the sets' H, not the H of the means; intervals by `stats.mean_of_intervals`.
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
        facts = [f"mean of {', '.join(sets)}; H is the mean of the sets' H; intervals of the mean by MOVER"]
        if lines:
            found.append(
                Block(vlm, f"mean of {len(sets)} sets", eps, norm, extra, ranked(lines, [], order), facts, sets)
            )
    return found


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
