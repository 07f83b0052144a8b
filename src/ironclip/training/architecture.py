"""CLIP's architecture at any size, and the start of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.core.rng import SampleRNG

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Architecture:
    """Sizes of both transformers; the feed-forward layers are four times as wide. ``dim``: of the joint space."""

    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 6
    vision_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    context: int = 32
    dim: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads or width % 4:
                raise ValueError(f"{tower}_width must be a multiple of 4 and of {tower}_heads={heads}, got {width}")


def build_clip(sizes: Architecture, tokenizer: Any, seed: int) -> Any:
    """A ``transformers.CLIPModel`` with weights that follow from ``seed`` and each tensor's name alone.

    Matrices start as in Radford et al. 2021 (arXiv 2103.00020): residual branches scaled down by the depth. The
    positions of patches start as sines and cosines of their row and column, and stay learnable.
    """
    from transformers import CLIPConfig, CLIPModel

    def tower(name: str) -> dict[str, Any]:
        width = getattr(sizes, f"{name}_width")
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": getattr(sizes, f"{name}_layers"),
            "num_attention_heads": getattr(sizes, f"{name}_heads"),
            "hidden_act": "quick_gelu",
            "projection_dim": sizes.dim,
        }

    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": sizes.context, **marks}
    config = CLIPConfig(
        text_config={**tower("text"), **text, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**tower("vision"), "image_size": sizes.image_size, "patch_size": sizes.patch_size},
        projection_dim=sizes.dim,
        **marks,
    )
    with torch.random.fork_rng(devices=[]):  # the library draws weights that we replace: leave the caller's stream
        model = CLIPModel._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.zero_()
            elif value.ndim >= 2 or name.endswith("class_embedding"):
                layers = sizes.text_layers if name.startswith("text") else sizes.vision_layers
                noise = SampleRNG.of(seed, [name]).fold("weights").normal(*value.shape)[0]
                value.copy_(noise * _spread(name, value, layers))
        grid = sizes.image_size // sizes.patch_size
        positions = model.vision_model.embeddings.position_embedding.weight
        positions[1:] = 0.5 * waves(grid, sizes.vision_width)
    return model


def _spread(name: str, value: Tensor, layers: int) -> float:
    """Standard deviation of a tensor's first values."""
    if "position_embedding" in name:
        return 0.01
    if "token_embedding" in name:
        return 0.02
    if name.endswith("fc1.weight"):
        return (2 * value.shape[1]) ** -0.5
    if name.endswith(("out_proj.weight", "fc2.weight")):
        width = min(value.shape)
        return float((2 * layers * width) ** -0.5)
    return float(value[0].numel() ** -0.5) if value.ndim > 1 else float(value.numel() ** -0.5)


def waves(grid: int, width: int) -> Tensor:
    """(grid * grid, width): sines and cosines of column and row at wavelengths from 2 pi to 200 pi patches."""
    row, column = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


def whiten_patches(patches: nn.Conv2d, images: Tensor, seed: int, floor: float = 0.1) -> None:
    """Start the patch embedding as a whitening of the patches of ``images``: (n, 3, h, w), normalised.

    Neighbouring pixels agree, so a random embedding sees little but mean colours and the edges that make a shape are
    learned late; whitened patches show both alike and training gets by with a fraction of the images. (The idea for
    the first layer of a small network: Jordan 2024, arXiv 2404.00498; here by principal components and a random
    rotation.) ``floor`` is added to the variances so that pixel noise is not blown up.
    """
    size, width = patches.kernel_size[0], patches.out_channels
    rows = F.unfold(images.double(), size, stride=size).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    keep = min(width, rows.shape[1])
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    vectors = vectors * torch.sign(vectors.sum(0))  # eigenvectors have no sign of their own
    noise = SampleRNG.of(seed, ["whitening"]).normal(width, keep)[0].double()
    turn, _ = torch.linalg.qr(noise)
    kernel = turn @ (vectors / (values.clamp(min=0) + floor).sqrt()).T
    with torch.no_grad():
        patches.weight.copy_(kernel.view(width, 3, size, size))


def log_scale_cap() -> float:
    """CLIP's bound on the learned temperature, 100, as the logarithm that the model stores."""
    return math.log(100.0)
