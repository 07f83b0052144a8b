"""TTE written out: one view of one image at a time, pixel by pixel, float64. Nothing comes from the package."""

from __future__ import annotations

from collections.abc import Callable

import torch


def shifted(image: torch.Tensor, down: int, across: int, pad: int) -> torch.Tensor:
    _, h, w = image.shape
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            y, x = i + down - pad, j + across - pad
            if 0 <= y < h and 0 <= x < w:
                out[:, i, j] = image[:, y, x]
    return out


def mirrored(image: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(image)
    for j in range(image.shape[2]):
        out[:, :, j] = image[:, :, image.shape[2] - 1 - j]
    return out


def logits(
    classify: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, corners: list[tuple[int, int]], pad: int,
    flip: bool = True,
) -> torch.Tensor:  # fmt: skip
    """``classify``: one image (3, h, w) to (k,)."""
    views = [image] + [shifted(image, i, j, pad) for i, j in corners]
    if flip:
        views += [mirrored(v) for v in views]
    total = torch.zeros_like(classify(image))
    for v in views:
        total = total + classify(v)
    return total / len(views)
