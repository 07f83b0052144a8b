"""One self-contained page: opens offline, asks no network for anything, and forbids itself to (content policy)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from ironclip.report import charts
from ironclip.report.flags import FATAL, FLAGS, explain
from ironclip.report.lines import THREATS, Block
from ironclip.report.pairs import matrices
from ironclip.report.published import HEADS, beside, sources
from ironclip.report.summary import Results, blocks, budget_text, check, eps_value, row_score
from ironclip.report.write import write_text

VIEWS = (("clean", "clean"), ("adv", "adversarial"), ("diff", "perturbation"), ("seen", "what the defense saw"))
LISTS = ("undefended_clean", "undefended_adv", "defended_clean", "defended_adv")
GALLERY_BYTES = 16_000_000


def write_html(results: Results, path: str | Path, gallery_bytes: int = GALLERY_BYTES) -> Path:
    """Write the page, complete or not at all. Raises ImportError naming the extra, ValueError for other formats."""
    return write_text(Path(path), render(results, gallery_bytes))


def render(results: Results, gallery_bytes: int = GALLERY_BYTES) -> str:
    """The page as text; at most ``gallery_bytes`` of pictures, taken evenly from all cells."""
    try:
        import jinja2
    except ImportError as e:
        raise ImportError(charts.MISSING.format(name="jinja2")) from e
    full = check(results)
    made = blocks(full)
    here = files("ironclip.report")
    figures = charts.figures(made)
    cards, images, left_out = gallery(full["gallery"], gallery_bytes)
    budgets = [budget_text(row) for row in full["rows"]]
    named = {str(row.get("eps")): text for row, text in zip(full["rows"], budgets, strict=True)}
    raised = [f for r in (*full["rows"], *full["worst"]) for f in r.get("flags") or []]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["dash"] = lambda v: "-" if v is None or v == "" else v
    environment.filters["amount"] = _amount
    return environment.from_string((here / "template.html.j2").read_text(encoding="utf-8")).render(
        r=full,
        blocks=made,
        figures=figures,
        figure_specs=[f.spec() for f in figures],
        matrices=matrices(full["pairs"], made),
        means={b.data for b in made if len(b.sets) > 1},
        tied=any(s.tie for b in made for s in b.lines),
        broken=[(b, s) for b in made for s in b.lines if s.fallen],
        scores=[{k: row_score(row, k) for k in ("clean", "robust")} for row in full["rows"]],
        budgets=budgets,
        named=named,
        eps_value=lambda eps: f"{v:.6g}" if isfinite(v := eps_value(eps)) else "",
        cards=cards,
        images=images,
        left_out=left_out,
        views=VIEWS,
        threats=[
            t for t in THREATS if t != "blackbox" or any(s.threats[t].number != "-" for b in made for s in b.lines)
        ],
        choices=choices(full, made),
        raised=explain(raised),
        fatal=FATAL,
        others=[(n, f) for n, f in FLAGS.items() if n not in set(raised)],
        recipe=recipe(full["rows"]),
        published=(known := beside(full)),
        published_heads=HEADS,
        published_sources=sources(known),
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        vega=charts.javascript() if figures else "",
    )


def choices(full: Mapping[str, Any], made: Sequence[Block]) -> dict[str, list[str]]:
    """Values of each filter, in the order of the tables; the mean over sets counts as a set."""
    everything = [*full["rows"], *full["gallery"], *full["errors"]]
    found = {
        "vlm": _seen(b.vlm for b in made) or _seen(e.get("vlm") for e in everything),
        "set": _seen((*(b.data for b in made), *(e.get("data") for e in everything))),
        "eps": sorted(_seen(b.budget for b in made), key=lambda e: eps_value(e.split(" ")[0])),
        "threat": _seen(e.get("threat") for e in everything),
        "defense": _seen(e.get("title") for e in full["gallery"]),
    }
    return found


def recipe(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What a rerun needs to know: each field with the values that occur."""
    names = ("vlm", "data", "recipe", "prompts", "seed", "precision", "budget", "attack", "defense_spec", "state")
    values = [(n, _seen(r.get(n) for r in rows)) for n in names]
    return [(n, v) for n, v in values if v]


def gallery(
    entries: Sequence[Mapping[str, Any]], most: int = GALLERY_BYTES
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Cards, the pictures they name (each stored once), and how many entries did not fit in ``most`` bytes.

    Entries are taken evenly: the first image of every cell, then the second of every cell, while there is room. Cards
    of the same image stand together.
    """
    cells: dict[tuple[str, ...], list[int]] = {}
    for i, e in enumerate(entries):
        key = tuple(str(e.get(k)) for k in ("vlm", "data", "eps", "threat", "defense", "title", "attack"))
        cells.setdefault(key, []).append(i)
    order = sorted((rank, i) for members in cells.values() for rank, i in enumerate(members))
    images: dict[str, str] = {}
    kept: list[int] = []
    used = 0
    for _, i in order:
        fresh = {k: v for k, v in _pictures(entries[i]).values() if k not in images}
        size = sum(map(len, fresh.values()))
        if used + size <= most:
            images |= fresh
            used += size
            kept.append(i)
    kept.sort()
    cards = [{**entries[i], "views": {v: k for v, (k, _) in _pictures(entries[i]).items()}} for i in kept]
    place = {key: n for n, key in enumerate(dict.fromkeys(map(_image, entries)))}
    cards.sort(key=lambda c: place[_image(c)])
    for card in cards:
        card["tops"] = {name: _top(card.get(name), str(card.get("class_name", ""))) for name in LISTS}
    return cards, images, len(entries) - len(kept)


def _image(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(entry.get(k)) for k in ("vlm", "data", "sample_id"))


def _pictures(entry: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """View -> (name by content, base64 PNG). Raises ValueError for what is no base64 PNG."""
    found = {}
    for view, _ in VIEWS:
        text = entry.get(f"{view}_png")
        if text:
            try:
                head = base64.b64decode(str(text), validate=True)[:8]
            except (ValueError, binascii.Error):
                head = b""
            if head != b"\x89PNG\r\n\x1a\n":
                raise ValueError(f"gallery: {view}_png of sample {entry.get('sample_id')!r} must be a base64 PNG")
            found[view] = (hashlib.sha256(str(text).encode()).hexdigest()[:16], str(text))
    return found


def _top(pairs: Any, truth: str) -> list[dict[str, Any]]:
    return [{"name": str(n), "p": max(0.0, min(1.0, float(p))), "right": str(n) == truth} for n, p in pairs or []]


def _seen(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values if v not in (None, "")))


def _amount(value: Any) -> str:
    """A count or a cost, short; a dash for what is missing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"
