"""Tiny random diffusion models in folders, as `diffusers` writes them; made once, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import generator

_HOME = Path(tempfile.gettempdir()) / f"ironclip-tests-{os.getuid() if hasattr(os, 'getuid') else 0}"
TINY_UNET = (_HOME / "unet-v1").as_posix()


def need_diffusers() -> None:
    if find_spec("diffusers") is None:
        pytest.skip('diffusers is not installed: pip install "ironclip[diffusion]"')


def randomised(net: Any, seed: int, gain: float = 1.0) -> Any:
    """The network with weights that do not depend on the global generator."""
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (gain / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1))
    return net.eval()


def unet(**changes: Any) -> Any:
    """A UNet2DModel of some thousand weights for 16 x 16 images."""
    from diffusers import UNet2DModel

    fields = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return randomised(UNet2DModel(**{**fields, **changes}), 1)


def save_pipeline(folder: Path, net: Any, **scheduler: Any) -> Path:
    """A folder with `unet` and `scheduler`, like that of a DDPM pipeline."""
    from diffusers import DDPMScheduler

    net.save_pretrained(folder / "unet")
    DDPMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return folder


def tiny_unet() -> None:
    """Make the folder TINY_UNET, or skip without diffusers."""
    need_diffusers()
    if Path(TINY_UNET).is_dir():
        return
    _HOME.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=_HOME))
    save_pipeline(aside, unet())
    try:
        os.replace(aside, TINY_UNET)
    except OSError:  # another worker was first
        shutil.rmtree(aside, ignore_errors=True)


def tiny_prior(folder: Path, dim: int = 16, tokens: int = 5, text: str | None = "linear", std: float = 0.5) -> Path:
    """A random PriorTransformer as the hub's pipelines hold it, in the sub-folder `prior`."""
    from diffusers import PriorTransformer

    with torch.random.fork_rng(devices=[]):
        net = PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=dim, num_embeddings=tokens,
            encoder_hid_proj_type=text,
        )  # fmt: skip
    net = randomised(net, 2)
    with torch.no_grad():
        net.clip_mean.copy_(torch.linspace(-0.1, 0.1, dim)[None])
        net.clip_std.fill_(std)
    net.save_pretrained(folder / "prior")
    return folder
