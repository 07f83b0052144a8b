"""SQL over real small stores: the same figures as the table, every layout in one view, read-only, helpful errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toyset import toy_block

import ironclip
from ironclip.cli import main
from ironclip.evaluation.query import query
from ironclip.evaluation.store import Store, StoreError

FAST = "PGD(eps=8/255, steps=5, returned=last)"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("it's a store") / "store"
    vlm, data = toy_block()
    options: Any = {"budget": "smoke", "costs": False, "gallery": 0}
    threats = "static,adaptive,blackbox"
    return folder, ironclip.evaluate(vlm, data, "none,noise", FAST, threats, store=folder, **options)


def test_cells_have_the_figures_of_the_table(ran: tuple[Path, dict[str, Any]]) -> None:
    store, results = ran
    found = {r["digest"]: r for r in query(store, "select * from cells").to_pylist()}
    assert len(found) == 8  # two clean cells more than rows of the table
    for row in results["rows"]:
        line = found[row["digest"]]
        for key in ("vlm", "data", "defense", "defense_spec", "threat", "eps", "norm", "n", "prompts"):
            assert line[key] == row[key], key
        assert line["clean"] == pytest.approx(row["clean"])
        assert line["robust"] == pytest.approx(row["robust"])
        assert line["eps_value"] == pytest.approx(8 / 255)
    assert all(r["robust"] is None and r["clean"] > 50 for r in found.values() if r["threat"] == "clean")


def test_rows_of_every_layout_stand_in_one_view(ran: tuple[Path, dict[str, Any]]) -> None:
    store, _ = ran
    counts = query(store, "select threat, count(*) n, count(outcome) o from rows group by all order by all")
    assert counts.to_pylist() == [{"threat": t, "n": 48, "o": 48} for t in ("adaptive", "blackbox", "clean", "static")]
    sql = "select sample_id, outcome, robust, member_correct from rows where threat = 'adaptive' and defense = 'noise'"
    (digest,) = query(store, "select digest from cells where threat='adaptive' and defense='noise'")[0].to_pylist()
    stored = {r["sample_id"]: r for r in Store(store).rows(digest)}
    for line in query(store, sql).to_pylist():
        mine = stored[line["sample_id"]]
        assert (line["outcome"], line["member_correct"]) == (mine["robust"], mine["correct"])


def test_the_worst_case_can_be_asked_for(ran: tuple[Path, dict[str, Any]]) -> None:
    store, results = ran
    sql = """select defense, 100 * avg(o) robust from (
      select defense, sample_id, min(outcome) o from rows where threat <> 'clean' group by all) group by all"""
    found = {r["defense"]: r["robust"] for r in query(store, sql).to_pylist()}
    assert found == {w["defense"]: pytest.approx(w["robust"]) for w in results["worst"]}


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select nothing from rows", r'"nothing" not found(.|\n)*rows has: digest, (.|\n)*\ncells has: digest, '),
        ("selec 1", r"syntax error at or near"),
        ("select 1; select 2", "a query is one SELECT"),
        ("create table t as select 1", "a query is one SELECT"),
        ("copy (select 1) to '/nowhere/x.csv'", "a query is one SELECT"),
        ("select * from '/etc/passwd'", "passwd"),
        ("select * from read_csv('/etc/passwd')", "disabled by configuration"),
        ("", "a query is one SELECT"),
    ],
)
def test_what_is_no_question_is_refused(ran: tuple[Path, dict[str, Any]], sql: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query(ran[0], sql)


def test_asking_changes_nothing(ran: tuple[Path, dict[str, Any]]) -> None:
    store, _ = ran
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    query(store, "select * from rows")
    assert query(store, "explain select 1").num_rows > 0
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before


def test_missing_empty_and_damaged_stores_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere is no store; pass --store FOLDER"):
        query(tmp_path / "nowhere", "select 1")
    assert not (tmp_path / "nowhere").exists()
    Store(tmp_path / "store")
    with pytest.raises(ValueError, match="has no finished cell yet; run ironclip bench --store"):
        query(tmp_path / "store", "select 1")
    (tmp_path / "store" / "cells").mkdir()
    (tmp_path / "store" / "cells" / "abc.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StoreError, match=r"abc.parquet is damaged; ironclip store verify"):
        query(tmp_path / "store", "select 1")


def test_the_command_speaks_json_and_csv(ran: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = ran
    sql = "select defense, n, members, 'nan'::double odd from cells where threat = 'static' order by defense"
    assert main(["query", sql, "--store", str(store), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["columns"] == ["defense", "n", "members", "odd"]
    assert said["rows"] == [{"defense": d, "n": 24, "members": [], "odd": None} for d in ("noise", "none")]
    assert main(["query", "select defense, n from cells where threat = 'static'", "--store", str(store), "--csv"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["defense,n", "noise,24", "none,24"]
    assert main(["query", "describe rows", "--store", str(store)]) == 0
    assert "outcome" in capsys.readouterr().out
    assert main(["query", "select x from cells", "--store", str(store)]) == 2
    assert "cells has: digest" in capsys.readouterr().err
    assert main(["query", "select 1", "--store", str(store), "--csv", "--json"]) == 2
    assert main(["query", "--help"]) == 0
    assert "select data, defense" in capsys.readouterr().out
