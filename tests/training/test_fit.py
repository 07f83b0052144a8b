"""`ironclip fit`: runs of seconds through the public command, read by `bench`; what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ironclip
from ironclip.cli import main
from ironclip.evaluation.entries import expand_defenses
from ironclip.evaluation.fitting import estimate_fit, fit_defense
from ironclip.registry import DEFENSES

SMALL = ["--vlm", "tiny", "--data", "shapes:train", "--limit", "20", "--steps", "3", "--batch-size", "4"]
SPEC = "TeCoA(steps=1)"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("states")
    assert main(["fit", SPEC, *SMALL, "--out", str(out), "--half", "--loop", "hold_out=4", "--licence", "CC0-1.0"]) == 0
    return out


def test_state_and_manifest(fitted: Path) -> None:
    manifest = json.loads((fitted / "tecoa.json").read_text(encoding="utf-8"))
    state = load_file(fitted / "tecoa.safetensors")
    assert manifest["recipe"].startswith("TeCoA(eps=1/255, alpha=1/255, steps=1,")
    assert (manifest["vlm"], manifest["images"], manifest["classes"], manifest["seed"]) == ("tiny-v1", 20, 48, 0)
    assert manifest["data"] == [{"name": "shapes:train", "limit": 20}]
    assert manifest["loop"]["steps"] == 3
    assert manifest["licence"] == "CC0-1.0"
    assert manifest["state"]["sha256"] == hashlib.sha256((fitted / "tecoa.safetensors").read_bytes()).hexdigest()
    assert manifest["state"]["tensors"] == len(state)
    assert {"val_loss", "val_clean", "val_robust", "loss"} <= manifest["metrics"].keys()
    kinds = {v.dtype for k, v in state.items() if k.startswith("image.")}
    assert kinds == {torch.float16}
    assert not list(fitted.glob(".*"))


def test_bench_reads_the_state(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--vlm", "tiny", "--data", "shapes", "--limit", "4", "--json", "--store", str(tmp_path / "store")]
    status = main(["bench", *shared, "--defenses", SPEC, "--state", str(fitted), "--threat", "static,graybox"])
    assert status == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(r["defense"], r["threat"]) for r in rows} == {("tecoa", "static"), ("tecoa", "graybox")}
    assert main(["bench", *shared, "--defenses", "tecoa", "--state", str(fitted)]) == 2
    assert "the state was fitted by TeCoA(eps=1/255, alpha=1/255, steps=1," in capsys.readouterr().err
    assert main(["bench", *shared, "--defenses", "tecoa", "--state", str(tmp_path)]) == 2
    assert "tecoa must be fitted first: no tecoa.safetensors for this spec and model" in capsys.readouterr().err


def test_a_state_of_another_backbone_is_refused(fitted: Path, tmp_path: Path) -> None:
    state = load_file(fitted / "tecoa.safetensors")
    state["base.sha256"] = torch.zeros(32, dtype=torch.uint8)
    save_file(state, tmp_path / "tecoa.safetensors")
    with pytest.raises(ValueError, match=r"fitted on a backbone with weights 000000000000\.\.\., tiny-v1 has "):
        ironclip.evaluate("tiny", "shapes", SPEC, limit=2, state=tmp_path)


def test_all_is_every_defense_once() -> None:
    names = expand_defenses(["tecoa", "all", "none"])
    assert sorted(names) == sorted(DEFENSES)
    assert names[0] == "tecoa"


def test_going_on_and_starting_over(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (fitted / "tecoa.safetensors").read_bytes()
    same = ["fit", SPEC, *SMALL, "--out", str(fitted), "--half", "--loop", "hold_out=4", "--licence", "CC0-1.0"]
    assert main(same) == 0
    assert (fitted / "tecoa.safetensors").read_bytes() == before
    assert main([*same, "--lr", "0.5", "--seed", "3"]) == 2
    told = capsys.readouterr().err
    assert "lr: 0.0001 there, 0.5 now" in told
    assert "seed: 0 there, 3 now" in told
    assert (fitted / "tecoa.safetensors").read_bytes() == before


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", SPEC, *SMALL, "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 forwards and 2 backwards of the image tower per image" in text
    assert "memory: " in text
    assert not (tmp_path / "new").exists()
    one, two = (
        estimate_fit(SPEC, "tiny", "shapes:train", limit=40, changes={"batch_size": b, "steps": 3}) for b in (4, 8)
    )
    assert two["bytes"]["activations"] == pytest.approx(2 * one["bytes"]["activations"], rel=0.2)
    assert two["bytes"]["model"] == one["bytes"]["model"] > 8e6
    last = estimate_fit(
        SPEC, "tiny", "shapes:train", limit=40, changes={"steps": 3, "batch_size": 4, "train": "last-1"}
    )
    assert last["trained_parameters"] == 128 * 128
    assert last["bytes"]["activations"] < one["bytes"]["activations"]
    assert last["bytes"]["training"] == 4 * 4 * 128 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["noise"], "noise learns nothing; fit takes "),
        (["tekoa"], "unknown defense 'tekoa'; did you mean 'TeCoA'?"),
        ([SPEC, "--loop", "rate=3"], "a loop has no field 'rate'; it has steps, batch_size, lr"),
        ([SPEC, "--loop", "3"], "--loop needs names, got '3'; write --loop 'ema=0.99, clip_norm=1'"),
        ([SPEC, "--train", "first-2"], "train must be all, last-N or lora-R, got 'first-2'"),
        (["TeCoA(eps=4)"], "eps must be in (0, 1], got 4; write 4/255"),
        ([SPEC, "--data", "shapes:train,shapes:train"], "shapes:train is named twice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "states"
    assert main(["fit", arguments[0], *SMALL, "--out", str(out), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_state_made_elsewhere_is_not_overwritten(fitted: Path, tmp_path: Path) -> None:
    out = tmp_path / "states"
    out.mkdir()
    (out / "tecoa.safetensors").write_bytes((fitted / "tecoa.safetensors").read_bytes())
    with pytest.raises(ValueError, match="exists already and was made elsewhere; name another --out, or write --no-r"):
        fit_defense(SPEC, "tiny", "shapes:train", out, limit=20, changes={"steps": 1})


def test_several_folders_of_photographs_are_joined(photo_root: Path, tmp_path: Path) -> None:
    """Two sets on `lite:conse`, two images a step: the label space is that of both."""
    sets = [f"folder:{photo_root / name / 'train'}" for name in ("eurosat", "sun15")]
    if not all(Path(s.removeprefix("folder:")).is_dir() for s in sets):
        pytest.skip("no eurosat and sun15 among the photographs")
    changes: dict[str, Any] = {"steps": 1, "batch_size": 2, "hold_out": 0, "train": "last-2"}
    try:
        made = fit_defense("TeCoA(steps=1)", "lite:conse", ",".join(sets), tmp_path, limit=3, changes=changes)
    except ImportError as missing:
        pytest.skip(f"lite is not installed: {missing}")
    assert made["images"] == 6
    assert 20 < made["classes"] <= 25
    assert "lite:conse" in made["licence"]
