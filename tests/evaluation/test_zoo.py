"""The states that ship: what their manifests say is true, they open on their model, and together they stay small."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ironclip
from ironclip.core.spec import full_text
from ironclip.evaluation.states import find_state

ZOO = Path(str(resources.files("ironclip"))) / "zoo"
MANIFESTS = sorted(ZOO.glob("*/*/*.json"))


def test_the_zoo_is_there_and_small() -> None:
    assert len(MANIFESTS) >= 5
    assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) < 60e6


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_manifest_tells_the_truth(path: Path) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    file = path.with_suffix(".safetensors")
    assert told["state"]["file"] == file.name
    assert told["state"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["licence"] == "Apache-2.0"
    assert "/tmp" not in told["command"]
    vlm = ironclip.load(told["vlm"])
    assert told["weights"] == vlm.weights_hash
    defense = ironclip.build(told["recipe"])
    assert full_text(defense) == told["recipe"]
    assert find_state(None, defense, vlm.weights_hash) == file
    clf = ironclip.ZeroShot.build(vlm, ["red circle", "blue square", "green star"])
    state = load_file(file)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(defense.apply(clf, state)(x)).all()
    assert not torch.equal(defense.apply(clf, state)(x), clf(x))


def test_an_adaptive_attacker_may_use_what_a_graybox_one_has(tmp_path: Path) -> None:
    strong = "PGD(eps=2/255, alpha=1/510, steps=20)"  # the budget's own members take three steps
    results = ironclip.evaluate(
        "tiny", "shapes", "tecoa", strong, "graybox,adaptive", limit=16, batch_size=16, budget="smoke", store=tmp_path
    )
    gray, adaptive = results["rows"]
    assert (gray["threat"], adaptive["threat"]) == ("graybox", "adaptive")
    (worst,) = results["worst"]
    by = {m["name"]: m for m in worst["members"]}
    assert by["graybox"]["ran"] == 16
    assert by["graybox"]["broke"] >= 1, "the test needs images that only the graybox attack breaks"
    assert adaptive["robust"] <= gray["robust"] < 100
