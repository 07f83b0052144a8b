"""A leaderboard from a store: a folder of plain pages that open offline, ranked by H over R*.

A *board* holds what may be compared: one model, pixel budget and attack budget, over one set or all of them. H is the
harmonic mean of clean and R*, over several sets the mean of the sets' H. An entry shares the rank of the one that leads
its group where no paired test on any set tells the two apart. Rows with a fatal flag, without an adaptive run or with a
set missing stand below in grey and are not ranked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ironclip.evaluation.results import from_store
from ironclip.evaluation.store import Store
from ironclip.report import charts
from ironclip.report.flags import explain
from ironclip.report.summary import Results, budget_text
from ironclip.report.write import write_text

ALL = "all sets"
SAMPLES = ("sample_id", "label", "clean_pred", "clean_correct", "pred", "correct", "robust", "broken_by", "linf", "l2")


@dataclass(frozen=True)
class Standing:
    """One line of a board, accuracies in percent, None where not run; ``rank`` 0 is unranked, ``why`` says why."""

    title: str
    spec: str
    paradigm: str
    page: str
    clean: float | None
    static: float | None
    graybox: float | None
    robust: float | None
    interval: str
    h: float | None
    n: int
    flags: tuple[str, ...]
    why: str
    rank: int = 0
    tie: bool = False


@dataclass(frozen=True)
class Board:
    """Entries that may be compared, best first."""

    vlm: str
    eps: str
    budget: str
    data: str
    standings: tuple[Standing, ...]


def boards(results: Results) -> list[Board]:
    """Every board of a results dictionary: all sets together first, then each alone. Raises ValueError without R*."""
    if not results["worst"]:
        raise ValueError(
            "no adaptive results, and a leaderboard ranks by nothing else; "
            "run ironclip bench --threat static,adaptive --store STORE"
        )
    keyed: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for w in results["worst"]:
        keyed.setdefault((w["vlm"], budget_text(w), w["budget"], w["precision"], w["seed"]), []).append(w)
    out = []
    for (vlm, eps, budget, precision, seed), found in keyed.items():
        sets = list(dict.fromkeys(str(w["data"]) for w in found))
        said = f"{budget}; attack in {precision}, seed {seed}"
        for scope in ([sets] if len(sets) > 1 else []) + [[s] for s in sets]:
            out.append(Board(vlm, eps, said, scope[0] if len(scope) == 1 else ALL, _lines(results, scope, found)))
    return out


def _lines(results: Results, sets: list[str], found: Sequence[Mapping[str, Any]]) -> tuple[Standing, ...]:
    vlm, eps = found[0]["vlm"], budget_text(found[0])
    worst = [w for w in found if w["data"] in sets]
    rows = [r for r in results["rows"] if r["vlm"] == vlm and r["data"] in sets and budget_text(r) == eps]
    specs = dict.fromkeys([w["defense_spec"] for w in worst] + [r["defense_spec"] for r in rows])
    lines = []
    for spec in specs:
        own, seen = ([x for x in part if x["defense_spec"] == spec] for part in (worst, rows))
        lines.append(_standing(results, sets, own, seen))
    pairs = [p for p in results["pairs"] if p["metric"] == "R*" and p["vlm"] == vlm and p["data"] in sets]
    apart = {frozenset((p["a"], p["b"])) for p in pairs if p["verdict"] != "tie" and p["eps"] == found[0]["eps"]}
    grey = sorted((s for s in lines if s.why), key=lambda s: (s.title, s.spec))
    return (*_ranked([s for s in lines if not s.why], apart), *grey)


def _standing(
    results: Results, sets: list[str], worst: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> Standing:
    first = (worst or rows)[0]
    missing = [s for s in sets if s not in {w["data"] for w in worst}]
    why = "" if not missing else "no adaptive run" if not worst else f"no adaptive run on {', '.join(missing)}"
    if any(w["unreliable"] for w in worst):
        why = "unreliable"
    shown = worst if not why else ()
    return Standing(
        title=first["title"],
        spec=first["defense_spec"],
        paradigm=first["paradigm"],
        page=page_name(first["vlm"], first["defense_spec"]),
        clean=_mean([w["clean"] for w in worst] or [r["clean"] for r in rows]),
        static=_weakest(rows, "static", sets),
        graybox=_weakest(rows, "graybox", sets),
        robust=_mean([w["robust"] for w in shown]),
        interval=_interval(results, shown),
        h=_mean([w["harmonic"] for w in shown]),
        n=sum(w["n"] for w in worst),
        flags=tuple(sorted({f for w in worst for f in w["flags"]})),
        why=why,
    )


def _ranked(lines: list[Standing], apart: set[frozenset[str]]) -> list[Standing]:
    """Best H first. Who cannot be told from the leader of the group above shares its rank."""
    out: list[Standing] = []
    leader: Standing | None = None
    for i, s in enumerate(sorted(lines, key=lambda s: (-(s.h or 0.0), s.title, s.spec)), 1):
        if leader is not None and frozenset((leader.spec, s.spec)) not in apart:
            out.append(replace(s, rank=leader.rank, tie=True))
        else:
            leader = replace(s, rank=i)
            out.append(leader)
    shared = {s.rank for s in out if s.tie}
    return [replace(s, tie=s.rank in shared) for s in out]


def _interval(results: Results, worst: Sequence[Mapping[str, Any]]) -> str:
    """Wilson's on one set, the stratified bootstrap's over several."""
    if not worst:
        return ""
    first, found = worst[0], worst[:1]
    if len(worst) > 1:
        keys = ("vlm", "defense_spec", "eps", "norm")
        found = [m for m in results["macro"] if m["sets"] == len(worst) and all(m[k] == first[k] for k in keys)]
    return f"[{found[0]['robust_lo']:.1f}, {found[0]['robust_hi']:.1f}]" if found else ""


def _weakest(rows: Sequence[Mapping[str, Any]], threat: str, sets: list[str]) -> float | None:
    """The lowest accuracy over the attacks of each set, averaged; None unless every set has one."""
    by = [[r["robust"] for r in rows if r["threat"] == threat and r["data"] == s] for s in sets]
    return _mean([min(b) for b in by]) if all(by) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def page_name(vlm: str, spec: str) -> str:
    """File of an entry: readable, and of its own for every spec."""
    plain = "".join(c if c.isalnum() else "-" for c in f"{vlm}-{spec.partition('(')[0]}")
    return f"{plain}-{hashlib.sha256(f'{vlm} {spec}'.encode()).hexdigest()[:8]}.html"


def command(rows: Sequence[Mapping[str, Any]]) -> str:
    """What measures these rows of one entry again."""
    first = rows[0]
    budgets = dict.fromkeys(str(r["budget"]).partition(":")[0] for r in rows if r["budget"])
    attacks = dict.fromkeys(r["attack"] for r in rows if r["threat"] in ("static", "graybox"))
    words = ["ironclip", "bench", "--vlm", first["vlm"], "--data", ",".join(dict.fromkeys(r["data"] for r in rows))]
    words += ["--defenses", first["defense_spec"], "--threat", ",".join(dict.fromkeys(r["threat"] for r in rows))]
    words += ["--attacks", ",".join(attacks)] if attacks else []
    words += ["--budget", *budgets] if len(budgets) == 1 else []
    adaptive = [r["n"] for r in rows if r["threat"] == "adaptive"]
    words += ["--limit", str(max(r["n"] for r in rows))]
    words += ["--adaptive-limit", str(max(adaptive))] if adaptive else []
    return shlex.join([*words, "--precision", first["precision"], "--seed", str(first["seed"])])


def write_leaderboard(store: Store, out: Path) -> list[Path]:
    """``index.html``, a page for each entry and its per-sample records as CSV; returns the paths, the index first.

    Raises ValueError for a store without adaptive results, ImportError naming the extra.
    """
    try:
        import jinja2
    except ImportError as e:
        raise ImportError(charts.MISSING.format(name="jinja2")) from e
    results = from_store(store)
    found = boards(results)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda v: "-" if v is None else f"{v:.1f}"
    here = files("ironclip.report")
    css = (here / "page.css").read_text(encoding="utf-8")
    template = environment.from_string((here / "leaderboard.html.j2").read_text(encoding="utf-8"))
    pages = {"index.html": template.render(css=css, boards=found, all_sets=ALL, entry=None, version=results["version"])}
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for r in results["rows"]:
        entries.setdefault(page_name(r["vlm"], r["defense_spec"]), []).append(r)
    for page, rows in entries.items():
        said = explain(f for r in rows for f in r["flags"])
        records = [(r, f"samples/{r['digest']}.csv") for r in rows]
        pages[page] = template.render(css=css, entry=rows[0], records=records, said=said, command=command(rows))
        pages |= {name: _samples(store, r["digest"]) for r, name in records}
    return [write_text(out / name, text) for name, text in pages.items()]


def _samples(store: Store, digest: str) -> str:
    rows = sorted(store.rows(digest), key=lambda r: r["sample_id"])
    columns = [c for c in SAMPLES if any(c in r for r in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[r.get(c) for c in columns] for r in rows])
    return text.getvalue()
