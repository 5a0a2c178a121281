"""Intervals and tests for measures of prompts, with the prompt as the unit that is drawn anew.

Everything that belongs to one prompt (its seeds, arms, temperatures and tokens) moves together, so
tokens of one text, or texts of one prompt, are never taken for independent observations. The
bootstrap is hierarchical: prompts are drawn with replacement, and each comes with all its seeds.
Drawing seeds anew within a drawn prompt as well would count the noise within prompts twice (Davison
and Hinkley 1997, section 3.8, prefer the first for that reason), and a measure that compares the
seeds of a prompt, as distinct-n does, would see seeds that equal themselves. So every measure is
one number per prompt, and the bootstrap of their means is all that is needed. One seed serves all
intervals: arms and temperatures see the same drawn prompts, and equal data give equal intervals.

Intervals are BCa (Efron 1987), read at the levels of Student's t instead of the normal distribution
and wider by sqrt(n / (n - 1)), as Hesterberg proposes for percentiles ("What teachers should know
about the bootstrap", 2015, section 5.3): without that, 16 prompts give 92 % instead of 95. Fewer
than `FEW` prompts are too few to draw from, and the interval is Student's, with the standard error
of the jackknife. p-values come from the same draws by asking at which level the interval would end
at the bound, so an interval and its p never contradict each other; they are given on the two-sided
scale (twice the p of a directed claim), on which p <= 0.05 says that the 95 % interval lies beyond
the bound.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From means over prompts, (..., points), to what is asked for, (..., columns)."""

FEW = 10
"""Below so many prompts, intervals are Student's."""

_PIECE = 4_000_000
"""Numbers that are resampled at a time."""


@dataclass(frozen=True)
class Resampled:
    """Estimates and what they came out as in every draw of prompts: (columns), (columns, draws)
    sorted, and per column the bias correction, the acceleration and the standard error."""

    estimate: Floats
    drawn: Floats
    bias: Floats
    acceleration: Floats
    error: Floats
    clusters: int
    student: bool
    """Whether there are too few clusters to read the draws."""

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """(low, high), each (columns); NaN from one cluster, a point where nothing varies."""
        from scipy import special

        if self.clusters < 2:
            nothing = np.full_like(self.estimate, np.nan)
            return nothing, nothing
        level = _student_quantile((1 - confidence) / 2, self.clusters - 1)
        if self.student:
            return self.estimate + level * self.error, self.estimate - level * self.error
        ends = []
        for z in (level * _widening(self.clusters), -level * _widening(self.clusters)):
            moved = self.bias + z
            share = special.ndtr(self.bias + moved / (1 - self.acceleration * moved))
            draws = self.drawn.shape[1]
            place = np.floor(share * draws) if z < 0 else np.ceil(share * draws) - 1
            place = np.clip(np.nan_to_num(place), 0, draws - 1).astype(np.intp)
            ends.append(np.take_along_axis(self.drawn, place[:, None], axis=1)[:, 0])
        # with half of the draws equal to it, the estimate may lie outside of what was drawn
        return np.minimum(ends[0], self.estimate), np.maximum(ends[1], self.estimate)


@dataclass(frozen=True)
class Finding:
    """One number with its interval and the number of clusters behind it."""

    estimate: float
    low: float
    high: float
    clusters: int
    resampled: Resampled | None = None
    """None for a number that was counted, and so is exact."""

    @classmethod
    def counted(cls, value: float) -> Finding:
        """A number without any uncertainty."""
        return cls(value, value, value, 0)

    def p_above(self, bound: float) -> float:
        """p-value, on the two-sided scale, of "the number is greater than `bound`"."""
        return self._p(bound, 1.0)

    def p_below(self, bound: float) -> float:
        """p-value, on the two-sided scale, of "the number is less than `bound`"."""
        return self._p(bound, -1.0)

    def p_within(self, margin: float) -> float:
        """p-value of two one-sided tests (TOST) of "the number lies within -margin to margin"."""
        return max(self.p_above(-margin), self.p_below(margin))

    def p_other(self, value: float) -> float:
        """p-value of "the number is not `value`"."""
        return min(self.p_above(value), self.p_below(value))

    def _p(self, bound: float, sign: float) -> float:
        from scipy import special

        if math.isnan(self.low) or math.isnan(bound):
            return math.nan
        found = self.resampled
        if found is None or found.error[0] == 0:
            return 0.0 if sign * (self.estimate - bound) > 0 else 1.0
        if found.student:
            t = sign * (bound - self.estimate) / found.error[0]
        else:
            bias, acceleration = sign * found.bias[0], sign * found.acceleration[0]
            moved = _place(found.drawn[0], bound, sign) - bias
            scale = 1 + acceleration * moved
            if scale <= 0:  # beyond all that the acceleration allows for
                return 0.0 if moved < 0 else 1.0
            t = (moved / scale - bias) / _widening(found.clusters)
        return float(min(1.0, 2 * special.stdtr(found.clusters - 1, t)))


def _place(drawn: Floats, bound: float, sign: float) -> float:
    """How far below the draws the bound is, as a normal quantile; beyond all of them (few draws
    cannot give a small p) the tail of a normal distribution goes on."""
    from scipy import special

    beyond = np.count_nonzero(sign * drawn < sign * bound)
    level = np.count_nonzero(drawn == bound)
    share = np.clip((beyond + level / 2) / len(drawn), 0.5 / len(drawn), 1 - 0.5 / len(drawn))
    place = float(special.ndtri(share))
    if beyond + level == 0:
        place = min(place, float(sign * (bound - drawn.mean()) / drawn.std()))
    return place


@dataclass(frozen=True)
class Intervals:
    """How intervals are made: `confidence` (two-sided), number of `draws`, `seed`."""

    confidence: float = 0.95
    draws: int = 2000
    seed: int = 20230911

    @property
    def alpha(self) -> float:
        """The largest p that counts as evidence."""
        return 1 - self.confidence

    def weights(self, n: int) -> Floats:
        """(draws, n): the share of each of `n` clusters in every draw, rows summing to 1."""
        return _weights(n, self.draws, self.seed)

    def mean(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """Mean over axis 0, and its interval: (estimate, low, high), each of shape (...).

        `values` (clusters, ...) float64; in each column, clusters that are NaN (prompts without the
        measure) are left out. One cluster has no interval: NaN; none: all NaN.
        """
        values = np.asarray(values, np.float64)
        columns = values.reshape(len(values), -1)
        found = np.full((3, columns.shape[1]), np.nan)
        for absent, chosen in _patterns(columns):
            kept = columns[~absent][:, chosen]
            if len(kept):
                found[:, chosen] = self._means(kept)
        estimate, low, high = found.reshape(3, *values.shape[1:])
        return estimate, low, high

    def _means(self, values: Floats) -> Floats:
        """(3, columns) of `values` (clusters, columns) without NaN, some columns at a time."""
        step = max(1, _PIECE // self.draws)
        parts = []
        for first in range(0, values.shape[1], step):
            found = self.resample(values[:, first : first + step])
            parts.append(np.stack([found.estimate, *found.interval(self.confidence)]))
        return np.concatenate(parts, axis=1)

    def of(
        self, values: Floats, statistic: Statistic, smooth: bool = True
    ) -> tuple[Floats, Floats, Floats]:
        """Numbers computed from the means over clusters, as a curve's peak or a ratio: (estimate,
        low, high), each (columns).

        `values` (clusters, points), where clusters with any NaN are left out; `statistic` maps
        (..., points) to (..., columns). Not `smooth`: a number that jumps, as the place of a peak,
        so that few clusters get percentiles of the draws and no standard error.
        """
        kept = complete(values)
        if len(kept) == 0:
            nothing = np.full_like(statistic(np.full(values.shape[1:], np.nan)), np.nan)
            return nothing, nothing, nothing
        found = self.resample(kept, statistic, smooth)
        return (found.estimate, *found.interval(self.confidence))

    def finding(self, values: Floats, statistic: Statistic | None = None) -> Finding:
        """A single number: the mean of `values` (clusters), or the one that `statistic` makes of
        the means of `values` (clusters, points). Clusters with NaN are left out."""
        values = np.asarray(values, np.float64)
        kept = complete(values[:, None] if values.ndim == 1 else values)
        if len(kept) == 0:
            return Finding(math.nan, math.nan, math.nan, 0)
        found = self.resample(kept, statistic)
        low, high = found.interval(self.confidence)
        return Finding(
            float(found.estimate[0]), float(low[0]), float(high[0]), found.clusters, found
        )

    def resample(
        self, values: Floats, statistic: Statistic | None = None, smooth: bool = True
    ) -> Resampled:
        """Draws clusters anew: `values` (clusters, points) without NaN; the statistic of each
        draw's means, or the means themselves."""
        n = len(values)
        whole = values.mean(axis=0)
        fixed = (values == values[0]).all(axis=0)
        whole[fixed] = values[0][fixed]  # which a sum could round
        if statistic is None:
            estimate, drawn = whole, values.T @ self.weights(n).T
            gaps = (values - whole) / max(1, n - 1)
        else:
            estimate = np.atleast_1d(statistic(whole))
            means = self.weights(n) @ values
            means[:, fixed] = whole[fixed]
            drawn = _columns(statistic(means), estimate)
            others = (n * whole - values) / max(1, n - 1)
            others[:, fixed] = whole[fixed]
            left_out = _columns(statistic(others), estimate).T
            gaps = left_out.mean(axis=0) - left_out
        drawn = np.sort(drawn, axis=1)
        squares = (gaps**2).sum(axis=0)
        constant = np.isclose(drawn[:, 0], drawn[:, -1], rtol=1e-12, atol=0.0)
        if statistic is None:
            constant |= fixed
        drawn[constant] = estimate[constant, None]
        squares[constant] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            acceleration = np.nan_to_num((gaps**3).sum(axis=0) / (6 * squares**1.5), posinf=0.0)
        acceleration[squares == 0] = 0.0
        error = np.sqrt((n - 1) / n * squares)
        if statistic is not None and not smooth:
            error[~constant] = drawn[~constant].std(axis=1)
        return Resampled(
            estimate, drawn, _bias(drawn, estimate), acceleration, error, n, n < FEW and smooth
        )

    def median(self, values: Floats) -> Finding:
        """Median of `values` (rounds), which a few disturbed timings do not move. Percentiles of
        the draws, widened; few rounds get Student's interval with the error that the median of
        normal data has."""
        values = np.asarray(values, np.float64)
        n = len(values)
        estimate = np.atleast_1d(np.median(values))
        rng = np.random.default_rng(self.seed)
        drawn = np.sort(np.median(values[rng.integers(0, n, (self.draws, n))], axis=1))[None]
        zero = np.zeros(1)
        error = math.sqrt(math.pi / 2 / n) * values.std(ddof=1, keepdims=True) if n > 1 else zero
        found = Resampled(estimate, drawn, zero, zero, error, n, n < FEW)
        low, high = (float(end[0]) for end in found.interval(self.confidence))
        if (values >= 0).all():
            low = max(low, 0.0)  # where a symmetric interval of few rounds would reach below
        return Finding(float(estimate[0]), low, high, n, found)


@functools.lru_cache(maxsize=32)
def _weights(n: int, draws: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(rng.multinomial(n, np.full(n, 1 / n), size=draws) / n)


@functools.lru_cache(maxsize=256)
def _student_quantile(tail: float, freedom: int) -> float:
    from scipy import special

    return float(special.stdtrit(freedom, tail))


def _widening(n: int) -> float:
    """By how much an interval of the bootstrap over `n` clusters is too short: its variance divides
    by n where n - 1 would be right."""
    return math.sqrt(n / (n - 1))


def _bias(drawn: Floats, estimate: Floats) -> Floats:
    """The bias correction of BCa: the normal quantile of the share of draws below the estimate,
    those equal to it (up to rounding) counting half."""
    from scipy import special

    slack = 1e-10 * (drawn[:, -1] - drawn[:, 0])
    below = (drawn < (estimate - slack)[:, None]).sum(axis=1)
    upto = (drawn <= (estimate + slack)[:, None]).sum(axis=1)
    half = 0.5 / drawn.shape[1]
    share = np.clip((below + upto) / (2 * drawn.shape[1]), half, 1 - half)
    return np.asarray(special.ndtri(share))


def _columns(found: Floats, estimate: Floats) -> Floats:
    """What a statistic gave for every draw, as (columns, draws)."""
    return np.ascontiguousarray(found.reshape(-1, len(estimate)).T)


def _patterns(columns: Floats) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """(clusters that are absent, columns in which just these are) for every such set."""
    absent = np.isnan(columns)
    if not absent.any():
        return [(np.zeros(len(columns), bool), np.ones(columns.shape[1], bool))]
    patterns, group = np.unique(absent, axis=1, return_inverse=True)
    return [(pattern, group.reshape(-1) == i) for i, pattern in enumerate(patterns.T)]


def complete(values: Floats) -> Floats:
    """The clusters (rows of axis 0) without any NaN, float64."""
    values = np.asarray(values, np.float64)
    return values[~np.isnan(values).any(axis=tuple(range(1, values.ndim)))]


# ------------------------------------------------------------------------------- other tests


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact p-value of McNemar's test, two-sided: items in which only the one, and only the other,
    has the property. 1 without any such item."""
    from scipy import stats

    discordant = only_one + only_other
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(only_one, discordant, 0.5).pvalue)


def permutation(values: Floats, draws: int, seed: int) -> tuple[float, float]:
    """Whether arms have different curves: (largest |t|, p).

    `values` (clusters, arms, points): what each arm has for a prompt at each temperature. Under the
    hypothesis that arms are alike, their labels may be exchanged within every prompt. The statistic
    is the largest |t| over arms and points of an arm's distance from the mean of all arms. All
    exchanges are tried when there are at most `draws`; else p is (b + 1) / (draws + 1), b being the
    number of random exchanges that reach the statistic. NaN with fewer than two clusters or arms;
    clusters with NaN are left out.
    """
    kept = complete(values)
    n, arms, points = kept.shape
    if n < 2 or arms < 2:
        return math.nan, math.nan
    noise = 1e-12 * np.abs(kept).max(axis=(0, 1))  # what rounding leaves of equal arms
    kept = kept - kept.mean(axis=1, keepdims=True)
    kept[:, :, np.all(np.abs(kept) <= noise, axis=(0, 1))] = 0.0
    orders = np.array(list(itertools.permutations(range(arms))))
    exact = n * math.log(len(orders)) <= math.log(draws) + 1e-9
    if exact:
        choices = np.array(list(itertools.product(range(len(orders)), repeat=n)))
    else:
        choices = np.random.default_rng(seed).integers(0, len(orders), (draws, n))
    flat = kept.reshape(n * arms, points)
    observed = _largest_t(np.eye(arms)[None].repeat(n, axis=0)[None], flat, noise)[0]
    reached, step = 0, max(1, _PIECE // (arms * n * arms))
    for first in range(0, len(choices), step):
        # which of a prompt's rows each arm gets: (some, clusters, arms, arms)
        given = np.eye(arms)[orders[choices[first : first + step]]]
        reached += int(np.sum(_largest_t(given, flat, noise) >= observed * (1 - 1e-9)))
    p = reached / len(choices) if exact else (reached + 1) / (len(choices) + 1)
    return float(observed), p


def _largest_t(given: Floats, flat: Floats, noise: Floats) -> Floats:
    """The largest |t| over arms and points for each way to give `flat` (clusters * arms, points) to
    the arms: `given` (ways, clusters, arms, arms of the rows)."""
    ways, n, arms, _ = given.shape
    chosen = given.transpose(0, 2, 1, 3).reshape(ways * arms, n * arms)
    sums = chosen @ flat
    squares = chosen @ flat**2
    mean = sums / n
    error = np.sqrt(np.maximum(squares - sums * mean, 0.0) / (n - 1) / n)
    error[error <= noise] = 0.0
    mean[np.abs(mean) <= noise] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(np.abs(mean) / error, nan=0.0, posinf=np.inf)
    return np.asarray(t.reshape(ways, -1).max(axis=1))


def holm(p: Sequence[float] | Floats) -> Floats:
    """p-values adjusted as Holm (1979) does, so that the chance of any false claim among them stays
    below the level. NaN (no test) stays NaN and does not count."""
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, np.nan)
    order = np.flatnonzero(~np.isnan(values))
    order = order[np.argsort(values[order], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def benjamini_hochberg(p: Sequence[float] | Floats) -> Floats:
    """p-values adjusted as Benjamini and Hochberg (1995) do, which holds the expected share of
    false claims among those made. NaN stays NaN and does not count."""
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, np.nan)
    order = np.flatnonzero(~np.isnan(values))
    order = order[np.argsort(-values[order], kind="stable")]
    scaled = values[order] * len(order) / np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return adjusted


# --------------------------------------------------------------------------------- verdicts


def equivalence(low: float, high: float, margin: float) -> str:
    """Verdict on "equal up to the margin": confirmed when the interval lies inside, refuted when it
    lies outside, else inconclusive."""
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if -margin < low and high < margin:
        return "confirmed"
    return "refuted" if low > margin or high < -margin else "inconclusive"


def superiority(low: float, high: float, bound: float) -> str:
    """Verdict on "greater than the bound": confirmed when the whole interval is, refuted when no
    part of it is, else inconclusive."""
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if low > bound:
        return "confirmed"
    return "refuted" if high <= bound else "inconclusive"


def effect(low: float, high: float, margin: float) -> str:
    """Verdict on "greater than 0 by an amount that counts": refuted when the interval excludes even
    the smallest effect that counts, confirmed when it lies above 0, else inconclusive."""
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if high < margin:
        return "refuted"
    return "confirmed" if low > 0 else "inconclusive"
