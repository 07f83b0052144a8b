"""The same table four times: rich for the terminal, Markdown, LaTeX (booktabs), and all row fields as CSV."""

from __future__ import annotations

import csv as csv_module
import io
import re
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ironclip.report.flags import FATAL
from ironclip.report.lines import Block, Line, Order, Score
from ironclip.report.published import HEADS, TITLE, beside, sources
from ironclip.report.summary import Results, blocks, check

_MIN = {"defense": 13, "flags": 13}  # columns a narrow terminal may squeeze, and how far
UPPER_BOUND = "R* is an upper bound on robustness under the stated budget; intervals are 95% (Wilson)."
FIELDS = (
    *("vlm", "data", "defense", "defense_spec", "title", "paradigm", "threat", "attack", "eps", "norm", "n"),
    *("clean", "clean_lo", "clean_hi", "robust", "robust_lo", "robust_hi", "mean_per_class", "unreliable", "flags"),
    *("ms_per_image", "ms_batch", "forwards", "backwards", "attack_forwards", "attack_backwards", "memory_mb", "ties"),
    *("members", "budget", "prompts", "seed", "precision", "recipe", "state", "seconds", "digest"),
)


def columns(block: Block) -> list[tuple[str, Callable[[Line], Score | str]]]:
    """Headings and cells of a block; the black-box column appears where somebody was attacked that way."""
    black = any(s.threats["blackbox"] != Score() for s in block.lines)
    return [
        ("defense", lambda s: s.title),
        ("paradigm", lambda s: s.paradigm or "-"),
        ("clean", lambda s: s.clean),
        ("static", lambda s: s.threats["static"]),
        ("graybox", lambda s: s.threats["graybox"]),
        *([("blackbox", _blackbox)] if black else []),
        ("adaptive R*", lambda s: s.adaptive),
        ("H", lambda s: s.harmonic),
        ("ms/image", lambda s: "-" if s.ms is None else _short(s.ms)),
        ("F/B", lambda s: s.cost),
        ("flags", lambda s: ", ".join(s.flags) or "-"),
    ]


def terminal(results: Results, order: Order = "R*") -> list[RenderableType]:
    """One rich table per (model, set, budget), with images and budgets in its caption, then errors and notes.

    Cells have two lines, the number above its interval and the title above its paradigm, so that 80 columns suffice.
    An empty gray-box column is left out.
    """
    full = check(results)
    parts: list[RenderableType] = []
    for block in blocks(full, order):
        table = Table(title=Text(block.title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.padding = (0, 1, 0, 0)
        hidden = {"paradigm"} | ({"graybox"} if all(s.threats["graybox"] == Score() for s in block.lines) else set())
        cells = [c for c in columns(block) if c[0] not in hidden]
        for name, _ in cells:
            text = name in ("defense", "flags")
            head = Text(name.replace(" ", "\n").replace("/i", "/\ni"))
            table.add_column(
                head, justify="left" if text else "right", no_wrap=not text, overflow="fold", min_width=_MIN.get(name)
            )
        for line in block.lines:
            believed = line.adaptive.value is not None and not line.adaptive.unreliable
            table.add_row(*(_rich(name, get(line), line) for name, get in cells), style="" if believed else "dim")
        parts += [table, *(Text(f"  {fact}", style="dim") for fact in _caption(block)), Text()]
    parts += _published(full)
    if not full["rows"]:
        parts.append(Text("no results: every cell failed or none was run"))
    for e in full["errors"]:
        where = ", ".join(str(e[k]) for k in ("vlm", "data", "defense", "threat", "attack") if e.get(k))
        parts.append(Text.assemble(("failed: ", "bold red"), f"{where}: {e.get('error', '')}"))
    parts += [Text(f"note: {note}") for note in full["notes"]]
    return parts


def _published(full: Results) -> list[RenderableType]:
    """The published figures beside ours, nothing where there are none."""
    known = beside(full)
    if not known:
        return []
    table = Table(title=Text(TITLE, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(HEADS):
        table.add_column(Text(name.replace(" ", "\n")), justify="left" if i < 3 else "right", overflow="fold")
    for b in known:
        table.add_row(*(Text(c.replace(" [", "\n[")) for c in b.cells))
    return [table, *(Text(f"  {fact}", style="dim") for fact in sources(known)), Text()]


def markdown(results: Results, order: Order = "R*") -> str:
    """A heading, a table and its facts per block; GitHub's dialect."""
    full = check(results)
    out = []
    for block in blocks(full, order):
        cells = columns(block)
        out += [f"### {_md(block.title)}", "", _md_row(name for name, _ in cells)]
        out.append(_md_row("---" if n in ("defense", "paradigm", "flags") else "---:" for n, _ in cells))
        out += [_md_row(_md(_plain(n, get(line), line)) for n, get in cells) for line in block.lines]
        out += ["", *(f"- {_md(fact)}" for fact in _caption(block)), ""]
    if known := beside(full):
        out += [f"### {TITLE}", "", _md_row(HEADS), _md_row("---" if i < 3 else "---:" for i in range(len(HEADS)))]
        out += [_md_row(map(_md, b.cells)) for b in known]
        out += ["", *(f"- {_md(fact)}" for fact in sources(known)), ""]
    if not full["rows"]:
        out += ["No results.", ""]
    out += [f"> {_md(note)}" for note in full["notes"]]
    return "\n".join(out).rstrip() + "\n"


def latex(results: Results, order: Order = "R*") -> str:
    r"""One ``table`` environment per block for a paper that loads booktabs; everything escaped."""
    full = check(results)
    out = ["% needs \\usepackage{booktabs,graphicx}"]
    for block in blocks(full, order):
        cells = columns(block)
        align = "".join("l" if n in ("defense", "paradigm", "flags") else "r" for n, _ in cells)
        out += [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_tex(block.title)}. {_tex('; '.join(_caption(block)))}}}",
        ]
        out += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
        out += [" & ".join(_tex_head(n) for n, _ in cells) + r" \\", r"\midrule"]
        out += [" & ".join(_tex_cell(get(line), line) for _, get in cells) + r" \\" for line in block.lines]
        out += [r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""]
    if known := beside(full):
        out += [r"\begin{table}[t]", r"\centering", rf"\caption{{{TITLE}. {_tex('; '.join(sources(known)))}}}"]
        out += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{lll{'r' * (len(HEADS) - 3)}}}", r"\toprule"]
        out += [" & ".join(map(_tex, HEADS)) + r" \\", r"\midrule"]
        out += [" & ".join(map(_tex, b.cells)) + r" \\" for b in known]
        out += [r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""]
    return "\n".join(out).rstrip() + "\n"


def csv(results: Results) -> str:
    """All fields of all rows; lists joined by ``;`` (members by name), booleans true and false, missing ones empty."""
    rows = check(results)["rows"]
    extra = sorted({str(k) for row in rows for k in row} - set(FIELDS))
    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    writer.writerow([*FIELDS, *extra])
    writer.writerows([[_csv(row.get(k)) for k in (*FIELDS, *extra)] for row in rows])
    return text.getvalue()


def _blackbox(line: Line) -> Score:
    return line.threats["blackbox"]


def _caption(block: Block) -> list[str]:
    facts = list(block.facts)
    if any(s.tie for s in block.lines):
        facts.append("= : not distinguishable from the best R* (exact McNemar, Holm)")
    if any(s.adaptive.unreliable or any(t.unreliable for t in s.threats.values()) for s in block.lines):
        facts.append(f"unreliable: one of the flags {', '.join(sorted(FATAL))} was raised")
    if any(s.adaptive.value is not None for s in block.lines):
        facts.append(UPPER_BOUND)
    return facts


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _plain(name: str, cell: Score | str, line: Line) -> str:
    if isinstance(cell, str):
        return cell
    mark = " =" if name == "adaptive R*" and line.tie else ""
    return " ".join(p for p in (cell.number, f"[{cell.interval}]" if cell.interval else "") if p) + mark


def _rich(name: str, cell: Score | str, line: Line) -> Text:
    if name == "defense":
        return Text.assemble((line.title, "bold" if line.best else ""), (f"\n{line.paradigm or '-'}", "not bold dim"))
    if isinstance(cell, str):
        return Text(cell.replace(", ", "\n") if name == "flags" else cell.replace(" ", "\n") if name == "F/B" else cell)
    text = Text(cell.number, style="bold red" if cell.unreliable else "bold" if name == "adaptive R*" else "")
    text.append(" =" if name == "adaptive R*" and line.tie else "")
    return text.append(f"\n{cell.interval}" if cell.interval else "", style="not bold dim")


def _md(text: str) -> str:
    escaped = re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return re.sub(r"\s+", " ", escaped).replace("^", "&#94;")


def _md_row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
}
_TEX |= {">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"} | {c: f"\\{c}" for c in "&%$#_{}"}


def _tex(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(_TEX.get(c, c) for c in text))


def _tex_head(name: str) -> str:
    return {"adaptive R*": "adaptive $R^*$", "H": "$H$"}.get(name, _tex(name))


def _tex_cell(cell: Score | str, line: Line) -> str:
    if isinstance(cell, str):
        return "--" if cell == "-" else _tex(cell)
    if cell.unreliable:
        return r"\textit{unreliable}"
    number = rf"\textbf{{{cell.number}}}" if line.best and cell is line.adaptive else cell.number.replace("-", "--")
    mark = "$^{=}$" if line.tie and cell is line.adaptive else ""
    return number + mark + (rf" {{\scriptsize [{cell.interval.replace('-', '--')}]}}" if cell.interval else "")


def _csv(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ";".join(str(v.get("name", v) if isinstance(v, dict) else v) for v in value)
    return repr(value) if isinstance(value, float) else str(value)
