"""Intervals, tests and verdicts of a study against scipy, NumPy, published examples and synthetic
data."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qllm.study.statistics import (
    Finding,
    Intervals,
    benjamini_hochberg,
    effect,
    equivalence,
    holm,
    mcnemar,
    permutation,
    superiority,
)

INTERVALS = Intervals(confidence=0.95, draws=4000, seed=7)


def prompts(rng, clusters, studies, skewed):
    """Means of five texts per prompt: each prompt has a level of its own, around 2."""
    shape = (clusters, studies)
    levels = rng.gamma(4, 0.5, shape) if skewed else rng.normal(2, 1, shape)
    return levels[:, None] + rng.normal(0, 1, (clusters, 5, studies))


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("clusters", [3, 8, 12, 16, 48])
def test_intervals_cover_the_truth(clusters, skewed):
    """3,000 studies at once: an interval over prompts must cover the true mean in 95 % of them."""
    texts = prompts(np.random.default_rng(11), clusters, 3000, skewed)
    _, lower, upper = INTERVALS.mean(texts.mean(axis=1))
    assert 0.93 <= np.mean((lower <= 2) & (2 <= upper)) <= 0.97


def test_intervals_over_texts_would_not_cover_and_seeds_drawn_anew_would_too_often():
    """Why prompts are drawn, with all their seeds."""
    rng = np.random.default_rng(11)
    alike = rng.normal(2, 1, (16, 1, 400)).repeat(5, axis=1)  # none of it within prompts
    _, lower, upper = INTERVALS.mean(alike.reshape(80, 400))
    assert np.mean((lower <= 2) & (2 <= upper)) < 0.75
    noisy = rng.normal(2, 1, (16, 5, 400))  # all of it
    covered = []
    for study in noisy.transpose(2, 0, 1):
        drawn = study[rng.integers(0, 16, (300, 16))[..., None], rng.integers(0, 5, (300, 16, 5))]
        low, high = np.quantile(drawn.mean(axis=(1, 2)), [0.025, 0.975])
        covered.append(low <= 2 <= high)
    assert np.mean(covered) > 0.97
    _, lower, upper = INTERVALS.mean(noisy.mean(axis=1))
    assert 0.92 <= np.mean((lower <= 2) & (2 <= upper)) <= 0.97


def ratio(means):
    return (means[..., 0] / means[..., 1])[..., None]


@pytest.mark.parametrize("statistic", [None, ratio])
def test_interval_is_bca_of_scipy_but_for_the_level(statistic):
    """scipy reads BCa at the normal level; asked for the level that a t interval has, it agrees."""
    n, rng = 30, np.random.default_rng(5)
    values = np.stack([rng.gamma(2, size=n), rng.gamma(9, size=n)], axis=1)
    values = values[:, :1] if statistic is None else values
    found = Intervals(draws=40000, seed=1).finding(values, statistic)
    wide = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))

    def plain(*columns, axis):
        means = [column.mean(axis=axis) for column in columns]
        return means[0] if statistic is None else means[0] / means[1]

    named = {"paired": True, "vectorized": True, "axis": 0, "n_resamples": 40000}
    other = stats.bootstrap(
        tuple(values.T), plain, confidence_level=1 - 2 * wide, method="BCa", **named
    ).confidence_interval
    width = other.high - other.low
    assert found.low == pytest.approx(other.low, abs=0.03 * width)
    assert found.high == pytest.approx(other.high, abs=0.03 * width)
    assert found.estimate == pytest.approx(float(plain(*values.T, axis=0)), rel=1e-12)


@pytest.mark.parametrize("clusters", [2, 5, 7])
def test_few_prompts_have_students_interval(clusters):
    values = np.random.default_rng(3).normal(5, 2, clusters)
    found = INTERVALS.finding(values)
    wanted = stats.ttest_1samp(values, 5).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    for bound in (4.0, 5.0, 7.0):
        p = 2 * stats.ttest_1samp(values, bound, alternative="greater").pvalue
        assert found.p_above(bound) == pytest.approx(min(1, p))


def test_equal_data_have_equal_intervals_and_constant_data_a_point():
    values = np.random.default_rng(5).normal(size=(9, 4))
    both = np.stack([values, values, values + 1], axis=1)
    estimate, low, high = INTERVALS.mean(both)
    assert low[0] == pytest.approx(low[1], rel=1e-12) and high[2] == pytest.approx(high[0] + 1)
    for value in (0.0, 0.1, -1 / 3):
        for clusters in (2, 9, 48):
            for part in INTERVALS.mean(np.full((clusters, 4), value)):
                assert part.shape == (4,) and (part == value).all()
    found = INTERVALS.finding(np.full(9, 0.1))
    assert found.p_above(0.0) == 0 and found.p_above(0.1) == 1 and found.p_within(0.2) == 0


def test_missing_clusters_are_left_out_column_by_column():
    values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 4.0], [np.nan, np.nan]])
    estimate, low, high = INTERVALS.mean(values)
    assert estimate.tolist() == [3.0, 3.0]
    assert low[0] < 3 < high[0] and low[1] < 3 < high[1]
    assert np.isnan(INTERVALS.mean(np.full((3, 2), np.nan))).all()
    estimate, low, high = INTERVALS.mean(np.array([[4.0]]))
    assert estimate == 4 and np.isnan(low) and np.isnan(high)
    for empty in (np.full((3, 2), np.nan), np.empty((0, 2))):
        assert all(np.isnan(part).all() for part in INTERVALS.of(empty, lambda means: means))
        found = INTERVALS.finding(empty)
        assert found.clusters == 0 and math.isnan(found.p_above(0.0))
    assert math.isnan(INTERVALS.finding(np.array([4.0])).p_within(1.0))


@pytest.mark.parametrize("clusters", [5, 12, 48])
def test_p_says_what_the_interval_says(clusters):
    """p <= 0.05 on one side of the ends of the interval, and above 0.05 on the other."""
    rng = np.random.default_rng(clusters)
    for _ in range(20):
        found = INTERVALS.finding(rng.gamma(3, size=clusters))
        gap = 0.03 * (found.high - found.low)
        assert found.p_above(found.low - gap) <= 0.05 < found.p_above(found.low + gap)
        assert found.p_below(found.high + gap) <= 0.05 < found.p_below(found.high - gap)
        margin = max(abs(found.low), abs(found.high))
        assert found.p_within(margin + gap) <= 0.05 < found.p_within(margin - gap)
        assert found.p_other(found.low - gap) <= 0.05 < found.p_other(found.low + gap)


def test_p_is_near_students_for_normal_data_and_falls_on_beyond_the_draws():
    values = np.random.default_rng(2).normal(1, 1, 48)
    found = Intervals(draws=10000, seed=1).finding(values)
    last = 1.0
    for bound in np.linspace(found.estimate, found.estimate - 1.5, 16):
        p = found.p_above(bound)
        wanted = 2 * stats.ttest_1samp(values, bound, alternative="greater").pvalue
        assert 0 <= p <= last
        assert wanted < 1e-4 or p == pytest.approx(wanted, rel=0.35, abs=0.002)
        last = p
    assert last < 1e-7


def test_a_true_null_is_rejected_as_often_as_allowed():
    """One-sided tests and TOST at the bound: 2.5 % each, over 1,500 studies."""
    rng = np.random.default_rng(8)
    above = within = 0
    for _ in range(1500):
        found = INTERVALS.finding(rng.normal(1, 1, 20))
        above += found.p_above(1.0) <= 0.05
        within += found.p_within(1.0) <= 0.05
    assert 0.015 <= above / 1500 <= 0.04 and 0.015 <= within / 1500 <= 0.04


def test_median_is_not_moved_by_a_disturbed_timing():
    values = np.random.default_rng(0).normal(1, 0.02, 12)
    disturbed = np.where(values == values.max(), 9.0, values)
    found = INTERVALS.median(disturbed)
    assert found.estimate == np.median(values) and 0.95 < found.low < 1 < found.high < 1.05
    assert found.p_below(1.1) < 0.01 and found.p_above(0.9) < 0.01 < found.p_above(1.0)
    rng = np.random.default_rng(1)
    for rounds in (3, 15):
        found = [INTERVALS.median(rng.normal(0, 1, rounds)) for _ in range(300)]
        assert 0.92 <= np.mean([one.low <= 0 <= one.high for one in found])
    assert math.isnan(INTERVALS.median(np.array([1.0])).low)
    assert INTERVALS.median(np.array([1.0, 2.0, 9.0])).low == 0


def test_what_is_counted_is_exact():
    found = Finding.counted(1.25)
    assert (found.low, found.high, found.clusters) == (1.25, 1.25, 0)
    assert found.p_above(1.0) == 0 and found.p_above(1.25) == 1 and found.p_below(2.0) == 0


# ------------------------------------------------------------------------------- other tests


def test_mcnemar_by_hand_and_scipy():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)
    # Agresti, Categorical Data Analysis, table of prime minister ratings: 150 and 86 changed
    assert mcnemar(86, 150) == pytest.approx(stats.binomtest(86, 236).pvalue)
    assert mcnemar(86, 150) == pytest.approx(3.7e-5, rel=0.05)


def test_holm_and_benjamini_hochberg_on_a_published_example():
    """Fifteen p-values of Benjamini and Hochberg 1995, section 4.1: at 0.05 their method rejects
    four of them; Holm's adjustment is written out."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262]
    p += [0.5719, 0.6528, 0.7590, 1.0000]
    assert (benjamini_hochberg(p) <= 0.05).sum() == 4
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    wanted = [max(min(1, p[j] * (15 - j)) for j in range(i + 1)) for i in range(15)]
    assert holm(p) == pytest.approx(wanted)
    assert (holm(p) <= 0.05).sum() == 3
    shuffled = np.random.default_rng(0).permutation(15)
    assert holm(np.array(p)[shuffled]) == pytest.approx(holm(p)[shuffled])


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_adjustment_leaves_out_what_was_not_tested(adjust):
    assert adjust([0.01, math.nan, 0.04]).tolist()[::2] == adjust([0.01, 0.04]).tolist()
    assert np.isnan(adjust([0.01, math.nan])[1]) and adjust([]).shape == (0,)
    assert adjust([0.03]).tolist() == [0.03]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_adjusted_p_values_are_no_smaller_and_keep_their_order(p):
    for adjust in (holm, benjamini_hochberg):
        found = adjust(p)
        assert (found >= np.asarray(p) * (1 - 1e-12)).all() and (found <= 1).all()
        order = np.argsort(p, kind="stable")
        assert (np.diff(found[order]) >= -1e-12).all()
    assert (benjamini_hochberg(p) <= holm(p) * (1 + 1e-12)).all()


def test_permutation_of_two_arms_is_a_sign_flip_test():
    values = np.random.default_rng(4).normal(0.4, 1, 9)
    both = np.stack([values, np.zeros(9)], axis=1)[..., None]
    signs = np.array(list(itertools.product([1, -1], repeat=9)))
    t = np.abs(stats.ttest_1samp(signs * values, 0, axis=1).statistic)
    observed = abs(stats.ttest_1samp(values, 0).statistic)
    statistic, p = permutation(both, 1000, 0)
    assert statistic == pytest.approx(observed)
    assert p == np.mean(t >= observed * (1 - 1e-9))
    _, drawn = permutation(both, 400, 0)  # fewer than all 512: at random
    assert drawn == pytest.approx(p, abs=0.07) and drawn > 0


def test_permutation_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(6)
    level = rng.normal(size=(24, 1, 7))
    found = []
    for _ in range(200):
        _, p = permutation(level + rng.normal(0, 0.3, (24, 3, 7)), 200, 1)
        found.append(p <= 0.05)
    assert 0.01 <= np.mean(found) <= 0.09
    planted = level + rng.normal(0, 0.3, (24, 3, 7))
    planted[:, 1, 4] += 0.5  # one arm, one temperature
    assert permutation(planted, 999, 1)[1] == 1 / 1000
    assert permutation(np.ones((24, 3, 7)) * level, 200, 1) == (0.0, 1.0)
    assert math.isnan(permutation(planted[:1], 100, 1)[1])
    planted[3, 0, 0] = np.nan
    assert permutation(planted, 199, 1)[1] == 1 / 200


# --------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-0.5, 0.5, "confirmed"),
        (1.5, 3, "refuted"),
        (-3, -1.5, "refuted"),
        (0.5, 1.5, "inconclusive"),
        (-2, 2, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_equivalence(low, high, word):
    assert equivalence(low, high, 1.0) == word


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 2, "confirmed"),
        (-2, -0.1, "refuted"),
        (-1, 1, "inconclusive"),
        (0, 0, "refuted"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_superiority(low, high, word):
    assert superiority(low, high, 0.0) == word


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 1.0, "confirmed"),
        (0.1, 0.15, "refuted"),  # there, but smaller than what counts
        (-0.1, 0.1, "refuted"),
        (-0.1, 0.3, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_effect(low, high, word):
    assert effect(low, high, 0.2) == word
