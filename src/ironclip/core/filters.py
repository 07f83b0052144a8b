"""Image filters on pixels (b, 3, h, w) in [0, 1]: blur, low-pass, median, JPEG. Batched, each image by itself."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.grad import forwarded


def gaussian_blur(x: Tensor, sigma: float, size: int = 5) -> Tensor:
    """Gaussian of standard deviation ``sigma`` pixels on a ``size`` x ``size`` window, edges mirrored. Linear in x."""
    if sigma == 0:
        return x
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-0.5 * (at / sigma) ** 2)
    line = (line / line.sum()).to(x)
    pad = size // 2
    flat = F.pad(x, (pad, pad, pad, pad), mode="reflect").flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, line.view(1, 1, 1, size)), line.view(1, 1, size, 1))
    return flat.view(x.shape)


def low_pass(x: Tensor, radius: float) -> Tensor:
    """Fourier coefficients within ``radius`` cycles per image of zero frequency; the rest is cut off. Linear in x."""
    if x.numel() == 0:
        return x
    h, w = x.shape[-2:]
    rows = torch.fft.fftfreq(h, 1 / h, dtype=torch.float64, device=x.device)
    columns = torch.fft.rfftfreq(w, 1 / w, dtype=torch.float64, device=x.device)
    keep = (rows[:, None] ** 2 + columns[None, :] ** 2) <= radius**2
    out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * keep, s=(h, w))
    return out


def median(x: Tensor, size: int) -> Tensor:
    """Median over a ``size`` x ``size`` window (odd), edges mirrored; its derivative is that of the pixel chosen."""
    pad = size // 2
    wide = F.pad(x, (pad, pad, pad, pad), mode="reflect")
    windows = wide.unfold(2, size, 1).unfold(3, size, 1).flatten(4)
    return windows.median(dim=-1).values


# JPEG (ITU T.81): colour transform, 4:2:0 chroma, 8 x 8 cosine transform, rounding by the standard's example tables

LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def jpeg_file(x: Tensor, quality: int) -> Tensor:
    """Through a real JPEG file in memory, 4:2:0, and back: pixels rounded to 8 bits. No derivative."""
    import numpy as np
    from PIL import Image

    out = []
    for image in (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
        out.append(torch.from_numpy(np.array(Image.open(file).convert("RGB"))))
    return torch.stack(out).permute(0, 3, 1, 2).to(x) / 255 if out else x


def jpeg_smooth(x: Tensor, quality: int) -> Tensor:
    """The arithmetic of JPEG where every rounding has derivative one: close to ``jpeg_file``, a useful gradient."""
    h, w = x.shape[-2:]
    turn = torch.tensor(TO_YCC).to(x)
    ycc = torch.einsum("ij,bjhw->bihw", turn, _through(x * 255))
    ycc = F.pad(ycc, (0, -w % 16, 0, -h % 16), mode="replicate")
    parts = []
    for i in range(3):
        plane = ycc[:, i] - (128.0 if i == 0 else 0.0)
        small = plane if i == 0 else F.avg_pool2d(plane[:, None], 2)[:, 0]
        back = _blocks(small, _table(LUMA if i == 0 else CHROMA, quality).to(x))
        parts.append(back if i == 0 else F.interpolate(back[:, None], scale_factor=2.0, mode="bilinear")[:, 0])
    rgb = torch.einsum("ij,bjhw->bihw", turn.double().inverse().to(x), torch.stack(parts, 1))
    return (_through(rgb[:, :, :h, :w] + 128) / 255).clamp(0.0, 1.0)


def _through(values: Tensor) -> Tensor:
    return forwarded(values.round(), values)


def _table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """The IJG scaling of the standard's tables."""
    share = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * share + 50) // 100).clamp(1, 255).float()


def _blocks(plane: Tensor, table: Tensor) -> Tensor:
    """(b, h, w) planes through the rounded cosine transform of their 8 x 8 blocks and back."""
    at = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(torch.pi * (2 * at[None] + 1) * at[:, None] / 16) / 2
    basis[0] /= 2**0.5
    basis = basis.to(plane)
    b, h, w = plane.shape
    blocks = plane.view(b, h // 8, 8, w // 8, 8).transpose(2, 3)
    found = _through(basis @ blocks @ basis.T / table) * table
    return (basis.T @ found @ basis).transpose(2, 3).reshape(b, h, w)
