"""``ironclip run --dry-run``: the plan as a table or as JSON."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ironclip.evaluation.job import Job, validate
from ironclip.evaluation.planning import plan_jobs


def show_plan(jobs: list[Job], store: Path, measure: bool, as_json: bool) -> int:
    """Print the plan of some jobs; exit status 0 also where something is missing. Raises ValueError for bad input."""
    for job in jobs:
        validate(job)
    plan = plan_jobs(jobs, store, measure)
    if as_json:
        print(json.dumps(plan))
        return 0
    console = Console(file=sys.stdout)
    for (vlm, data), steps in groupby(plan["steps"], key=lambda s: (s["vlm"], s["data"])):
        console.print(_table(f"{vlm}, {data}", list(steps)))
    for line in _facts(plan):  # not through the console, which would break commands that people copy
        print(line)
    return 0


def _table(title: str, steps: list[dict[str, Any]]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("defense", "threat", "attack"):
        table.add_column(name, overflow="fold")
    for name in ("images", "stored", "forwards", "backwards"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in steps:
        known = s["n"] is not None
        passes = (s["attack_forwards"] + s["forwards"], s["attack_backwards"] + s["backwards"])
        shown = [amount(p) if known else "?" for p in passes]
        texts = (s["title"], s["threat"], _short(s["attack"]), str(s["n"]) if known else "?", str(s["done"]), *shown)
        table.add_row(*(Text(t) for t in texts), style="dim" if known and s["n"] == s["done"] else "")
    return table


def _facts(plan: dict[str, Any]) -> list[str]:
    total = plan["total"]
    f, b = total["attack_forwards"] + total["forwards"], total["attack_backwards"] + total["backwards"]
    out = [
        f"{total['cells']} cells, {total['cached']} of them stored; for the rest at most {amount(f)} forward and "
        f"{amount(b)} backward passes of the image tower"
    ]
    if f + b > 0:
        share = (total["attack_forwards"] + total["attack_backwards"]) / (f + b)
        out.append(f"the attacks take {100 * share:.0f} % of them")
    for vlm, r in plan["rates"].items():
        out.append(
            f"{vlm} on this machine as it is now: {1 / r['forward']:,.0f} forward and {1 / r['gradient']:,.0f} "
            "forward-backward passes a second"
        )
    if plan["hours"] is not None:
        out.append(f"tower passes: {plan['hours']:.2f} h")
    out += [f"{vlm} is not here: passes were counted on {on}" for vlm, on in plan["counted_on"].items()]
    if any(s["n"] is None for s in plan["steps"]):
        out.append("? : not here, and the number of images is not known")
    absent: dict[tuple[str, str, str], list[str]] = {}
    for a in plan["not_applicable"]:
        absent.setdefault((a["title"], a["vlm"], a["reason"]), []).append(a["data"])
    out += [f"not applicable: {title} on {vlm}: {reason}" for title, vlm, reason in absent]
    if plan["missing"]:
        width = max(len(m["name"]) for m in plan["missing"])
        out += ["missing:", *(f"  {m['what']:<6}{m['name']:<{width + 2}}{m['get']}" for m in plan["missing"])]
    return out


def amount(value: float) -> str:
    """``950``, ``12.3 k``, ``4.56 M``, ``1.20 G``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.0f}"


def _short(attack: str) -> str:
    """A spec without the fields that are at their defaults."""
    from ironclip.core.spec import to_text
    from ironclip.registry import build_attack

    return to_text(build_attack(attack)) if "(" in attack else attack
