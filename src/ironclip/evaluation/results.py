"""From stored rows to the table: one dictionary, printed by ``--json``, read by every report."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from ironclip.evaluation.checks import check_flags
from ironclip.evaluation.probes import probe_flags
from ironclip.evaluation.stats import harmonic, macro_mean, pairwise, wilson
from ironclip.evaluation.store import Store
from ironclip.evaluation.suspicion import FATAL, adaptive_flags, attack_flags, budget_flags

FORMAT = 1
NO_COST: dict[str, Any] = {"ms_per_image": None, "ms_batch": None, "memory_mb": None}


def cell_row(store: Store, digest: str, ids: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """One table row of a finished cell and its per-sample outcomes {sample id: share of draws that stay right}.

    ``ids`` restricts to a subset. ``robust`` counts samples that are wrong on clean pixels as wrong; ``adv_accuracy``
    does not, which is what published static tables print.
    """
    foot = store.footer(digest)
    rows = store.rows(digest)
    if ids is not None:
        wanted = set(ids)
        rows = [r for r in rows if r["sample_id"] in wanted]
    rows.sort(key=lambda r: r["sample_id"])
    n = len(rows)
    eps = Fraction(foot["eps"])
    adaptive = foot["threat"] in ("adaptive", "blackbox")
    outcome = {r["sample_id"]: r["robust"] if adaptive else min(r["clean_correct"], r["correct"]) for r in rows}
    clean = sum(r["clean_correct"] for r in rows)
    robust = sum(outcome.values())
    flags: list[str] = []
    members: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    if adaptive:
        members = _members(rows, foot["members"], foot.get("plans", []))
        flags = adaptive_flags(rows, foot["members"])
        flags += budget_flags(rows, float(eps), foot["norm"])
        found = store.get_json("probes", digest) or {}
        flags += probe_flags(found, robust / n, n, clean / n, eps, foot["k"])
    else:
        flags = attack_flags(rows, float(eps), foot["norm"])
    tally = foot.get("tally", {})
    flags += check_flags(foot.get("checks", {}), tally)
    spent = max(tally.get("n", 0), 1)
    clean_lo, clean_hi = wilson(clean, n)
    lo, hi = wilson(robust, n)
    row = {
        **{k: foot[k] for k in ("vlm", "data", "defense", "defense_spec", "title", "paradigm", "threat", "attack")},
        "eps": foot["eps"],
        "norm": foot["norm"],
        "n": n,
        "clean": 100 * clean / n,
        "robust": 100 * robust / n,
        "clean_lo": 100 * clean_lo,
        "clean_hi": 100 * clean_hi,
        "robust_lo": 100 * lo,
        "robust_hi": 100 * hi,
        "adv_accuracy": None if adaptive else 100 * sum(r["correct"] for r in rows) / n,
        "worst_draw": 100 * sum(bool(r["worst"]) and r["clean_correct"] > 0 for r in rows) / n,
        "mean_per_class": _per_class(rows, outcome),
        "flags": sorted(set(flags)),
        "unreliable": bool(FATAL & set(flags)),
        "forwards": None if adaptive else round(tally.get("forwards", 0) / spent, 3),
        "backwards": None if adaptive else round(tally.get("backwards", 0) / spent, 3),
        "attack_forwards": sum(r["attack_forwards"] for r in rows) / n,
        "attack_backwards": sum(r["attack_backwards"] for r in rows) / n,
        "ties": sum(bool(r["tie"]) for r in rows),
        "members": members,
        "budget": foot["budget"] if adaptive else "",
        "draws": foot["draws"],
        "probes": found,
        "checks": foot.get("checks", {}),
        **{k: foot[k] for k in ("prompts", "seed", "precision", "recipe", "state")},
        "digest": digest,
    }
    return row, {"outcome": outcome, "clean": {r["sample_id"]: r["clean_correct"] for r in rows}, "foot": foot}


def assemble(
    store: Store,
    digests: Iterable[str],
    *,
    ids: dict[str, list[str]] | None = None,
    costs: dict[str, dict[str, Any]] | None = None,
    command: str = "",
    gallery: Iterable[dict[str, Any]] = (),
    errors: Iterable[dict[str, Any]] = (),
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """The results dictionary of some cells: rows, worst cases, paired tests, macro means, pictures, failures.

    ``ids``: cell digest -> the samples that this table is about (all stored ones by default).
    """
    from ironclip import __version__

    rows, details = [], []
    for digest in digests:
        if store.footer(digest).get("threat") in (None, "clean"):
            continue
        row, detail = cell_row(store, digest, (ids or {}).get(digest))
        row.update((costs or {}).get(digest, NO_COST))
        rows.append(row)
        details.append(detail)
    said = [*notes, *(note for d in details for note in d["foot"].get("notes", []))]
    worst, outcomes = _worst(rows, details)
    _passes(rows)
    return {
        "format": FORMAT,
        "command": command,
        "version": __version__,
        "notes": list(dict.fromkeys(said)),
        "rows": rows,
        "worst": worst,
        "pairs": _pairs(worst, outcomes) + _static_pairs(rows, details),
        "macro": _macro(worst, outcomes),
        "errors": list(errors),
        "not_applicable": [],
        "gallery": list(gallery),
    }


def _members(
    rows: list[dict[str, Any]], members: list[dict[str, Any]], plans: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    out, known = [], {p["name"]: p for p in plans}
    for i, m in enumerate(members):
        ran = [r for r in rows if r["ran"][i]]
        broke = sum(1 for r in rows if r["broken_by"] == m["name"])
        alone = 100 * sum(min(r["correct"][i], r["clean_correct"]) for r in ran) / len(ran) if ran else None
        blocked = any(r["blocked"][i] for r in ran if "blocked" in r)
        facts = {k: known.get(m["name"], {}).get(k) for k in ("attack", "draws", "cosine")}
        out.append(
            {
                **{k: m[k] for k in ("name", "view", "white")},
                "alone": alone,
                "ran": len(ran),
                "broke": broke,
                "no_gradient": blocked,
                **facts,
            }
        )
    return out


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("vlm", "data", "defense_spec", "state", "eps", "norm", "seed", "prompts"))


def _worst(
    rows: list[dict[str, Any]], details: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[tuple[Any, ...], dict[str, float]]]:
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[_group(row)].append(i)
    worst, outcomes = [], {}
    for key, members in groups.items():
        adaptive = [i for i in members if rows[i]["threat"] == "adaptive"]
        if not adaptive:
            continue
        ids = set.intersection(*(set(details[i]["outcome"]) for i in members))
        value = {s: min(details[i]["outcome"][s] for i in members) for s in sorted(ids)}
        clean = {s: details[adaptive[0]]["clean"][s] for s in value}
        n = len(value)
        lo, hi = wilson(sum(value.values()), n)
        first = rows[adaptive[0]]
        flags = sorted({f for i in adaptive for f in rows[i]["flags"]})
        c, r = 100 * sum(clean.values()) / n, 100 * sum(value.values()) / n
        worst.append(
            {
                **{k: first[k] for k in ("vlm", "data", "defense", "defense_spec", "title", "paradigm", "eps", "norm")},
                "n": n,
                "clean": c,
                "robust": r,
                "robust_lo": 100 * lo,
                "robust_hi": 100 * hi,
                "harmonic": harmonic(c, r),
                "members": [m for i in adaptive for m in rows[i]["members"]],
                "attacks": [f"{rows[i]['threat']}:{rows[i]['attack'] or 'composition'}" for i in members],
                "flags": flags,
                "unreliable": any(rows[i]["unreliable"] for i in adaptive),
                "budget": first["budget"],
                "precision": first["precision"],
                "seed": first["seed"],
            }
        )
        outcomes[key] = value
        worst[-1]["group"] = list(key)
    return worst, outcomes


def _passes(rows: list[dict[str, Any]]) -> None:
    """Adaptive rows show the passes of one defended prediction too: those of the defense's other row."""
    known = {_group(r): (r["forwards"], r["backwards"]) for r in rows if r["forwards"] is not None}
    for r in rows:
        if r["forwards"] is None:
            r["forwards"], r["backwards"] = known.get(_group(r), (None, None))


def _pairs(worst: list[dict[str, Any]], outcomes: dict[tuple[Any, ...], dict[str, float]]) -> list[dict[str, Any]]:
    blocks: dict[tuple[Any, ...], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in worst:
        block = (row["vlm"], row["data"], row["eps"], row["norm"])
        blocks[block][row["defense_spec"]] = outcomes[tuple(row["group"])]
        del row["group"]
    return _compare(blocks, "R*")


def _static_pairs(rows: list[dict[str, Any]], details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks: dict[tuple[Any, ...], dict[str, dict[str, float]]] = defaultdict(dict)
    for row, detail in zip(rows, details, strict=True):
        if row["threat"] == "static":
            blocks[(row["vlm"], row["data"], row["eps"], row["attack"])][row["defense_spec"]] = detail["outcome"]
    return _compare(blocks, "static")


def _compare(blocks: dict[tuple[Any, ...], dict[str, dict[str, float]]], metric: str) -> list[dict[str, Any]]:
    found = []
    for (vlm, data, eps, what), outcomes in blocks.items():
        if len(outcomes) < 2:
            continue
        common = sorted(set.intersection(*(set(o) for o in outcomes.values())))
        if not common:
            continue
        for p in pairwise({name: [o[s] for s in common] for name, o in outcomes.items()}):
            found.append(
                {
                    "vlm": vlm,
                    "data": data,
                    "eps": eps,
                    "a": p.a,
                    "b": p.b,
                    "metric": metric,
                    "attack": what if metric == "static" else "",
                    "n": len(common),
                    "diff": 100 * p.diff.value,
                    "diff_lo": 100 * p.diff.lo,
                    "diff_hi": 100 * p.diff.hi,
                    "p": p.p,
                    "p_holm": p.p_holm,
                    "verdict": p.verdict,
                }
            )
    return found


def _macro(worst: list[dict[str, Any]], outcomes: dict[tuple[Any, ...], dict[str, float]]) -> list[dict[str, Any]]:
    by_defense: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for row, values in zip(worst, outcomes.values(), strict=True):
        by_defense[(row["vlm"], row["defense_spec"], row["title"], row["eps"], row["norm"])].append(
            list(values.values())
        )
    out = []
    for (vlm, spec, title, eps, norm), sets in by_defense.items():
        if len(sets) > 1:
            m = macro_mean(sets)
            line = {"vlm": vlm, "defense_spec": spec, "title": title, "eps": eps, "norm": norm, "sets": len(sets)}
            out.append(line | {"robust": 100 * m.value, "robust_lo": 100 * m.lo, "robust_hi": 100 * m.hi})
    return out


def _per_class(rows: list[dict[str, Any]], outcome: dict[str, float]) -> float:
    by: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        by[r["label"]].append(outcome[r["sample_id"]])
    return 100 * sum(sum(v) / len(v) for v in by.values()) / len(by)


def from_store(store: Store) -> dict[str, Any]:
    """The table of everything that a store holds."""
    digests = store.digests()
    feet = {d: store.footer(d) for d in digests}
    shown = [item for d in digests for item in store.documents("gallery", f"{d}-")]
    failed = [
        {k: e["cell"].get(k, "") for k in ("vlm", "data", "defense", "threat")}
        | {"attack": e["cell"].get("what", ""), "error": e["error"], "traceback": e["traceback"]}
        for e in store.errors()
    ]
    costs = {d: store.get_json("cost", feet[d]["cost_key"]) or NO_COST for d in digests if "cost_key" in feet[d]}
    return assemble(store, digests, costs=costs, command="ironclip report", gallery=shown, errors=failed)


def exit_status(results: dict[str, Any]) -> int:
    """0 done, 3 some cells failed."""
    return 3 if results["errors"] else 0


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results dictionaries as one table of several blocks."""
    out = dict(parts[0])
    for key in ("rows", "worst", "pairs", "macro", "errors", "not_applicable", "gallery", "notes"):
        out[key] = list(itertools.chain.from_iterable(p[key] for p in parts))
    out["notes"] = list(dict.fromkeys(out["notes"]))
    return out
