"""Projections on a hyperplane inside the box, against a linear program, a bisection and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_toys import images, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from ironclip.core.hyperplane import to_hyperplane


def by_program(x: np.ndarray, w: np.ndarray, value: float, norm: str) -> float:
    """Smallest norm by linear programming; infinite where the box does not reach the plane."""
    d = len(x)
    if norm == "linf":  # minimise t with -t <= delta <= t
        upper = np.block([[np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]])
        cost = np.r_[np.zeros(d), 1.0]
        equal = np.r_[w, 0.0][None]
    else:  # delta = plus - minus
        upper, cost = None, np.ones(2 * d)
        equal = np.r_[w, -w][None]
    if norm == "linf":
        bounds = [(-v, 1 - v) for v in x] + [(0, None)]
        limit = np.zeros(2 * d)
    else:
        bounds = [(0, 1 - v) for v in x] + [(0, v) for v in x]
        limit = None
    got = linprog(cost, A_ub=upper, b_ub=limit, A_eq=equal, b_eq=[-value], bounds=bounds)
    return float(got.fun) if got.success else float("inf")


def by_bisection(x: np.ndarray, w: np.ndarray, value: float) -> float:
    """Smallest l_2 norm: delta = clip(-l w) with the multiplier l found by bisection."""

    def at(lam: float) -> np.ndarray:
        return np.clip(-lam * np.sign(value) * w, -x, 1 - x)

    if abs(w @ at(1e12)) < abs(value):
        return float("inf")
    low, high = 0.0, 1e12
    for _ in range(300):
        mid = (low + high) / 2
        low, high = (mid, high) if abs(w @ at(mid)) < abs(value) else (low, mid)
    return float(np.linalg.norm(at(high)))


NUMBERS = st.floats(-2, 2).map(lambda v: 0.0 if abs(v) < 1e-3 else v)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), NUMBERS), min_size=1, max_size=6),
    st.floats(-3, 3).filter(lambda v: abs(v) > 1e-3),
    st.sampled_from(["linf", "l2", "l1"]),
)
def test_smallest_step_equals_the_slow_solution(pairs: list, value: float, norm: str) -> None:
    x, w = (np.array(v) for v in zip(*pairs, strict=True))
    delta = to_hyperplane(torch.tensor(x)[None], torch.tensor(w)[None], torch.tensor([value]).double(), norm)
    d = delta[0].numpy()
    assert (x + d >= -1e-9).all()
    assert (x + d <= 1 + 1e-9).all()
    want = by_bisection(x, w, value) if norm == "l2" else by_program(x, w, value, norm)
    if np.isfinite(want):
        assert w @ d == pytest.approx(-value, abs=1e-5)
        size = {"linf": np.abs(d).max(), "l2": np.linalg.norm(d), "l1": np.abs(d).sum()}[norm]
        assert size == pytest.approx(want, rel=1e-4, abs=1e-6)
    else:
        reach = np.where(w > 0, 1 - x, x) if value < 0 else np.where(w > 0, x, 1 - x)
        assert abs(w @ d) == pytest.approx(float(np.abs(w) @ reach), rel=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_away_from_the_walls_it_is_the_closed_form(norm: str) -> None:
    x, w = images(8, low=0.45, high=0.55).flatten(1), tensor(8, 192)
    value = tensor(8, seed=2, scale=0.05)
    d = to_hyperplane(x, w, value, norm)
    torch.testing.assert_close((w * d).sum(1), -value, atol=1e-5, rtol=1e-4)
    dual = {"linf": w.abs().sum(1), "l2": w.norm(dim=1), "l1": w.abs().amax(1)}[norm]
    size = {"linf": d.abs().amax(1), "l2": d.norm(dim=1), "l1": d.abs().sum(1)}[norm]
    torch.testing.assert_close(size, value.abs() / dual, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_many_pixels_at_the_walls_and_flat_normals(norm: str) -> None:
    x = images(4, size=32, low=-1.0, high=2.0).clamp(0, 1).flatten(1)
    w = tensor(4, 3072)
    w[:, ::2] = 0
    value = torch.tensor([5.0, -20.0, 200.0, 0.0])
    d = to_hyperplane(x, w, value, norm)
    assert not d[:, ::2].any()
    torch.testing.assert_close((w * d).sum(1), -value, atol=1e-3, rtol=1e-4)
    assert not d[3].any()
    flat = to_hyperplane(x, 0 * w, value, norm)
    assert not flat.any()
    assert bool(torch.isfinite(d).all())


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match="unknown norm 'l0'"):
        to_hyperplane(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), "l0")
