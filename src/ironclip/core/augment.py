"""Random views of images, differentiable in the pixels, one stream per sample.

Parameters are drawn first, as data, and depend on (seed, sample, draw) alone; applying them is linear in the pixels, so
gradients of any order pass through. More views extend fewer: the first views stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG

TRIES = 10
"""A crop that does not fit is drawn again this often, then the largest centred one is taken (as in torchvision)."""


@dataclass(frozen=True, eq=False)
class Crops:
    """``boxes``: (b, v, 4) whole pixels top, left, height, width. ``flips``: (b, v) mirrored left to right."""

    boxes: Tensor
    flips: Tensor

    def __post_init__(self) -> None:
        if self.boxes.ndim != 3 or self.boxes.shape[-1] != 4 or self.flips.shape != self.boxes.shape[:2]:
            raise ValueError(
                f"boxes must be (b, v, 4) and flips (b, v), got {tuple(self.boxes.shape)} and {tuple(self.flips.shape)}"
            )

    @property
    def v(self) -> int:
        """Views of each image."""
        return self.boxes.shape[1]

    def views(self, part: slice) -> Crops:
        """Some views of every image."""
        return Crops(self.boxes[:, part], self.flips[:, part])

    def pick(self, index: Tensor) -> Crops:
        """Per image the views ``index`` (b, s)."""
        boxes = self.boxes.gather(1, index.cpu()[..., None].expand(-1, -1, 4))
        return Crops(boxes, self.flips.gather(1, index.cpu()))


def draw_crops(
    rng: SampleRNG,
    v: int,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    plain: bool = False,
) -> Crops:
    """Boxes of random resized crops of an image of ``size`` (h, w), flipped with probability ``flip``.

    ``scale``: range of the crop's share of the area, drawn uniformly. ``ratio``: range of width over height, drawn
    uniformly in the logarithm. ``plain``: view 0 is the whole image as it is and v - 1 views are random. Raises
    ValueError for no views and for ranges that are empty or outside (0, 1] for ``scale``.
    """
    if v < 1:
        raise ValueError(f"views must be at least 1, got {v}; write 64")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be a range inside (0, 1], got {scale}; write (0.08, 1)")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must be a range of positive numbers, got {ratio}; write (3/4, 4/3)")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, got {flip}; write 0.5")
    height, width = size
    u = rng.fold("crops").uniform(max(v - int(plain), 0), 4 * TRIES + 1).double()
    area, shape, down, across = u[..., 1:].unflatten(-1, (TRIES, 4)).unbind(-1)
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = torch.exp(low + shape * (high - low))
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = (down * (height - h + 1)).floor().long().clamp(max=height - 1)
    left = (across * (width - w + 1)).floor().long().clamp(max=width - 1)
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    boxes = torch.stack([part.gather(-1, first).squeeze(-1) for part in (top, left, h, w)], dim=-1)
    boxes = torch.where(fits.any(dim=-1)[..., None], boxes, torch.tensor(_centred(height, width, ratio)))
    flips = u[..., 0] < flip
    if plain:
        whole = torch.tensor([0, 0, height, width]).expand(len(rng), 1, 4)
        boxes, flips = torch.cat([whole, boxes], 1), torch.cat([torch.zeros(len(rng), 1, dtype=torch.bool), flips], 1)
    return Crops(boxes, flips)


def _centred(height: int, width: int, ratio: tuple[float, float]) -> list[int]:
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def resampling(start: Tensor, length: Tensor, n: int, flips: Tensor | None = None) -> Tensor:
    """(..., n, n) float64 matrices: ``length`` samples from ``start`` on become n, bilinear, mirrored at ``flips``.

    Sample centres lie at half numbers and the crop's edges are repeated beyond it, as image libraries do. For a whole
    axis the matrix is the identity.
    """
    start, length = start.double()[..., None], length.double()[..., None]
    at = (torch.arange(n, dtype=torch.float64) + 0.5) * length / n - 0.5
    at = torch.minimum(at.clamp(min=0.0), length - 1) + start
    weights = (1 - (at[..., None] - torch.arange(n, dtype=torch.float64)).abs()).clamp(min=0.0)
    if flips is not None:
        weights = torch.where(flips[..., None, None], weights.flip(-2), weights)
    return weights


def crop_views(x: Tensor, crops: Crops) -> Tensor:
    """(b, 3, h, w) to (b, v, 3, h, w): each crop stretched to the full size. Linear in x."""
    if x.ndim != 4 or x.shape[0] != crops.boxes.shape[0]:
        raise ValueError(f"crops are of {crops.boxes.shape[0]} images (b, 3, h, w), got {tuple(x.shape)}")
    top, left, height, width = crops.boxes.unbind(-1)
    b, v, (h, w) = x.shape[0], crops.v, x.shape[-2:]
    rows = resampling(top, height, h).to(x)
    columns = resampling(left, width, w, crops.flips).to(x)
    wide = x.flatten(1, 2) @ columns.flatten(1, 2).transpose(1, 2)  # (b, 3h, vw): one large product per image
    tall = rows @ wide.view(b, 3, h, v, w).permute(0, 3, 2, 1, 4).reshape(b, v, h, 3 * w)
    return tall.view(b, v, h, 3, w).transpose(2, 3).contiguous()


def random_views(
    x: Tensor,
    v: int,
    rng: SampleRNG,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    plain: bool = True,
) -> Tensor:
    """(b, 3, h, w) pixels to (b, v, 3, h, w): random resized crops and flips, view 0 the plain image with ``plain``."""
    rng.check_rows(x)
    size = (x.shape[-2], x.shape[-1])
    return crop_views(x, draw_crops(rng, v, size, scale, ratio, flip, plain))
