"""Published figures beside ours (``published.json``, with sources): the same model, attack, prompts and set.

Published tables count accuracy on the attacked images, whether the clean one was right or not: ``adv_accuracy`` of our
static and graybox rows. The interval is that of our figure (Wilson) less the published one, which comes without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from ironclip.core.spec import to_text
from ironclip.evaluation.stats import Estimate, mean_of_intervals, wilson
from ironclip.registry import build_attack


@dataclass(frozen=True)
class Gap:
    """A published figure and ours with its interval, all in percent."""

    published: float
    ours: Estimate

    @property
    def text(self) -> str:
        """Ours minus the published one: ``+1.2 [-0.3, 2.6]``."""
        lo, hi = self.ours.lo - self.published, self.ours.hi - self.published
        return f"{self.ours.value - self.published:+.1f} [{lo:+.1f}, {hi:+.1f}]"

    @property
    def agrees(self) -> bool:
        """Does our interval hold the published figure?"""
        return self.ours.lo <= self.published <= self.ours.hi


@dataclass(frozen=True)
class Beside:
    """One line: a published row and ours on one set, or the means over the sets that both have."""

    vlm: str
    data: str
    title: str
    threat: str
    n: int
    clean: Gap
    robust: Gap
    source: str

    @property
    def cells(self) -> list[str]:
        """The line as text, under ``HEADS``."""
        gaps = [t for g in (self.clean, self.robust) for t in (f"{g.published:.1f}", f"{g.ours.value:.1f}", g.text)]
        return [self.title, self.data, self.threat, str(self.n), *gaps]


HEADS = (
    "defense",
    "set",
    "threat",
    "n",
    *(f"{w} {x}" for w in ("clean", "attacked") for x in ("publ.", "ours", "diff.")),
)
TITLE = "Published figures beside ours"
NOTE = "diff.: ours minus published, with the 95 % interval of ours; attacked: accuracy on the attacked images alone"


@lru_cache(maxsize=1)
def tables() -> list[dict[str, Any]]:
    """The published tables."""
    text = (files("ironclip.report") / "published.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["tables"]
    return found


def beside(results: Mapping[str, Any]) -> list[Beside]:
    """Every row of the results that has a published counterpart, then the means of those with two sets or more."""
    out: list[Beside] = []
    for table in tables():
        attack = to_text(build_attack(table["attack"]))
        for row in results.get("rows") or []:
            same = row.get("vlm") in table["vlm"] and row.get("prompts") == table["prompts"]
            if not same or row.get("attack") != attack or row.get("adv_accuracy") is None:
                continue
            name = set_name(str(row["data"]))
            for known in table["rows"]:
                if known["defense"] == row["defense"] and known["threat"] == row["threat"] and name in known["sets"]:
                    clean, robust = (Gap(p, _ours(row, k)) for p, k in zip(known["sets"][name], KEYS, strict=True))
                    title = str(row.get("title") or row["defense"])
                    out.append(Beside(row["vlm"], name, title, row["threat"], row["n"], clean, robust, table["source"]))
    return [*out, *_means(out)]


KEYS = ("clean", "adv_accuracy")


def set_name(data: str) -> str:
    """``tv:pets`` and ``hub:pets@PATH`` are ``pets``; another split is another set."""
    kind, _, rest = data.partition(":")
    return rest.partition("@")[0] if kind in ("tv", "hub") else data


def _ours(row: Mapping[str, Any], key: str) -> Estimate:
    n, value = int(row["n"]), float(row[key])
    lo, hi = wilson(min(max(value / 100 * n, 0.0), n), n)
    return Estimate(value, 100 * lo, 100 * hi)


def _means(lines: Sequence[Beside]) -> list[Beside]:
    groups: dict[tuple[str, ...], list[Beside]] = {}
    for b in lines:
        groups.setdefault((b.vlm, b.title, b.threat, b.source), []).append(b)
    found = []
    for (vlm, title, threat, source), parts in groups.items():
        if len(parts) > 1:
            clean, robust = (_mean([getattr(b, k) for b in parts]) for k in ("clean", "robust"))
            n = sum(b.n for b in parts)
            found.append(Beside(vlm, f"mean of {len(parts)} sets", title, threat, n, clean, robust, source))
    return found


def _mean(gaps: Sequence[Gap]) -> Gap:
    return Gap(sum(g.published for g in gaps) / len(gaps), mean_of_intervals([g.ours for g in gaps]))


def sources(lines: Sequence[Beside]) -> list[str]:
    """What the published figures were taken from, each once, and how to read the table."""
    return [*dict.fromkeys(f"published: {b.source}" for b in lines), NOTE]
