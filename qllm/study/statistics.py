"""Intervals for means over prompts, with the prompt as the unit that is drawn anew.

Everything that belongs to one prompt (its seeds, arms, temperatures and tokens) moves together, so
tokens of one text are never taken for independent observations. One seed serves all intervals:
arms and temperatures see the same resampled prompts, and equal data give equal intervals.

The intervals are bootstrap percentile intervals of scipy, widened for few prompts as Hesterberg
proposes ("What teachers should know about the bootstrap", 2015, section 5.3): with n prompts the
percentiles are those of Phi(-sqrt(n / (n - 1)) * t), t being the quantile of Student's t with
n - 1 degrees of freedom, because a plain percentile interval is too short by both factors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Intervals:
    """How intervals are made: `confidence` (two-sided), number of `draws`, `seed`."""

    confidence: float = 0.95
    draws: int = 2000
    seed: int = 20230911

    def level(self, n: int) -> float:
        """The confidence at which a percentile interval of a mean over `n` clusters is read."""
        from scipy import stats

        tail = (1 - self.confidence) / 2
        wide = math.sqrt(n / (n - 1)) * stats.t.ppf(tail, n - 1)
        return float(1 - 2 * stats.norm.cdf(wide))

    def mean(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """Mean over axis 0, and its interval: (estimate, low, high), each of shape (...).

        `values` (clusters, ...) float64; in each column, clusters that are NaN (prompts without the
        measure) are left out. One cluster has no interval: NaN; none: all NaN.
        """
        values = np.asarray(values, np.float64)
        columns = values.reshape(len(values), -1)
        found = np.full((3, columns.shape[1]), np.nan)
        patterns, group = np.unique(np.isnan(columns), axis=1, return_inverse=True)
        for number, absent in enumerate(patterns.T):
            chosen = group.reshape(-1) == number
            kept = columns[~absent][:, chosen]
            if len(kept) > 0:
                found[0, chosen] = kept.mean(axis=0)
            if len(kept) > 1:
                found[1:, chosen] = self._bootstrap((kept,), _mean, self.level(len(kept)))
        estimate, low, high = found.reshape(3, *values.shape[1:])
        return estimate, low, high

    def median(self, values: Floats) -> tuple[float, float, float]:
        """Median of `values` (clusters), which a few disturbed timings do not move, and its
        interval: (estimate, low, high). Needs two values at least."""
        low, high = self._bootstrap((values,), np.median, self.level(len(values)))
        return float(np.median(values)), float(low), float(high)

    def of(
        self, values: Floats, statistic: Callable[[Floats], Floats]
    ) -> tuple[float, float, float]:
        """A number computed from the mean over clusters, as a curve's peak: (estimate, low, high).

        `values` (clusters, points); `statistic` maps (..., points) to (...). Plain percentiles.
        """
        kept = complete(values)
        if len(kept) == 0:
            return math.nan, math.nan, math.nan
        estimate = float(statistic(kept.mean(axis=0)))
        if len(kept) == 1:
            return estimate, math.nan, math.nan

        def resampled(*columns: Floats, axis: int) -> Floats:
            means = [column.mean(axis=axis) for column in columns]
            return statistic(np.stack(means, axis=-1))

        columns = tuple(np.ascontiguousarray(column) for column in kept.T)
        low, high = self._bootstrap(columns, resampled, self.confidence, paired=True)
        return estimate, float(low), float(high)

    def _bootstrap(
        self, data: tuple[Floats, ...], statistic: Any, level: float, paired: bool = False
    ) -> tuple[Floats, Floats]:
        from scipy import stats

        # scipy 1.15 renamed the argument that takes the generator.
        named = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"
        found = stats.bootstrap(
            data,
            statistic,
            n_resamples=self.draws,
            batch=max(1, min(self.draws, 4_000_000 // max(1, sum(d.size for d in data)))),
            vectorized=True,
            paired=paired,
            axis=0,
            confidence_level=level,
            method="percentile",
            **{named: np.random.default_rng(self.seed)},
        ).confidence_interval
        return np.asarray(found.low), np.asarray(found.high)


def _mean(values: Floats, axis: int) -> Floats:
    return np.asarray(values.mean(axis=axis))


def complete(values: Floats) -> Floats:
    """The clusters (rows of axis 0) without any NaN, float64."""
    values = np.asarray(values, np.float64)
    return values[~np.isnan(values.reshape(len(values), -1)).any(axis=1)]


def inside(points: Floats, low: float, high: float) -> NDArray[np.bool_]:
    """Which of `points` lie in [low, high], decimal fractions taken as they are written."""
    return (points >= low - 1e-9) & (points <= high + 1e-9)


def contrast(
    temperatures: Floats, curves: Floats, band: tuple[float, float], around: tuple[float, float]
) -> Floats:
    """Mean of each curve in the band minus its mean over the rest of the surroundings: (clusters).

    `curves` (clusters, temperatures). NaN when the grid has no point in one of the two.
    """
    within = inside(temperatures, *band)
    rest = inside(temperatures, *around) & ~within
    if not within.any() or not rest.any():
        return np.full(len(curves), np.nan)
    return np.asarray(curves[:, within].mean(axis=1) - curves[:, rest].mean(axis=1))


def slope_contrast(
    temperatures: Floats, curves: Floats, band: tuple[float, float], around: tuple[float, float]
) -> Floats:
    """How much steeper each curve rises in the band than in the rest of the surroundings.

    The difference of two signed mean slopes per unit of temperature, each the rise over the pieces
    that lie there divided by their length. Signed, since a mean of absolute slopes grows with the
    sampling noise of an arm. `curves` (clusters, temperatures); returns (clusters).
    """
    steps = np.diff(temperatures)
    middles = temperatures[:-1] + steps / 2
    pieces = inside(temperatures[:-1], *around) & inside(temperatures[1:], *around)
    # the surroundings' first piece may begin below them, as from 0 to 0.25 around 0.1
    pieces |= inside(middles, *around) & inside(temperatures[1:], *around)
    within = pieces & inside(temperatures[:-1], *band) & inside(temperatures[1:], *band)
    rest = pieces & ~within
    if not within.any() or not rest.any():
        return np.full(len(curves), np.nan)
    rises = np.diff(curves, axis=1)

    def slope(which: NDArray[np.bool_]) -> Floats:
        return np.asarray(rises[:, which].sum(axis=1) / steps[which].sum())

    return slope(within) - slope(rest)


def peak(temperatures: Floats) -> Callable[[Floats], Floats]:
    """The statistic that maps curves (..., temperatures) to the temperature of their maximum (the
    lowest among equals)."""

    def at(curves: Floats) -> Floats:
        return np.asarray(temperatures[np.argmax(curves, axis=-1)])

    return at


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
