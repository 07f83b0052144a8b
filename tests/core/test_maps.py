"""Maps of patches by hand, and enlarged maps against pixel-by-pixel ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import tga_zsr_literal as literal

from ironclip.core.maps import bilinear, enlarged, map_distance, patch_scores, square_side, stretched, triangle


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def length(d: list[float] | torch.Tensor, size: int) -> float:
    d = torch.as_tensor(d).float().reshape(1, -1)
    return float(map_distance(d, torch.zeros_like(d), size))


def test_two_by_two_on_four_by_four() -> None:
    u = bilinear(2, 4)
    torch.testing.assert_close(u.T @ u, torch.tensor([[1.625, 0.375], [0.375, 1.625]]).double())
    assert length([1, 0, 0, 0], 4) == pytest.approx(1.625)
    assert length([1, 1, 1, 1], 4) == pytest.approx(4)
    assert length([1, -1, -1, 1], 4) == pytest.approx(2.5)


def test_seven_by_seven_on_224() -> None:
    gram = bilinear(7, 224).T @ bilinear(7, 224)
    assert float(gram[3, 3]) == pytest.approx(21.328125)
    assert float(gram[0, 0]) == float(gram[6, 6]) == pytest.approx(26.6640625)
    assert float(gram[0, 1]) == pytest.approx(5.3359375)
    assert float(gram[0, 2]) == 0
    assert length(torch.full((49,), 0.1), 224) == pytest.approx(22.4)
    assert length(torch.eye(49)[24], 224) == pytest.approx(21.328125)
    assert length(torch.eye(49)[0], 224) == pytest.approx(26.6640625)
    assert float(enlarged(torch.eye(49)[24:25], 224).max()) == pytest.approx(0.984375**2)


@pytest.mark.parametrize(("side", "size"), [(7, 224), (4, 9), (3, 3), (5, 2), (1, 6), (8, 1)])
def test_small_form_equals_the_enlarged_maps(side: int, size: int) -> None:
    a, b = noise(3, side**2), noise(3, side**2, seed=1)
    wide = [F.interpolate(m.view(3, 1, side, side), size=size, mode="bilinear", align_corners=False) for m in (a, b)]
    torch.testing.assert_close(enlarged(a, size), wide[0][:, 0], rtol=1e-5, atol=1e-5)
    difference = (wide[0] - wide[1]).flatten(1)
    torch.testing.assert_close(map_distance(a, b, size), difference.norm(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(map_distance(a, b, size, "l1"), difference.abs().mean(dim=1), rtol=1e-5, atol=1e-5)
    cosine = F.cosine_similarity(wide[0].flatten(1), wide[1].flatten(1))
    torch.testing.assert_close(map_distance(a, b, size, "cos"), 1 - cosine, rtol=1e-4, atol=1e-5)
    assert triangle(side, size).shape == (min(side, size), side)
    if size > 30:
        return  # pixel by pixel, that takes seconds
    by_hand = literal.enlarge(a[0].double(), size)
    torch.testing.assert_close(enlarged(a.double(), size)[0], by_hand, rtol=1e-10, atol=1e-12)


def test_distance_of_a_map_to_itself_has_no_gradient() -> None:
    for kind in ("l2", "l1", "cos"):
        a = noise(2, 9).requires_grad_(True)
        value = map_distance(a, a.detach(), 12, kind)
        (grad,) = torch.autograd.grad(value.sum(), a)
        torch.testing.assert_close(value, torch.zeros(2), rtol=0, atol=1e-6)
        assert bool(torch.isfinite(grad).all())
        assert kind == "cos" or float(grad.abs().max()) == 0


def test_maps_reach_from_zero_to_one() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    torch.testing.assert_close(stretched(a), torch.tensor([[0, 0.25, 0.5, 1]]))
    torch.testing.assert_close(stretched(3 * a - 7), stretched(a))
    torch.testing.assert_close(stretched(-a), 1 - stretched(a))
    wide = stretched(a, enlarged(a, 8).flatten(1))
    torch.testing.assert_close(enlarged(wide, 8).amin(), torch.tensor(0.0))
    torch.testing.assert_close(enlarged(wide, 8).amax(), torch.tensor(1.0))


def test_minimum_and_maximum_carry_gradient() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 5.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(stretched(a)[0, 1], a)
    torch.testing.assert_close(grad, torch.tensor([[-0.1875, 0.25, 0, -0.0625]]))


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_map_is_zeros_with_a_finite_gradient(value: float) -> None:
    a = torch.full((1, 9), value, requires_grad=True)
    m = stretched(a)
    assert torch.equal(m, torch.zeros(1, 9))
    (grad,) = torch.autograd.grad(map_distance(m, noise(1, 9), 12).sum(), a)
    assert bool(torch.isfinite(grad).all())


def test_token_normalisations() -> None:
    tokens, text = noise(2, 10, 6), F.normalize(noise(2, 6, seed=3), dim=1)
    torch.testing.assert_close(F.normalize(tokens, dim=1).square().sum(dim=1), torch.ones(2, 6))
    found = {}
    for mode in ("feature", "token", "none"):
        found[mode] = patch_scores(tokens, text, mode)
        by_hand = literal.scores(tokens[1].double(), text[1].double(), mode)
        torch.testing.assert_close(found[mode][1].double(), by_hand, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stretched(patch_scores(tokens, -text, mode)), 1 - stretched(found[mode]))
    assert float(found["feature"].abs().max()) <= 1
    assert not torch.allclose(found["feature"], found["token"], atol=1e-2)
    moved = tokens.clone()
    moved[:, 0] += 3  # the class token
    assert not torch.allclose(patch_scores(moved, text, "token"), found["token"], atol=1e-3)
    assert torch.equal(patch_scores(moved, text, "feature"), found["feature"])


def test_refusals() -> None:
    assert square_side(49) == square_side(49, (7, 7)) == 7
    with pytest.raises(ValueError, match="attention maps need a square grid, got 8 patches"):
        square_side(8)
    with pytest.raises(ValueError, match="attention maps need a square grid, got 2 x 8 patches"):
        square_side(16, (2, 8))
    with pytest.raises(ValueError, match="size must be 1 or more, got 0; write 224"):
        enlarged(noise(1, 4), 0)
    with pytest.raises(ValueError, match="unknown distance 'l3'"):
        map_distance(noise(1, 4), noise(1, 4), 4, "l3")
    with pytest.raises(ValueError, match="unknown normalise 'batch'"):
        patch_scores(noise(1, 5, 3), noise(1, 3), "batch")
