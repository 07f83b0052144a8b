"""Projections, starts and steps, against slow oracles and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_toys import images, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ironclip.core.ball import NORMS, STARTS, norms, project, project_delta, project_l1, start_delta, unit_step
from ironclip.core.rng import SampleRNG


def slow_l1(v: np.ndarray, radius: float) -> np.ndarray:
    """Soft threshold found by bisection in float64."""
    if np.abs(v).sum() <= radius:
        return v
    low, high = 0.0, float(np.abs(v).max())
    for _ in range(200):
        mid = (low + high) / 2
        if np.maximum(np.abs(v) - mid, 0).sum() > radius:
            low = mid
        else:
            high = mid
    return np.sign(v) * np.maximum(np.abs(v) - high, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12),
    st.floats(0, 5, width=32),
)
def test_l1_projection_equals_the_slow_one(values: list[float], radius: float) -> None:
    v = np.array(values)
    got = project_l1(torch.tensor([values], dtype=torch.float64), radius)[0].numpy()
    np.testing.assert_allclose(got, slow_l1(v, radius), atol=1e-9)


def test_l1_projection_by_hand_and_per_row() -> None:
    v = torch.tensor([[3.0, -1.0, 0.0], [0.1, 0.2, -0.1], [1.0, 1.0, 1.0]])
    want = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.2, -0.1], [2 / 3, 2 / 3, 2 / 3]])
    torch.testing.assert_close(project_l1(v, 2.0), want)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point_of_the_ball(norm: str) -> None:
    v = tensor(16, 3, 4, 4, seed=1)
    eps = 0.5
    p = project_delta(v, eps, norm)
    assert bool((norms(p, norm) <= eps * (1 + 1e-5)).all())
    torch.testing.assert_close(project_delta(p, eps, norm), p)
    inside = v * (0.9 * eps / norms(v, norm)).view(-1, 1, 1, 1)
    torch.testing.assert_close(project_delta(inside, eps, norm), inside)
    for seed in range(5):
        other = project_delta(tensor(16, 3, 4, 4, seed=10 + seed), eps, norm)
        assert bool((norms(v - p, "l2") <= norms(v - other, "l2") + 1e-5).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1 / 255, 0.5, 3.0])
def test_projection_of_images_stays_in_ball_and_box(norm: str, eps: float) -> None:
    eps = min(eps, 1.0) if norm == "linf" else eps
    x = images(8, low=0.0, high=1.0)
    far = x + tensor(8, 3, 8, 8)
    out = project(far, x, eps, norm)
    assert bool((norms(out - x, norm) <= eps + 1e-6 * max(1, eps)).all())
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    if norm == "linf":
        assert torch.equal(out, (x + (far - x).clamp(-eps, eps)).clamp(0, 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", STARTS)
def test_starts_lie_within_the_budget(norm: str, kind: str) -> None:
    x, eps = images(64), 0.25
    d = start_delta(x, eps, norm, kind, SampleRNG.rows(64))
    size = norms(d, norm)
    assert bool((size <= eps * (1 + 1e-5)).all())
    if kind == "zero":
        assert not d.any()
    else:
        assert len(size.unique()) > 1 or kind == "surface"
        assert abs(float(d.mean())) < 0.02
    if kind == "surface":
        torch.testing.assert_close(size, torch.full_like(size, eps))
    if kind == "uniform" and norm != "linf":
        assert 0.35 * eps < float(size.mean()) < 0.65 * eps
    if kind == "volume":
        assert bool((size > 0.8 * eps).all())
    assert torch.equal(d[3:5], start_delta(x[3:5], eps, norm, kind, SampleRNG.rows(64)[3:5]))
    assert not start_delta(x, 0.0, norm, kind, SampleRNG.rows(64)).any()


def test_steps_are_the_steepest_ones() -> None:
    g = torch.tensor([[3.0, -4.0, 0.0]])
    assert unit_step(g, "linf").tolist() == [[1, -1, 0]]
    torch.testing.assert_close(unit_step(g, "l2"), torch.tensor([[0.6, -0.8, 0.0]]))
    assert unit_step(g, "l1").tolist() == [[0, -1, 0]]
    for norm in NORMS:
        assert not unit_step(torch.zeros(1, 3), norm).any()


def test_norms_by_hand() -> None:
    d = torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    assert norms(d, "linf").tolist() == [4, 1]
    assert norms(d, "l2").tolist() == [5, 1]
    assert norms(d, "l1").tolist() == [7, 1]
