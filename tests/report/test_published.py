"""Published figures beside ours: which rows they belong to, the difference and its interval, in every format."""

from __future__ import annotations

from typing import Any

import pytest

from ironclip.core.spec import to_text
from ironclip.data.survey import SETS
from ironclip.evaluation.stats import wilson
from ironclip.registry import DEFENSES, build_attack
from ironclip.report.html import render
from ironclip.report.published import beside, set_name, tables
from ironclip.report.tables import latex, markdown, terminal

VLM = "hf:openai/clip-vit-base-patch32"


def row(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"vlm": VLM, "data": "tv:pets", "defense": "none", "title": "undefended", "n": 1000}
    fields |= {"threat": "static", "attack": to_text(build_attack("table2-pgd10")), "eps": "1/255", "prompts": "ttc"}
    return fields | {"clean": 88.0, "robust": 0.5, "adv_accuracy": 2.0} | changes


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "rows": list(rows)}


def test_a_row_stands_beside_its_published_figure() -> None:
    (line,) = beside(results(row()))
    lo, hi = wilson(880, 1000)
    assert (line.clean.published, line.robust.published) == (87.4, 1.0)
    assert line.clean.text == f"+0.6 [{100 * lo - 87.4:+.1f}, {100 * hi - 87.4:+.1f}]"
    assert line.clean.agrees
    assert line.robust.ours.value == 2.0  # accuracy on the attacked images, not the stricter count
    assert not line.robust.agrees
    assert "arXiv 2601.12443" in line.source


@pytest.mark.parametrize(
    "changes",
    [
        {"vlm": "lite"},
        {"prompts": "fixed"},
        {"attack": "PGD(eps=4/255)"},
        {"data": "folder:oxford_pets/dev"},
        {"data": "tv:pets:trainval"},
        {"defense": "noise"},
        {"defense": "tecoa"},  # published under graybox
        {"adv_accuracy": None},
    ],
)
def test_other_models_prompts_attacks_and_sets_have_none(changes: dict[str, Any]) -> None:
    assert beside(results(row(**changes))) == []


def test_fine_tuned_rows_are_compared_where_they_were_attacked() -> None:
    (line,) = beside(results(row(defense="tecoa", threat="graybox", clean=60.0, adv_accuracy=38.0)))
    assert (line.clean.published, line.robust.published) == (62.1, 38.4)


def test_means_over_sets_are_the_surveys() -> None:
    sets = [n for n, s in SETS.items() if s.survey]
    lines = beside(results(*(row(data=f"tv:{n}", clean=60.0, adv_accuracy=2.0) for n in sets)))
    assert len(lines) == 10
    mean = lines[-1]
    assert (mean.data, mean.n) == ("mean of 9 sets", 9000)
    assert (round(mean.clean.published, 1), round(mean.robust.published, 1)) == (59.6, 2.4)  # as the survey prints
    assert mean.clean.ours.value == pytest.approx(60.0)


def test_the_data_file_names_what_exists() -> None:
    for table in tables():
        assert table["source"]
        build_attack(table["attack"])
        for known in table["rows"]:
            assert known["defense"] in DEFENSES
            assert set(known["sets"]) <= set(SETS)
            assert all(0 <= v <= 100 for pair in known["sets"].values() for v in pair)
    survey = next(t for t in tables() if t["id"] == "survey-table2")
    assert [len(k["sets"]) for k in survey["rows"]] == [9] * 7
    robust = {k["defense"]: sum(v[1] for v in k["sets"].values()) / 9 for k in survey["rows"]}
    printed = {"none": 2.4, "fare": 17.8, "tecoa": 21.1, "aom": 34.7, "pmg_aft": 23.2, "ttc": 38.7, "cola": 46.2}
    assert robust == {k: pytest.approx(v, abs=0.06) for k, v in printed.items()}


def test_set_names() -> None:
    assert [set_name(n) for n in ("tv:pets", "hub:pets@/x/y", "photos")] == ["pets", "pets", "photos"]


def test_every_format_prints_them_and_only_then() -> None:
    from rich.console import Console

    both, neither = results(row()), results(row(vlm="lite"))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in terminal(both):
        console.print(part)
    for text in (markdown(both), latex(both), render(both), console.export_text()):
        assert "Published figures beside ours" in text
        assert "87.4" in text
        assert "2601.12443" in text
    for text in (markdown(neither), latex(neither), render(neither)):
        assert "Published figures beside ours" not in text
