"""Intervals, paired tests and worst cases on per-sample outcomes; numpy and scipy only.

Everything here takes *fractions* in [0, 1] and returns fractions; the caller multiplies by 100 when it prints. An
outcome has one entry per image in one fixed order of the images, so that two defenses are always compared on the same
images: booleans (True: classified correctly), or for a randomised defense the share of its draws that were correct, in
[0, 1]. Randomness comes from a numpy Generator made from ``seed``.

Sources: Wilson (1927) for one proportion; Efron (1979) for the percentile bootstrap; Zou and Donner (2008) for the mean
of proportions whose intervals are known; McNemar (1947), exact form, for two defenses on the same images; Holm (1979)
for many pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

Floats = NDArray[np.float64]
Verdict = Literal["a", "b", "tie"]

DRAWS = 10_000
_CELLS = 4_000_000  # entries of the largest temporary array of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, all fractions (a difference lies in [-1, 1])."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Pair:
    """Two defenses on the same images: ``diff`` = accuracy of a minus accuracy of b, with a bootstrap interval.

    ``only_a`` / ``only_b``: images that only a / only b gets right (in most draws); ``p``: exact McNemar; ``p_holm``:
    after Holm over the family of pairs that were compared together; ``verdict``: "a", "b" or "tie" (see `verdict`).
    """

    a: str
    b: str
    diff: Estimate
    only_a: int
    only_b: int
    p: float
    p_holm: float
    verdict: Verdict


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions (lo, hi); exactly 0 or 1 at the ends of the range.

    ``successes`` need not be whole: for a randomised defense it is the sum of shares, and the interval, which treats
    every image as one trial, is then a little too wide.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; an accuracy needs images")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n={n}], got {successes}")
    z = _z(confidence)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / scale
    lo = 0.0 if successes == 0 else max(0.0, centre - half)
    hi = 1.0 if successes == n else min(1.0, centre + half)
    return lo, hi


def harmonic(clean: float, robust: float) -> float:
    """2CR / (C + R), 0 if either is 0; any unit, the same for both (60 and 30 give 40)."""
    if clean < 0 or robust < 0:
        raise ValueError(f"accuracies must not be negative, got clean={clean}, robust={robust}")
    return 0.0 if clean == 0 or robust == 0 else 2 * clean * robust / (clean + robust)


def macro_harmonic(clean: Sequence[float], robust: Sequence[float]) -> tuple[float, float]:
    """(mean over sets of H, H of the two means). The first is the headline, the second only for parity with papers."""
    if not clean or len(clean) != len(robust):
        raise ValueError(f"expected one clean and one robust value per set, got {len(clean)} and {len(robust)}")
    mean = float(np.mean([harmonic(c, r) for c, r in zip(clean, robust, strict=True)]))
    return mean, harmonic(float(np.mean(clean)), float(np.mean(robust)))


def worst_case(clean: ArrayLike, members: Sequence[ArrayLike], ran: Sequence[ArrayLike] | None = None) -> Floats:
    """Correct on the clean image AND under every attack of the composition: (n,) fractions, the smallest outcome.

    ``members[i]``: outcome under attack i, (n,). ``ran[i]``: (n,) booleans, which images attack i was run on (survivors
    only); images it did not see keep their outcome. Every image must fall or be seen by all members: an image that is
    still correct and that some member never saw is an error, not a robust image.
    """
    alive = _outcome("clean", clean)
    n = alive.size
    seen = [np.ones(n, dtype=np.bool_) for _ in members] if ran is None else [_outcome("ran", r, n) > 0 for r in ran]
    if len(seen) != len(members):
        raise ValueError(f"expected one `ran` mask per member, got {len(seen)} for {len(members)} members")
    for i, (member, mask) in enumerate(zip(members, seen, strict=True)):
        alive = np.where(mask, np.minimum(alive, _outcome(f"members[{i}]", member, n)), alive)
    for i, mask in enumerate(seen):
        skipped = int(np.sum((alive > 0) & ~mask))
        if skipped:
            raise ValueError(f"{skipped} images survive although member {i} never attacked them; run it on them first")
    return alive


def asr_cond(clean: ArrayLike, robust: ArrayLike) -> float:
    """Attack success, conditional form: originally correct that become wrong / originally correct; 0 if none was."""
    c = _outcome("clean", clean)
    r = _outcome("robust", robust, c.size)
    return float(np.sum(np.maximum(c - r, 0)) / np.sum(c)) if c.any() else 0.0


def asr_diff(clean: ArrayLike, robust: ArrayLike) -> float:
    """Attack success, difference form: clean accuracy minus accuracy under attack (images newly correct count)."""
    c = _outcome("clean", clean)
    return float(np.mean(c) - np.mean(_outcome("robust", robust, c.size)))


def over_draws(correct: ArrayLike) -> tuple[float, float]:
    """A randomised defense, ``correct``: (draws, n) -> (mean over draws, accuracy in the worst draw of each image)."""
    c = np.asarray(correct)
    if c.ndim != 2 or c.size == 0 or c.dtype != np.bool_:
        raise ValueError(f"correct must be a boolean (draws, n) array, got {c.dtype} of shape {c.shape}")
    return float(c.mean()), float(c.all(axis=0).mean())


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation) over run seeds; printed beside the sampling interval, never instead of it."""
    if len(values) < 2:
        raise ValueError(f"a spread needs at least 2 seeds, got {len(values)}")
    return float(np.mean(values)), float(np.std(values, ddof=1))


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Mean of a - b over the same images with a percentile bootstrap interval (images are resampled as pairs)."""
    x = _outcome("a", a)
    return _bootstrap([x - _outcome("b", b, x.size)], confidence, draws, seed)


def macro_mean(sets: Sequence[ArrayLike], *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean over data sets of the per-set mean, every set counting the same, with a stratified bootstrap interval.

    ``sets``: one array of per-image values per set (booleans, or differences of two outcomes in {-1, 0, 1}). Images
    are resampled inside their set; the sets themselves are taken as given.
    """
    values = [np.asarray(s, dtype=np.float64) for s in sets]
    if not values or any(v.ndim != 1 or v.size == 0 for v in values):
        raise ValueError(
            f"expected at least one set, each a non-empty (n,) array, got shapes {[v.shape for v in values]}"
        )
    return _bootstrap(values, confidence, draws, seed)


def mean_of_intervals(sets: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, each with its interval, where the outcomes themselves are not at hand.

    The interval of the mean from the distances of each limit to its estimate (MOVER, Zou and Donner 2008); with Wilson
    limits it agrees with the stratified bootstrap of `macro_mean` to 0.3 points at 200 images a set, 0.1 at 1,000.
    """
    if not sets:
        raise ValueError("expected at least one estimate, got none")
    k = len(sets)
    value = sum(s.value for s in sets) / k
    below = sum((s.value - s.lo) ** 2 for s in sets) ** 0.5 / k
    above = sum((s.hi - s.value) ** 2 for s in sets) ** 0.5 / k
    return Estimate(value, value - below, value + above)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts (10 and 2 give 0.0386); 1 without any."""
    if only_a < 0 or only_b < 0:
        raise ValueError(f"discordant counts must not be negative, got {only_a} and {only_b}")
    total = only_a + only_b
    return 1.0 if total == 0 else float(binomtest(only_a, total, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: adjusted p-values, monotone in p and never above 1."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.size and not bool(np.all((p >= 0) & (p <= 1))):
        raise ValueError(f"p-values must be in [0, 1], got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return [float(v) for v in adjusted]


def verdict(diff: Estimate, p: float, alpha: float = 0.05) -> Verdict:
    """Who wins: "a" or "b" only if the interval excludes 0 and p (after Holm) is below alpha; otherwise "tie"."""
    if p >= alpha or diff.lo <= 0 <= diff.hi:
        return "tie"
    return "a" if diff.value > 0 else "b"


def pairwise(
    outcomes: Mapping[str, ArrayLike],
    *,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Pair]:
    """All pairs of one block: difference, interval, exact McNemar, Holm over these pairs, verdict.

    ``outcomes``: name -> (n,) outcomes over the same images in the same order. Pair i draws from stream (seed, i).
    McNemar counts an image as right for a randomised defense if it is right in most draws; the difference is of means.
    """
    names = list(outcomes)
    n = len(np.asarray(outcomes[names[0]])) if names else 0
    arrays = {name: _outcome(name, outcomes[name], n) for name in names}
    pairs = list(combinations(names, 2))
    right = {name: outcome > 0.5 for name, outcome in arrays.items()}
    counts = [(int(np.sum(right[a] & ~right[b])), int(np.sum(~right[a] & right[b]))) for a, b in pairs]
    raw = [mcnemar(*c) for c in counts]
    adjusted = holm(raw)
    found: list[Pair] = []
    for i, (a, b) in enumerate(pairs):
        diff = _bootstrap([arrays[a] - arrays[b]], 1 - alpha, draws, (seed, i))
        found.append(Pair(a, b, diff, *counts[i], raw[i], adjusted[i], verdict(diff, adjusted[i], alpha)))
    return found


def _bootstrap(sets: list[Floats], confidence: float, draws: int, seed: int | tuple[int, int]) -> Estimate:
    """Percentile bootstrap of the mean of per-set means.

    A resample of n images is a multinomial draw over the *distinct values* of the set (three for a paired
    difference), so 10,000 draws cost the same for a hundred images and for fifty thousand.
    """
    if draws < 100:
        raise ValueError(f"draws must be at least 100, got {draws}; the default is {DRAWS}")
    tail = (1 - _level(confidence)) / 2
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for values in sets:
        levels, counts = np.unique(values, return_counts=True)
        step = max(1, _CELLS // levels.size)
        for start in range(0, draws, step):
            size = min(step, draws - start)
            resampled: NDArray[Any] = rng.multinomial(values.size, counts / values.size, size=size)
            total[start : start + size] += resampled @ levels / values.size
    lo, hi = np.quantile(total / len(sets), [tail, 1 - tail])
    return Estimate(float(np.mean([v.mean() for v in sets])), float(lo), float(hi))


def _outcome(name: str, values: ArrayLike, n: int | None = None) -> Floats:
    array = np.asarray(values)
    if array.dtype.kind not in "bf" or array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a non-empty (n,) array of booleans or of shares in [0, 1], "
            f"got {array.dtype} of shape {array.shape}"
        )
    if n is not None and array.size != n:
        raise ValueError(f"{name} has {array.size} images, expected {n}; outcomes must cover the same images")
    if not bool(np.all((array >= 0) & (array <= 1))):
        raise ValueError(f"{name} must lie in [0, 1], got {array.min()} to {array.max()}; divide percentages by 100")
    return array.astype(np.float64)


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}; write 0.95")
    return confidence


def _z(confidence: float) -> float:
    return float(norm.ppf(0.5 + _level(confidence) / 2))
