"""Gates: anchors of the undefended model, checked before any defense is run."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from ironclip.cli import main
from ironclip.evaluation.gates import Gate, GateError, misses
from ironclip.evaluation.matrix import load_matrix
from ironclip.evaluation.run import evaluate_jobs

MATRIX = """
vlm = "tiny"
data = ["shapes"]
attacks = ["table2-pgd10"]
limit = 20
gallery = 0
costs = false
[[block]]
defenses = ["none", "clipure"]
[[gate]]
data = "shapes"
clean = {clean}
robust = {robust}
source = "docs/results.md"
"""


def written(folder: Path, clean: float = 99.5, robust: float = 50.5, more: str = "") -> Path:
    path = folder / "m.toml"
    path.write_text(MATRIX.format(clean=clean, robust=robust) + more)
    return path


def gate(**changes: Any) -> Gate:
    return Gate(**{"vlm": "m", "data": "d", "clean": 60.0, "robust": 2.4, "source": "a paper", **changes})


@pytest.mark.parametrize(
    ("clean", "robust", "n"),
    [(60.0, 2.4, 10_000), (60.9, 4.3, 10_000), (70.0, 5.0, 20), (50.0, 0.0, 20)],
)
def test_near_or_within_the_interval_passes(clean: float, robust: float, n: int) -> None:
    assert misses(gate(), clean, robust, n) == ""


@pytest.mark.parametrize(
    ("clean", "robust", "cause"),
    [
        (1.0, 0.0, "labels in another order"),
        (55.0, 2.0, "QuickGELU"),
        (60.2, 30.9, "an attack that is too weak"),
        (60.2, 0.0, "an attack that is stronger"),
    ],
)
def test_what_is_off_names_its_likely_cause(clean: float, robust: float, cause: str) -> None:
    said = misses(gate(), clean, robust, 10_000)
    assert cause in said
    assert "a paper" in said
    assert "--no-gates" in said


def test_a_set_up_fault_known_from_the_field_is_refused() -> None:
    """73.0 and 30.9 were once reported for plain CLIP on CIFAR10, whose anchor is 85.1 and 0.7."""
    assert misses(gate(clean=85.1, robust=0.7), 73.0, 30.9, 10_000)


def test_without_a_robust_anchor_only_clean_counts() -> None:
    assert misses(gate(robust=None), 60.0, 99.0, 10_000) == ""


def test_a_true_anchor_lets_the_table_through(tmp_path: Path) -> None:
    matrix = load_matrix(written(tmp_path))
    results = evaluate_jobs(matrix.jobs, tmp_path / "store")
    assert {r["defense"] for r in results["rows"]} == {"none", "clipure"}


def test_a_missed_anchor_stops_before_any_defense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = written(tmp_path, clean=20.0), tmp_path / "store"
    with pytest.raises(GateError, match=r"undefended tiny on shapes is not where it should be \(n = 20\): clean"):
        evaluate_jobs(load_matrix(path).jobs, store)
    assert main(["run", str(path), "--store", str(store)]) == 2
    assert "anchor 20" in capsys.readouterr().err
    assert main(["query", "select distinct defense from cells", "--store", str(store), "--json"]) == 0
    assert [r["defense"] for r in json.loads(capsys.readouterr().out)["rows"]] == ["none"]
    assert main(["run", str(path), "--store", str(store), "--no-gates", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {r["defense"] for r in said["rows"]} == {"none", "clipure"}
    assert any("gates were off" in n for n in said["notes"])


def test_a_gate_is_for_its_model_prompts_and_space(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert load_matrix(path).jobs[0].gates
    assert not load_matrix(path, vlm="lite").jobs[0].gates
    assert not load_matrix(path, prompts="ttc").jobs[0].gates
    assert not load_matrix(path, gates=False).jobs[0].gates


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[[gate]]\ndata = "shapes"\nclaen = 3\n', "m gate 2: unknown field 'claen'; did you mean 'clean'"),
        ('[[gate]]\ndata = "shapes"\nclean = 3\n', "m gate 2: source missing"),
        ('[[gate]]\ndata = "shapes"\nclean = 300\nsource = "x"\n', "clean must be in percent, 0 to 100, got 300"),
        ('[[gate]]\ndata = "shapes"\nclean = "99.5"\nsource = "x"\n', "0 to 100, got '99.5'"),
        ('[[gate]]\ndata = "shapess"\nclean = 99.5\nsource = "x"\n', "m gate 2: no block has tiny on shapess"),
        (
            '[[gate]]\nvlm = "tinny"\ndata = "shapes"\nclean = 9\nsource = "x"\n',
            "no block has tinny on shapes; blocks have: tiny on shapes",
        ),
    ],
)
def test_bad_gates(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_matrix(written(tmp_path, more=more))


def test_gates_in_single_brackets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    text = MATRIX.replace("[[gate]]", "[gate]")
    path.write_text(text.format(clean=99.5, robust=50.5))
    with pytest.raises(ValueError, match=r"write \[\[gate\]\] in double brackets"):
        load_matrix(path)


def test_a_gate_that_cannot_be_measured_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation import run as running

    def broken(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(running, "run_static", broken)
    with pytest.raises(GateError, match="could not be measured for its gate: RuntimeError: the device is gone"):
        evaluate_jobs(load_matrix(written(tmp_path)).jobs, tmp_path / "store")


def test_the_surveys_gates_are_its_undefended_row() -> None:
    table = json.loads((files("ironclip.report") / "published.json").read_text())["tables"][0]
    gates = load_matrix("survey-table2").jobs[0].gates
    assert {g.data: [g.clean, g.robust] for g in gates} == table["rows"][0]["sets"]


def test_the_dry_run_names_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(written(tmp_path)), "--store", str(tmp_path / "s"), "--dry-run"]) == 0
    assert "gate: tiny on shapes: clean 99.5, 50.5 under table2-pgd10 (docs/results.md)" in capsys.readouterr().err
