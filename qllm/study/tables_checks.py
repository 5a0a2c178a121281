"""The table that says whether the instrument works: the null arms, which must not differ from the
reference in anything, and the positive control, whose damage must be seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .design import Design
from .long_form import Cells
from .statistics import Intervals
from .tables_logits import CURVES, logit_clusters
from .tables_texts import place_of

CHECKS = (
    "model",
    "arm",
    "check",
    "measure",
    "largest_difference",
    "exactly_zero",
    "estimate",
    "low",
    "high",
    "margin",
    "clusters",
    "passed",
)
"""Columns of `checks`."""


def check_rows(
    design: Design, cells: Cells, samples: Sequence[Mapping[str, Any]], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `checks`. For a null arm and a measure, the largest absolute difference from the
    reference, which must be exactly 0. For a positive control, its mean difference, whose interval
    must lie above what counts as equal."""
    for model in design.models:
        for arm in design.arms:
            if arm.role == "null":
                texts = cells[model, arm.name]["texts"]
                largest = {**_null_logits(texts), **_null_texts(design, samples, model, arm.name)}
                for name, value in largest.items():
                    yield _row(model, arm.name, "null arm", name, value)
            elif arm.role == "control":
                yield from _control(design, cells, model, arm.name, intervals)


def _row(
    model: str,
    arm: str,
    check: str,
    measure: str,
    largest: float,
    found: Sequence[float] = (math.nan, math.nan, math.nan),
    margin: float = 0.0,
    clusters: int = 0,
) -> dict[str, Any]:
    passed = largest == 0 if check == "null arm" else found[1] > margin
    values = (*found, margin, clusters, bool(passed))
    return dict(zip(CHECKS, (model, arm, check, measure, largest, largest == 0, *values)))


def _null_logits(texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    largest = {}
    for name in CURVES:
        values = [np.abs(logit_clusters([text], "all", name)).max() for text in texts]
        largest[name] = float(max(values, default=math.nan))
    tops = [1 - text["same_top"] for text in texts]
    largest["1 - same_top"] = max(tops, default=math.nan)
    ratios = [abs(text["ln_ppl_ratio"]) for text in texts]
    largest["ln_ppl_ratio"] = max(ratios, default=math.nan)
    return largest


def _null_texts(
    design: Design, samples: Sequence[Mapping[str, Any]], model: str, arm: str
) -> dict[str, float]:
    of_model = [sample for sample in samples if sample["model"] == model]
    plain = {place_of(one): one for one in of_model if one["arm"] == design.reference.name}
    pairs = [(one, plain[place_of(one)]) for one in of_model if one["arm"] == arm]
    largest = {"texts that differ": float(sum(a["ids"] != b["ids"] for a, b in pairs))}
    for name in ("nll_reference", "rep_4", "zlib_ratio", "tokens"):
        largest[name] = max((_gap(a[name], b[name]) for a, b in pairs), default=math.nan)
    return largest


def _gap(one: float, two: float) -> float:
    """The absolute difference; two that are both not there (NaN) are equal."""
    return 0.0 if math.isnan(one) and math.isnan(two) else abs(one - two)


def _control(
    design: Design, cells: Cells, model: str, arm: str, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    texts = cells[model, arm]["texts"]
    margins = {
        "ln_ppl_ratio": design.claims["C1c"].endpoints["ln_ppl"],
        "disagreement": design.claims["C7"].endpoints["curves_disagreement"],
    }
    for name, margin in margins.items():
        values = logit_clusters(texts, "all", name)
        if len(values):
            means = values.reshape(len(values), -1).mean(axis=1)
            found = intervals.finding(means)
            at = (found.estimate, found.low, found.high)
            largest = float(np.abs(values).max())
            yield _row(model, arm, "positive control", name, largest, at, margin, found.clusters)
