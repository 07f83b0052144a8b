"""Views: the same crop as the image library's, parameters by sample, gradients of a linear map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import toy_images

from ironclip.core.augment import Crops, crop_views, draw_crops, random_views
from ironclip.core.rng import SampleRNG


def test_a_crop_by_hand() -> None:
    """Two middle pixels of a row of four, stretched to four: edges repeat, the rest are quarters."""
    x = torch.tensor([[0.0, 0.2, 0.6, 1.0]]).expand(1, 3, 4, 4)
    boxes = torch.tensor([[[0, 1, 4, 2], [0, 1, 4, 2]]])
    out = crop_views(x, Crops(boxes, torch.tensor([[False, True]])))
    torch.testing.assert_close(out[0, 0, 0, 0], torch.tensor([0.2, 0.3, 0.5, 0.6]))
    torch.testing.assert_close(out[0, 1, 2, 3], torch.tensor([0.6, 0.5, 0.3, 0.2]))


def test_equals_cropping_and_interpolating() -> None:
    x, rng = toy_images(3, size=24), SampleRNG.rows(3, seed=4)
    crops = draw_crops(rng, 9, (24, 24), plain=True)
    got = crop_views(x, crops)
    for i in range(3):
        for j in range(9):
            top, left, h, w = crops.boxes[i, j].tolist()
            patch = x[i : i + 1, :, top : top + h, left : left + w]
            want = F.interpolate(patch, (24, 24), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(got[i, j], want.flip(-1) if crops.flips[i, j] else want, rtol=0, atol=1e-5)


def test_equals_the_imaging_library_to_a_grey_level() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    crops = draw_crops(SampleRNG.rows(1), 6, (32, 32))
    got = crop_views(x, crops)[0]
    for j in range(6):
        top, left, h, w = crops.boxes[0, j].tolist()
        want = image.fromarray(pixels).crop((left, top, left + w, top + h)).resize((32, 32), image.Resampling.BILINEAR)
        want = torch.from_numpy(np.array(want)).permute(2, 0, 1) / 255
        assert float((got[j] - (want.flip(-1) if crops.flips[0, j] else want)).abs().max()) < 1.5 / 255


def test_view_zero_is_the_image_bit_for_bit() -> None:
    x = toy_images(2, size=17)
    assert torch.equal(random_views(x, 4, SampleRNG.rows(2))[:, 0], x)
    assert not torch.equal(random_views(x, 4, SampleRNG.rows(2), plain=False)[:, 0], x)
    assert random_views(x, 1, SampleRNG.rows(2)).shape == (2, 1, 3, 17, 17)


def test_views_belong_to_samples_and_extend_each_other() -> None:
    x, rng = toy_images(4, size=16), SampleRNG.of(3, list("abcd"))
    all_views = random_views(x, 12, rng)
    torch.testing.assert_close(random_views(x[2:3], 12, rng[2:3]), all_views[2:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(random_views(x, 5, rng), all_views[:, :5], rtol=0, atol=1e-6)
    one = draw_crops(rng, 12, (16, 16), plain=True)
    assert torch.equal(draw_crops(rng, 5, (16, 16), plain=True).boxes, one.boxes[:, :5])
    for other in (rng.at(1), SampleRNG(4, rng.ids), rng.fold("x")):
        assert not torch.equal(draw_crops(other, 12, (16, 16), plain=True).boxes, one.boxes)
    parts = torch.cat([crop_views(x, one.views(slice(0, 7))), crop_views(x, one.views(slice(7, None)))], dim=1)
    torch.testing.assert_close(parts, all_views, rtol=0, atol=1e-6)
    index = torch.tensor([[3, 0], [1, 1], [11, 2], [5, 6]])
    picked = crop_views(x, one.pick(index))
    want = torch.stack([all_views[i, index[i]] for i in range(4)])
    torch.testing.assert_close(picked, want, rtol=0, atol=1e-6)


def test_boxes_have_the_asked_law() -> None:
    crops = draw_crops(SampleRNG.rows(1), 4000, (60, 90), scale=(0.2, 0.6), flip=0.25)
    top, left, h, w = crops.boxes[0].double().unbind(-1)
    share, ratio = h * w / 5400, w / h
    assert bool(((top >= 0) & (left >= 0) & (top + h <= 60) & (left + w <= 90)).all())
    assert float(share.min()) > 0.19
    assert float(share.max()) < 0.62
    assert float(share.mean()) == pytest.approx(0.4, abs=0.01)
    assert 0.72 < float(ratio.min()) < 0.78
    assert 1.30 < float(ratio.max()) < 1.38
    assert float(crops.flips.double().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(left.min()) == 0
    assert float((left + w).max()) == 90


def test_a_crop_that_never_fits_is_the_largest_centred_one() -> None:
    crops = draw_crops(SampleRNG.rows(1), 3, (10, 40), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0)
    assert crops.boxes[0].tolist() == [[0, 15, 10, 10]] * 3


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_any_order_pass(order: int) -> None:
    x = toy_images(1, size=6).double().requires_grad_(True)
    crops = draw_crops(SampleRNG.rows(1), 2, (6, 6))
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(lambda x: crop_views(x, crops).square(), (x,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"v": 0}, "views must be at least 1, got 0; write 64"),
        ({"v": 2, "scale": (0.5, 0.1)}, r"scale must be a range inside \(0, 1\]"),
        ({"v": 2, "scale": (8, 100)}, r"scale must be a range inside \(0, 1\], got \(8, 100\)"),
        ({"v": 2, "ratio": (0.0, 1.0)}, "ratio must be a range of positive numbers"),
        ({"v": 2, "flip": 50}, "flip must be a probability, got 50; write 0.5"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_crops(SampleRNG.rows(1), size=(8, 8), **fields)


def test_bad_shapes() -> None:
    crops = draw_crops(SampleRNG.rows(2), 3, (8, 8))
    with pytest.raises(ValueError, match="crops are of 2 images"):
        crop_views(toy_images(3), crops)
    with pytest.raises(ValueError, match="rng carries 1 sample ids but x has 3 rows"):
        random_views(toy_images(3), 2, SampleRNG.rows(1))
    with pytest.raises(ValueError, match=r"boxes must be \(b, v, 4\)"):
        Crops(crops.boxes, crops.flips[:, :1])
