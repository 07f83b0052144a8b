"""`conv4:MODEL`, `conv4:WIDTH:MODEL`: an untrained image network in the joint space of another model's texts.

The network of anchor-based adversarial training from nothing (LAAT, arXiv 2301.13096): four 3 x 3 convolutions of 512
channels with ReLU and 2 x 2 max-pooling, the mean over the map, a linear map without bias. Group norm stands where
published code has batch norm, so that an image never depends on its neighbours and attack and training see the same
function. Its weights are always the same; it knows nothing until a defense is fitted.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.core.parts import Parts
from ironclip.core.vlm import VLM

WIDTH, DEPTH, GROUP = 512, 4, 16
NOTE = "conv4's image network is untrained: it is at chance until a defense is fitted on it"


class Conv4(nn.Module):
    """Normalised pixels (b, 3, h, w) to features (b, dim); ``tokens`` sends every cell of the map the same way."""

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = [3, *[width] * DEPTH]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(width // GROUP, width) for _ in range(DEPTH))
        self.out = nn.Linear(width, dim, bias=False)

    def spatial(self, x: Tensor) -> Tensor:
        """(b, width, h / 16, w / 16)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.spatial(x).mean(dim=(2, 3)))
        return out

    def tokens(self, x: Tensor) -> Tensor:
        cells = self.spatial(x).flatten(2).transpose(1, 2)
        out: Tensor = self.out(torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1))
        return out


def start(network: Conv4) -> None:
    """The same in every process: convolutions normal with variance 2 / fan-out (He et al. 2015), the map 1 / fan-in."""
    draws = np.random.Generator(np.random.Philox(key=0))
    with torch.no_grad():
        for layer in (*network.convs, network.out):
            w: Any = layer.weight
            fan = 2 / (9 * w.shape[0]) if w.ndim == 4 else 1 / w.shape[1]
            w.copy_(torch.from_numpy(draws.standard_normal(tuple(w.shape), dtype=np.float32)) * math.sqrt(fan))
            if layer.bias is not None:
                layer.bias.zero_()


def load_conv4(rest: str = "") -> VLM:
    """``MODEL`` or ``WIDTH:MODEL``: any model of the library lends its texts, image size and pixel statistics.

    Raises ValueError for no model, a width that is no multiple of 16, or images below 16 pixels.
    """
    from ironclip.models import load

    first, _, other = rest.partition(":")
    width, base = (int(first), other) if first.isdigit() else (WIDTH, rest)
    if not base:
        raise ValueError(
            f"conv4 needs the model whose texts it learns, got {rest!r}; write conv4:tiny or conv4:64:tiny"
        )
    if width < GROUP or width % GROUP:
        raise ValueError(f"the width of conv4 must be a multiple of {GROUP}, got {width}; write conv4:64:{base}")
    texts = load(base)
    if texts.image_size < 2**DEPTH:
        raise ValueError(f"conv4 needs images of {2**DEPTH} pixels or more, {texts.name} has {texts.image_size}")
    network = Conv4(texts.dim, width).eval()
    start(network)
    side = texts.image_size // 2**DEPTH
    return VLM(
        f"conv4:{width}:{texts.name}",
        network,
        texts.text,
        texts.tokenize,
        image_size=texts.image_size,
        dim=texts.dim,
        scale=texts.scale,
        mean=texts.get_buffer("mean").flatten().tolist(),
        std=texts.get_buffer("std").flatten().tolist(),
        eot=texts.eot,
        causal=texts.causal,
        parts=Parts(token_embedding=texts.parts.token_embedding, patch_grid=(side, side)),
        facts={
            **{k: v for k, v in texts.facts.items() if k == "max_tokens"},
            "tower": "convolutional",
            "notes": [NOTE],
        },
    )
