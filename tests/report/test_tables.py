"""What the tables must say, on results built by the factory."""

from __future__ import annotations

import csv
import io
import re

import pytest
from report_factory import defended, results, row, worst
from rich.console import Console

from ironclip.evaluation.suspicion import FATAL
from ironclip.report import flags, tables
from ironclip.report.lines import Score
from ironclip.report.summary import blocks, eps_value

MEMBERS = [
    "zero-grad",
    "no-gradient",
    "constant",
    "not-converged",
    "steps-hurt",
    "eps-sweep",
    "bb-beats-wb",
    "random-beats",
    "start-spread",
    "stochastic",
    "dynamic",
]
MEMBERS += ["probabilities", "tie", "dtype", "budget"]


def shown(found: dict, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(*tables.terminal(found), sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


def md_rows(found: dict, block: int = 0) -> list[list[str]]:
    """Cells of the Markdown table of one block."""
    part = tables.markdown(found).split("### ")[1 + block]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[c.strip().replace("\\", "") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:1] + lines[2:]]


@pytest.fixture
def three() -> dict:
    return results(
        defended("none", 62.5, 3.0, 0.0), defended("tecoa", 40.0, 30.5, 28.125), defended("ttc", 60.0, 45.0, 3.125)
    )


def test_lines_are_sorted_by_the_worst_case_or_left_as_given(three: dict) -> None:
    assert [r[0] for r in md_rows(three)[1:]] == ["TECOA", "TTC", "NONE"]
    given = tables.markdown(three, order="given")
    assert given.index("NONE") < given.index("TECOA") < given.index("TTC")


def test_columns_numbers_and_intervals(three: dict) -> None:
    head, tecoa, *_ = md_rows(three)
    line = dict(zip(head, tecoa, strict=True))
    assert head == ["defense", "paradigm", "clean", "static", "graybox", "adaptive R*", "H", "ms/image", "F/B", "flags"]
    assert line["clean"] == "40.0 [33.5-46.9]"
    assert line["adaptive R*"] == "28.1 [18.6-40.1]"  # 18 of 64
    assert line["H"] == "33.0"  # 2 * 40 * 28.125 / 68.125
    assert line["graybox"] == line["flags"] == "-"
    assert (line["ms/image"], line["F/B"]) == ("12.5", "3F 2B")


def test_caption_names_images_attacks_and_budgets(three: dict) -> None:
    text = shown(three)
    assert "static: n = 200, PGD(eps=1/255, steps=10)" in text
    assert "R*: n = 64, quick: 10 steps, EOT 2, 4 fresh draws" in text
    assert "upper bound" in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_terminal_keeps_every_number_whole_at_any_width(three: dict, width: int) -> None:
    text = shown(three, width)
    for part in ("40.0", "33.5-46.9", "28.1", "18.6-40.1", "TECOA", "training-time", "adaptive"):
        assert part in text
    assert max(map(len, text.splitlines())) <= width


def test_a_defense_without_adaptive_run_shows_a_dash_and_comes_last() -> None:
    found = results(defended("rtpt", 63.0, 50.0, None), defended("ttc", 60.0, 45.0, 0.0))
    found["worst"].append(worst("rtpt", 63.0, 50.0))  # worst case over static attacks alone is no R*
    head, *lines = md_rows(found)
    assert [s[0] for s in lines] == ["TTC", "RTPT"]
    last = dict(zip(head, lines[1], strict=True))
    assert last["static"].startswith("50.0")
    assert last["adaptive R*"] == last["H"] == "-"


def test_an_adaptive_row_stands_in_where_no_worst_case_was_made() -> None:
    found = results({"rows": [row("ttc", "adaptive", 60.0, 20.0)], "worst": []})
    assert dict(zip(*md_rows(found), strict=True))["H"] == "30.0"


def test_unreliable_replaces_the_number_everywhere() -> None:
    bad = defended("bad", 63.0, 50.0, 40.625, flags=["zero-grad"], unreliable=True)
    found = results(bad, defended("ttc", 60.0, 45.0, 3.125))
    head, *lines = md_rows(found)
    assert [s[0] for s in lines] == ["TTC", "BAD"]  # below a real 3.1
    line = dict(zip(head, lines[1], strict=True))
    assert line["static"] == line["adaptive R*"] == "unreliable"
    assert line["H"] == "-"
    assert line["clean"].startswith("63.0")
    for text in (shown(found), tables.markdown(found), tables.latex(found)):
        assert "unreliable" in text
        assert "40.6" not in text
        assert "50.0" not in text


def test_lowest_believable_attack_stands_for_a_threat_model() -> None:
    rows = [
        row("ttc", robust=45.0),
        row("ttc", robust=41.0, attack="APGD(eps=1/255)"),
        row("ttc", robust=9.0, attack="CW(eps=1/255)", unreliable=True, flags=["budget"]),
    ]
    found = results({"rows": rows, "worst": []})
    line = dict(zip(*md_rows(found), strict=True))
    assert line["static"].startswith("41.0")
    assert line["flags"] == "budget"
    assert "lowest of PGD(eps=1/255, steps=10), APGD(eps=1/255), CW(eps=1/255)" in tables.markdown(found).replace(
        "\\", ""
    )


def test_budgets_sets_and_models_are_never_mixed() -> None:
    found = results(
        defended("ttc", 60.0, 45.0, 20.0, eps="4/255"),
        defended("ttc", 60.0, 50.0, 30.0, eps="1/255"),
        defended("ttc", 70.0, 50.0, 40.0, eps="1/255", vlm="tiny"),
    )
    assert [b.title for b in blocks(found)] == [
        "lite, photos, eps 1/255",
        "lite, photos, eps 4/255",
        "tiny, photos, eps 1/255",
    ]
    assert [b.lines[0].adaptive.value for b in blocks(found)] == [30.0, 20.0, 40.0]


def test_seeds_that_differ_make_blocks_of_their_own() -> None:
    parts = [defended("ttc", 60.0, 45.0, r, seed=s) for s, r in ((0, 20.0), (1, 24.0))]
    for s, part in enumerate(parts):
        part["worst"][0]["seed"] = s
    found = blocks(results(*parts))
    assert [b.title for b in found] == ["lite, photos, eps 1/255, seed 0", "lite, photos, eps 1/255, seed 1"]
    assert [b.lines[0].adaptive.value for b in found] == [20.0, 24.0]


def test_two_settings_of_one_defense_are_two_lines() -> None:
    parts = [
        defended("ttc", 60.0, 45.0, r, defense_spec=s) for s, r in (("TTC(steps=2)", 20.0), ("TTC(steps=5)", 24.0))
    ]
    for part in parts:
        part["worst"][0]["defense_spec"] = part["rows"][0]["defense_spec"]
    lines = blocks(results(*parts))[0].lines
    assert [(s.spec, s.adaptive.value) for s in lines] == [("TTC(steps=5)", 24.0), ("TTC(steps=2)", 20.0)]
    assert [s.title for s in lines] == [s.spec for s in lines]


def test_mean_over_sets_is_of_the_defenses_that_have_all() -> None:
    found = results(
        defended("tecoa", 60.0, 40.0, 30.0),
        defended("ttc", 60.0, 40.0, 10.0),
        defended("tecoa", 100.0, 20.0, 0.0, data="shapes"),
    )
    mean = blocks(found)[0]
    assert mean.data == "mean of 2 sets"
    assert [s.title for s in mean.lines] == ["TECOA"]
    line = mean.lines[0]
    assert (line.clean.value, line.threats["static"].value, line.adaptive.value) == (80.0, 30.0, 15.0)
    assert line.harmonic.value == pytest.approx(20.0)  # mean of 40 and 0, not the H of 80 and 15
    assert line.adaptive.lo is not None
    assert line.adaptive.lo < 15 < line.adaptive.hi  # type: ignore[operator]


def test_bootstrap_interval_of_the_mean_is_used_where_it_is_known() -> None:
    parts = [defended("ttc", 60.0, 40.0, r, data=d) for r, d in ((10.0, "photos"), (20.0, "shapes"))]
    entry = {"vlm": "lite", "eps": "1/255", "norm": "linf", "robust_lo": 11.5, "robust_hi": 18.5, "sets": 2}
    same = {**entry, "defense_spec": "TTC()", "robust": 15.0}
    assert blocks(results(*parts, macro=[same]))[0].lines[0].adaptive == Score(15.0, 11.5, 18.5)
    for other in ({"robust": 16.0}, {"defense_spec": "TTC(steps=3)"}, {"eps": "4/255"}, {"norm": "l2"}):
        assert blocks(results(*parts, macro=[{**same, **other}]))[0].lines[0].adaptive.lo != 11.5


def test_mean_with_an_unreliable_or_missing_part_is_no_number() -> None:
    found = results(
        defended("ttc", 60.0, 40.0, 10.0),
        defended("ttc", 60.0, 40.0, 50.0, data="shapes", unreliable=True),
        defended("rtpt", 60.0, 40.0, 10.0),
        defended("rtpt", 60.0, 40.0, None, data="shapes"),
    )
    by_title = {s.title: s for s in blocks(found)[0].lines}
    assert by_title["TTC"].adaptive == Score(unreliable=True)
    assert by_title["RTPT"].adaptive == Score()
    assert by_title["RTPT"].threats["static"].value == 40.0


def test_lines_that_cannot_be_told_from_the_best_are_marked(three: dict) -> None:
    pair = {"vlm": "lite", "data": "photos", "eps": "1/255", "metric": "R*", "diff": 1, "diff_lo": -1, "diff_hi": 3}
    three["pairs"] = [
        {**pair, "a": "ttc", "b": "TECOA", "verdict": "tie"},
        {**pair, "a": "none", "b": "tecoa", "verdict": "b"},
        {**pair, "a": "none", "b": "ttc", "verdict": "tie"},
        {**pair, "a": "none", "b": "tecoa", "verdict": "tie", "metric": "static"},
        {**pair, "a": "none", "b": "tecoa", "verdict": "tie", "data": "shapes"},
    ]
    assert [(s.title, s.best, s.tie) for s in blocks(three)[0].lines] == [
        ("TECOA", True, False),
        ("TTC", False, True),
        ("NONE", False, False),
    ]
    assert "3.1 =" in shown(three)


def test_latex_escapes_everything_and_balances() -> None:
    nasty = r"50% of_a & b #1 $x$ {y} \z ~ ^ <|>"
    found = results(defended("ttc", 60.0, 45.0, 3.125, title=nasty, data="a_b&c"))
    text = tables.latex(found)
    assert r"50\% of\_a \& b \#1 \$x\$ \{y\} \textbackslash{}z \textasciitilde{} \textasciicircum{}" in text
    assert r"a\_b\&c" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert len(re.findall(r"(?<!\\)&", body)) == 9
    for rule in ("toprule", "midrule", "bottomrule", "end{tabular}", "end{table}"):
        assert text.count("\\" + rule) == 1
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")


def test_markdown_escapes_bars_and_tags() -> None:
    found = results(defended("ttc", 60.0, 45.0, 3.125, title="a|b <script>*x*\nnew"))
    line = next(s for s in tables.markdown(found).splitlines() if "script" in s)
    assert line.startswith(r"| a\|b &lt;script&gt;\*x\* new |")


def test_rich_markup_in_a_name_is_only_text() -> None:
    text = shown(results(defended("ttc", 60.0, 45.0, 3.1, title="[red]x[/red]"), notes=["[bold]n"]))
    assert "[red]x[/red]" in text
    assert "note: [bold]n" in text


def test_empty_results_and_errors_are_said() -> None:
    error = {"vlm": "lite", "data": "photos", "defense": "aom", "threat": "static", "error": "ValueError: [x]"}
    text = shown(results(errors=[error]))
    assert "no results" in text
    assert "failed: lite, photos, aom, static: ValueError: [x]" in text
    assert tables.markdown(results()) == "No results.\n"
    assert tables.csv(results()).count("\n") == 1


def test_missing_fields_show_as_dashes() -> None:
    bare = {"vlm": "lite", "data": "photos", "defense": "ttc", "threat": "static", "robust": 20.0}
    line = dict(zip(*md_rows(results({"rows": [bare], "worst": []})), strict=True))
    assert line["static"] == "20.0"
    assert {line[k] for k in ("paradigm", "clean", "graybox", "adaptive R*", "H", "ms/image", "F/B", "flags")} == {"-"}


def test_bad_results_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="must have format 1, got 2; make them with `ironclip bench --json`"):
        tables.markdown(results(format=2))
    with pytest.raises(ValueError, match="got list"):
        tables.csv([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows\[0\] must name its vlm, data and defense; data, defense missing"):
        tables.csv(results({"rows": [{"vlm": "lite"}], "worst": []}))


def test_csv_comes_back_as_it_went() -> None:
    rows = [
        row("ttc", robust=1 / 3, flags=["dynamic", "tie"], recipe='a,"b"\nc'),
        row("none", mean_per_class=None, extra=7),
    ]
    back = list(csv.DictReader(io.StringIO(tables.csv(results({"rows": rows, "worst": []})))))
    assert len(back) == 2
    assert float(back[0]["robust"]) == 1 / 3
    assert back[0]["flags"].split(";") == ["dynamic", "tie"]
    assert back[0]["recipe"] == rows[0]["recipe"]
    assert (back[0]["unreliable"], back[1]["mean_per_class"]) == ("false", "")
    assert (back[0]["extra"], back[1]["extra"]) == ("", "7")
    assert set(back[0]) == {*rows[1]}


def test_csv_names_members_only() -> None:
    found = results(
        {"rows": [row("ttc", members=[{"name": "through-ce", "ran": 3}, {"name": "bpda", "ran": 1}])], "worst": []}
    )
    assert next(csv.DictReader(io.StringIO(tables.csv(found))))["members"] == "through-ce;bpda"


def test_every_flag_is_explained_and_four_are_fatal() -> None:
    assert list(flags.FLAGS) == MEMBERS
    assert FATAL == flags.FATAL == {"zero-grad", "bb-beats-wb", "steps-hurt", "budget"}
    assert all(f.meaning.endswith(".") and f.todo.endswith(".") for f in flags.FLAGS.values())
    assert [n for n, _ in flags.explain(["tie", "new-flag", "zero-grad"])] == ["zero-grad", "tie", "new-flag"]


def test_budgets_are_numbers() -> None:
    assert eps_value("4/255") == pytest.approx(4 / 255)
    assert eps_value("0.5") == 0.5
    assert eps_value("-") == eps_value("1/0") == float("inf")
