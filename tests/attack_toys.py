"""Classifiers whose right answer is known, for the tests of attacks and views. All take ``(x, rng=None)``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ironclip.core.rng import SampleRNG
from ironclip.core.types import prediction


def tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Fixed standard normal float32 numbers."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)) * scale


def images(b: int, size: int = 8, seed: int = 0, low: float = 0.2, high: float = 0.8) -> Tensor:
    """Uniform random images, away from the walls of the box by default."""
    u = np.random.default_rng(seed).random((b, 3, size, size), dtype=np.float32)
    return torch.from_numpy(u) * (high - low) + low


class Linear(nn.Module):
    """z = W x + b, every row summed by itself in float64, so that results do not depend on the batch."""

    def __init__(self, k: int = 2, size: int = 8, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor(k, 3 * size * size, seed=seed, scale=scale).double())
        self.b = nn.Parameter(torch.zeros(k, dtype=torch.float64))

    def forward(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        flat = x.flatten(1).double()
        return ((flat[:, None] * self.w).sum(-1) + self.b).float()


def two_class(w: Tensor, offset: float = 0.0) -> Linear:
    """Logits (0, w.x + offset); ``w``: (3, h, w)."""
    model = Linear(2, w.shape[-1])
    with torch.no_grad():
        model.w.copy_(torch.stack([torch.zeros_like(w), w]).flatten(1))
        model.b.copy_(torch.tensor([0.0, offset]))
    return model


class Conv(nn.Module):
    """A small convolutional classifier with smooth activations; float64 inside, so that batches agree."""

    def __init__(self, k: int = 10, seed: int = 0, scale: float = 8.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(1)
        )
        self.head = nn.Linear(12 * 16, k)
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for p in self.parameters():
                fan = p[0].numel() if p.ndim > 1 else 1
                p.copy_(torch.from_numpy(rng.standard_normal(p.shape) / max(fan, 1) ** 0.5 * (p.ndim > 1)))
            self.head.weight.mul_(scale)
        self.double()

    def forward(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.head(self.net((x - 0.5).double() * 4)).float()


class Noisy:
    """``base`` behind Gaussian pixel noise of its own stream."""

    randomized = True

    def __init__(self, base: nn.Module, sigma: float = 0.1) -> None:
        self.base, self.sigma = base, sigma

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        assert rng is not None
        return self.base(x + self.sigma * rng.fold("noise").normal_like(x))


class Rounded:
    """``base`` behind a layer that rounds to ``levels`` steps: zero gradient everywhere."""

    def __init__(self, base: nn.Module, levels: int = 16) -> None:
        self.base, self.levels = base, levels

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.base((x * self.levels).round() / self.levels)


class Constant:
    """The same logits for every image, with a gradient that is exactly zero."""

    def __init__(self, logits: tuple[float, ...]) -> None:
        self.logits = torch.tensor(logits)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.logits + 0.0 * x.flatten(1).sum(1, keepdim=True)


class Fixed:
    """A classifier from any function of the pixels."""

    def __init__(self, fn: object) -> None:
        self.fn = fn

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.fn(x)  # type: ignore[operator]


def labels_of(clf: object, x: Tensor) -> Tensor:
    """What the classifier says of the clean images: attacks then start from full accuracy."""
    with torch.no_grad():
        return prediction(clf(x, SampleRNG.rows(x.shape[0])))  # type: ignore[operator]


def runner_up_gap(clf: object, x: Tensor) -> Tensor:
    """(b,) clean distance of the two best logits."""
    with torch.no_grad():
        top = clf(x, SampleRNG.rows(x.shape[0])).topk(2, dim=1).values  # type: ignore[operator]
    return top[:, 0] - top[:, 1]
