"""Charts as altair objects: accuracy against the budget, and clean accuracy against R* with the cost as size.

They are drawn in the page by the Vega runtime that vl-convert carries, so nothing is fetched from a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

from ironclip.report.lines import Block, Line, Score
from ironclip.report.summary import eps_value

MISSING = 'the report needs {name}; type pip install "ironclip[report]"'
BASELINE = "#8a8f98"
COLORS = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6", "#6a79d8"),
    *("#a05195", "#1b9e77", "#d95f02", "#7570b3", "#66a61e", "#e7298a", "#a6761d", "#17becf", "#c44e52", "#6b8ba4"),
)


@dataclass(frozen=True)
class Figure:
    """A chart and what it is about; the page filters by ``vlm``, ``data`` and ``eps`` (empty: all budgets)."""

    kind: str
    title: str
    caption: str
    vlm: str
    data: str
    eps: str
    chart: Any

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification, data inside."""
        return dict(self.chart.to_dict())


def figures(blocks: Sequence[Block]) -> list[Figure]:
    """For each set one chart over the budgets and one trade-off chart per budget; those without points are left out."""
    _altair()
    colors = palette(blocks)
    groups: dict[tuple[str, str, str, str], list[Block]] = {}
    for b in blocks:
        groups.setdefault((b.vlm, b.data, b.norm, b.extra), []).append(b)
    found: list[Figure] = []
    for (vlm, data, _, extra), mine in groups.items():
        where = ", ".join(p for p in (vlm, data, extra) if p)
        curve = accuracy_chart(mine, colors)
        if curve is not None:
            caption = "Thin bars: 95% intervals. Click a name to single it out."
            found.append(Figure("accuracy", f"Accuracy against eps: {where}", caption, vlm, data, "", curve))
        for b in mine:
            cloud = tradeoff_chart(b, colors)
            if cloud is not None:
                caption = "Area: image-tower passes for one prediction. Thin bars: 95% intervals."
                found.append(Figure("tradeoff", f"Clean against R*: {b.title}", caption, vlm, data, b.budget, cloud))
    return found


def palette(blocks: Sequence[Block]) -> dict[str, str]:
    """One colour per defense for all charts of a page; grey for the undefended model."""
    titles = dict.fromkeys(s.title for b in blocks for s in b.lines)
    grey = {s.title for b in blocks for s in b.lines if s.paradigm == "baseline"}
    rest = [t for t in titles if t not in grey]
    return {t: BASELINE if t in grey else COLORS[rest.index(t) % len(COLORS)] for t in titles}


def accuracy_chart(blocks: Sequence[Block], colors: dict[str, str]) -> Any | None:
    """Accuracy against eps, one colour per defense; None without an attacked point. ``blocks``: one set, one norm."""
    alt = _altair()
    every = [p for b in blocks if isfinite(eps_value(b.eps)) for line in b.lines for p in _points(line, b)]
    points = list({(p["defense"], p["metric"], p["eps"]): p for p in reversed(every)}.values())[::-1]
    if not any(p["eps"] > 0 for p in points):
        return None
    scale = 255 if all(b.norm == "linf" for b in blocks) else 1
    points = [{**p, "eps": round(p["eps"] * scale, 6)} for p in points]
    metrics = list(dict.fromkeys(p["metric"] for p in points))
    unit = "/255" if scale == 255 else ""
    pick = alt.selection_point(fields=["defense"], bind="legend")
    shown = alt.param("shown", value=metrics[0], bind=alt.binding_radio(options=metrics, name="accuracy: "))
    axis = alt.Axis(
        values=sorted({p["eps"] for p in points}),
        labelExpr=f"datum.value == 0 ? 'clean' : datum.value + '{unit}'",
        labelOverlap="greedy",
    )
    base = (
        alt.Chart(alt.Data(values=points))
        .encode(
            x=alt.X("eps:Q", title=f"eps ({blocks[0].norm})", axis=axis),
            y=alt.Y("accuracy:Q", title="accuracy in %", scale=alt.Scale(zero=True)),
            color=_color(alt, points, colors),
            opacity=alt.condition(pick, alt.value(0.95), alt.value(0.08)),
            tooltip=[*("defense:N", "metric:N", "budget:N"), alt.Tooltip("accuracy:Q", format=".1f"), "interval:N"],
        )
        .transform_filter("datum.metric == shown")
    )
    whiskers = base.mark_rule(strokeWidth=1).encode(
        y="lo:Q", y2="hi:Q", opacity=alt.condition(pick, alt.value(0.35), alt.value(0.03))
    )
    lines = base.mark_line(strokeWidth=2).add_params(pick, shown)
    return (whiskers + lines + base.mark_point(filled=True, size=45)).properties(width="container", height=320)


def tradeoff_chart(block: Block, colors: dict[str, str]) -> Any | None:
    """Clean accuracy against R*, area = image-tower passes per prediction; None if no line has both."""
    alt = _altair()
    points = [_cloud_point(s) for s in block.lines if s.clean.value is not None and s.adaptive.value is not None]
    if not points:
        return None
    low, top = min(p["clean"] for p in points), max(p["robust"] for p in points)
    data = alt.Chart(alt.Data(values=points))
    x = alt.X("clean:Q", title="clean accuracy in %", scale=alt.Scale(domain=_tens(points, "clean")))
    y = alt.Y("robust:Q", title="R* in %", scale=alt.Scale(domain=[0, _tens(points, "robust")[1]]))
    color = _color(alt, points, colors)
    kinds = list(dict.fromkeys(p["paradigm"] for p in points))
    shapes = ["circle", "square", "triangle-up", "diamond", "cross"][: len(kinds)]
    whiskers = [
        data.mark_rule(opacity=0.4).encode(x=x, y="robust_lo:Q", y2="robust_hi:Q", color=color),
        data.mark_rule(opacity=0.4).encode(x="clean_lo:Q", x2="clean_hi:Q", y=y, color=color),
    ]
    size = alt.Size(
        "passes:Q",
        scale=alt.Scale(type="log", domain=[1, max(10.0, *(p["passes"] for p in points))], range=[70, 900]),
        legend=None,
    )
    dots = data.mark_point(filled=True, opacity=0.8).encode(
        x=x,
        y=y,
        color=color,
        size=size,
        shape=alt.Shape(
            "paradigm:N",
            scale=alt.Scale(domain=kinds, range=shapes),
            legend=alt.Legend(title=None, symbolFillColor=BASELINE, symbolStrokeWidth=0, symbolOpacity=1),
        ),
        tooltip=[*("defense:N", "paradigm:N", "clean_text:N", "robust_text:N", "cost:N", "ms:N")],
    )
    layers = [*whiskers, dots]
    if len(points) <= 6:
        layers.append(data.mark_text(dy=-16, fontSize=11).encode(x=x, y=y, text="defense:N"))
    if top > low:  # the limit R* = clean is in sight
        ends = [{"clean": v, "robust": v} for v in (low, top)]
        dashes = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[3, 4], strokeWidth=1, color=BASELINE)
        layers.insert(0, dashes.encode(x=x, y=y))
    return alt.layer(*layers).properties(width="container", height=320)


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines ``vegaEmbed``; about 0.9 MB."""
    alt = _altair()
    try:
        import vl_convert
    except ImportError as e:
        raise ImportError(MISSING.format(name="vl-convert-python")) from e
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    return _bundle(vl_convert.javascript_bundle, version if version in known else None)


@cache
def _bundle(make: Callable[..., str], version: str | None) -> str:
    return str(make("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _altair() -> Any:
    try:
        import altair
    except ImportError as e:
        raise ImportError(MISSING.format(name="altair")) from e
    return altair


def _points(line: Line, block: Block) -> list[dict[str, Any]]:
    found = []
    for metric, score in (("R*", line.adaptive), ("static", line.threats["static"])):
        if score.value is not None:
            found.append(_point(line, metric, eps_value(block.eps), block.budget, score))
            if line.clean.value is not None:
                found.append(_point(line, metric, 0.0, "clean", line.clean))
    return found


def _point(line: Line, metric: str, eps: float, budget: str, score: Score) -> dict[str, Any]:
    value = score.value or 0.0
    named = {"defense": line.title, "metric": metric, "budget": budget, "interval": score.interval}
    lo, hi = (value if v is None else v for v in (score.lo, score.hi))
    return {**named, "eps": eps, "accuracy": round(value, 3), "lo": round(lo, 3), "hi": round(hi, 3)}


def _tens(points: Sequence[dict[str, Any]], name: str) -> list[int]:
    """Whole tens of percent around the intervals, within 0 and 100."""
    lo, hi = min(p[f"{name}_lo"] for p in points), max(p[f"{name}_hi"] for p in points)
    return [10 * int(lo // 10), min(100, 10 * int(hi // 10 + 1))]


def _color(alt: Any, points: Sequence[dict[str, Any]], colors: dict[str, str]) -> Any:
    names = list(dict.fromkeys(p["defense"] for p in points))
    scale = alt.Scale(domain=names, range=[colors[n] for n in names])
    return alt.Color("defense:N", scale=scale, legend=alt.Legend(title=None, symbolOpacity=1, symbolType="circle"))


def _cloud_point(line: Line) -> dict[str, Any]:
    clean, star = line.clean, line.adaptive
    return {
        "defense": line.title,
        "paradigm": line.paradigm or "-",
        "clean": clean.value,
        "clean_lo": clean.value if clean.lo is None else clean.lo,
        "clean_hi": clean.value if clean.hi is None else clean.hi,
        "robust": star.value,
        "robust_lo": star.value if star.lo is None else star.lo,
        "robust_hi": star.value if star.hi is None else star.hi,
        "clean_text": f"{clean.number} {clean.interval}",
        "robust_text": f"{star.number} {star.interval}",
        "passes": max(1.0, (line.forwards or 1.0) + (line.backwards or 0.0)),
        "cost": line.cost,
        "ms": "-" if line.ms is None else f"{line.ms:.1f}",
    }
