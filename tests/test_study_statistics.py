"""Intervals, contrasts and verdicts of a study against NumPy, scipy and synthetic data; measures of
texts against strings made by hand."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qllm.study.claims import _c4_verdict, _effect, overall
from qllm.study.measures import (
    distinct_n,
    divergent_word,
    first_divergence,
    ngrams,
    rep_n,
    zlib_ratio,
)
from qllm.study.statistics import (
    Intervals,
    contrast,
    equivalence,
    inside,
    peak,
    slope_contrast,
    superiority,
)
from qllm.study.tables import logit_clusters

INTERVALS = Intervals(confidence=0.95, draws=1000, seed=7)


@pytest.mark.parametrize(
    ("clusters", "skewed", "low", "high"),
    [
        (40, False, 0.93, 0.97),
        (40, True, 0.92, 0.97),
        (16, False, 0.93, 0.97),
        (8, False, 0.92, 0.97),
    ],
)
def test_intervals_cover_the_truth(clusters, skewed, low, high):
    """2,000 studies at once: each prompt has a level of its own and five texts that scatter around
    it; an interval over prompts must cover the true mean in 95 % of the studies."""
    rng = np.random.default_rng(11)
    shape = (clusters, 2000)
    levels = rng.gamma(4, 0.5, shape) if skewed else rng.normal(2, 1, shape)
    texts = levels[:, None] + rng.normal(0, 1, (clusters, 5, 2000))
    _, lower, upper = INTERVALS.mean(texts.mean(axis=1))
    covered = np.mean((lower <= 2) & (2 <= upper))
    assert low <= covered <= high


def test_intervals_over_tokens_would_not_cover():
    """The reason for clusters: the same data with texts as units are covered far too seldom."""
    rng = np.random.default_rng(11)
    levels = rng.normal(2, 1, (16, 1, 500))
    texts = levels + rng.normal(0, 0.3, (16, 5, 500))
    _, lower, upper = INTERVALS.mean(texts.reshape(80, 500))
    assert np.mean((lower <= 2) & (2 <= upper)) < 0.75


def test_interval_is_near_student_for_normal_data():
    values = np.random.default_rng(3).normal(5, 2, 12)
    estimate, low, high = Intervals(draws=20000, seed=1).mean(values)
    half = stats.t.ppf(0.975, 11) * values.std(ddof=1) / math.sqrt(12)
    assert estimate == values.mean()
    assert high - low == pytest.approx(2 * half, rel=0.08)


def test_interval_equals_a_bootstrap_written_out():
    values = np.random.default_rng(5).gamma(2, size=20)
    estimate, low, high = Intervals(draws=40000, seed=1).mean(values)
    rng = np.random.default_rng(99)
    means = values[rng.integers(0, 20, (40000, 20))].mean(axis=1)
    tail = stats.norm.cdf(math.sqrt(20 / 19) * stats.t.ppf(0.025, 19))
    assert low == pytest.approx(np.quantile(means, tail), rel=0.02)
    assert high == pytest.approx(np.quantile(means, 1 - tail), rel=0.02)


def test_equal_data_have_equal_intervals_and_zero_has_none_of_width():
    values = np.random.default_rng(5).normal(size=(9, 4))
    both = np.stack([values, values, values + 1], axis=1)
    estimate, low, high = INTERVALS.mean(both)
    assert (low[0] == low[1]).all() and (high[0] == high[1]).all()
    assert low[2] == pytest.approx(low[0] + 1)
    for part in INTERVALS.mean(np.zeros((9, 4))):
        assert part.shape == (4,) and (part == 0).all()


def test_missing_clusters_are_left_out_column_by_column():
    values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 4.0], [np.nan, np.nan]])
    estimate, low, high = INTERVALS.mean(values)
    assert estimate.tolist() == [3.0, 3.0]
    assert low[0] < 3 < high[0] and low[1] < 3 < high[1]
    assert np.isnan(INTERVALS.mean(np.full((3, 2), np.nan))).all()
    estimate, low, high = INTERVALS.mean(np.array([[4.0]]))
    assert estimate == 4 and np.isnan(low) and np.isnan(high)


def test_median_is_not_moved_by_a_disturbed_timing():
    values = np.random.default_rng(0).normal(1, 0.02, 12)
    disturbed = np.where(values == values.max(), 9.0, values)
    estimate, low, high = INTERVALS.median(disturbed)
    assert estimate == np.median(values) and 0.95 < low < estimate < high < 1.05
    assert INTERVALS.mean(disturbed)[0] > 1.5
    rng = np.random.default_rng(1)
    found = [INTERVALS.median(rng.normal(0, 1, 15)) for _ in range(300)]
    assert 0.92 <= np.mean([low <= 0 <= high for _, low, high in found])


def test_peak_and_its_interval():
    grid = np.round(np.arange(0.1, 1.05, 0.1), 2)
    curves = -((grid - 0.6) ** 2) * np.linspace(1, 2, 8)[:, None]
    assert INTERVALS.of(curves, peak(grid)) == (0.6, 0.6, 0.6)
    noisy = curves + np.random.default_rng(0).normal(0, 0.05, curves.shape)
    estimate, low, high = INTERVALS.of(noisy, peak(grid))
    assert low <= estimate <= high and low < high and {low, high} <= set(grid)
    assert peak(grid)(np.zeros((2, 10))).tolist() == [0.1, 0.1]


def test_contrast_by_hand():
    grid = np.array([0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.2])
    curve = np.array([[100.0, 1, 2, 5, 7, 3, 100]])
    assert contrast(grid, curve, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([6 - 2])
    assert np.isnan(contrast(grid, curve, (0.55, 0.6), (0.1, 1.0))).all()
    assert inside(np.round(np.arange(1, 41) * 0.05, 2), 0.5, 0.8).sum() == 7


def test_slope_contrast_by_hand():
    grid = np.array([0.0, 0.25, 0.5, 0.65, 0.8, 1.0, 1.5])
    straight = 3 * grid[None] + 1
    assert slope_contrast(grid, straight, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([0])
    kinked = np.where(grid < 0.5, 0, np.where(grid > 0.8, 0.3, grid - 0.5))[None]
    assert slope_contrast(grid, kinked, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([1])
    assert np.isnan(
        slope_contrast(np.array([0.0, 1.0]), np.ones((1, 2)), (0.5, 0.8), (0.1, 1.0))
    ).all()


@given(st.floats(-5, 5), st.integers(0, 2**32 - 1))
def test_contrasts_do_not_see_a_shift(shift, seed):
    grid = np.array([0.1, 0.25, 0.5, 0.65, 0.8, 1.0])
    curves = np.random.default_rng(seed).normal(size=(3, 6))
    for function in (contrast, slope_contrast):
        before = function(grid, curves, (0.5, 0.8), (0.1, 1.0))
        after = function(grid, curves + shift, (0.5, 0.8), (0.1, 1.0))
        assert after == pytest.approx(before, abs=1e-9)


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


def test_verdicts_are_put_together():
    assert _effect([0.5, 0.1, 1.0], 0.2) == "confirmed"
    assert _effect([0.0, -0.1, 0.1], 0.2) == "refuted"
    assert _effect([0.0, -0.1, 0.3], 0.2) == "inconclusive"
    assert _c4_verdict(["confirmed", "refuted", "confirmed"]) == "confirmed"
    assert _c4_verdict(["confirmed", "refuted", "refuted"]) == "refuted"
    assert _c4_verdict(["refuted", "confirmed", "confirmed"]) == "refuted"
    assert _c4_verdict(["confirmed", "inconclusive", "refuted"]) == "inconclusive"
    assert overall(["confirmed", "refuted"]) == "refuted"
    assert overall(["confirmed", "inconclusive"]) == "inconclusive"
    assert overall(["confirmed", "confirmed"]) == "confirmed"
    assert overall(["not tested"]) == "not tested"


def _text(source, name, tokens, kl):
    curve = [kl, 2 * kl]
    names = ("kl", "entropy_ref", "entropy_test", "delta_p_squared")
    return {
        "source": source,
        "id": name,
        "tokens": tokens,
        "same_top": 1.0,
        "ln_ppl_ratio": kl,
        "curves": {name: curve for name in names},
    }


def test_a_prompt_counts_once_and_its_texts_by_their_tokens():
    texts = [_text("own", "a", 30, 1.0), _text("own", "a", 10, 5.0), _text("held", "a", 99, 4.0)]
    assert logit_clusters(texts, "all", "kl").tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert logit_clusters(texts, "own", "kl").tolist() == [[2.0, 4.0]]
    assert logit_clusters(texts, "held", "ln_ppl_ratio").tolist() == [4.0]
    assert logit_clusters(texts, "all", "entropy_shift").tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_repetition_by_hand():
    ids = [1, 2, 1, 2, 1, 2]
    assert ngrams(ids, 5) == [(1, 2, 1, 2, 1), (2, 1, 2, 1, 2)]
    assert rep_n(ids, 1) == pytest.approx(4 / 6)
    assert rep_n(ids, 2) == pytest.approx(3 / 5)  # 12 and 21 of five
    assert rep_n(ids, 4) == pytest.approx(1 / 3)
    assert rep_n([7, 8, 9], 2) == 0
    assert math.isnan(rep_n([7, 8, 9], 4)) and math.isnan(rep_n([], 1))


def test_distinct_over_texts_by_hand():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1, 2], [1, 2]], 2) == pytest.approx(1 / 2)
    assert math.isnan(distinct_n([[1], []], 2))


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_repetition_is_what_distinct_lacks(ids, n):
    if len(ids) >= n:
        assert rep_n(ids, n) == pytest.approx(1 - distinct_n([ids], n))
        assert 0 <= rep_n(ids, n) < 1


def test_zlib_ratio():
    assert math.isnan(zlib_ratio(""))
    assert zlib_ratio("ab" * 500) < 0.05
    assert zlib_ratio("\u00e4") == len(zlib.compress("\u00e4".encode(), 9)) / 2


def test_first_divergence():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([], []) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([1], [1, 2]) == 1


def test_divergent_word():
    assert divergent_word("the cat sat", "the car sat") == 4
    assert divergent_word("same", "same") == 4
    assert divergent_word("one two", "one") == 3
    assert divergent_word("one twofold", "one two") == 4
    assert divergent_word("a b", "a b c") == 2
    assert divergent_word("", "x") == 0
