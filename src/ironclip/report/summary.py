"""One dictionary of results -> blocks of table lines, which the terminal, Markdown, LaTeX, HTML and the charts share.

The dictionary (format 1) has ``rows`` (one per defense, threat model and attack), ``worst`` (R*, the per-sample worst
case), ``pairs``, ``macro``, ``errors``, ``gallery`` and ``notes``; ``ironclip bench --json`` prints
it. Accuracies are percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeAlias

from ironclip.evaluation.stats import harmonic
from ironclip.report.lines import THREATS, Block, Line, Order, Score, ranked
from ironclip.report.means import means as means_over_sets

Results: TypeAlias = Mapping[str, Any]
FORMAT = 1
LISTS = ("rows", "worst", "pairs", "macro", "errors", "not_applicable", "gallery", "notes")


def check(results: Results) -> dict[str, Any]:
    """The dictionary with every list present. Raises ValueError for another format or rows without an identity."""
    if not isinstance(results, Mapping):
        raise ValueError(
            f"results must be the dictionary that `ironclip bench --json` prints, got {type(results).__name__}"
        )
    if results.get("format") != FORMAT:
        raise ValueError(
            f"results must have format {FORMAT}, got {results.get('format')!r}; make them with `ironclip bench --json`"
        )
    full = {**results, **{name: list(results.get(name) or []) for name in LISTS}}
    for name in ("rows", "worst"):
        for i, row in enumerate(full[name]):
            missing = [k for k in ("vlm", "data", "defense") if not row.get(k)]
            if missing:
                raise ValueError(f"{name}[{i}] must name its vlm, data and defense; {', '.join(missing)} missing")
    shown = {(r["vlm"], r["data"]) for r in full["rows"]}
    alone = [a for a in full["not_applicable"] if (a["vlm"], a["data"]) not in shown]
    full["notes"] = list(dict.fromkeys([*full["notes"], *(f"{a['vlm']}, {a['data']}: {_absent(a)}" for a in alone)]))
    return full


def _absent(entry: Mapping[str, Any]) -> str:
    """A defense that cannot be run on a model, and why."""
    return f"{entry['title']} not applicable: {entry['reason']}"


def blocks(results: Results, order: Order = "R*", means: bool = True) -> list[Block]:
    """Blocks in the order of models, then sets, then budgets; first the means over sets where there are several."""
    full = check(results)
    varying = [k for k in ("prompts", "seed", "precision") if len({str(r.get(k)) for r in full["rows"]}) > 1]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in full["rows"]:
        extra = ", ".join(f"{k} {row[k]}" for k in varying if row.get(k) is not None)
        key = (str(row["vlm"]), str(row["data"]), str(row.get("eps") or "-"), str(row.get("norm") or "linf"), extra)
        groups.setdefault(key, []).append(row)
    made = [_block(key, rows, full, order) for key, rows in groups.items()]
    specs: dict[str, set[str]] = {}
    for s in (s for b in made for s in b.lines):
        specs.setdefault(s.title, set()).add(s.spec)
    for b in made:  # several settings of one defense go by their specs
        b.lines[:] = [replace(s, title=s.spec) if len(specs[s.title]) > 1 else s for s in b.lines]
    place = {v: i for i, v in enumerate(dict.fromkeys((b.vlm, b.data) for b in made))}
    made.sort(key=lambda b: (place[b.vlm, b.data], b.norm, eps_value(b.eps), b.extra))
    return [*(means_over_sets(made, full["macro"], order) if means else []), *made]


def eps_value(eps: str) -> float:
    """``4/255`` -> 0.0157; infinity for what is no number."""
    try:
        return float(Fraction(eps))
    except (ValueError, ZeroDivisionError):
        return math.inf


def budget_text(row: Mapping[str, Any]) -> str:
    """``4/255``, with the norm where it is not l_inf; empty without a budget."""
    eps, norm = str(row.get("eps") or ""), str(row.get("norm") or "linf")
    return eps if norm == "linf" or not eps else f"{eps} ({norm})"


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def matches(entry: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Do an entry of ``worst`` (or ``pairs``) and a row speak of the same thing, in all fields that both have?"""
    keys = ("vlm", "data", "defense", "defense_spec", "eps", "norm", "prompts", "seed", "precision")
    shared = [k for k in keys if entry.get(k) is not None and row.get(k) is not None]
    return all(str(entry[k]) == str(row[k]) for k in shared)


def _block(key: tuple[str, ...], rows: Sequence[dict[str, Any]], full: dict[str, Any], order: Order) -> Block:
    vlm, data, eps, norm, extra = key
    by_defense: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_defense.setdefault((str(row["defense"]), str(row.get("defense_spec") or "")), []).append(row)
    lines, worst = [], []
    for mine in by_defense.values():
        found = next((w for w in full["worst"] if matches(w, mine[0])), None)
        lines.append(_line(mine, found))
        worst += [found] if found else []
    pairs = [p for p in full["pairs"] if p.get("metric") == "R*" and matches(p, rows[0])]
    facts = _facts(rows, worst)
    facts += [_absent(a) for a in full["not_applicable"] if (a["vlm"], a["data"]) == (vlm, data)]
    return Block(vlm, data, eps, norm, extra, ranked(lines, pairs, order), facts, (data,))


def _line(rows: Sequence[dict[str, Any]], worst: Mapping[str, Any] | None) -> Line:
    first = rows[0]
    largest = max(rows, key=lambda r: (number(r.get("clean")) is not None, r.get("n") or 0))
    adaptive = [r for r in rows if r.get("threat") == "adaptive"]
    source = (worst or adaptive[0]) if adaptive else None
    clean = row_score(largest, "clean")
    star = row_score(source, "robust") if source else Score()
    flags = [f for r in (*rows, *([worst] if worst and adaptive else [])) for f in r.get("flags") or []]
    return Line(
        defense=str(first["defense"]),
        spec=str(first.get("defense_spec") or first["defense"]),
        title=str(first.get("title") or first["defense"]),
        paradigm=str(first.get("paradigm") or ""),
        clean=clean,
        threats={t: _lowest(r for r in rows if r.get("threat") == t) for t in THREATS},
        adaptive=star,
        harmonic=_harmonic(source, clean, star),
        ms=_first(rows, "ms_per_image"),
        forwards=_first(rows, "forwards"),
        backwards=_first(rows, "backwards"),
        flags=tuple(dict.fromkeys(map(str, flags))),
        fallen=tuple(
            (str(m.get("name", "")), a, int(m.get("ran") or 0))
            for m in (worst or {}).get("members") or []
            if isinstance(m, Mapping) and (a := number(m.get("alone"))) is not None
        ),
    )


def row_score(row: Mapping[str, Any], name: str) -> Score:
    """``clean`` or ``robust`` of a row; a fatal flag takes the robust number away, the clean one stays."""
    if name != "clean" and row.get("unreliable"):
        return Score(unreliable=True)
    return Score(number(row.get(name)), number(row.get(f"{name}_lo")), number(row.get(f"{name}_hi")))


def _lowest(rows: Iterable[Mapping[str, Any]]) -> Score:
    """The lowest believable accuracy among the attacks of one threat model."""
    scores = [row_score(r, "robust") for r in rows]
    valid = [s for s in scores if s.value is not None]
    if valid:
        return min(valid, key=lambda s: s.rank)
    return scores[0] if scores else Score()


def _harmonic(source: Mapping[str, Any] | None, clean: Score, star: Score) -> Score:
    if source is None or star.value is None:
        return Score()
    given, own = number(source.get("harmonic")), number(source.get("clean"))
    base = clean.value if own is None else own
    return Score(given if given is not None else None if base is None else harmonic(base, star.value))


def _facts(rows: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands below the table: images, attacks and budgets of each column."""
    facts = []
    for threat in THREATS:
        mine = [r for r in rows if r.get("threat") == threat]
        attacks = list(dict.fromkeys(str(r["attack"]) for r in mine if r.get("attack")))
        if mine:
            lowest = "lowest of " if len(attacks) > 1 else ""
            facts.append(f"{threat}: n = {_span(mine)}, {lowest}{', '.join(attacks) or 'attack not named'}")
    adaptive = [r for r in rows if r.get("threat") == "adaptive"]
    if adaptive:
        budgets = dict.fromkeys(str(r["budget"]) for r in (*worst, *adaptive) if r.get("budget"))
        facts.append(f"R*: n = {_span(worst or adaptive)}, {'; '.join(budgets) or 'budget not stated'}")
    return facts


def _span(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({int(r["n"]) for r in rows if r.get("n")})
    return "?" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _first(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    return next((v for r in rows if (v := number(r.get(key))) is not None), None)
