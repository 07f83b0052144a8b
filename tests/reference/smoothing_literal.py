"""Cohen et al.'s Predict and Certify, one image and one draw at a time; tests and bounds from their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from statistics import NormalDist

import torch


def count(classify: Callable[[torch.Tensor], int], image: torch.Tensor, noise: list[torch.Tensor], k: int) -> list[int]:
    votes = [0] * k
    for n in noise:
        votes[classify(image + n)] += 1
    return votes


def two_sided(a: int, b: int) -> float:
    """p-value of a fair coin for a heads and b tails, exactly."""
    n = a + b
    if n == 0:
        return 1.0
    below = sum(math.comb(n, i) for i in range(min(a, b) + 1))
    return float(min(Fraction(1), Fraction(2 * below, 2**n)))


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """The p at which ``hits`` or more have probability alpha, by bisection."""
    if hits == 0:
        return 0.0

    def tail(p: float) -> float:
        return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(hits, n + 1))

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) < alpha else (low, middle)
    return low


def predict(votes: list[int], alpha: float) -> int:
    first, second = sorted(votes, reverse=True)[:2]
    return votes.index(first) if two_sided(first, second) <= alpha else -1


def certify(select: list[int], votes: list[int], sigma: float, alpha: float) -> tuple[int, float]:
    guess = select.index(max(select))
    p = lower_bound(votes[guess], sum(votes), alpha)
    return (guess, sigma * NormalDist().inv_cdf(p)) if p > 0.5 else (-1, 0.0)
