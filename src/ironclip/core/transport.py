"""Discrete optimal transport: min over plans P >= 0 with P 1 = a and P^T 1 = b of sum P * cost.

``sinkhorn`` solves many small problems at once in the log domain (Cuturi 2013, arXiv 1306.0895), ``exact`` one linear
programme at a time. Both return the dual potentials, so that no iteration has to be differentiated: at the optimum the
derivative is P in the cost and the potentials in a and b (envelope theorem).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """``plan``: (..., n, m). ``rows``: (..., n) and ``columns``: (..., m) dual potentials, each up to one constant,
    0 where there is no mass. ``iterations``: (...) taken."""

    plan: Tensor
    rows: Tensor
    columns: Tensor
    iterations: Tensor

    def value(self, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(...) cost of the plan, with the envelope's derivative in ``cost``, ``a`` and ``b``."""
        cost, a, b = (t.to(self.plan.dtype) for t in (cost, a, b))
        value = (self.plan * cost).sum(dim=(-2, -1))
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (cost, a, b))):
            return value
        slope = (self.plan.detach() * cost).sum(dim=(-2, -1))
        slope = slope + (self.rows.detach() * a).sum(-1) + (self.columns.detach() * b).sum(-1)
        return value.detach() + (slope - slope.detach())


def check_problem(cost: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse shapes that do not fit and numbers that are not finite. Raises ValueError."""
    if cost.shape[-2:] != (a.shape[-1], b.shape[-1]):
        want, got = (a.shape[-1], b.shape[-1]), tuple(cost.shape[-2:])
        raise ValueError(f"cost must be (..., n, m) with (n, m) = {want} as a and b have, got {got}")
    if not all(bool(torch.isfinite(t).all()) for t in (cost, a, b)):
        raise ValueError("cost and weights must be finite numbers, got NaN or infinity")


def sinkhorn(cost: Tensor, a: Tensor, b: Tensor, eps: float = 0.1, iterations: int = 100, tol: float = 1e-2) -> Plan:
    """Entropic plans of many problems: ``cost`` (..., n, m), weights ``a`` (..., n) and ``b`` (..., m), rows of sum 1.

    ``eps``: weight of the entropy, in units of the cost. A problem stops when the mean change of its row scaling
    exp(rows / eps) falls below ``tol``, or after ``iterations``, and is frozen then: its result does not depend on the
    problems beside it. Columns hold b exactly, rows hold a to the tolerance. Differentiable step by step where the
    input is. Raises ValueError for ``eps`` that is not positive and bad problems.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}; write 0.1, or use the exact solver")
    check_problem(cost, a, b)
    gain = -cost / eps
    a, b = torch.broadcast_tensors(a, cost[..., 0])[0], torch.broadcast_tensors(b, cost[..., 0, :])[0]
    log_a, log_b = _log(a), _log(b)
    u, v = torch.where(log_a > -torch.inf, 0.0, log_a), torch.where(log_b > -torch.inf, 0.0, log_b)
    active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)
    taken = torch.zeros(active.shape, dtype=torch.long, device=cost.device)
    for _ in range(iterations):
        new_u = log_a - torch.logsumexp(gain + v[..., None, :], dim=-1)
        new_v = log_b - torch.logsumexp(gain + new_u[..., :, None], dim=-2)
        with torch.no_grad():
            change = (new_u.exp() - u.exp()).abs().mean(dim=-1)
            taken += active
        u = torch.where(active[..., None], new_u, u)
        v = torch.where(active[..., None], new_v, v)
        active = active & ~(change < tol)
        if not bool(active.any()):
            break
    plan = (gain + u[..., :, None] + v[..., None, :]).exp()
    rows = torch.where(a > 0, eps * u, torch.zeros_like(u))
    columns = torch.where(b > 0, eps * v, torch.zeros_like(v))
    return Plan(plan, rows, columns, taken)


def _log(weights: Tensor) -> Tensor:
    """log, -inf without mass, and with a derivative of zero there."""
    some = weights > 0
    return torch.where(some, torch.where(some, weights, 1.0).log(), -torch.inf)


def exact(cost: Tensor, a: Tensor, b: Tensor) -> Plan:
    """Optimal plans by linear programming in float64, one problem after the other; arguments as in ``sinkhorn``.

    Raises ValueError for bad problems and RuntimeError where the solver gives up.
    """
    check_problem(cost, a, b)
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    n, m = cost.shape[-2:]
    flat = cost.detach().double().cpu().reshape(-1, n, m).numpy()
    lead = cost.shape[:-2]
    rows_in = a.detach().double().cpu().expand(*lead, n).reshape(-1, n).numpy()
    columns_in = b.detach().double().cpu().expand(*lead, m).reshape(-1, m).numpy()
    sums: Any = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))
    constraints: Any = vstack(sums, format="csc")
    plans, duals, steps = np.empty_like(flat), np.empty((len(flat), n + m)), []
    for i, c in enumerate(flat):
        wanted = np.concatenate([rows_in[i] / rows_in[i].sum(), columns_in[i] / columns_in[i].sum()])
        found: Any = linprog(c.ravel(), A_eq=constraints, b_eq=wanted, bounds=(0, None), method="highs")
        if not found.success:
            raise RuntimeError(f"the linear programme of problem {i} was not solved: {found.message}")
        plans[i], duals[i] = found.x.reshape(n, m), found.eqlin.marginals
        steps.append(int(found.nit))
    made = [torch.from_numpy(t).to(cost.device) for t in (plans, duals[:, :n], duals[:, n:])]
    taken = torch.tensor(steps, device=cost.device).reshape(lead)
    return Plan(made[0].reshape(cost.shape), made[1].reshape(*lead, n), made[2].reshape(*lead, m), taken)


def bounds(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(...) lower and upper bound of the exact cost: all mass takes its cheapest way; the plan a b^T."""
    by_row = (a * cost.amin(dim=-1)).sum(dim=-1)
    by_column = (b * cost.amin(dim=-2)).sum(dim=-1)
    return torch.maximum(by_row, by_column), product_cost(cost, a, b)


def product_cost(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(...) cost of the plan a b^T: the only plan there is where n or m is 1."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2) * cost).sum(dim=(-2, -1))
