"""Paired verdicts as matrices: who beats whom, and who cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ironclip.report.lines import Block
from ironclip.report.summary import number


@dataclass(frozen=True)
class Cell:
    """Row minus column: ``text`` for the cell, ``kind`` "win", "loss", "tie" or "none", ``detail`` in words."""

    text: str = ""
    kind: str = "none"
    detail: str = ""


@dataclass(frozen=True)
class Matrix:
    """All pairs of one block under one metric; ``names`` head rows and columns, ``cells[i][j]`` is i minus j."""

    vlm: str
    data: str
    eps: str
    metric: str
    names: list[str]
    cells: list[list[Cell]]


def matrices(pairs: Sequence[Mapping[str, Any]], blocks: Sequence[Block]) -> list[Matrix]:
    """One matrix per (model, set, budget, metric), R* first; a second comparison of a pair opens a further matrix."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for p in sorted(pairs, key=lambda p: p.get("metric") != "R*"):
        both = (str(p.get("a")), str(p.get("b")))
        part = 0
        key = tuple(str(p.get(k, "")) for k in ("vlm", "data", "eps", "metric"))
        while both in groups.get((*key, str(part)), {}):
            part += 1
        groups.setdefault((*key, str(part)), {})[both] = p
    return [_matrix(key, found, blocks) for key, found in groups.items()]


def _matrix(
    key: tuple[str, ...], found: Mapping[tuple[str, str], Mapping[str, Any]], blocks: Sequence[Block]
) -> Matrix:
    vlm, data, eps, metric, part = key
    mine = [b for b in blocks if (b.vlm, b.data, b.eps) == (vlm, data, eps)]
    lines = [s for b in mine for s in b.lines]
    ids = [*(i for s in lines for i in (s.spec, s.defense, s.title)), *(n for both in found for n in both)]
    used = {n for both in found for n in both}
    names = [n for n in dict.fromkeys(ids) if n in used]
    titles: dict[str, str] = {}
    for s in lines:
        for i in (s.title, s.spec, s.defense):
            titles.setdefault(i, s.title)
    shown = [titles.get(n, n) for n in names]
    cells = [[_cell(found, a, b, titles) for b in names] for a in names]
    extra = "" if part == "0" else f" ({int(part) + 1})"
    return Matrix(vlm, data, mine[0].budget if mine else eps, metric + extra, shown, cells)


def _cell(found: Mapping[tuple[str, str], Mapping[str, Any]], row: str, column: str, titles: Mapping[str, str]) -> Cell:
    pair, sign = found.get((row, column)), 1.0
    if pair is None:
        pair, sign = found.get((column, row)), -1.0
    if pair is None:
        return Cell()
    diff, lo, hi = (number(pair.get(k)) for k in ("diff", "diff_lo", "diff_hi"))
    verdict = pair.get("verdict")
    won = verdict == ("a" if sign > 0 else "b")
    kind = "tie" if verdict == "tie" else "win" if won else "loss"
    parts = [f"{titles.get(row, row)} minus {titles.get(column, column)}"]
    if diff is not None:
        parts.append(f"{sign * diff:+.1f} points")
    if lo is not None and hi is not None:
        parts.append(f"interval {min(sign * lo, sign * hi):+.1f} to {max(sign * lo, sign * hi):+.1f}")
    if (p := number(pair.get("p_holm"))) is not None:
        parts.append(f"p = {p:.3g} after Holm")
    parts.append("tie" if kind == "tie" else kind)
    text = "tie" if kind == "tie" else "?" if diff is None else f"{sign * diff:+.1f}"
    return Cell(text, kind, ", ".join(parts))
