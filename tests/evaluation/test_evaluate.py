"""The evaluation as a whole on a small problem: what it counts, what it keeps, what it resumes, what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toyset import toy_block

import ironclip
from ironclip.evaluation import cells
from ironclip.evaluation.recipes import BUDGETS
from ironclip.evaluation.results import from_store
from ironclip.evaluation.store import Store, StoreError

ATTACK = "PGD(eps=8/255, steps=5, returned=last)"
EXACT = ("n", "forwards", "backwards", "attack_forwards", "attack_backwards", "flags", "ties", "digest")


def table(store: Path | None = None, **options: Any) -> dict[str, Any]:
    vlm, data = options.pop("block", None) or toy_block()
    options = {
        "costs": False,
        "defenses": "none,noise,TTC(tau=0.5)",
        "attacks": ATTACK,
        "threat": "static,adaptive",
    } | options
    return ironclip.evaluate(vlm, data, store=store, budget="smoke", **options)


def by(results: dict[str, Any], defense: str, threat: str) -> dict[str, Any]:
    (row,) = [r for r in results["rows"] if r["defense"] == defense and r["threat"] == threat]
    return row


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return table(tmp_path_factory.mktemp("shared") / "store")


def test_rows_carry_what_decisions_promise(results: dict[str, Any]) -> None:
    keys = ["vlm", "data", "defense", "defense_spec", "title", "threat", "attack", "eps", "n", "clean", "robust"]
    keys += [
        "clean_lo",
        "clean_hi",
        "robust_lo",
        "robust_hi",
        "flags",
        "ms_per_image",
        "forwards",
        "backwards",
        "digest",
    ]
    assert len(results["rows"]) == 6
    for row in results["rows"]:
        assert set(keys) <= set(row)
        assert row["clean_lo"] <= row["clean"] <= row["clean_hi"]
        assert row["robust_lo"] <= row["robust"] <= row["robust_hi"]
    for row in results["worst"]:
        assert {"vlm", "data", "defense", "eps", "n", "robust", "robust_lo", "robust_hi", "members"} <= set(row)
    assert json.loads(json.dumps(results)) == results


def test_attack_works_and_worst_case_is_at_most_every_row(results: dict[str, Any]) -> None:
    assert by(results, "none", "static")["clean"] > 90
    assert by(results, "none", "static")["robust"] < 50
    for worst in results["worst"]:
        for row in results["rows"]:
            if row["defense"] == worst["defense"]:
                assert worst["robust"] <= row["robust"] + 1e-9


def test_undefended_static_row_equals_the_attack_called_by_hand(results: dict[str, Any]) -> None:
    vlm, data = toy_block()
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    x, y, ids = next(data.batches(len(data)))
    result = ironclip.build(ATTACK)(clf, x, y, rng=ironclip.SampleRNG.of(0, ids).fold("attack"))
    right = (clf(x).argmax(1) == y) & ~result.success
    assert by(results, "none", "static")["robust"] == pytest.approx(100 * float(right.float().mean()))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_rows_do_not_depend_on_the_batch_size(results: dict[str, Any], batch_size: int, tmp_path: Path) -> None:
    other = table(tmp_path / "store", batch_size=batch_size)
    assert len(other["rows"]) == len(results["rows"])
    for a, b in zip(results["rows"], other["rows"], strict=True):
        for key in ("n", "flags", "digest", "clean", "robust", "attack_forwards", "attack_backwards"):
            assert a[key] == b[key], (a["defense"], a["threat"], key)
        assert a["forwards"] == pytest.approx(b["forwards"], abs=1e-3)


def test_samples_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    seen = []
    for size in (3, 24):
        store = tmp_path / str(size)
        results = table(store, batch_size=size, defenses="noise", threat="static")
        seen.append(Store(store).rows(results["rows"][0]["digest"]))
    for a, b in zip(*seen, strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), key


def test_second_run_attacks_nothing_and_prints_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table(tmp_path / "store")
    calls: list[str] = []
    monkeypatch.setattr(cells, "counted_judge", lambda *a: calls.append("judged"))
    monkeypatch.setattr("ironclip.evaluation.adversarial.AdvSet.put", lambda *a: calls.append("attacked"))
    second = table(tmp_path / "store")
    assert calls == []
    assert [strip(r) for r in second["rows"]] == [strip(r) for r in first["rows"]]


def strip(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("ms_per_image", "ms_batch", "memory_mb")}


def test_one_static_attack_serves_every_defense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation.adversarial import AdvSet

    stored: list[int] = []
    put = AdvSet.put
    monkeypatch.setattr(AdvSet, "put", lambda self, ids, *a: (stored.append(len(ids)), put(self, ids, *a))[1])
    table(tmp_path / "store", threat="static", defenses="none,noise,TTC(tau=0.5),clipure")
    assert sum(stored) == 24


def test_a_larger_limit_extends_the_smaller_one(tmp_path: Path) -> None:
    block = toy_block()
    table(tmp_path / "store", block=block, limit=8, defenses="none", threat="static")
    grown = table(tmp_path / "store", block=block, limit=16, defenses="none", threat="static")
    fresh = table(tmp_path / "other", block=block, limit=16, defenses="none", threat="static")
    assert strip(grown["rows"][0]) == strip(fresh["rows"][0])
    again = table(tmp_path / "store", block=block, limit=8, defenses="none", threat="static")
    assert again["rows"][0]["n"] == 8


class Killed(BaseException):
    """Stands for a signal: not an Exception, so nothing may swallow it."""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_interrupted_runs_resume_to_the_same_rows(
    results: dict[str, Any], after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    add = Store.add_rows

    def killer(self: Store, *args: Any) -> None:
        if next(count) == after:
            raise Killed
        add(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Store, "add_rows", killer)
        with pytest.raises(Killed):
            table(tmp_path / "store", batch_size=8)
    assert not list((tmp_path / "store").rglob("*.tmp"))
    resumed = table(tmp_path / "store", batch_size=8)
    for a, b in zip(results["rows"], resumed["rows"], strict=True):
        for key in ("n", "flags", "digest", "clean", "robust", "attack_forwards"):
            assert a[key] == b[key], (a["defense"], a["threat"], key)


def test_report_from_the_store_equals_the_run(tmp_path: Path) -> None:
    ran = table(tmp_path / "store")
    again = from_store(Store(tmp_path / "store"))
    key = lambda r: r["digest"]  # noqa: E731
    assert sorted(map(strip, again["rows"]), key=key) == sorted(map(strip, ran["rows"]), key=key)
    assert len(again["gallery"]) == len(ran["gallery"]) > 0


def test_two_runs_on_one_store_do_not_disturb_each_other(tmp_path: Path) -> None:
    import threading

    found: list[dict[str, Any]] = []
    runs = [threading.Thread(target=lambda: found.append(table(tmp_path / "store", batch_size=5))) for _ in range(2)]
    for r in runs:
        r.start()
    for r in runs:
        r.join()
    assert len(found) == 2
    assert [strip(r) for r in found[0]["rows"]] == [strip(r) for r in found[1]["rows"]]


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.defenses.noise import Noise

    def broken(self: Any, clf: Any, state: Any = None) -> Any:
        made = apply(self, clf, state)

        def fail(x: torch.Tensor, rng: Any = None) -> torch.Tensor:
            raise RuntimeError("planted failure")

        return type(made)(**{**made.__dict__, "encode": fail})

    apply = Noise.apply
    with monkeypatch.context() as m:
        m.setattr(Noise, "apply", broken)
        failed = table(tmp_path / "store", threat="static")
    assert [r["defense"] for r in failed["rows"]] == ["none", "ttc"]
    assert failed["errors"][0]["error"] == "RuntimeError: planted failure"
    assert "planted failure" in failed["errors"][0]["traceback"]
    assert len(list((tmp_path / "store" / "cells").glob("*.error.json"))) == 1
    mended = table(tmp_path / "store", threat="static")
    assert not mended["errors"]


def test_a_cell_that_fails_once_is_run_again_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation import run as running

    real, calls = running.run_static, list[str]()

    def shaky(block: Any, entry: Any, *args: Any) -> Any:
        calls.append(entry.defense.info.name)
        if calls.count("ttc") == 1 and calls[-1] == "ttc":
            raise RuntimeError("out of memory, for once")
        return real(block, entry, *args)

    expected = table(tmp_path / "calm", threat="static")
    monkeypatch.setattr(running, "run_static", shaky)
    got = table(tmp_path / "store", threat="static")
    assert calls.count("ttc") == 2
    assert calls.count("none") == 1
    assert not got["errors"]
    assert [strip(r) for r in got["rows"]] == [strip(r) for r in expected["rows"]]
    said = [n for n in got["notes"] if "failed once (RuntimeError: out of memory, for once) and was run again" in n]
    assert len(said) == 1
    assert said[0].startswith("ttc on ")
    assert not list((tmp_path / "store" / "cells").glob("*.error.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threat": "statik"},
            "unknown threat 'statik'; did you mean 'static'? valid: adaptive, blackbox, graybox, static",
        ),
        ({"defenses": "tcc"}, "did you mean 'TTC'"),
        ({"attacks": "PGD(eps=4)"}, "eps must be in (0, 1], got 4; write 4/255"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"device": "cuda:7"}, "is not usable here"),
        ({"executor": "threads"}, "unknown executor 'threads'"),
    ],
)
def test_bad_input_is_refused_before_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        table(tmp_path / "store", **options)
    assert not (tmp_path / "store" / "cells").exists()


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 99, "tool": "ironclip"}')
    with pytest.raises(StoreError, match="format 99, this ironclip reads format 1; upgrade ironclip or pass another"):
        Store(tmp_path)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="is not empty and is no ironclip store"):
        Store(tmp_path)


def test_damaged_files_are_never_read_as_results(tmp_path: Path) -> None:
    first = table(tmp_path / "store", defenses="none", threat="static")
    digest = first["rows"][0]["digest"]
    cell = Store(tmp_path / "store").cell_path(digest)
    cell.write_bytes(cell.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"is damaged .* delete it and run the command again"):
        table(tmp_path / "store", defenses="none", threat="static")
    cell.unlink()
    (shard, *_) = (tmp_path / "store" / "adv").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    again = table(tmp_path / "store", defenses="none", threat="static")
    assert strip(again["rows"][0]) == strip(first["rows"][0])


def test_a_changed_model_does_not_inherit_stored_examples(tmp_path: Path) -> None:
    vlm, data = toy_block()
    first = table(tmp_path / "store", block=(vlm, data), defenses="none", threat="static")
    with torch.no_grad():
        next(vlm.image.parameters()).mul_(1.01)
    vlm._hash = None
    second = table(tmp_path / "store", block=(vlm, data), defenses="none", threat="static")
    assert first["rows"][0]["digest"] != second["rows"][0]["digest"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from ironclip.evaluation import store as module

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(module, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            table(tmp_path / "store", defenses="none", threat="static")
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert table(tmp_path / "store", defenses="none", threat="static")["rows"]


def test_budgets_grow() -> None:
    order = [BUDGETS[n] for n in ("smoke", "quick", "short", "standard", "full")]
    assert all(a.steps < b.steps and a.eot <= b.eot and a.draws <= b.draws for a, b in itertools.pairwise(order))


def test_duplicate_classes_are_merged_and_named() -> None:
    vlm, _ = toy_block()
    names = ["ant", "bee", "cat", "dog", "ant"]
    with pytest.warns(UserWarning, match="merged into one class each: ant"):
        clf = ironclip.ZeroShot.build(vlm, names)
    assert clf.k == 4
    assert clf.labels(torch.tensor([0, 4, 3])).tolist() == [0, 0, 3]
