"""Shared by the data tests: the folder of photographs, a private hash cache, small images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _private_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def shared() -> Path:
    """Root of the real photographs; skips where there are none."""
    default = Path(__file__).parents[3] / "shared" / "data"
    root = Path(os.environ.get("IRONCLIP_DATA") or default)
    if not root.is_dir():
        pytest.skip("no photographs: set IRONCLIP_DATA")
    return root


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A noisy RGB image."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(cat=2, dog=1): an ImageFolder of that many PNG files per class."""

    def make(where: str = "set", **classes: int) -> Path:
        base = tmp_path / where
        for c, (name, count) in enumerate(classes.items()):
            (base / name).mkdir(parents=True)
            for k in range(count):
                picture(100 * c + k).save(base / name / f"{k}.png")
        return base

    return make
