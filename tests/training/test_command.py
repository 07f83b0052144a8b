"""`ironclip pretrain`: a run of seconds through the public command, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import ironclip
from ironclip.cli.pretrain import pretrain


def test_a_short_run_opens_as_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates at full size; the figures are taken on 8 images of each set."""
    module = sys.modules["ironclip.cli.pretrain"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "ATTACKED", 8)
    monkeypatch.setattr(module, "CLEAN", 8)
    assert pretrain(tmp_path / "run", steps=2, batch_size=4, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert printed["command"] == (
        "ironclip pretrain --data shapes:train --out OUT --seed 0 --steps 2 --batch-size 4 --lr 0.001"
    )
    assert [(f["data"], f["attack"], f["n"]) for f in printed["figures"]] == [
        ("shapes", "none", 8),
        ("shapes", "table2-pgd10", 8),
        ("shapes", "PGD(eps=4/255, steps=10)", 8),
        ("shapes:heldout", "none", 8),
    ]
    vlm = ironclip.load(f"hf:{tmp_path / 'run'}")
    assert (vlm.image_size, vlm.dim, vlm.parts.patch_grid) == (64, 128, (8, 8))
    with pytest.raises(ValueError, match="steps: 2 there, 3 now"):
        pretrain(tmp_path / "run", steps=3, batch_size=4)


def test_data_without_captions_are_refused_before_anything_is_written(photo_root: Path, tmp_path: Path) -> None:
    folder = next(p for p in sorted(photo_root.glob("eurosat/dev")))
    with pytest.raises(ValueError, match=r"pre-training needs captions, which .* does not have; use --data shapes"):
        pretrain(tmp_path / "run", data=f"folder:{folder}", steps=1)
    assert not (tmp_path / "run").exists()
