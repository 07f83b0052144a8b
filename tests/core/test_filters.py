"""Filters against their definitions, and JPEG's arithmetic against a real file."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from toys import toy_images

from ironclip.core.filters import LUMA, _table, gaussian_blur, jpeg_file, jpeg_smooth, low_pass, median


def smooth_images(n: int, size: int) -> torch.Tensor:
    """Blurred noise: something that a JPEG file can hold."""
    return gaussian_blur(gaussian_blur(toy_images(n, size=size), 2.0, 9), 2.0, 9).clamp(0, 1)


def test_blur_is_the_weighted_mean_of_the_window() -> None:
    x = torch.zeros(1, 3, 9, 9)
    x[:, :, 4, 4] = 1.0
    got = gaussian_blur(x, 1.0)
    raw = [math.exp(-0.5 * d * d) for d in (-2, -1, 0, 1, 2)]
    line = [v / sum(raw) for v in raw]
    for i in range(-2, 3):
        for j in range(-2, 3):
            assert float(got[0, 1, 4 + i, 4 + j]) == pytest.approx(line[i + 2] * line[j + 2], rel=1e-5)
    assert float(got.sum()) == pytest.approx(3.0)
    assert torch.equal(gaussian_blur(x, 0.0), x)


def test_low_pass_keeps_slow_waves_and_cuts_fast_ones() -> None:
    at = torch.arange(32) / 32
    slow, fast = (0.5 + 0.2 * torch.cos(2 * math.pi * f * at).expand(1, 3, 32, 32) for f in (3, 9))
    torch.testing.assert_close(low_pass(slow, 5), slow)
    torch.testing.assert_close(low_pass(fast, 5), torch.full_like(fast, 0.5))
    x = toy_images(2, size=32)
    torch.testing.assert_close(low_pass(low_pass(x, 5), 5), low_pass(x, 5))
    torch.testing.assert_close(low_pass(x, 100), x)
    torch.testing.assert_close(low_pass(x, 0).std(dim=(2, 3)), torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_median_by_hand() -> None:
    x = toy_images(2)
    got = median(x, 3)
    for i, j in ((1, 1), (4, 6), (6, 2)):
        window = x[1, 2, i - 1 : i + 2, j - 1 : j + 2].flatten().tolist()
        assert float(got[1, 2, i, j]) == pytest.approx(statistics.median(window))
    spike = torch.full((1, 3, 8, 8), 0.5)
    spike[:, :, 3, 3] = 1.0
    assert torch.equal(median(spike, 3), torch.full_like(spike, 0.5))


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("size", [32, 40])
def test_smooth_jpeg_is_near_the_real_file(quality: int, size: int) -> None:
    x = smooth_images(4, size)
    real, near = jpeg_file(x, quality), jpeg_smooth(x, quality)
    assert torch.equal((real * 255).round() / 255, real)
    assert float((real - near).abs().mean()) < 0.004
    grey = x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert float((jpeg_file(grey, quality) - jpeg_smooth(grey, quality)).abs().mean()) < 0.5 / 255
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(jpeg_smooth(leaf, quality).square().sum(), leaf)
    assert bool(torch.isfinite(grad).all())
    assert float(grad.abs().min(dim=-1).values.max()) > 0


def test_quality_scales_the_table() -> None:
    assert _table(LUMA, 50).tolist() == [[float(v) for v in row] for row in LUMA]
    assert float(_table(LUMA, 100).max()) == 1.0
    assert _table(LUMA, 75)[0, :3].tolist() == [8.0, 6.0, 5.0]


def test_each_image_by_itself() -> None:
    x = toy_images(3, size=16)
    for f in (
        lambda v: jpeg_file(v, 75),
        lambda v: jpeg_smooth(v, 75),
        lambda v: median(v, 3),
        lambda v: low_pass(v, 4),
    ):
        torch.testing.assert_close(f(x), torch.cat([f(x[i : i + 1]) for i in range(3)]))
        assert f(x[:0]).shape == (0, 3, 16, 16)
