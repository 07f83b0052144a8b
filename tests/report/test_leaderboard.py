"""The leaderboard: ranks and ties by hand, and the pages of a store that was really measured."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_factory import defended, results

from ironclip.cli import main
from ironclip.evaluation.stats import harmonic
from ironclip.report.leaderboard import ALL, Standing, boards, command, page_name

STORE = Path(__file__).parents[2] / "results" / "foundation"


def pair(a: str, b: str, verdict: str, data: str = "photos") -> dict[str, Any]:
    plain = {"vlm": "lite", "data": data, "eps": "1/255", "metric": "R*", "attack": "", "n": 200, "p": 0.5}
    numbers = {"diff": 1.0, "diff_lo": 0.0, "diff_hi": 2.0, "p_holm": 0.5}
    return {**plain, **numbers, "a": a, "b": b, "verdict": verdict}


def made(*pairs: dict[str, Any], **ttc: Any) -> dict[str, Any]:
    full = results(
        defended("none", 60.0, 5.0, 0.0),
        defended("tecoa", 40.0, 35.0, 40.0),
        defended("ttc", 50.0, 45.0, 30.0, **ttc),
    )
    for w in full["worst"]:
        row = next(r for r in full["rows"] if r["defense"] == w["defense"])
        for key in ("defense_spec", "title", "paradigm", "vlm", "data", "eps", "norm"):
            w.setdefault(key, row[key])
        for key, value in {"precision": "fp32", "seed": 0, "unreliable": False, "flags": [], "budget": "short"}.items():
            w.setdefault(key, value)
        w["harmonic"] = harmonic(w["clean"], w["robust"])
    full["pairs"] = list(pairs)
    return full


def names(standings: tuple[Standing, ...]) -> list[tuple[int, bool, str]]:
    return [(s.rank, s.tie, s.spec) for s in standings]


def test_h_over_r_star_decides_and_not_the_static_column() -> None:
    one = pair("TECOA()", "TTC()", "a"), pair("TECOA()", "NONE()", "a"), pair("NONE()", "TTC()", "b")
    board = boards(made(*one))[0]
    assert names(board.standings) == [(1, False, "TECOA()"), (2, False, "TTC()"), (3, False, "NONE()")]
    assert [s.h for s in board.standings] == pytest.approx([40.0, 37.5, 0.0])


def test_what_no_test_tells_apart_shares_the_leaders_rank() -> None:
    one = pair("TECOA()", "TTC()", "tie"), pair("TECOA()", "NONE()", "a"), pair("NONE()", "TTC()", "tie")
    assert names(boards(made(*one))[0].standings) == [(1, True, "TECOA()"), (1, True, "TTC()"), (3, False, "NONE()")]


def test_unreliable_and_unrun_rows_have_no_rank_and_no_number() -> None:
    full = made()
    full["worst"] = [w for w in full["worst"] if w["defense"] != "none"]
    next(w for w in full["worst"] if w["defense"] == "ttc").update(unreliable=True, flags=["zero-grad"])
    found = {s.spec: s for s in boards(full)[0].standings}
    assert found["TECOA()"].rank == 1
    grey = found["TTC()"]
    assert (grey.rank, grey.why, grey.robust, grey.h) == (0, "unreliable", None, None)
    assert (found["NONE()"].rank, found["NONE()"].why) == (0, "no adaptive run")


def test_without_adaptive_results_there_is_no_board() -> None:
    full = made()
    full["worst"] = []
    with pytest.raises(ValueError, match=r"no adaptive results.*--threat static,adaptive"):
        boards(full)


def test_every_spec_has_a_page_of_its_own() -> None:
    assert page_name("lite", "TTC()") != page_name("lite", "TTC(tau=0.1)") != page_name("tiny", "TTC(tau=0.1)")
    assert re.fullmatch(r"[\w-]+\.html", page_name("hf:a/b", "Purify(filter=jpeg)"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(STORE, folder / "store")
    assert main(["leaderboard", "--store", str(folder / "store"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_pages_of_a_measured_store_ask_no_network(pages: Path) -> None:
    for page in pages.glob("*.html"):
        text = page.read_text()
        assert "default-src 'none'" in text
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
        for link in re.findall(r'href="([^"]+)"', text):
            assert (pages / link).exists()
    assert ALL in (pages / "index.html").read_text()


def test_records_give_the_rows_figure(pages: Path) -> None:
    page = (pages / page_name("lite", "NoDefense()")).read_text()
    assert "ironclip bench --vlm lite" in page
    row = re.search(r"folder:oxford_pets/dev</td><td>static.*?samples/(\w+\.csv)", page, re.DOTALL)
    assert row is not None
    records = list(csv.DictReader((pages / "samples" / row[1]).read_text().splitlines()))
    right = sum(min(float(r["clean_correct"]), float(r["correct"])) for r in records)
    assert len(records) == 200
    assert f"{100 * right / 200:.1f}" in row[0]


def test_the_command_names_everything_that_differs_from_a_default() -> None:
    full = made()
    more = {"budget": "short: 10 steps", "seed": 3, "precision": "bf16"}
    rows = [r | more for r in full["rows"] if r["defense"] == "ttc"]
    said = command(rows)
    for word in ("--vlm lite", "--data photos", "--defenses 'TTC()'", "--budget short", "--seed 3", "--precision bf16"):
        assert word in said


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "--store", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "is no store; pass --store FOLDER" in capsys.readouterr().err
