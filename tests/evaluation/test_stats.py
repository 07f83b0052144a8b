"""Hand checks of the protocol's arithmetic and laws that hold for every input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest

from ironclip.evaluation import stats

fractions = st.integers(0, 1000).map(lambda v: v / 1000)
bools = arrays(np.bool_, st.integers(1, 60))
counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def outcomes(n: int, rows: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.bool_, (rows, n))


def flips(n: int, only_a: int, only_b: int) -> tuple[np.ndarray, np.ndarray]:
    """Two outcomes over n images that disagree on exactly only_a + only_b of them."""
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    a[:only_a] = True
    b[only_a : only_a + only_b] = True
    a[only_a + only_b :: 2] = b[only_a + only_b :: 2] = True
    return a, b


@pytest.mark.parametrize(
    ("successes", "n", "lo", "hi"),
    [(0, 1000, 0.0, 0.38), (24, 1000, 1.62, 3.55), (50, 100, 40.4, 59.6), (500, 1000, 46.9, 53.1)],
)
def test_wilson_by_hand(successes: int, n: int, lo: float, hi: float) -> None:
    got = stats.wilson(successes, n)
    assert [round(100 * v, 2 if hi < 10 else 1) for v in got] == [lo, hi]


@given(counts)
def test_wilson_agrees_with_scipy_and_contains_the_proportion(case: tuple[int, int]) -> None:
    successes, n = case
    lo, hi = stats.wilson(successes, n)
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert (lo, hi) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= lo <= successes / n <= hi <= 1
    assert (lo == 0) == (successes == 0)
    assert (hi == 1) == (successes == n)


@given(counts)
def test_wilson_is_symmetric_and_widens_with_confidence(case: tuple[int, int]) -> None:
    successes, n = case
    lo, hi = stats.wilson(successes, n)
    mirrored = stats.wilson(n - successes, n)
    assert (lo, hi) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)
    wide = stats.wilson(successes, n, confidence=0.99)
    assert wide[0] <= lo
    assert wide[1] >= hi


def test_wilson_refuses_what_is_no_proportion() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        stats.wilson(0, 0)
    with pytest.raises(ValueError, match=r"successes must be in \[0, n=5\], got 6"):
        stats.wilson(6, 5)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95; write 0.95"):
        stats.wilson(1, 5, confidence=95)


def test_harmonic_by_hand() -> None:
    assert stats.harmonic(60, 30) == pytest.approx(40)
    assert stats.harmonic(60, 0) == stats.harmonic(0, 30) == stats.harmonic(0, 0) == 0


def test_the_mean_of_harmonics_is_not_the_harmonic_of_means() -> None:
    mean, of_means = stats.macro_harmonic([60, 100], [30, 0])
    assert mean == pytest.approx(20)
    assert of_means == pytest.approx(2 * 80 * 15 / 95)


@given(fractions, fractions)
def test_harmonic_lies_between_its_arguments_and_below_the_mean(c: float, r: float) -> None:
    h = stats.harmonic(c, r)
    assert h == stats.harmonic(r, c)
    assert h <= (c + r) / 2 + 1e-12
    if c > 0 and r > 0:
        assert min(c, r) - 1e-12 <= h <= max(c, r) + 1e-12


def test_worst_case_by_hand_is_40_not_60() -> None:
    clean = np.ones(5, bool)
    a = np.array([True, False, False, True, True])
    b = np.array([True, True, False, False, True])
    worst = stats.worst_case(clean, [a, b])
    assert worst.mean() == pytest.approx(0.4)
    assert min(a.mean(), b.mean()) == pytest.approx(0.6)


def test_worst_case_of_survivors_only_is_the_same() -> None:
    clean = np.array([True, True, True, True, False])
    a = np.array([True, False, True, True, True])
    b_where_run = np.array([False, False, True, True, False])  # entries of images it never saw mean nothing
    ran = [np.array([True, True, True, True, False]), np.array([True, False, True, True, False])]
    assert stats.worst_case(clean, [a, b_where_run], ran).tolist() == [False, False, True, True, False]


def test_a_survivor_that_a_member_never_attacked_is_an_error() -> None:
    clean = np.ones(3, bool)
    with pytest.raises(ValueError, match="1 images survive although member 1 never attacked them"):
        stats.worst_case(clean, [clean, clean], [clean, np.array([True, True, False])])


@given(st.integers(1, 40).flatmap(lambda n: outcomes(n, 4)))
def test_worst_case_is_at_most_every_member_and_ignores_their_order(rows: np.ndarray) -> None:
    clean, *members = rows
    worst = stats.worst_case(clean, members)
    assert all((worst <= m).all() for m in (clean, *members))
    assert (worst == stats.worst_case(clean, members[::-1])).all()
    assert (worst == rows.all(axis=0)).all()
    assert (stats.worst_case(clean, []) == clean).all()


def test_attack_success_by_hand_has_two_definitions() -> None:
    clean = np.arange(100) < 80
    robust = np.concatenate([np.arange(80) < 25, np.arange(20) < 5])
    assert robust.sum() == 30
    assert stats.asr_cond(clean, robust) == pytest.approx(55 / 80)
    assert stats.asr_diff(clean, robust) == pytest.approx(0.50)


def test_attack_success_without_a_correct_image_is_zero() -> None:
    assert stats.asr_cond(np.zeros(4, bool), np.ones(4, bool)) == 0


def test_outcomes_must_be_fractions_of_one_length() -> None:
    with pytest.raises(
        ValueError, match=r"clean must be a non-empty \(n,\) array of booleans or of shares .* got int64"
    ):
        stats.asr_cond(np.ones(3, int), np.ones(3, bool))
    with pytest.raises(ValueError, match="robust has 4 images, expected 3; outcomes must cover the same images"):
        stats.asr_diff(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match=r"b must lie in \[0, 1\], got 55.0 to 60.0; divide percentages by 100"):
        stats.paired_difference(np.ones(2, bool), np.array([55.0, 60.0]))


def test_shares_of_draws_are_outcomes_too() -> None:
    clean = np.array([1.0, 0.5, 0.9, 0.0])
    attacked = np.array([0.2, 0.6, 0.9, 1.0])
    assert stats.worst_case(clean, [attacked]).tolist() == [0.2, 0.5, 0.9, 0.0]
    assert stats.asr_cond(clean, attacked) == pytest.approx(0.8 / 2.4)
    assert stats.paired_difference(clean, attacked).value == pytest.approx(-0.075)
    pair = stats.pairwise({"a": clean, "b": attacked})[0]
    assert (pair.only_a, pair.only_b) == (1, 2)
    lo, hi = stats.wilson(2.4, 4)
    assert stats.wilson(2, 4)[0] < lo < 0.6 < hi < stats.wilson(3, 4)[1]


def test_draws_of_a_randomised_defense() -> None:
    mean, worst = stats.over_draws(np.array([[True, True, False, False], [True, False, False, True]]))
    assert (mean, worst) == (0.5, 0.25)
    with pytest.raises(ValueError, match=r"boolean \(draws, n\) array"):
        stats.over_draws(np.ones(4, bool))


def test_spread_over_seeds() -> None:
    assert stats.over_seeds([30.0, 32.0, 34.0]) == (32.0, 2.0)
    with pytest.raises(ValueError, match="a spread needs at least 2 seeds, got 1"):
        stats.over_seeds([30.0])


def test_mcnemar_by_hand() -> None:
    assert stats.mcnemar(10, 2) == pytest.approx(0.0386, abs=5e-5)
    assert stats.mcnemar(0, 5) == pytest.approx(0.0625)
    assert stats.mcnemar(0, 6) == pytest.approx(0.03125)
    assert stats.mcnemar(0, 0) == 1


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_symmetric_and_a_probability(b: int, c: int) -> None:
    p = stats.mcnemar(b, c)
    assert p == pytest.approx(stats.mcnemar(c, b))
    assert 0 < p <= 1
    if b == c:
        assert p == pytest.approx(1)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []
    with pytest.raises(ValueError, match=r"p-values must be in \[0, 1\]"):
        stats.holm([0.5, 1.5])


@given(st.lists(fractions, min_size=1, max_size=12), st.randoms())
def test_holm_is_monotone_above_p_below_bonferroni_and_blind_to_order(ps: list[float], random) -> None:
    adjusted = stats.holm(ps)
    assert all(p <= a <= min(1, p * len(ps)) + 1e-12 for p, a in zip(ps, adjusted, strict=True))
    assert [a for _, a in sorted(zip(ps, adjusted, strict=True))] == sorted(adjusted)
    shuffled = list(range(len(ps)))
    random.shuffle(shuffled)
    assert stats.holm([ps[i] for i in shuffled]) == [adjusted[i] for i in shuffled]


def test_pairing_narrows_the_difference_as_the_protocol_says() -> None:
    """30% accuracy, n = 1,000: unpaired half width 4.0 points, paired with 5% discordance 1.4."""
    rng = np.random.default_rng(0)
    a = np.zeros(1000, bool)
    a[:300] = True
    b = a.copy()
    b[275:325] = ~b[275:325]
    est = stats.paired_difference(a, b, seed=1)
    assert est.value == 0
    assert (est.hi - est.lo) / 2 == pytest.approx(0.014, abs=0.001)
    unpaired = stats.paired_difference(a, rng.permutation(a), seed=1)
    assert (unpaired.hi - unpaired.lo) / 2 == pytest.approx(0.040, abs=0.003)


def test_multinomial_bootstrap_equals_the_literal_one() -> None:
    """Resampling images one by one gives the same interval up to Monte Carlo error."""
    rng = np.random.default_rng(3)
    a, b = rng.random(80) < 0.7, rng.random(80) < 0.5
    est = stats.paired_difference(a, b, seed=0)
    d = a.astype(float) - b
    literal = d[rng.integers(0, 80, (10_000, 80))].mean(axis=1)
    assert (est.lo, est.hi) == pytest.approx(tuple(np.quantile(literal, [0.025, 0.975])), abs=0.013)


def test_macro_mean_half_width_by_hand() -> None:
    """Nine sets of 1,000 images at 30%: half width near 0.95 points."""
    sets = [np.arange(1000) < 300 for _ in range(9)]
    est = stats.macro_mean(sets)
    assert est.value == pytest.approx(0.3)
    assert (est.hi - est.lo) / 2 == pytest.approx(0.0095, abs=0.0004)


@pytest.mark.parametrize("shares", [(30, 30, 30), (5, 50, 90), (0, 2, 40)])
def test_mean_of_wilson_intervals_agrees_with_the_bootstrap(shares: tuple[int, ...]) -> None:
    n = 400
    sets = [np.arange(n) < n * s // 100 for s in shares]
    known = [stats.Estimate(float(s.mean()), *stats.wilson(int(s.sum()), n)) for s in sets]
    mean, exact = stats.mean_of_intervals(known), stats.macro_mean(sets)
    assert mean.value == pytest.approx(exact.value)
    assert (mean.lo, mean.hi) == pytest.approx((exact.lo, exact.hi), abs=0.004)


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one estimate, got none"):
        stats.mean_of_intervals([])


def test_macro_mean_gives_every_set_the_same_weight() -> None:
    est = stats.macro_mean([np.ones(10, bool), np.zeros(10_000, bool)])
    assert (est.value, est.lo, est.hi) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="expected at least one set"):
        stats.macro_mean([])


@settings(max_examples=25)
@given(st.integers(1, 40).flatmap(lambda n: outcomes(n, 2)), st.integers(0, 2**32))
def test_bootstrap_is_seeded_antisymmetric_and_in_range(rows: np.ndarray, seed: int) -> None:
    a, b = rows
    est = stats.paired_difference(a, b, draws=400, seed=seed)
    assert est == stats.paired_difference(a, b, draws=400, seed=seed)
    assert -1 <= est.lo <= est.hi <= 1
    assert est.value == pytest.approx(a.mean() - b.mean())
    assert stats.paired_difference(b, a, draws=400, seed=seed).value == pytest.approx(-est.value)
    same = stats.paired_difference(a, a, draws=400, seed=seed)
    assert (same.value, same.lo, same.hi) == (0, 0, 0)


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draws must be at least 100, got 10"):
        stats.paired_difference(np.ones(3, bool), np.ones(3, bool), draws=10)


def test_five_one_sided_flips_are_a_tie_and_six_are_not() -> None:
    five = stats.pairwise(dict(zip("xy", flips(100, 5, 0), strict=True)))[0]
    six = stats.pairwise(dict(zip("xy", flips(100, 6, 0), strict=True)))[0]
    assert (five.verdict, five.only_a, five.only_b) == ("tie", 5, 0)
    assert five.p == pytest.approx(0.0625)
    assert six.verdict == "a"
    assert six.diff.value == pytest.approx(0.06)


def test_holm_over_the_block_turns_a_narrow_win_into_a_tie() -> None:
    x, y = flips(200, 6, 0)
    alone = stats.pairwise({"x": x, "y": y})
    block = stats.pairwise({"x": x, "y": y, "z": x.copy()})
    assert alone[0].verdict == "a"
    assert [(p.a, p.b) for p in block] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert [p.verdict for p in block] == ["tie", "tie", "tie"]
    assert block[0].p == pytest.approx(0.03125)
    assert block[0].p_holm == pytest.approx(0.09375)


def test_verdict_needs_both_the_interval_and_the_test() -> None:
    clear, touching = stats.Estimate(-0.1, -0.2, -0.01), stats.Estimate(0.1, 0.0, 0.2)
    assert stats.verdict(clear, 0.01) == "b"
    assert stats.verdict(clear, 0.05) == "tie"
    assert stats.verdict(touching, 0.01) == "tie"


def test_pairs_of_nothing_and_of_unequal_images() -> None:
    assert stats.pairwise({}) == []
    assert stats.pairwise({"x": np.ones(3, bool)}) == []
    with pytest.raises(ValueError, match="y has 4 images, expected 3"):
        stats.pairwise({"x": np.ones(3, bool), "y": np.ones(4, bool)})
