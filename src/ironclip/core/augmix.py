"""AugMix at its lowest severity, in floating point: three random chains of image operations, mixed with the image.

Hendrycks et al. 2020 (arXiv 1912.02781). Crops are not part of it. Geometry, autocontrast, solarize and the mixing are
differentiated; equalize and posterize, whose derivative is zero or none, pass gradients straight through. Between
operations nothing is rounded to 8 bits, which published pipelines on image files do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.grad import forwarded
from ironclip.core.rng import SampleRNG

CHAINS, DEPTH = 3, 3


def autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Each channel of (n, 3, h, w) stretched to [0, 1]; flat channels stay."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1.0), x)


def equalize(x: Tensor, level: Tensor) -> Tensor:
    """Each channel's histogram of 256 grey levels made flat, by the rule of common image libraries."""
    grey = (x.detach() * 255).round().long().clamp(0, 255).flatten(2)
    counts = torch.zeros(*grey.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, grey, torch.ones_like(grey))
    last = counts.gather(2, grey.amax(dim=2, keepdim=True))
    step = (grey.shape[2] - last) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    made = table.clamp(max=255).gather(2, grey).view(x.shape).to(x) / 255
    return forwarded(torch.where((step > 0).unsqueeze(-1), made, x), x)


def posterize(x: Tensor, level: Tensor) -> Tensor:
    """The four highest of eight bits, whatever the level: at this severity the rule always rounds to four."""
    return forwarded((x * 255).round().div(16).floor() * 16 / 255, x)


def solarize(x: Tensor, level: Tensor) -> Tensor:
    """Negative above the threshold 256 - int(25.6 level) grey levels."""
    threshold = (256 - (25.6 * level.abs()).floor()).view(-1, 1, 1, 1)
    return torch.where((x.detach() * 255).round() < threshold, x, 1 - x)


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """(n, 3, h, w) read at ``matrix`` (n, 2, 3) times (column, row, 1), in pixels from the top left corner; bilinear.

    Whatever lies outside is black, and edges are repeated for the half pixel at the border. Linear in x; derivatives of
    the first order only.
    """
    n, (height, width) = x.shape[0], x.shape[2:]
    down, across = (torch.arange(s, device=x.device, dtype=x.dtype) + 0.5 for s in (height, width))
    spots = torch.stack(torch.broadcast_tensors(across[None, :], down[:, None], x.new_ones(1, 1)), dim=-1)
    unit = 2 * matrix.to(x) / x.new_tensor([[width], [height]])
    unit[:, :, 2] -= 1
    grid = (spots.view(-1, 3) @ unit.transpose(0, 1).reshape(2 * n, 3).T).view(-1, 2, n).permute(2, 0, 1)
    grid = grid.reshape(n, height, width, 2)
    read = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(dim=-1)
    return read * inside.to(x).unsqueeze(1)


def _matrix(*rows: tuple[Tensor | float, Tensor | float, Tensor | float], like: Tensor) -> Tensor:
    return torch.stack([torch.stack([torch.as_tensor(e).to(like).expand_as(like) for e in r], -1) for r in rows], -2)


def rotate(x: Tensor, level: Tensor) -> Tensor:
    """By int(3 level) degrees about the centre."""
    angle = level.sign() * (3 * level.abs()).floor() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    cx, cy = x.shape[3] / 2, x.shape[2] / 2
    shift = (cx - cos * cx + sin * cy, cy - sin * cx - cos * cy)
    return affine(x, _matrix((cos, -sin, shift[0]), (sin, cos, shift[1]), like=level))


def shear_x(x: Tensor, level: Tensor) -> Tensor:
    """Columns move by 0.03 level of the row."""
    return affine(x, _matrix((1.0, 0.03 * level, 0.0), (0.0, 1.0, 0.0), like=level))


def shear_y(x: Tensor, level: Tensor) -> Tensor:
    """Rows move by 0.03 level of the column."""
    return affine(x, _matrix((1.0, 0.0, 0.0), (0.03 * level, 1.0, 0.0), like=level))


def translate_x(x: Tensor, level: Tensor) -> Tensor:
    """By int(level width / 30) pixels: a third of the image at the highest severity, a tenth of that here."""
    pixels = level.sign() * (level.abs() * x.shape[3] / 30).floor()
    return affine(x, _matrix((1.0, 0.0, pixels), (0.0, 1.0, 0.0), like=level))


def translate_y(x: Tensor, level: Tensor) -> Tensor:
    """By int(level height / 30) pixels."""
    pixels = level.sign() * (level.abs() * x.shape[2] / 30).floor()
    return affine(x, _matrix((1.0, 0.0, 0.0), (0.0, 1.0, pixels), like=level))


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    autocontrast, equalize, posterize, rotate, solarize, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
"""Images (n, 3, h, w) in [0, 1] and signed levels (n,) of magnitude 0.1 to 1 to images."""


@dataclass(frozen=True, eq=False)
class Mixes:
    """``image``: (b, v) share of the image itself. ``chains``: (b, v, 3) shares among the chains. ``operations``:
    (b, v, 3, 3) index into ``OPERATIONS``, -1 where a chain has ended. ``levels``: (b, v, 3, 3) signed levels.
    """

    image: Tensor
    chains: Tensor
    operations: Tensor
    levels: Tensor

    def views(self, part: slice) -> Mixes:
        """Some views of every image."""
        return Mixes(self.image[:, part], self.chains[:, part], self.operations[:, part], self.levels[:, part])


def draw_mixes(rng: SampleRNG, v: int) -> Mixes:
    """Parameters for v views of each sample: Dirichlet(1, 1, 1), Beta(1, 1), 1 to 3 operations a chain, levels."""
    u = rng.fold("augmix").uniform(v, 1 + 2 * CHAINS + 3 * CHAINS * DEPTH)
    share, raw, depth, which, level, sign = u.split([1, CHAINS, CHAINS, 9, 9, 9], dim=-1)
    weights = -(1 - raw).clamp(min=1e-30).log()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    lengths = 1 + (depth * DEPTH).long().clamp(max=DEPTH - 1)
    kind = (which * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1).unflatten(-1, (CHAINS, DEPTH))
    kind = torch.where(torch.arange(DEPTH) < lengths.unsqueeze(-1), kind, -1)
    levels = (0.1 + 0.9 * level) * torch.where(sign < 0.5, -1.0, 1.0)
    return Mixes(share.squeeze(-1), weights, kind, levels.unflatten(-1, (CHAINS, DEPTH)))


def mix_views(views: Tensor, mixes: Mixes) -> Tensor:
    """(b, v, 3, h, w) in [0, 1] to the same shape: m r + (1 - m) sum_j w_j chain_j(r)."""
    b, v = views.shape[:2]
    if mixes.image.shape != (b, v):
        raise ValueError(f"mixes are of {tuple(mixes.image.shape)} views (b, v), got {(b, v)}")
    out = mixes.image.to(views).view(b, v, 1, 1, 1) * views
    flat = views.flatten(0, 1)
    shares = ((1 - mixes.image).unsqueeze(-1) * mixes.chains).flatten(0, 1).to(views)
    for j in range(CHAINS):
        chain = flat
        for step in range(DEPTH):
            kinds = mixes.operations[:, :, j, step].flatten()
            levels = mixes.levels[:, :, j, step].flatten()
            order = kinds.argsort(stable=True)
            parts: list[Tensor] = []
            first = 0
            for kind, count in zip(*(t.tolist() for t in kinds.unique(return_counts=True)), strict=True):
                rows, first = order[first : first + count], first + count
                part = chain[rows.to(views.device)]
                parts.append(part if kind < 0 else OPERATIONS[kind](part, levels[rows].to(views)))
            chain = torch.cat(parts)[order.argsort().to(views.device)]
        out = out + (shares[:, j].view(-1, 1, 1, 1) * chain).view_as(views)
    return out.clamp(0.0, 1.0)
