"""Flags that say when a robustness figure should not be believed (attacks.md of the design; Carlini et al. 2019, arXiv
1902.06705; Athalye et al. 2018, arXiv 1802.00420). Each is computed from the stored rows, so a table made again from
the store carries them too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ironclip.evaluation.recipes import STORED

FATAL = frozenset({"zero-grad", "bb-beats-wb", "steps-hurt", "budget"})
"""A row with one of these prints ``unreliable`` instead of a number."""


def attack_flags(rows: Sequence[dict[str, Any]], eps: float, norm: str) -> list[str]:
    """Flags of one attack's rows: gradients, convergence, budget, ties, probabilities, random answers, precision."""
    n = len(rows)
    if not n:
        return []
    flags = []
    ran = [r for r in rows if r["attack_backwards"] > 0]
    if (ran and _share(ran, "zero_grad") > 0.01) or (ran and sum(r["zero_pixels"] for r in ran) / len(ran) > 0.5):
        flags.append("zero-grad")
    if ran and sum(r["late_gain"] for r in ran) / len(ran) > 0.01:
        flags.append("not-converged")
    return [*flags, *budget_flags(rows, eps, norm), *answer_flags(rows)]


def budget_flags(rows: Sequence[dict[str, Any]], eps: float, norm: str) -> list[str]:
    """``budget`` if an image left the ball or the pixel box; sums over all pixels are held to float precision."""
    most = eps + 1e-6 if norm == "linf" else eps * (1 + 1e-5) + 1e-6
    return ["budget"] if any(r[norm] > most or r["outside_box"] for r in rows) else []


def answer_flags(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Flags of the classifier's answers, attacked or not."""
    flags = []
    if any(r["tie"] for r in rows):
        flags.append("tie")
    if any(r["stochastic"] for r in rows):
        flags.append("stochastic")
    if rows and all(r["probabilities"] for r in rows):
        flags.append("probabilities")
    tops = [float(t) for r in rows if (t := r.get("clean_top", r.get("top"))) is not None]
    preds = {r.get("clean_pred", r["pred"]) for r in rows}
    if len(rows) > 1 and len(tops) == len(rows) and len(preds) == 1 and max(tops) - min(tops) <= 1e-6:
        flags.append("constant")
    if rows and _share(rows, "dtype_flip") > 0.001:
        flags.append("dtype")
    return flags


def adaptive_flags(rows: Sequence[dict[str, Any]], members: Sequence[dict[str, Any]]) -> list[str]:
    """Flags of a composition.

    ``zero-grad`` only if no white-box member had a usable gradient, ``no-gradient`` if one could not differentiate at
    all, ``not-converged`` if the loss of every one still rose at the end; ``bb-beats-wb`` if transfer or black-box
    members break more than 0.2 points, and more than one image, that no white-box member broke; ``random-beats`` if
    random points do.
    """
    n = len(rows)
    if not n:
        return []
    flags = []
    white = [i for i, m in enumerate(members) if m["white"] and m["view"] not in STORED]
    met = [i for i in white if any(r["ran"][i] for r in rows)]
    if white and len(met) == len(white) and not any(_usable(rows, i) for i in white):
        flags.append("zero-grad")
    if any(r["blocked"][i] for i in white for r in rows if "blocked" in r):
        flags.append("no-gradient")
    if met and "late" in rows[0] and all(_mean(rows, "late", i) > 0.01 for i in met):
        flags.append("not-converged")
    if not any(m["white"] for m in members):  # a query-only attacker: nothing to compare with
        return [*flags, *answer_flags(rows)]
    only_other = [r for r in rows if _broken_only_by(r, members, white=False)]
    if len(only_other) > max(1, 0.002 * n):
        flags.append("bb-beats-wb")
    points = [i for i, m in enumerate(members) if m["name"] == "random"]
    if points and any(r["ran"][points[0]] and r["correct"][points[0]] < r["white_correct"] for r in rows):
        flags.append("random-beats")
    return [*flags, *answer_flags(rows)]


def _mean(rows: Sequence[dict[str, Any]], key: str, i: int) -> float:
    """Mean over the samples on which member ``i`` ran."""
    values = [float(r[key][i]) for r in rows if r["ran"][i]]
    return sum(values) / len(values)


def _usable(rows: Sequence[dict[str, Any]], i: int) -> bool:
    """Had member ``i`` a gradient: entirely zero on at most 1% of the samples, and on at most half of the pixels?"""
    return _mean(rows, "dead", i) <= 0.01 and ("blank" not in rows[0] or _mean(rows, "blank", i) <= 0.5)


def _broken_only_by(row: dict[str, Any], members: Sequence[dict[str, Any]], white: bool) -> bool:
    """Correct on clean pixels and under all members of the other colour, wrong under one of this colour."""
    if row["clean_correct"] < 0.5 or row["white_correct"] < 0.5:
        return False
    return any(row["ran"][i] and row["correct"][i] < 0.5 for i, m in enumerate(members) if m["white"] is white)


def sweep_flags(accuracy_by_eps: dict[float, tuple[float, int]], classes: int) -> list[str]:
    """``eps-sweep`` if accuracy rises with the budget by more than one image, or survives 64/255 above half chance."""
    points = sorted(accuracy_by_eps.items())
    rises = any(
        later[0] > earlier[0] + 1.0 / max(min(later[1], earlier[1]), 1)
        for (_, earlier), (_, later) in itertools.pairwise(points)
    )
    huge = [acc for eps, (acc, _) in points if eps >= 64 / 255 - 1e-9]
    survives = any(acc > 0.5 / classes + 1e-9 for acc in huge)
    return ["eps-sweep"] if rises or survives else []


def _share(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(bool(r[key]) for r in rows) / len(rows)
