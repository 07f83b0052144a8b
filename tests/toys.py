"""Small deterministic models for laws: smooth towers of a few hundred weights behind ``VLM.wrap``.

Random weights serve for laws only. ``toy_problem`` is a task that such a tower solves cleanly and loses under attack,
so that attacks and broken defenses can be told apart on it in milliseconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def generator(seed: int) -> torch.Generator:
    """A generator of its own: the global one stays untouched."""
    return torch.Generator().manual_seed(seed)


def filled(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """The module in eval mode with weights from ``seed``, scaled by fan-in."""
    g = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g) * (gain / math.sqrt(fan) if p.ndim > 1 else 0.1))
    return module.eval()


class ConvTower(nn.Module):
    """Two smooth strided convolutions and a linear map: (b, 3, s, s) to (b, d)."""

    def __init__(self, size: int, dim: int, width: int) -> None:
        super().__init__()
        make = nn.utils.skip_init
        self.one = make(nn.Conv2d, 3, width, 3, stride=2, padding=1)
        self.two = make(nn.Conv2d, width, 2 * width, 3, stride=2, padding=1)
        self.out = make(nn.Linear, 2 * width * (size // 4) ** 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.spatial(x).flatten(1))

    def spatial(self, x: Tensor) -> Tensor:
        return F.gelu(self.two(F.gelu(self.one(x))))

    def tokens(self, x: Tensor) -> Tensor:
        """The feature, then what each cell of the map brings to it: (b, 1 + p, d)."""
        h = self.spatial(x)
        weight = self.out.weight.view(-1, *h.shape[1:])
        cells = torch.einsum("bcij,dcij->bijd", h, weight).flatten(1, 2)
        return torch.cat([self.out(h.flatten(1)).unsqueeze(1), cells], dim=1)


class AttentionTower(nn.Module):
    """One fused-attention block over 4 x 4 patches: what second derivatives stumble over."""

    def __init__(self, size: int, dim: int, width: int) -> None:
        super().__init__()
        make = nn.utils.skip_init
        self.patch = make(nn.Conv2d, 3, width, 4, stride=4)
        self.qkv = make(nn.Linear, width, 3 * width)
        self.out = make(nn.Linear, width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x).mean(dim=1))

    def mixed(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        return tokens + F.scaled_dot_product_attention(q, k, v).squeeze(1)

    def tokens(self, x: Tensor) -> Tensor:
        """The feature, then every patch sent the same way: (b, 1 + p, d)."""
        patches = self.mixed(x)
        return self.out(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))


def words(dim: int) -> Callable[[Sequence[str]], Tensor]:
    """A text tower: every text gets its own direction, the same in every process."""

    def encode(texts: Sequence[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=6).digest(), "little") for t in texts]
        return torch.stack([torch.randn(dim, generator=generator(s)) for s in seeds])

    return encode


def toy_vlm(
    seed: int = 0, size: int = 8, dim: int = 16, width: int = 6, tower: str = "conv", scale: float = 20.0
) -> VLM:
    """A tower with fixed random weights, ``conv`` or ``attention``, and a text tower of fixed directions."""
    made = {"conv": ConvTower, "attention": AttentionTower}[tower](size, dim, width)
    vlm = VLM.wrap(filled(made, seed, 2.0), words(dim), size, (0.5,) * 3, (0.25,) * 3, scale=scale, name=f"toy-{tower}")
    return vlm.freeze()


def toy_clf(seed: int = 0, classes: Sequence[str] = CLASSES, **options: object) -> ZeroShot:
    """A zero-shot classifier over ``toy_vlm``."""
    return ZeroShot.build(toy_vlm(seed, **options), list(classes))  # type: ignore[arg-type]


def toy_images(n: int, size: int = 8, seed: int = 0) -> Tensor:
    """(n, 3, size, size) uniform pixels, a few of them exactly 0 or 1."""
    x = torch.rand(n, 3, size, size, generator=generator(1000 + seed))
    return (1.2 * x - 0.1).clamp(0.0, 1.0)


def toy_problem(
    n: int = 40, seed: int = 0, size: int = 8, dim: int = 16, contrast: float = 0.06, tower: str = "conv"
) -> tuple[ZeroShot, Tensor, Tensor]:
    """Classifier, images (n, 3, size, size) and labels (n,) of a task with five grey-ish prototypes.

    Image = grey + contrast * (prototype + noise); class features are those of the prototypes, so clean accuracy is
    high and a budget of the contrast's size overturns it.
    """
    vlm = toy_vlm(seed, size=size, dim=dim, tower=tower)
    g = generator(77 + seed)
    patterns = torch.randn(len(CLASSES), 3, size, size, generator=g).clamp(-2, 2)
    y = torch.arange(n) % len(CLASSES)
    x = 0.5 + contrast * (patterns[y] + 0.6 * torch.randn(n, 3, size, size, generator=g))
    grey = torch.full((1, 3, size, size), 0.5)
    with torch.no_grad():
        origin = vlm.encode_image(grey, normalize=False)
        prototypes = vlm.encode_image(0.5 + contrast * patterns, normalize=False) - origin
    head = _Centred(vlm.image, origin)
    made = VLM.wrap(head.eval(), vlm.text, size, (0.5,) * 3, (0.25,) * 3, scale=20.0, name=f"toy-{tower}-problem")
    made.freeze()
    clf = ZeroShot.build(made, list(CLASSES)).with_weights(prototypes)
    return clf, x.clamp(0.0, 1.0), y


class _Centred(nn.Module):
    """A tower whose features are measured from those of the grey image."""

    def __init__(self, tower: nn.Module, origin: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("origin", origin)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x) - self.get_buffer("origin")

    def tokens(self, x: Tensor) -> Tensor:
        return self.tower.tokens(x) - self.get_buffer("origin")
