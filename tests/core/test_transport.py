"""Optimal transport: hand cases, bounds, freezing, and the derivative of the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ironclip.core.subspace import leading_directions
from ironclip.core.transport import bounds, exact, product_cost, sinkhorn

SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
HALF = torch.tensor([0.5, 0.5])


def problems(number: int, n: int = 5, m: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(number, k, generator=g, dtype=torch.float64) + 0.05 for k in (n, m))
    cost = torch.rand(number, n, m, generator=g, dtype=torch.float64)
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def test_by_hand() -> None:
    uneven = torch.tensor([0.7, 0.3])
    for b, want in ((HALF, 0.0), (uneven, 0.2)):
        assert float(exact(SWAP, HALF, b).value(SWAP, HALF, b)) == pytest.approx(want, abs=1e-7)
        made = sinkhorn(SWAP, HALF, b, eps=0.01, iterations=2000, tol=1e-9)
        assert want - 1e-6 <= float(made.value(SWAP, HALF, b)) <= want + 0.02


def test_marginals_and_never_below_the_optimum() -> None:
    cost, a, b = problems(20)
    made = sinkhorn(cost, a, b)
    torch.testing.assert_close(made.plan.sum(-2), b, rtol=0, atol=1e-9)
    made = sinkhorn(cost, a, b, iterations=500, tol=1e-8)
    assert float((made.plan.sum(-1) - a).abs().max()) < 1e-6
    best = exact(cost, a, b)
    torch.testing.assert_close(best.plan.sum(-1), a, rtol=0, atol=1e-7)
    assert bool((made.value(cost, a, b) >= best.value(cost, a, b) - 1e-6).all())
    lower, upper = bounds(cost, a, b)
    assert bool((lower <= best.value(cost, a, b) + 1e-9).all())
    assert bool((upper >= best.value(cost, a, b) - 1e-9).all())


def test_small_eps_neither_overflows_nor_stalls() -> None:
    cost, a, b = problems(10)
    made = sinkhorn(cost.float() * 2, a.float(), b.float(), eps=0.002, iterations=3000, tol=1e-6)
    assert bool(torch.isfinite(made.plan).all())
    want = exact(cost * 2, a, b).value(cost * 2, a, b)
    assert float((made.value(cost.float() * 2, a.float(), b.float()) - want).abs().max()) < 0.02


def test_a_problem_is_frozen_when_it_is_done() -> None:
    cost, a, b = problems(12)
    cost = cost * torch.linspace(0.01, 1, 12, dtype=torch.float64)[:, None, None]
    together = sinkhorn(cost, a, b)
    assert len(set(together.iterations.tolist())) > 1
    for i in range(12):
        alone = sinkhorn(cost[i], a[i], b[i])
        assert int(alone.iterations) == int(together.iterations[i])
        assert torch.equal(alone.plan, together.plan[i])


def test_columns_without_mass_change_nothing() -> None:
    cost, a, b = problems(4)
    wide = torch.cat([cost, torch.rand(4, 5, 2, dtype=torch.float64)], dim=2)
    made, narrow = sinkhorn(wide, a, torch.cat([b, torch.zeros(4, 2)], 1)), sinkhorn(cost, a, b)
    torch.testing.assert_close(made.plan[..., :7], narrow.plan)
    assert float(made.plan[..., 7:].abs().max()) == 0
    assert float(made.columns[:, 7:].abs().max()) == 0


def test_one_row_or_one_column_has_one_plan() -> None:
    cost, a, b = problems(3, n=4, m=1)
    torch.testing.assert_close(product_cost(cost, a, b), (a * cost[..., 0]).sum(1))
    for solve in (sinkhorn, exact):
        torch.testing.assert_close(solve(cost, a, b).value(cost, a, b), product_cost(cost, a, b))


def test_envelope_is_the_derivative_of_the_optimum() -> None:
    """In the cost and, along directions that keep the total mass, in the weights."""
    cost, a, b = problems(3)
    g = torch.Generator().manual_seed(1)
    moves = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (cost, a, b)]
    moves[1:] = [d - d.mean(dim=1, keepdim=True) for d in moves[1:]]
    leaves = [t.clone().requires_grad_(True) for t in (cost, a, b)]
    grads = torch.autograd.grad(exact(*leaves).value(*leaves).sum(), leaves)
    h = 1e-6
    for i in range(3):
        up, down = ([t + s * h * moves[i] if j == i else t for j, t in enumerate((cost, a, b))] for s in (1, -1))
        slope = (exact(*up).value(*up).sum() - exact(*down).value(*down).sum()) / (2 * h)
        assert float((grads[i] * moves[i]).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_unrolled_sinkhorn_is_differentiable_and_meets_the_envelope_for_small_eps() -> None:
    cost, a, b = problems(3)
    leaf = cost.clone().requires_grad_(True)
    made = sinkhorn(leaf, a, b, eps=0.05, iterations=100, tol=0.0)
    (unrolled,) = torch.autograd.grad((made.plan * leaf).sum(), leaf)
    along = torch.randn(cost.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(c: Tensor) -> Tensor:
        return (sinkhorn(c, a, b, eps=0.05, iterations=100, tol=0.0).plan * c).sum()

    slope = (value(cost + 1e-6 * along) - value(cost - 1e-6 * along)) / 2e-6
    assert float((unrolled * along).sum()) == pytest.approx(float(slope), rel=1e-5)
    with torch.no_grad():
        sharp = sinkhorn(cost, a, b, eps=0.003, iterations=3000, tol=1e-7)
    (envelope,) = torch.autograd.grad(sharp.value(leaf, a, b).sum(), leaf)
    torch.testing.assert_close(envelope, exact(cost, a, b).plan, rtol=0, atol=0.05)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"eps must be positive, got 0; write 0.1"):
        sinkhorn(SWAP, HALF, HALF, eps=0)
    for solve in (sinkhorn, exact):
        with pytest.raises(ValueError, match="cost and weights must be finite"):
            solve(SWAP * torch.nan, HALF, HALF)
        with pytest.raises(ValueError, match=r"with \(n, m\) = \(2, 3\) as a and b have, got \(2, 2\)"):
            solve(SWAP, HALF, torch.ones(3) / 3)


def test_leading_directions_are_those_of_the_svd() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=g, dtype=torch.float64)
    for rank in (1, 3, 6):
        basis = leading_directions(rows, rank)
        projector = basis @ basis.T
        u = torch.linalg.svd(rows.T)[0][:, :rank]
        torch.testing.assert_close(projector, u @ u.T, rtol=0, atol=1e-8)
        torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-12)
        assert torch.equal(projector, projector.T) or torch.allclose(projector, projector.T, atol=1e-15)
    torch.testing.assert_close(leading_directions(rows) @ leading_directions(rows).T, torch.eye(6).double())
    assert leading_directions(rows[:2]).shape == (6, 2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        leading_directions(rows * torch.nan)
    with pytest.raises(ValueError, match="all zero"):
        leading_directions(rows * 0)
