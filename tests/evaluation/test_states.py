"""A state is found by its name in the folder, or by its recipe and model in the folders below."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ironclip
from ironclip.core.spec import full_text
from ironclip.evaluation.states import find_state


def shelve(folder: Path, spec: str, weights: str = "w") -> Path:
    defense = ironclip.build(spec)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{defense.info.name}.safetensors"
    path.write_bytes(b"")
    path.with_suffix(".json").write_text(json.dumps({"recipe": full_text(defense), "weights": weights}))
    return path


def test_a_state_in_the_folder_itself_is_taken(tmp_path: Path) -> None:
    path = shelve(tmp_path, "TeCoA(eps=4/255)")
    assert find_state(tmp_path, ironclip.build("TeCoA"), "other") == path
    assert find_state(tmp_path, ironclip.build("FARE"), "w") is None


def test_below_it_recipe_and_model_decide(tmp_path: Path) -> None:
    one, four = shelve(tmp_path / "eps1", "TeCoA"), shelve(tmp_path / "tiny" / "eps4", "TeCoA(eps=4/255)")
    assert find_state(tmp_path, ironclip.build("TeCoA"), "w") == one
    assert find_state(tmp_path, ironclip.build("TeCoA(eps=4/255)"), "w") == four
    assert find_state(tmp_path, ironclip.build("TeCoA(eps=2/255)"), "w") is None
    assert find_state(tmp_path, ironclip.build("TeCoA"), "another model") is None
    four.unlink()
    assert find_state(tmp_path, ironclip.build("TeCoA(eps=4/255)"), "w") is None


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    shelve(tmp_path / "a", "TeCoA").with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"tecoa\.json is not a manifest .* fit it again or remove it"):
        find_state(tmp_path, ironclip.build("TeCoA"), "w")


def test_missing_states_name_the_command() -> None:
    common = {"vlm": "tiny", "data": "shapes", "attacks": "FGSM", "limit": 2, "costs": False, "gallery": 0}
    with pytest.raises(ValueError, match=r"no tecoa\.safetensors for this spec and model in the zoo"):
        ironclip.evaluate(defenses="TeCoA(eps=7/255)", **common)
    with pytest.raises(
        ValueError, match=r"model in --state nowhere; run ironclip fit 'TeCoA\(eps=7/255\)' --vlm tiny-v1"
    ):
        ironclip.evaluate(defenses="TeCoA(eps=7/255)", state="nowhere", **common)
