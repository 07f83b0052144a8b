"""AugMix: every operation against the imaging library, the mixture by hand, parameters by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import generator, toy_images

from ironclip.core import augmix
from ironclip.core.augmix import Mixes, draw_mixes, mix_views
from ironclip.core.rng import SampleRNG

NAMES = [op.__name__ for op in augmix.OPERATIONS]


def smooth_picture(size: int = 48) -> np.ndarray:
    rng = np.random.default_rng(3)
    base = rng.integers(20, 230, (6, 6, 3)).astype(np.float64)
    picture = np.kron(base, np.ones((size // 6, size // 6, 1))) + rng.normal(0, 8, (size, size, 3))
    return picture.clip(0, 255).astype(np.uint8)


def with_library(name: str, pixels: np.ndarray, level: float) -> np.ndarray:
    """The operation as image libraries have it, by the published amounts."""
    image = pytest.importorskip("PIL.Image")
    from PIL import ImageOps

    size = pixels.shape[0]
    picture, sign, ell = image.fromarray(pixels), np.sign(level), abs(level)

    def warp(*coefficients: float) -> object:
        return picture.transform((size, size), image.Transform.AFFINE, coefficients, image.Resampling.BILINEAR)

    shift = int(sign) * int(ell * size / 30)
    made = {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(0.4 * ell)),
        "rotate": lambda: picture.rotate(int(sign) * int(3 * ell), resample=image.Resampling.BILINEAR),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(25.6 * ell)),
        "shear_x": lambda: warp(1, 0.03 * level, 0, 0, 1, 0),
        "shear_y": lambda: warp(1, 0, 0, 0.03 * level, 1, 0),
        "translate_x": lambda: warp(1, 0, shift, 0, 1, 0),
        "translate_y": lambda: warp(1, 0, 0, 0, 1, shift),
    }[name]()
    return np.asarray(made)


@pytest.mark.parametrize("level", [0.95, -0.72])
@pytest.mark.parametrize("name", NAMES)
def test_operations_equal_the_imaging_library(name: str, level: float) -> None:
    pixels = smooth_picture()
    pixels[5:9, 5:9] = 250
    want = torch.from_numpy(with_library(name, pixels, level).copy()).permute(2, 0, 1).float()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    got = getattr(augmix, name)(x, torch.tensor([level]))[0] * 255
    assert float((got - want).abs().max()) <= 1.01, name
    assert name in ("posterize", "solarize") or float((got - x[0] * 255).abs().max()) > 2


def test_flat_images_survive_everything() -> None:
    x = torch.full((1, 3, 8, 8), 0.5)
    for op in augmix.OPERATIONS:
        assert bool(torch.isfinite(op(x, torch.tensor([1.0]))).all()), op


def test_the_mixture_by_hand() -> None:
    """One view: half the image, the rest two thirds posterized and one third twice negative above the threshold."""
    x = torch.full((1, 1, 3, 2, 2), 100 / 255)
    operations = torch.full((1, 1, 3, 3), -1)
    operations[0, 0, 0, 0] = NAMES.index("posterize")
    mixes = Mixes(torch.tensor([[0.5]]), torch.tensor([[[2 / 3, 1 / 3, 0.0]]]), operations, torch.ones(1, 1, 3, 3))
    want = (0.5 * 100 + 0.5 * (2 / 3 * 96 + 1 / 3 * 100)) / 255
    torch.testing.assert_close(mix_views(x, mixes), torch.full_like(x, want))


def test_parameters_belong_to_samples_and_extend_each_other() -> None:
    rng = SampleRNG.of(1, list("abc"))
    whole = draw_mixes(rng, 9)
    for part in (draw_mixes(rng, 4), whole.views(slice(0, 4))):
        assert torch.equal(part.operations, whole.operations[:, :4])
    assert torch.equal(draw_mixes(rng[1:2], 9).levels, whole.levels[1:2])
    assert not torch.equal(draw_mixes(rng.at(1), 9).levels, whole.levels)
    views = toy_images(27, size=16).view(3, 9, 3, 16, 16)
    together = mix_views(views, whole)
    alone = mix_views(views[1:2], draw_mixes(rng[1:2], 9))
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1


def test_parameters_have_the_asked_law() -> None:
    m = draw_mixes(SampleRNG.rows(1), 4000)
    lengths = (m.operations[0] >= 0).sum(-1).flatten()
    assert [float((lengths == n).double().mean()) for n in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.02)
    assert bool((m.operations[0, :, :, 0] >= 0).all())
    used = m.operations[m.operations >= 0]
    assert torch.bincount(used, minlength=9).double().div(len(used)).tolist() == pytest.approx([1 / 9] * 9, abs=0.01)
    torch.testing.assert_close(m.chains.sum(-1), torch.ones(1, 4000))
    assert float(m.chains.var()) == pytest.approx(1 / 18, abs=0.003)
    assert float(m.image.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.1 <= float(m.levels.abs().min()) < 0.11
    assert 0.99 < float(m.levels.abs().max()) <= 1


def gradient(op: str, x: Tensor, level: float = 0.9) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    out = getattr(augmix, op)(leaf, torch.full((len(x),), level))
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    return grad


def test_gradients() -> None:
    x = toy_images(2, size=12).clamp(0.05, 0.95)
    for op in ("equalize", "posterize"):
        assert torch.equal(gradient(op, x), torch.ones_like(x))
    bright = (x * 255).round() >= 256 - 23
    assert torch.equal(gradient("solarize", x), torch.where(bright, -1.0, 1.0))
    double = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=generator(0)).requires_grad_(True)
    level = torch.tensor([0.9, -0.4], dtype=torch.float64)
    for op in (augmix.rotate, augmix.shear_x, augmix.translate_y, augmix.autocontrast):
        assert torch.autograd.gradcheck(lambda x, op=op: op(x, level), (double,), fast_mode=True)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"mixes are of \(1, 4\) views \(b, v\), got \(1, 5\)"):
        mix_views(torch.zeros(1, 5, 3, 4, 4), draw_mixes(SampleRNG.rows(1), 4))
