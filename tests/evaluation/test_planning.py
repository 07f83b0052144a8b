"""The dry run: passes that a real run then spends, what is stored, what is missing; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toyset import toy_block

import ironclip
from ironclip.cli import main
from ironclip.evaluation import cells
from ironclip.evaluation.job import Job
from ironclip.evaluation.passes import Passes, calls, of_attack
from ironclip.evaluation.planning import plan_jobs
from ironclip.evaluation.recipes import budget

PGD = "PGD(eps=8/255, steps=3, policy=max_loss)"


@pytest.mark.parametrize(
    ("spec", "gradients", "plain"),
    [
        ("table2-pgd10", 10, 1),  # ten steps, and the last point is judged
        ("PGD(steps=4, restarts=2)", 8, 2),
        ("PGD(steps=4, policy=first_success)", 4, 1),
        ("APGD(steps=10)", 10, 1),
        ("RandomPoints(points=4)", 0, 4),
        ("Square(queries=20)", 0, 21),
    ],
)
def test_calls_of_attacks(spec: str, gradients: int, plain: int) -> None:
    assert calls(spec) == (gradients, plain)


def test_every_draw_counts() -> None:
    answer, gradient = Passes(2, 0), Passes(2, 1)
    assert of_attack("PGD(steps=4)", 5, 10, answer, gradient) == Passes(5 * (4 * 2 + 2), 5 * 4)
    assert of_attack("PGD(steps=4)", 5, 10, answer, None) == answer  # no gradient: the attack ends at once


def job(**changes: Any) -> Job:
    vlm, data = toy_block()
    fields: dict[str, Any] = {"vlm": vlm, "data": (data,), "defenses": ("none", "noise"), "attacks": (PGD,)}
    return Job(**(fields | {"budget": budget("smoke"), "costs": False, "gallery": 0} | changes))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    from ironclip.evaluation import planning

    real = planning.open_data

    def opened(spec: Any, *args: Any, **options: Any) -> Any:
        return real(spec, *args, **options) if isinstance(spec, str) else spec.subset(options["limit"], 0)

    monkeypatch.setattr(planning, "open_data", opened)
    return plan_jobs


def test_a_static_run_spends_what_was_planned(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = job()
    plan = planned([wanted], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(cells, "checks", lambda *a: {})
    with wanted.vlm.counting() as spent:
        ironclip.evaluate(wanted.vlm, wanted.data, "none,noise", PGD, budget="smoke", costs=False, gallery=0)
    total = plan["total"]
    assert total["attack_backwards"] + total["backwards"] == spent.backwards == 24 * 3
    rechecks = 2  # noise classifies one stored example of each batch again
    assert total["attack_forwards"] + total["forwards"] + rechecks == spent.forwards


def test_an_adaptive_run_spends_at_most_what_was_planned(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(threat=("static", "adaptive"), limit=8)
    total = planned([wanted], tmp_path / "store")["total"]
    monkeypatch.setattr(cells, "checks", lambda *a: {})
    with wanted.vlm.counting() as spent:
        options: Any = {"limit": 8, "budget": "smoke", "costs": False, "gallery": 0}
        ironclip.evaluate(wanted.vlm, wanted.data, "none,noise", PGD, "static,adaptive", **options)
    assert spent.forwards <= total["attack_forwards"] + total["forwards"] < 5 * spent.forwards
    assert spent.backwards <= total["attack_backwards"] + total["backwards"] < 5 * spent.backwards


def test_what_is_stored_costs_nothing(planned: Any, tmp_path: Path) -> None:
    wanted = job(threat=("static", "adaptive"))
    some = {"threat": "static", "budget": "smoke", "costs": False, "gallery": 0, "store": tmp_path / "store"}
    ironclip.evaluate(wanted.vlm, wanted.data, "none", PGD, limit=10, **some)  # type: ignore[arg-type]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    steps = {(s["defense"], s["threat"]): s for s in planned([wanted], tmp_path / "store")["steps"]}
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert steps["none", "static"]["done"] == steps["none", "clean"]["done"] == 10
    assert steps["none", "static"]["attack_backwards"] == (24 - 10) * 3
    assert steps["none", "static"]["forwards"] == 24 - 10
    assert steps["noise", "static"]["attack_backwards"] == 0  # the same examples
    some["threat"] = "static,adaptive"
    ironclip.evaluate(wanted.vlm, wanted.data, "none,noise", PGD, **some)  # type: ignore[arg-type]
    plan = planned([wanted], tmp_path / "store")
    assert plan["total"]["cells"] == plan["total"]["cached"] == 6
    assert sum(plan["total"][k] for k in ("attack_forwards", "attack_backwards", "forwards", "backwards")) == 0


def test_measured_hours_follow_from_passes_and_rates(planned: Any, tmp_path: Path) -> None:
    plan = planned([job()], tmp_path / "store", measure=True)
    ((name, r),) = plan["rates"].items()
    assert name == "toy-problem"
    t = plan["total"]
    seconds = (t["attack_forwards"] - t["attack_backwards"]) * r["forward"] + t["attack_backwards"] * r["gradient"]
    assert plan["hours"] == pytest.approx((seconds + t["forwards"] * r["answer"]) / 3600)


def test_missing_models_data_and_states_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "far.toml"
    file.write_text(
        f'[[block]]\nvlm = "hf:{tmp_path}/none"\ndata = ["pets", "folder:nowhere/dev", "shapes"]\n'
        'defenses = ["none", "tecoa"]\nbudget = "smoke"\nlimit = 1000\n'
    )
    assert main(["run", str(file), "--dry-run", "--store", str(tmp_path / "store"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(m["what"], m["name"]) for m in plan["missing"]] == [
        ("model", f"hf:{tmp_path}/none"), ("data", "pets"), ("data", "folder:nowhere/dev")
    ]  # fmt: skip
    assert "OxfordIIITPet" in plan["missing"][1]["get"]
    assert plan["counted_on"] == {f"hf:{tmp_path}/none": "tiny"}
    static = {s["data"]: s for s in plan["steps"] if s["threat"] == "static"}
    assert static["pets"]["n"] == 1000
    assert static["folder:nowhere/dev"]["n"] is None
    assert static["pets"]["attack_backwards"] == 1000 * 10
    assert {a["defense"] for a in plan["not_applicable"]} == {"tecoa"}
    assert all(f"run ironclip fit 'TeCoA()' --vlm hf:{tmp_path}/none" in a["reason"] for a in plan["not_applicable"])
    assert plan["hours"] is None
    assert main(["run", str(file), "--dry-run", "--store", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert "missing:" in said
    assert "not applicable: TeCoA" in said
    assert not (tmp_path / "store").exists()


def test_bad_combinations_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quick", "--measure", "--store", str(tmp_path / "s")]) == 2
    assert "--measure belongs to --dry-run" in capsys.readouterr().err
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "store.json").write_text('{"format": 99}')
    assert main(["run", "quick", "--dry-run", "--store", str(tmp_path / "newer")]) == 2
    assert "was written in format 99" in capsys.readouterr().err
