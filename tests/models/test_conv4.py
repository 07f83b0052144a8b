"""The untrained network of LAAT: the same in every process, in the space of another model's texts."""

from __future__ import annotations

import pytest
import torch

import ironclip
from ironclip.core.zeroshot import ZeroShot
from ironclip.models.conv4 import Conv4


@pytest.fixture(scope="module")
def vlm() -> ironclip.VLM:
    return ironclip.load("conv4:32:tiny")


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_it_lives_in_the_space_of_the_texts(vlm: ironclip.VLM) -> None:
    tiny = ironclip.load("tiny")
    assert (vlm.name, vlm.image_size, vlm.dim, vlm.scale) == ("conv4:32:tiny-v1", 64, tiny.dim, tiny.scale)
    assert vlm.encode_image(images()).shape == (3, 128)
    assert torch.equal(vlm.encode_text(["a red circle"]), tiny.encode_text(["a red circle"]))
    assert not any(p.requires_grad for p in vlm.parameters())
    clf = ZeroShot.build(vlm, ["red circle", "blue square"])
    assert clf(images()).shape == (3, 2)
    assert "untrained" in vlm.facts["notes"][0]


def test_it_is_the_same_every_time(vlm: ironclip.VLM) -> None:
    torch.rand(3)
    again = ironclip.load("conv4:32:tiny")
    assert again.weights_hash == vlm.weights_hash
    assert float(again.image.convs[0].weight.std()) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)
    assert float(again.image.out.weight.std()) == pytest.approx(32**-0.5, rel=0.1)


def test_images_do_not_influence_each_other(vlm: ironclip.VLM) -> None:
    x = images()
    alone = torch.cat([vlm.encode_image(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(vlm.encode_image(x), alone, rtol=0, atol=1e-5)


def test_tokens_are_the_cells_of_the_map(vlm: ironclip.VLM) -> None:
    tokens = vlm.image_tokens(images())
    assert tokens.shape == (3, 17, 128)
    assert vlm.parts.patch_grid == (4, 4)
    torch.testing.assert_close(tokens[:, 0], vlm.encode_image(images(), normalize=False), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), tokens[:, 0], rtol=0, atol=1e-5)


def test_the_published_width() -> None:
    network = Conv4(8)
    assert [tuple(c.weight.shape) for c in network.convs] == [(512, 3, 3, 3), *[(512, 512, 3, 3)] * 3]
    assert network.out.bias is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conv4", "conv4 needs the model whose texts it learns, got ''; write conv4:tiny"),
        ("conv4:40:tiny", "the width of conv4 must be a multiple of 16, got 40; write conv4:64:tiny"),
        ("conv4:large", "unknown model 'large'"),
    ],
)
def test_refusals(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.load(spec)
