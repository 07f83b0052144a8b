"""Shared by all tests: one torch thread per worker, hypothesis without a clock, where the photographs are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ci")


def photographs() -> Path | None:
    """Root of the development photographs: IRONCLIP_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("IRONCLIP_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    return root if root.is_dir() else None


@pytest.fixture(scope="session")
def photo_root() -> Path:
    """The photographs' root, or a skip that says what is missing."""
    root = photographs()
    if root is None:
        pytest.skip("no photographs: set IRONCLIP_DATA to a folder of data sets")
    return root
