"""Anchors by hand, and against rotations there and back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import laat_literal

from ironclip.core.anchors import ANCHORS, anchors, frame_of


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane."""
    rad = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([rad.cos(), rad.sin()], dim=1)


def cone(classes: int = 12, dim: int = 16) -> torch.Tensor:
    """Text features in a narrow cone, of different lengths."""
    lengths = torch.linspace(0.5, 9, classes, dtype=torch.float64)[:, None]
    return lengths * F.normalize(noise(classes, dim) + 3 * noise(1, dim, seed=1), dim=1)


def test_two_and_four_in_the_plane() -> None:
    two = at(30, -30)
    torch.testing.assert_close(anchors(two, frame_of(two)), at(90, -90))
    four = at(30, -30, 15, -15)
    torch.testing.assert_close(anchors(four, frame_of(four)), at(90, -90, 45, -45))
    assert frame_of(four).widest == pytest.approx(math.pi / 6)


def test_three_around_an_axis() -> None:
    turn = at(0, 120, 240)
    v = torch.cat([torch.full((3, 1), math.cos(math.pi / 6)).double(), 0.5 * turn], dim=1)
    assert float(v[0] @ v[1]) == pytest.approx(0.625)
    a = anchors(v, frame_of(v))
    assert float(a[0] @ a[1]) == pytest.approx(-0.5)
    assert float(a[1] @ a[2]) == pytest.approx(-0.5)


def test_classes_never_seen_use_the_frame_of_the_others() -> None:
    training = at(30, -30)
    frame = frame_of(training)
    torch.testing.assert_close(anchors(at(45), frame), at(135))
    torch.testing.assert_close(anchors(torch.cat([training, at(45)]), frame)[:2], anchors(training, frame))


@pytest.mark.parametrize("seed", [0, 1])
def test_closed_form_equals_rotations(seed: int) -> None:
    t = cone() + 0.1 * seed
    new = noise(5, 16, seed=7) + t.mean(0)
    torch.testing.assert_close(anchors(t, frame_of(t)), laat_literal.expanded(t, t), rtol=0, atol=1e-9)
    torch.testing.assert_close(anchors(new, frame_of(t)), laat_literal.expanded(t, new), rtol=0, atol=1e-9)
    low = anchors(t.float(), frame_of(t.float()))
    torch.testing.assert_close(low, laat_literal.expanded(t, t), rtol=0, atol=1e-6)


def test_laws_of_the_expansion() -> None:
    t = cone()
    frame = frame_of(t)
    a, v = anchors(t, frame), F.normalize(t, dim=1)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(12).double())
    before, after = (torch.acos(m @ frame.centre) for m in (v, a))
    assert float(after.max()) == pytest.approx(math.pi / 2)
    assert torch.equal(before.argsort(), after.argsort())
    direction = F.normalize(v - (v @ frame.centre)[:, None] * frame.centre, dim=1)
    assert bool(((a * direction).sum(dim=1) >= 0).all())
    off = ~torch.eye(12, dtype=torch.bool)
    assert float((a @ a.T)[off].mean()) < float((v @ v.T)[off].mean()) - 0.3
    scales = torch.linspace(0.1, 8, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(anchors(t * scales, frame_of(t * scales)), a)
    q, _ = torch.linalg.qr(noise(16, 16, seed=9))
    torch.testing.assert_close(anchors(t @ q.T, frame_of(t @ q.T)), a @ q.T)


def test_kinds_and_shares() -> None:
    t = cone()
    frame, v = frame_of(t), F.normalize(t, dim=1)
    for kind in ANCHORS:
        torch.testing.assert_close(anchors(t, frame, kind, 0.0), v)
        assert torch.allclose(anchors(t, frame, kind, 0.3).norm(dim=1), torch.ones(12).double())
    torch.testing.assert_close(anchors(t, frame, "text"), v)
    level = anchors(t, frame, "level")
    torch.testing.assert_close(level @ frame.centre, torch.zeros(12).double(), rtol=0, atol=1e-12)
    half = torch.acos(anchors(t, frame, "expanded", 0.5) @ frame.centre)
    ends = [torch.acos(anchors(t, frame, "expanded", s) @ frame.centre) for s in (0.0, 1.0)]
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)


def test_a_class_at_the_centre_stays_there() -> None:
    t = torch.cat([cone(), frame_of(cone()).centre[None]])
    for noisy in (t.double(), t.float()):
        for kind in ("expanded", "level"):
            a = anchors(noisy, frame_of(cone()), kind)
            torch.testing.assert_close(a[-1], frame_of(cone()).centre, rtol=0, atol=1e-6)
            assert bool(torch.isfinite(a).all())


def test_refusals() -> None:
    t = cone()
    with pytest.raises(ValueError, match=r"at least 2 training classes, got \(1, 16\)"):
        frame_of(t[:1])
    with pytest.raises(ValueError, match="all alike: nothing to expand"):
        frame_of(t[:1].float().expand(3, -1) * torch.tensor([[1.0], [2.0], [0.3]]))
    with pytest.raises(ValueError, match="cancel out: they have no centre"):
        frame_of(torch.stack([t[0], -t[0]]))
    with pytest.raises(ValueError, match="the text feature of class 1 has length 0"):
        frame_of(t * (torch.arange(12) != 1)[:, None])
    with pytest.raises(ValueError, match="NaN or infinity"):
        frame_of(t * math.nan)
    with pytest.raises(ValueError, match=r"the frame lives in 16 dimensions, got texts of shape \(3, 8\)"):
        anchors(noise(3, 8), frame_of(t))
    with pytest.raises(ValueError, match="unknown anchors 'wide'"):
        anchors(t, frame_of(t), "wide")
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        anchors(t, frame_of(t), share=2)
