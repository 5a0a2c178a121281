"""What all tables share: the cells that they are made from, and the rows of long tables.

A long table has a row per measure, with `estimate`, `low`, `high` (the interval) and `clusters`
(how many prompts and passages it rests on).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import Floats

Cells = Mapping[tuple[str, str], Mapping[str, Any]]
"""(model, arm) -> the body of the cell."""

_SHARES = ("tv", "disagreement", "same_top", "equal", "rep_1", "rep_2", "rep_3", "rep_4",
           "diversity", "loop", "repeated_sentences", "eos", "distinct_2", "distinct_3",
           "edit_distance")  # fmt: skip
_POSITIVE = ("kl", "kl_reverse", "rms_delta_p", "first_divergence", "nll_reference", "loop_start",
             "zlib_ratio", "tokens")  # fmt: skip
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(_SHARES, (0.0, 1.0)),
    **dict.fromkeys(_POSITIVE, (0.0, math.inf)),
}
"""Between which values a measure lies, where that is not everywhere. An interval of few prompts,
which is symmetric, may reach further."""

TextCurves = Mapping[tuple[str, str], Mapping[str, Floats]]
"""(model, arm) -> measure of generated texts -> (prompts, temperatures), means over the seeds."""


def row(
    keys: Mapping[str, Any], measure: str, found: Sequence[Any], clusters: int, signed: bool = False
) -> dict[str, Any]:
    """A row of a long table from (estimate, low, high). An interval is held within the range of the
    measure, unless it is about a difference (`signed`); mean squares become their root, which keeps
    the interval right."""
    numbers = [float(number) for number in found]
    if not signed:
        least, most = RANGES.get(re.sub("_(mean|at_1)$", "", measure), (-math.inf, math.inf))
        numbers[1:] = [min(max(number, least), most) for number in numbers[1:]]
    if measure.startswith("rms_"):
        numbers = [math.sqrt(number) for number in numbers]
    return {
        **keys,
        "measure": measure,
        "estimate": numbers[0],
        "low": numbers[1],
        "high": numbers[2],
        "clusters": clusters,
    }


def nan(value: float | None) -> float:
    """A number of a cell, which has None for one that is not there."""
    return math.nan if value is None else float(value)
