"""Defenses that cannot be run here: shown with the reason beside those that can; alone they are bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toyset import toy_block

import ironclip
from ironclip.cli import main
from ironclip.report.summary import blocks, check
from ironclip.report.tables import latex, markdown

TINY: Any = {"attacks": "PGD(eps=4/255, steps=1)", "costs": False, "gallery": 0, "budget": "smoke"}


def test_a_defense_without_its_state_stands_beside_the_others(tmp_path: Path) -> None:
    vlm, data = toy_block()
    results = ironclip.evaluate(vlm, data, "none,tecoa,noise", state=tmp_path, **TINY)
    assert [r["defense"] for r in results["rows"]] == ["none", "noise"]
    (absent,) = results["not_applicable"]
    assert (absent["vlm"], absent["data"], absent["defense"]) == ("toy-problem", "toys", "tecoa")
    assert absent["reason"].startswith("tecoa must be fitted first: no tecoa.safetensors for this spec and model in ")
    (block,) = blocks(results)
    fact = f"{absent['title']} not applicable: {absent['reason']}"
    assert fact in block.facts
    assert "must be fitted first" in markdown(results)
    assert "must be fitted first" in latex(results)


def test_a_defense_that_needs_a_transformer_on_a_convolutional_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.defenses.noise import Noise

    def apply(self: Any, clf: Any, state: Any = None) -> Any:
        return clf.vlm.vision_blocks

    monkeypatch.setattr(Noise, "apply", apply)
    vlm, data = toy_block()
    results = ironclip.evaluate(vlm, data, "none,noise", **TINY)
    assert "has no transformer image tower; deep visual prompts need one" in results["not_applicable"][0]["reason"]
    with pytest.raises(ValueError, match="has no transformer image tower"):
        ironclip.evaluate(vlm, data, "noise", **TINY)


def test_a_state_of_another_backbone_is_a_reason_too(tmp_path: Path) -> None:
    save_file({"image.nothing": torch.zeros(1)}, tmp_path / "tecoa.safetensors")
    vlm, data = toy_block()
    results = ironclip.evaluate(vlm, data, "none,tecoa", state=tmp_path, **TINY)
    assert len(results["not_applicable"]) == 1
    assert results["not_applicable"][0]["reason"]


def test_nothing_that_can_be_run_is_bad_input() -> None:
    vlm, data = toy_block()
    with pytest.raises(ValueError, match=r"none of the defenses can be run: tecoa on toy-problem: .*; fare on "):
        ironclip.evaluate(vlm, data, "tecoa,fare", **TINY)
    with pytest.raises(ValueError, match="tecoa must be fitted first"):
        ironclip.evaluate(vlm, data, "tecoa", **TINY)


def test_a_typing_error_is_not_a_missing_defense() -> None:
    vlm, data = toy_block()
    with pytest.raises(ValueError, match="unknown defense 'tecoo'"):
        ironclip.evaluate(vlm, data, "none,tecoo", **TINY)


def test_blocks_without_any_row_are_notes() -> None:
    absent = {"vlm": "m", "data": "d", "defense": "x", "defense_spec": "X()", "title": "X", "reason": "no tower"}
    assert check({"format": 1, "not_applicable": [absent]})["notes"] == ["m, d: X not applicable: no tower"]


def test_all_missing_sets_are_named_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    options = ["--vlm", "tiny", "--defenses", "none", "--store", str(store)]
    assert main(["bench", *options, "--data", "shapes,tv:pets,dtd:train,country211"]) == 2
    said = capsys.readouterr().err
    assert "OxfordIIITPet('ROOT'" in said
    assert "DTD('ROOT'" in said
    assert "Country211('ROOT'" in said
    assert not store.exists()


def test_time_is_up_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = tmp_path / "m.toml", tmp_path / "store"
    many = ", ".join(f'"PGD(eps={i}/255, steps=10)"' for i in range(1, 60))
    file.write_text(f'[[block]]\nvlm = "tiny"\ndata = ["shapes"]\nlimit = 8\nbatch_size = 2\nattacks = [{many}]\n')
    assert main(["run", str(file), "--store", str(store), "--max-hours", "0.0012", "--json"]) == 130
    said = capsys.readouterr()
    assert "time is up: --max-hours 0.0012" in said.err
    assert "run the same command to go on" in said.err
    assert not said.out
    assert not list(store.rglob("*.tmp"))
    assert json.loads((store / "store.json").read_text())["format"] == 1
    assert main(["run", str(file), "--store", str(store), "--max-hours", "0"]) == 2
    assert "max-hours must be above 0, got 0; write --max-hours 2.5" in capsys.readouterr().err
