"""Every shipped matrix: parsed as it is, with a header, and planned on a machine that has neither weights nor data."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ironclip.cli.plan import show_plan
from ironclip.core.vlm import VLM
from ironclip.data.survey import SETS
from ironclip.evaluation import planning
from ironclip.evaluation.matrix import load_matrix, shipped
from ironclip.evaluation.planning import plan_jobs
from ironclip.models import load

NAMES = shipped()
EMBEDDED = ("lite", "tiny")


def header(name: str) -> str:
    text = (resources.files("ironclip") / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    return "".join(line[2:] + " " for line in text.splitlines() if line.startswith("#"))


def test_the_names_are_those_of_the_design() -> None:
    assert {"quick", "survey-table1", "survey-table2", "offline-photos", "adaptive-full", "ttc16", "robustvlm"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_says_what_it_is_for(name: str) -> None:
    matrix = load_matrix(name)
    assert matrix.jobs
    assert matrix.title != name
    said = header(name)
    for word in ("Purpose:", "Cost:", "Expected:"):
        assert word in said or name in ("quick", "foundation"), word
    assert "@" not in said.replace("@native", "")


def test_survey_matrices_use_the_surveys_sets_model_and_prompts() -> None:
    nine = sorted(s.name for s in SETS.values() if s.survey)
    for name in ("survey-table1", "survey-table2", "adaptive-full"):
        (job,) = load_matrix(name).jobs
        assert sorted(job.data) == nine
        assert (job.vlm, job.prompts) == ("hf:openai/clip-vit-base-patch32", "ttc")
    assert len(set(load_matrix("ttc16").jobs[0].data)) == 16
    (table2,) = load_matrix("survey-table2").jobs
    assert {"none", "fare", "tecoa", "aom", "pmg_aft", "ttc", "cola"} <= set(table2.defenses)
    assert table2.limit is None


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_can_be_planned_without_weights_and_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = load("tiny")

    def here(spec: str, **options: Any) -> VLM:  # no hub, and the embedded models at the price of one
        if spec.partition(":")[0] not in EMBEDDED:
            raise FileNotFoundError(f"{spec} could not be loaded: tried the local hub cache, then the hub")
        return tiny

    monkeypatch.setattr(planning, "load", here)
    monkeypatch.delenv("IRONCLIP_DATA", raising=False)
    changes: dict[str, Any] = {"budget": "smoke", "limit": 8, "adaptive_limit": 4}
    if name == "robustvlm":
        changes["attacks"] = "table2-pgd10"  # counting APGD-T takes a minute
    else:
        changes["defenses"] = "none,TeCoA(eps=7/255)"  # a state that does not ship
    jobs = list(load_matrix(name, **changes).jobs)
    plan = plan_jobs(jobs, tmp_path / "store")
    far = sorted({str(j.vlm) for j in jobs if j.vlm.partition(":")[0] not in EMBEDDED})
    assert sorted(plan["counted_on"]) == far
    gone = {m["name"]: m["get"] for m in plan["missing"]}
    for job in jobs:
        assert job.vlm not in far or "load it once while online" in gone[job.vlm]
        for data in job.data:
            if data in SETS:
                assert "ROOT" in gone[data] or "while online" in gone[data]
            assert data in gone or data in ("photos", "shapes")
            static = [s for s in plan["steps"] if s["data"].startswith(data) and s["threat"] != "clean"]
            assert static
            known = [s for s in static if s["n"] is not None]
            assert all(s["attack_forwards"] + s["forwards"] > 0 for s in known if s["defense"] == "none")
    if "TeCoA" in changes.get("defenses", ""):
        assert {a["defense"] for a in plan["not_applicable"]} == {"tecoa"}
        assert all("must be fitted first" in a["reason"] for a in plan["not_applicable"])
    monkeypatch.setattr("ironclip.cli.plan.plan_jobs", lambda *a: plan)
    assert show_plan(jobs, tmp_path / "store", False, False) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in gone.values())
    assert not (tmp_path / "store").exists()
