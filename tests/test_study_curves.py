"""What is read off curves: against formulas written out, scipy's optimiser and its Kaplan-Meier."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats

from qllm.study.curves import (
    contrast,
    distance_of,
    effective_temperature_of,
    inside,
    kaplan_meier,
    peak_of,
    slope_contrast,
    slope_over,
    slopes,
)
from qllm.study.statistics import Intervals

INTERVALS = Intervals(confidence=0.95, draws=1000, seed=7)
GRID = np.round(np.arange(1, 41) * 0.05, 2)


def test_contrast_by_hand():
    grid = np.array([0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.2])
    curve = np.array([[100.0, 1, 2, 5, 7, 3, 100]])
    assert contrast(grid, curve, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([6 - 2])
    assert np.isnan(contrast(grid, curve, (0.55, 0.6), (0.1, 1.0))).all()
    assert inside(GRID, 0.5, 0.8).sum() == 7


def test_slopes_by_hand():
    grid = np.array([0.0, 0.25, 0.5, 0.65, 0.8, 1.0, 1.5])
    straight = 3 * grid[None] + 1
    assert np.concatenate(slopes(grid, straight, (0.5, 0.8), (0.1, 1.0))) == pytest.approx([3, 3])
    assert slope_contrast(grid, straight, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([0])
    kinked = np.where(grid < 0.5, 0, np.where(grid > 0.8, 0.3, grid - 0.5))[None]
    assert slope_contrast(grid, kinked, (0.5, 0.8), (0.1, 1.0)) == pytest.approx([1])
    assert slope_over(grid, kinked, (0.25, 0.65)) == pytest.approx([0.15 / 0.4])
    coarse = np.array([0.0, 1.0])
    assert np.isnan(slope_contrast(coarse, np.ones((1, 2)), (0.5, 0.8), (0.1, 1.0))).all()
    assert np.isnan(slope_over(np.array([1.0]), np.ones((1, 1)), (0.5, 0.8))).all()


@given(st.floats(-5, 5), st.integers(0, 2**32 - 1))
def test_contrasts_do_not_see_a_shift(shift, seed):
    grid = np.array([0.1, 0.25, 0.5, 0.65, 0.8, 1.0])
    curves = np.random.default_rng(seed).normal(size=(3, 6))
    for function in (contrast, slope_contrast):
        before = function(grid, curves, (0.5, 0.8), (0.1, 1.0))
        after = function(grid, curves + shift, (0.5, 0.8), (0.1, 1.0))
        assert after == pytest.approx(before, abs=1e-9)


def test_peak_and_its_interval():
    grid = np.round(np.arange(0.1, 1.05, 0.1), 2)
    curves = -((grid - 0.6) ** 2) * np.linspace(1, 2, 8)[:, None]
    found = INTERVALS.of(curves, peak_of(grid), smooth=False)
    assert [part.tolist() for part in found] == [[0.6], [0.6], [0.6]]
    noisy = curves + np.random.default_rng(0).normal(0, 0.05, curves.shape)
    for clusters in (4, 8):
        found = INTERVALS.of(noisy[:clusters], peak_of(grid), smooth=False)
        estimate, low, high = (part[0] for part in found)
        assert low <= estimate <= high and low < high and {low, high} <= set(grid)
    assert peak_of(grid)(np.zeros((2, 10))).tolist() == [[0.1], [0.1]]


def test_distance():
    assert distance_of(np.array([[1.0, -3, 2], [0, 0, 0]])).tolist() == [[3], [0]]


# ---------------------------------------------------------------------- effective temperature


def text(reference, arm):
    """Means over the tokens (rows) of what the statistic takes, from the logits, one after the
    other over the grid."""
    scaled = reference / GRID[:, None, None]
    log_z = special.logsumexp(scaled, axis=-1)
    entropy = log_z - (special.softmax(scaled, axis=-1) * scaled).sum(axis=-1)
    cross = (special.softmax(arm / GRID[:, None, None], axis=-1) * reference).sum(axis=-1)
    return np.concatenate([part.mean(axis=1) for part in (cross, log_z, entropy)])


def minimum(reference, arm, temperature):
    """The same by brute force: the mean KL of whole distributions, minimised over T'."""
    log_q = special.log_softmax(arm / temperature, axis=-1)

    def kl(other):
        log_p = special.log_softmax(reference / other, axis=-1)
        return (np.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()

    found = optimize.minimize_scalar(
        kl, bounds=(0.5 * temperature, 4 * temperature), options={"xatol": 1e-9}
    )
    return found.x


@pytest.mark.parametrize("noise", [0.1, 0.4, 1.0])
def test_effective_temperature_is_the_minimum(noise):
    rng = np.random.default_rng(3)
    reference = rng.normal(0, 3, (20, 60))
    arm = reference + rng.normal(0, noise, (20, 60))
    found = effective_temperature_of(GRID)(text(reference, arm))
    for place, temperature in list(enumerate(GRID))[3:36:4]:
        wanted = minimum(reference, arm, temperature)
        assert found[place] == pytest.approx(wanted, abs=0.01 * abs(wanted - temperature) + 2e-5)


@pytest.mark.parametrize("factor", [0.9, 0.99, 1.02, 1.2])
def test_scaled_logits_are_another_temperature(factor):
    """Logits times c at T are those of T / c: the planted temperature is found."""
    reference = np.random.default_rng(4).normal(0, 3, (30, 50))
    found = effective_temperature_of(GRID)(text(reference, factor * reference))
    inner = (GRID / factor > 0.15) & (GRID / factor < 2)
    assert found[inner] == pytest.approx(GRID[inner] / factor, rel=1e-3)
    inner &= GRID / factor > 0.35
    assert found[inner] == pytest.approx(GRID[inner] / factor, rel=1e-4)
    assert found.min() >= GRID[0] and found.max() <= GRID[-1]


def test_equal_logits_have_their_own_temperature_and_draws_are_quick():
    reference = np.random.default_rng(4).normal(0, 3, (30, 50))
    means = text(reference, reference)
    found = effective_temperature_of(GRID)(means)
    assert found == pytest.approx(GRID, abs=1e-9)
    clusters = means * np.random.default_rng(0).normal(1, 0.01, (12, 1))
    estimate, low, high = INTERVALS.of(clusters, effective_temperature_of(GRID))
    assert estimate.shape == (40,) and np.abs(high - low).max() < 1e-8
    assert effective_temperature_of(GRID[:1])(means[[0, 40, 80]]).tolist() == [GRID[0]]


def test_interval_of_the_effective_temperature_holds_the_planted_one():
    """Texts whose own factors scatter around 1.05: at T = 1 the arm is as the reference at 0.95."""
    rng = np.random.default_rng(5)
    clusters = []
    for factor in rng.normal(1.05, 0.02, 20):
        reference = rng.normal(0, 3, (25, 40))
        clusters.append(text(reference, factor * reference))
    place = np.flatnonzero(GRID == 1.0)[0]
    found = INTERVALS.of(np.stack(clusters), effective_temperature_of(GRID))
    estimate, low, high = (part[place] for part in found)
    assert low < 1 / 1.05 < high < 1 and high - low < 0.03 and low < estimate < high


# ------------------------------------------------------------------------------------ survival


def test_kaplan_meier_is_scipys():
    rng = np.random.default_rng(2)
    written = rng.integers(1, 13, (30, 4))
    parted = rng.random((30, 4)) < 0.7
    found = kaplan_meier(written, parted, 12, INTERVALS)
    data = stats.CensoredData(uncensored=written[parted], right=written[~parted])
    oracle = stats.ecdf(data).sf
    assert found.estimate == pytest.approx(oracle.evaluate(np.arange(13)))
    assert found.at_risk.tolist() == [120] + [(written >= t).sum() for t in range(1, 13)]
    wanted = [(parted & (written == t)).sum() / (written >= t).sum() for t in range(1, 13)]
    assert found.hazard[1:] == pytest.approx(wanted) and math.isnan(found.hazard[0])
    assert (found.low <= found.estimate).all() and (found.estimate <= found.high).all()
    assert found.estimate[0] == found.low[0] == found.high[0] == 1


def test_kaplan_meier_on_a_published_example():
    """Remission times of the 6-MP arm of Freireich et al. 1963, in weeks, + for censored: the
    curve of the textbooks (0.857 at 6, 0.753 at 10, 0.627 at 16, 0.448 at 23)."""
    times = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    written = np.array(times + censored)[:, None]
    parted = np.array([True] * len(times) + [False] * len(censored))[:, None]
    found = kaplan_meier(written, parted, 35, INTERVALS).estimate
    wanted = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448, 35: 0.448}
    for week, share in wanted.items():
        assert found[week] == pytest.approx(share, abs=6e-4)


def test_survival_of_texts_that_never_part_and_of_one_prompt():
    written, never = np.full((5, 2), 8), np.zeros((5, 2), bool)
    found = kaplan_meier(written, never, 8, INTERVALS)
    for part in (found.estimate, found.low, found.high):
        assert (part == 1).all()
    at_once = kaplan_meier(np.ones((5, 2), int), ~never, 3, INTERVALS)
    assert at_once.estimate.tolist() == [1, 0, 0, 0] and at_once.at_risk.tolist() == [10, 10, 0, 0]
    assert at_once.hazard[1] == 1 and np.isnan(at_once.hazard[2:]).all()
    single = kaplan_meier(np.array([[1, 2]]), np.ones((1, 2), bool), 2, INTERVALS)
    assert single.estimate.tolist() == [1, 0.5, 0] and np.isnan(single.low).all()


@pytest.mark.parametrize("clusters", [6, 40])
def test_survival_intervals_cover_the_truth(clusters):
    """Prompts with hazards of their own, four texts each: the share of all that survive 5 steps."""
    rng = np.random.default_rng(9)
    hazards = np.array([0.02, 0.1, 0.2])
    truth = np.mean((1 - hazards) ** 5)
    covered = []
    for _ in range(400):
        own = rng.choice(hazards, (clusters, 1))
        steps = rng.geometric(np.broadcast_to(own, (clusters, 4)))
        found = kaplan_meier(np.minimum(steps, 8), steps <= 8, 8, INTERVALS)
        covered.append(found.low[5] <= truth <= found.high[5])
    assert 0.91 <= np.mean(covered) <= 0.975
