"""Square: queries only, squares inside the image, and the optimum where it is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attack_toys import Conv, Fixed, Noisy, images, labels_of, tensor, two_class
from torch import Tensor

from ironclip.attacks._squares import bump, pyramid, shifted, window
from ironclip.attacks.pgd import FGSM
from ironclip.attacks.square import Square
from ironclip.core.ball import norms
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.views import counted, eot


@pytest.fixture(scope="module")
def conv() -> Conv:
    return Conv()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_forward_calls_only_and_never_more_than_promised(conv: Conv, norm: str) -> None:
    view, x = counted(conv), images(4)
    result = Square(eps="1/10", norm=norm, queries=30)(view, x, labels_of(conv, x), rng=SampleRNG.rows(4))
    assert result.forwards.tolist() == [31] * 4
    assert result.backwards.tolist() == [0] * 4
    assert (view.count.forwards, view.count.backwards) == (124, 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_margin_never_falls(conv: Conv, norm: str) -> None:
    x = images(8)
    result = Square(eps="1/20", norm=norm, queries=120, trace=True)(conv, x, labels_of(conv, x), rng=SampleRNG.rows(8))
    assert result.trace is not None
    for a, b in pairwise(result.trace["best_loss"]):
        assert bool((b >= a).all())
    torch.testing.assert_close(result.trace["best_loss"][-1], margin(conv(result.x_adv), labels_of(conv, x)))


def test_one_pixel_of_three_channels_reaches_the_fgsm_value() -> None:
    w = tensor(3, 1, 1)
    clf, x = two_class(w), images(16, size=1)
    y, rng = torch.zeros(16, dtype=torch.long), SampleRNG.rows(16)
    best = FGSM(eps="1/10", loss="margin")(clf, x, y, rng=rng).loss
    torch.testing.assert_close(Square(eps="1/10", queries=50)(clf, x, y, rng=rng).loss, best)


def test_start_is_stripes_and_every_pixel_stays_at_a_corner(conv: Conv) -> None:
    seen: list[Tensor] = []
    x, eps = images(3), 0.05
    clf = Fixed(lambda v: seen.append(v.clone()) or conv(v))
    result = Square(eps=eps, queries=40)(clf, x, labels_of(conv, x), rng=SampleRNG.rows(3))
    delta = seen[0] - x
    assert torch.allclose(delta.abs(), torch.full_like(delta, eps), atol=1e-6)
    assert torch.allclose(delta, delta[:, :, :1].expand_as(delta), atol=1e-6)
    assert torch.allclose((result.x_adv - x).abs(), torch.full_like(x, eps), atol=1e-6)
    changed = (seen[1] - seen[0]).abs().sum(1) > 1e-6
    for image in changed:
        r, c = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert len(r) == 0 or int(r[-1] - r[0]) < 7
        assert len(c) == 0 or int(c[-1] - c[0]) < 7


@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 12), (9, 4), (1, 1), (2, 3)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_squares_never_leave_the_image_whatever_its_shape(h: int, w: int, norm: str) -> None:
    weights = tensor(2, 3 * h * w)
    clf = Fixed(lambda v: v.flatten(1) @ weights.T)
    x = torch.full((4, 3, h, w), 0.5)
    result = Square(eps="1/10", norm=norm, queries=70)(clf, x, labels_of(clf, x), rng=SampleRNG.rows(4))
    assert result.x_adv.shape == x.shape
    assert float(norms(result.x_adv - x, norm).max()) <= 0.1 + 1e-6


def test_side_of_the_square_follows_the_schedule() -> None:
    attack = Square(p=0.8)
    p = {0: 0.8, 10: 0.8, 11: 0.4, 51: 0.2, 201: 0.1, 501: 0.05, 1001: 0.025, 2001: 0.0125}
    for query, share in p.items():
        assert attack.side(query, 224, 224) == round((share * 224 * 224) ** 0.5)
    assert attack.side(9999, 8, 8) == 1
    assert attack.side(0, 224, 30) == 30
    assert Square(queries=500, rescale=True).side(400, 224, 224) == attack.side(8000, 224, 224)
    assert Square(norm="l2").side(9000, 224, 224) % 2 == 1


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_bumps_have_norm_one_and_two_signs(side: int) -> None:
    b = bump(side)
    assert float(b.norm()) == pytest.approx(1)
    if side > 1:
        assert bool((b[: side // 2] > 0).all())
        assert bool((b[side // 2 :] < 0).all())


def test_pyramid_by_hand() -> None:
    raw = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]])
    torch.testing.assert_close(pyramid(3, 3), raw / raw.norm())


@pytest.mark.parametrize("off", [(5, 5), (1, 2)])
def test_energy_moves_from_one_window_to_the_other(off: tuple[int, int]) -> None:
    delta = tensor(2, 3, 8, 8)
    delta = delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    before, shape = delta.clone(), bump(3).flatten().expand(2, 3, 9)
    zero = torch.zeros(2, dtype=torch.long)
    to, away = window(zero, zero, 3, 8, 3), window(zero + off[0], zero + off[1], 3, 8, 3)
    out = shifted(delta.flatten(2), shape, to, away, 1.0).view(2, 3, 8, 8)
    torch.testing.assert_close(out.flatten(1).norm(dim=1), torch.ones(2))
    source, goal = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    goal[:3, :3] = True
    source[off[0] : off[0] + 3, off[1] : off[1] + 3] = True
    assert not out[:, :, source & ~goal].any()
    energy = before[:, :, source | goal].square().sum(2)
    torch.testing.assert_close(out[:, :, goal].square().sum(2), energy)
    torch.testing.assert_close(out[:, :, ~(source | goal)], before[:, :, ~(source | goal)])


def test_windows_by_hand() -> None:
    got = window(torch.tensor([0, 1]), torch.tensor([2, 0]), 2, 5, 3)
    assert got.shape == (2, 3, 4)
    assert got[0, 0].tolist() == [2, 3, 7, 8]
    assert got[1, 2].tolist() == [5, 6, 10, 11]


def test_early_leave_changes_no_flag_and_random_classifiers_never_leave(conv: Conv) -> None:
    x = images(24)
    y, rng = labels_of(conv, x), SampleRNG.rows(24)
    full = Square(eps="4/255", queries=150)(conv, x, y, rng=rng)
    quick = Square(eps="4/255", queries=150, policy="first_success")(conv, x, y, rng=rng)
    assert torch.equal(full.success, quick.success)
    assert 4 < int(quick.success.sum()) < 22
    assert bool((quick.forwards[~quick.success] == 151).all())
    assert int(quick.forwards.sum()) < int(full.forwards.sum())
    torch.testing.assert_close(full.x_adv[~full.success], quick.x_adv[~full.success])
    noisy = eot(Noisy(conv, 0.05), 3)
    result = Square(eps="4/255", queries=20, policy="first_success")(noisy, x, y, rng=rng)
    assert result.forwards.tolist() == [63] * 24


def test_more_queries_go_on_from_the_same_squares(conv: Conv) -> None:
    x = images(6)
    y, rng = labels_of(conv, x), SampleRNG.rows(6)
    few, more = (Square(eps="2/255", queries=n)(conv, x, y, rng=rng) for n in (70, 140))
    assert bool((more.loss >= few.loss).all())
    assert bool((more.success | ~few.success).all())


def test_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got 0.0; write 0.8"):
        Square(p=0)
    with pytest.raises(ValueError, match="unknown loss 'dlr'"):
        Square(loss="dlr")
