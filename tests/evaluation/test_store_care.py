"""Looking after real small stores: verify finds planted faults, gc takes only what nobody needs, merge is exact."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from toyset import toy_block

import ironclip
from ironclip.cli import main
from ironclip.evaluation.garbage import collect, garbage
from ironclip.evaluation.merge import merge
from ironclip.evaluation.results import from_store
from ironclip.evaluation.store import Store, StoreError, open_store, write_table
from ironclip.evaluation.verify import info, verify

BLOCK = toy_block()


def fill(folder: Path, **changes: Any) -> dict[str, Any]:
    options: Any = {"budget": "smoke", "costs": False, "gallery": 1, "threat": "static", "batch_size": 12}
    options |= {"attacks": "PGD(eps=8/255, steps=3, returned=last)", "defenses": "none,noise"} | changes
    return ironclip.evaluate(*BLOCK, store=folder, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    fill(folder)
    fill(folder, defenses="TTC(tau=0.5)", threat="adaptive", limit=6)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "store")
    return Store(tmp_path / "store")


def one(store: Store, pattern: str) -> Path:
    return sorted(store.root.glob(pattern))[0]


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of a file turned."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(bytes(data))


def test_a_sound_store_has_no_problem_and_is_not_touched(store: Store) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.root.rglob("*")}
    assert verify(store) == []
    told = info(store)
    assert told["cells"] == {"adaptive": 1, "clean": 3, "static": 3}
    assert told["rows"] == 4 * 24 + 3 * 6
    assert (told["unfinished"], told["failed"], told["defense"]) == (0, 0, ["noise", "none", "ttc"])
    assert told["bytes"]["total"] == sum(p.stat().st_size for p in store.root.rglob("*") if p.is_file())
    assert {p: p.stat().st_mtime_ns for p in store.root.rglob("*")} == before


def rename(path: Path) -> None:
    path.rename(path.with_name(f"0{path.name[1:]}" if path.name[0] != "0" else f"1{path.name[1:]}"))


def doubled(path: Path) -> None:
    table = pq.read_table(path)
    import pyarrow as pa

    write_table(pa.concat_tables([table, table.slice(0, 1)]), path)


def moved(path: Path) -> None:
    (path.parent.parent / ("0" * 32)).mkdir()
    path.rename(path.parent.parent / ("0" * 32) / path.name)


@pytest.mark.parametrize(
    ("pattern", "fault", "what"),
    [
        ("cells/*.parquet", lambda p: p.write_bytes(p.read_bytes()[:-9]), "cannot be read"),
        ("cells/*.parquet", lambda p: flip(p, 0.02), "cannot be read"),
        ("cells/*.parquet", rename, "holds the cell .*: renamed or changed"),
        ("cells/*.parquet", doubled, "1 of [0-9]+ sample ids are there twice"),
        ("adv/*/*.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1]), "cannot be read"),
        ("adv/*/*.safetensors", flip, "has changed since it was written"),
        ("adv/*/*.safetensors", rename, "is not named after its samples"),
        ("adv/*/*.safetensors", moved, "belongs to .*: moved or changed"),
        ("text/*.safetensors", lambda p: p.write_bytes(b"{}"), "cannot be read"),
        ("gallery/*.json", lambda p: p.write_text('{"vlm": '), "cannot be read"),
        ("cells/*.parquet", lambda p: shutil.copy(p, p.with_name(f".{p.name}.abc.tmp")), "half-written; left by"),
    ],
)
def test_every_fault_is_found_and_named(
    store: Store, pattern: str, fault: Callable[[Path], None], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault(one(store, pattern))
    (problem,) = verify(store)
    with pytest.raises(AssertionError, match=what):
        raise AssertionError(str(problem))
    assert main(["store", "verify", "--store", str(store.root)]) == 3
    assert str(problem) in capsys.readouterr().out


def test_examples_outside_their_budget_are_found(store: Store) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from ironclip.evaluation.store import checksum

    shard = one(store, "adv/*/*.safetensors")
    data = load_file(shard)
    with safe_open(shard, "pt") as file:
        said = file.metadata()
    data["radius"] = data["radius"] * 2
    save_file(data, shard, metadata={**said, "sha256": checksum(data)})
    assert [p.what for p in verify(store)] == ["leaves the budget of its attack"]


def age(store: Store) -> None:
    for p in store.root.rglob("*"):
        os.utime(p, (1, 1))


def test_gc_finds_nothing_in_use(store: Store) -> None:
    age(store)
    assert garbage(store) == ([], [])


def test_gc_takes_what_no_cell_needs_and_only_on_request(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    static = [d for d in store.digests() if store.footer(d)["threat"] == "static" and len(store.rows(d)) == 24]
    for digest in static:
        store.cell_path(digest).unlink()
    (store.root / "cells" / ".x.parquet.1.tmp").write_bytes(b"PAR1")
    kept = sorted(p for p in store.root.rglob("*"))
    assert garbage(store)[0] == []  # touched just now: somebody may be using it
    age(store)
    waste, notes = garbage(store)
    assert notes == []
    whys = sorted(w.why for w in waste)
    assert whys == ["gallery of no cell"] * 2 + ["half-written"]  # ttc's static cell still uses the examples
    assert main(["store", "gc", "--store", str(store.root)]) == 0
    assert "would be freed; write --delete to do it" in capsys.readouterr().out
    assert sorted(p for p in store.root.rglob("*")) == kept
    assert main(["store", "gc", "--store", str(store.root), "--delete", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == sum(w.size for w in waste)
    assert garbage(store, hours=0)[0] == []
    assert verify(store) == []


def test_gc_keeps_examples_that_an_unfinished_cell_may_need(store: Store) -> None:
    for digest in store.digests():
        if store.footer(digest)["threat"] == "static":
            rows = store.rows(digest)
            store.cell_path(digest).unlink()
            store.add_rows(digest, rows[:3])
    for digest in store.digests():
        if store.footer(digest)["threat"] == "adaptive":
            store.cell_path(digest).unlink()
    age(store)
    waste, notes = garbage(store)
    assert not [w for w in waste if "examples" in w.why]
    assert notes == ["1 sets of examples are kept: 3 unfinished cells may need them"]
    waste, notes = garbage(store, with_unfinished=True)
    assert notes == []
    assert sum(w.why == "rows of an unfinished cell" for w in waste) == 3
    assert sum(w.why == "examples that no cell used" for w in waste) == 1
    collect(waste)
    assert not list((store.root / "cells").glob("*.parts"))
    assert verify(store) == []


def test_gc_knows_what_adaptive_cells_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    fill(store.root, defenses="noise", threat="adaptive", attacks="PGD(eps=1/255, steps=1)", limit=6)
    age(store)
    used = {e for d in store.digests() for e in store.footer(d).get("examples", [])}
    assert used == {p.name for p in (store.root / "adv").iterdir()}
    assert len(used) == 2  # the static ones, and those of the member that attacks the undefended model
    assert garbage(store) == ([], [])


def test_gc_takes_parts_that_a_killed_merge_left(store: Store) -> None:
    digest = store.digests()[0]
    store.add_rows(digest, store.rows(digest)[:2])
    age(store)
    (waste,) = garbage(store)[0]
    assert waste.why == "rows that the finished cell holds"
    with pytest.raises(ValueError, match="hours must not be negative, got -1"):
        garbage(store, hours=-1)


def strip(results: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted((dict(r) for r in results["rows"]), key=lambda r: r["digest"])


def test_two_stores_merged_equal_one_run(tmp_path: Path) -> None:
    fill(tmp_path / "whole", defenses="none,noise,TTC(tau=0.5)")
    fill(tmp_path / "a", defenses="none,noise")
    fill(tmp_path / "b", defenses="none,TTC(tau=0.5)")
    done = merge(tmp_path / "a", [Store(tmp_path / "b")])
    assert (done.cells, done.rows, done.examples, done.differ) == (2, 48, 0, 0)
    assert verify(Store(tmp_path / "a")) == []
    assert strip(from_store(Store(tmp_path / "a"))) == strip(from_store(Store(tmp_path / "whole")))
    assert not any(merge(tmp_path / "a", [Store(tmp_path / "b")]).numbers().values())


def test_samples_of_one_cell_from_two_stores_become_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "whole")
    fill(tmp_path / "few", limit=8)
    merged = merge(tmp_path / "new" / "store", [Store(tmp_path / "few"), Store(tmp_path / "whole")])
    assert (merged.cells, merged.grown, merged.differ) == (4, 4, 0)
    monkeypatch.setattr("ironclip.evaluation.adversarial.AdvSet.put", lambda *a: pytest.fail("attacked again"))
    again = fill(tmp_path / "new" / "store")
    exact = ("n", "clean", "robust", "flags", "ties", "digest")
    whole = strip(from_store(Store(tmp_path / "whole")))
    assert [[r[k] for k in exact] for r in strip(again)] == [[r[k] for k in exact] for r in whole]


def test_unfinished_cells_and_disagreements_are_counted(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    digest, second = store.digests()[:2]
    rows = [{**r, "pred": r["pred"] + 1} for r in store.rows(digest)[:3]]
    other.add_rows(digest, rows)
    fresh = Store(tmp_path / "fresh")
    fresh.add_rows(second, store.rows(second)[:2])
    before = store.rows(digest)
    assert merge(store.root, [other]).differ == 3
    assert store.rows(digest) == before
    assert merge(tmp_path / "third", [fresh]).unfinished == 1
    assert len(Store(tmp_path / "third").rows(second)) == 2


def test_merge_refuses_what_does_not_fit(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(other: Path) -> str:
        assert main(["store", "merge", str(other), "--store", str(tmp_path / "target")]) == 2
        return capsys.readouterr().err

    newer, older = tmp_path / "newer", tmp_path / "older"
    for folder, version in ((newer, 99), (older, 0)):
        folder.mkdir()
        (folder / "store.json").write_text(json.dumps({"format": version}))
    assert "was written in format 99, this ironclip reads format 1; upgrade" in said(newer)
    assert "has format 0, this ironclip writes 1; merge stores of one format" in said(older)
    assert "is no store; pass --store FOLDER" in said(tmp_path / "nowhere")
    flip(one(store, "adv/*/*.safetensors"))
    assert "has changed since it was written (checksum); delete it" in said(store.root)
    assert not (tmp_path / "target").exists()
    with pytest.raises(StoreError, match="cannot be merged into itself"):
        merge(store.root, [open_store(store.root)])


def test_a_read_only_store_can_be_read_and_is_not_half_written(
    store: Store, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tempfile

    target = Store(tmp_path / "target")

    def refused(*args: Any, **options: Any) -> Any:  # what the system says on a read-only file system, root or not
        raise PermissionError(30, "Read-only file system", str(options.get("dir")))

    with monkeypatch.context() as m:
        m.setattr(tempfile, "mkstemp", refused)
        for command in (
            ["store", "info"],
            ["store", "verify"],
            ["store", "gc"],
            ["query", "select count(*) from rows"],
        ):
            assert main([*command, "--store", str(store.root)]) == 0, command
        capsys.readouterr()
        assert main(["store", "merge", str(made), "--store", str(target.root)]) == 2
        assert "Read-only file system" in capsys.readouterr().err
    assert [p.name for p in target.root.rglob("*") if p.is_file()] == ["store.json"]


def test_help_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify", "gc", "merge"):
        assert main(["store", command, "--help"]) == 0
        assert f"ironclip store {command}" in capsys.readouterr().out
