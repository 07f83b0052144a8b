"""Checks of an adaptive attack that need runs of their own, on a few images: huge budget, more steps, other starts."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from ironclip.core.grad import NoGradientError
from ironclip.evaluation.block import Block, Entry
from ironclip.evaluation.judge import judge
from ironclip.evaluation.plans import Plan, plan
from ironclip.registry import build_attack

HUGE = Fraction(64, 255)


def probe(block: Block, entry: Entry, digest: str, eps: Fraction, norm: str) -> dict[str, Any]:
    """Accuracy of ``budget.probe`` images under variations of the first white-box members, stored with the cell.

    ``huge``: at 64/255 (linf only), the union of the first two members. ``steps``: correct images at the budget's
    steps and at four times as many. ``starts``: standard deviation of success over 5 seeds, from the
    ``standard`` budget on.
    """
    n = min(block.budget.probe, len(block.data))
    if n == 0:
        return {}
    found: dict[str, Any] | None = block.store.get_json("probes", digest)
    if found is not None:
        return found
    plans = [
        p for p in plan(block, entry, eps, norm) if p.member.white and p.view is not None and p.member.view != "base"
    ][:2]
    if not plans:
        return {}
    out: dict[str, Any] = {"n": n}
    if norm == "linf":
        out["huge"] = _accuracy(_union([_right(block, entry, p, HUGE, norm, 1, n) for p in plans]))
    first = _right(block, entry, plans[0], eps, norm, 1, n)
    more = _right(block, entry, plans[0], eps, norm, 4, n)
    out["steps"] = [sum(first), sum(more)]
    if block.budget.name in ("standard", "full"):
        tries = [_right(block, entry, plans[0], eps, norm, 1, n, salt=s) for s in range(5)]
        spread = [statistics.pstdev([float(t[i]) for t in tries]) for i in range(n)]
        out["starts"] = sum(s > 0.1 for s in spread) / n
    block.store.put_json("probes", digest, out)
    return out


def probe_flags(found: dict[str, Any], accuracy: float, n: int, clean: float, eps: Fraction, k: int) -> list[str]:
    """``eps-sweep``, ``steps-hurt``, ``not-converged`` and ``start-spread`` from a probe's figures.

    ``accuracy`` and ``clean`` are fractions over the cell's n samples. On a handful of images one image may go either
    way: a rise counts from two images on.
    """
    from ironclip.evaluation.suspicion import sweep_flags

    if not found:
        return []
    flags = []
    if "huge" in found:
        flags += sweep_flags({0.0: (clean, n), float(eps): (accuracy, n), float(HUGE): (found["huge"], found["n"])}, k)
    before, after = found["steps"]
    if after > before + 1:
        flags.append("steps-hurt")
    if before - after > max(1, 0.01 * found["n"]):
        flags.append("not-converged")
    if found.get("starts", 0) * found["n"] > max(1, 0.05 * found["n"]):
        flags.append("start-spread")
    return flags


def _right(
    block: Block, entry: Entry, one: Plan, eps: Fraction, norm: str, times: int, n: int, salt: int = 0
) -> list[bool]:
    """Which of the first ``n`` images hold against a member at ``eps`` with ``times`` the budget's steps."""
    attack = build_attack(
        one.member.spec(eps, norm, replace(block.budget, steps=times * block.budget.steps), one.draws)
    )
    assert one.view is not None
    defended = entry.defense.apply(block.clf, entry.state)
    right: list[bool] = []
    for x, y, ids in block.data.batches(block.batch_size, list(range(n))):
        x, y = x.to(block.device), block.clf.labels(y.to(block.device))
        rng = block.rng(ids).fold("probe", one.member.name, salt)
        with contextlib.suppress(NoGradientError):
            x = attack(one.view, x, y, rng=rng).x_adv
        right += (judge(defended, x, y, rng, block.budget.draws).correct >= 0.5).tolist()
    return right


def _union(runs: list[list[bool]]) -> list[bool]:
    return torch.tensor(runs).all(dim=0).tolist()


def _accuracy(right: list[bool]) -> float:
    return sum(right) / len(right)
