"""What is read off curves over temperature: contrasts of a band with its surroundings, slopes,
peaks, the largest distance, the effective temperature, and survival over positions.

Functions that take clusters give one number per cluster, to be meaned; those named `..._of` are
statistics of mean curves, for `Intervals.of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .statistics import Floats, Intervals, Statistic

Band = tuple[float, float]

RISING: Mapping[str, int] = {
    "nll_reference": 1,
    "rep_1": -1,
    "rep_2": -1,
    "rep_3": -1,
    "rep_4": -1,
    "diversity": 1,
    "loop": -1,
    "repeated_sentences": -1,
    "zlib_ratio": 1,
    "distinct_2": 1,
    "distinct_3": 1,
    "edit_distance": 1,
}
"""Measures of texts, and whether temperature moves them up (1) or down (-1). Slopes count positive
in that direction, so that steeper means greater for all of them."""


def inside(points: Floats, low: float, high: float) -> NDArray[np.bool_]:
    """Which of `points` lie in [low, high], decimal fractions taken as they are written."""
    return (points >= low - 1e-9) & (points <= high + 1e-9)


def contrast(temperatures: Floats, curves: Floats, band: Band, around: Band) -> Floats:
    """Mean of each curve in the band minus its mean over the rest of the surroundings: (clusters).

    `curves` (clusters, temperatures). NaN when the grid has no point in one of the two.
    """
    within = inside(temperatures, *band)
    rest = inside(temperatures, *around) & ~within
    if not within.any() or not rest.any():
        return np.full(len(curves), np.nan)
    return np.asarray(curves[:, within].mean(axis=1) - curves[:, rest].mean(axis=1))


def slopes(temperatures: Floats, curves: Floats, band: Band, around: Band) -> tuple[Floats, Floats]:
    """Mean slope of each curve in the band and over the rest of the surroundings, per unit of
    temperature: two arrays (clusters), NaN where the grid has no piece of the one or the other.

    Each is the rise over the pieces of the grid that lie there divided by their length: signed,
    since a mean of absolute slopes grows with the sampling noise of an arm. `curves` (clusters,
    temperatures).
    """
    steps = np.diff(temperatures)
    middles = temperatures[:-1] + steps / 2
    pieces = inside(temperatures[:-1], *around) & inside(temperatures[1:], *around)
    # the surroundings' first piece may begin below them, as from 0 to 0.25 around 0.1
    pieces |= inside(middles, *around) & inside(temperatures[1:], *around)
    within = pieces & inside(temperatures[:-1], *band) & inside(temperatures[1:], *band)
    rises = np.diff(curves, axis=1)

    def slope(which: NDArray[np.bool_]) -> Floats:
        if not which.any():
            return np.full(len(curves), np.nan)
        return np.asarray(rises[:, which].sum(axis=1) / steps[which].sum())

    return slope(within), slope(pieces & ~within)


def slope_over(temperatures: Floats, curves: Floats, band: Band) -> Floats:
    """Mean slope of each curve in the band alone: (clusters)."""
    return slopes(temperatures, curves, band, band)[0]


def slope_contrast(temperatures: Floats, curves: Floats, band: Band, around: Band) -> Floats:
    """How much steeper each curve rises in the band than in the rest of the surroundings:
    (clusters), the difference of the two slopes."""
    within, rest = slopes(temperatures, curves, band, around)
    return within - rest


def peak_of(temperatures: Floats) -> Statistic:
    """The temperature of the maximum of curves (..., temperatures), the lowest among equals:
    (..., 1)."""

    def at(curves: Floats) -> Floats:
        return np.asarray(temperatures[np.argmax(curves, axis=-1)])[..., None]

    return at


def distance_of(differences: Floats) -> Floats:
    """The largest absolute difference of two curves, from their differences (..., temperatures):
    (..., 1)."""
    return np.asarray(np.abs(differences).max(axis=-1))[..., None]


# ---------------------------------------------------------------------- effective temperature


def effective_temperature_of(temperatures: Floats) -> Statistic:
    """The temperature T' at which the reference is nearest to the arm at T, for each T of the grid.

    The statistic maps (..., 3 * G), the means over tokens of `cross` (the arm's expectation at T of
    the reference's logit), `log_z` (logsumexp of the reference's logits / T) and `entropy` (of the
    reference at T), to (..., G): the minimiser over T' of the mean
    KL(q_T || p_T') = -H(q_T) - cross(T) / T' + log_z(T'), held within the grid.

    In 1 / T', log_z is convex and its slope is the mean logit of the reference at T', which is
    (log_z - entropy) T' and so known exactly at every point of the grid. The minimum is where that
    slope equals cross(T): the slope is interpolated by cubics through four points in ln T', and the
    equation solved by Newton's method within the piece that holds the sign change.
    """

    def minimiser(means: Floats) -> Floats:
        cross, log_z, entropy = np.split(means, 3, axis=-1)
        mean_logit = (log_z - entropy) * temperatures
        points = np.log(temperatures)
        flat = [part.reshape(-1, len(points)) for part in (cross, mean_logit)]
        found = _where(points, *flat)
        return np.where(found == points, temperatures, np.exp(found)).reshape(cross.shape)

    return minimiser


def _where(points: Floats, wanted: Floats, values: Floats) -> Floats:
    """Where curves through falling `values` (rows, G) at `points` (G) have the values `wanted`
    (rows, G), the j-th being sought from the j-th point on; held within the points."""
    count, rows = len(points), np.arange(len(values))[:, None]
    if count == 1:
        return np.broadcast_to(points, wanted.shape).copy()
    piece = np.broadcast_to(np.minimum(np.arange(count), count - 2), wanted.shape).copy()
    for _ in points:
        on = (wanted < values[rows, piece + 1]) & (piece < count - 2)
        back = (wanted > values[rows, piece]) & (piece > 0) & ~on
        if not (on | back).any():
            break
        piece = piece + on - back
    low, high = points[piece], points[piece + 1]
    left, right = values[rows, piece], values[rows, piece + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.nan_to_num((wanted - left) / (right - left)), 0.0, 1.0)
    place = low + share * (high - low)
    first = np.clip(piece - 1, 0, max(0, count - 4))
    nodes = [first + i for i in range(min(4, count))]
    for _ in range(4):
        value, slope = _polynomial(
            [points[node] for node in nodes], [values[rows, node] for node in nodes], place
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.nan_to_num((wanted - value) / slope, posinf=0.0, neginf=0.0)
        place = np.clip(place + step, low, high)
    same = np.abs(wanted - values) <= 1e-10 * np.ptp(values, axis=1, keepdims=True)
    return np.asarray(np.where(same, points, place))


def _polynomial(
    points: list[Floats], values: list[Floats], place: Floats
) -> tuple[Floats, Floats]:
    """Value and slope at `place` of the polynomial through the points, in Newton's form."""
    divided = list(values)
    for order in range(1, len(points)):
        for i in range(len(points) - 1, order - 1, -1):
            divided[i] = (divided[i] - divided[i - 1]) / (points[i] - points[i - order])
    value, slope = divided[-1], np.zeros_like(place)
    for i in range(len(points) - 2, -1, -1):
        gap = place - points[i]
        slope = slope * gap + value
        value = value * gap + divided[i]
    return value, slope


# ------------------------------------------------------------------------------------ survival


@dataclass(frozen=True)
class Survival:
    """A Kaplan-Meier curve over positions 0..L: how many texts were at risk of the step (L + 1; at
    0 all of them), share that survived it with its interval, hazard of the step (NaN at 0 and where
    none is left)."""

    at_risk: NDArray[np.int64]
    estimate: Floats
    low: Floats
    high: Floats
    hazard: Floats


def kaplan_meier(
    written: NDArray[np.int64], parted: NDArray[np.bool_], length: int, intervals: Intervals
) -> Survival:
    """Survival of texts, several per prompt, with an interval from drawing whole prompts.

    `written` (prompts, texts): tokens up to the end of observation; `parted`: whether that was the
    event (the last of these tokens is the one that differed) or the text ended, equal to the end.
    A text is at risk at positions 1..written.
    """
    positions = np.arange(1, length + 1)
    exposed = (written[..., None] >= positions).sum(axis=1, dtype=np.float64)
    events = ((written[..., None] == positions) & parted[..., None]).sum(axis=1, dtype=np.float64)
    estimate, low, high = intervals.of(np.concatenate([exposed, events], axis=1), survival_of)
    total = exposed.sum(axis=0)
    with np.errstate(invalid="ignore"):
        hazard = np.where(total > 0, events.sum(axis=0) / np.maximum(total, 1), np.nan)
    one = np.ones(1)
    return Survival(
        np.concatenate([[written.size], total]).astype(np.int64),
        np.concatenate([one, estimate]),
        np.concatenate([one if len(written) > 1 else one * np.nan, np.clip(low, 0, 1)]),
        np.concatenate([one if len(written) > 1 else one * np.nan, np.clip(high, 0, 1)]),
        np.concatenate([[np.nan], hazard]),
    )


def survival_of(means: Floats) -> Floats:
    """Kaplan-Meier estimate at positions 1..L from mean numbers at risk and of events,
    (..., 2 L) -> (..., L). Where none is at risk any more the curve stays."""
    exposed, events = np.split(means, 2, axis=-1)
    hazard = np.divide(events, exposed, out=np.zeros_like(events), where=exposed > 0)
    return np.asarray(np.cumprod(1 - hazard, axis=-1))
