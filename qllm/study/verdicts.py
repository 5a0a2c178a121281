"""Verdicts on the claims, by the rules fixed in the design.

Every comparison is a row with its interval, p-value, verdict and reason. Equality is tested for
equivalence (two one-sided tests): confirmed when the interval lies inside the margin, refuted when
it lies outside. "Greater" is confirmed when the interval lies above 0, refuted when it excludes
even the smallest effect that would count, the margin. Everything else is inconclusive.

Rows that decide a primary claim are confirmed only when their p-value, adjusted after Holm over
all such rows (those on timing apart, which change from run to run), is small enough too; for claims
that are not primary the adjustment is Benjamini and Hochberg's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .claims import CLAIMS, SPEED_CLAIMS, TEXT_CLAIMS
from .design import Design
from .evidence import TESTS, Comparison, Evidence, Found
from .statistics import Intervals, benjamini_hochberg, holm

if TYPE_CHECKING:
    from pandas import DataFrame

    from .long_form import Cells, TextCurves
    from .tables_texts import KnobCurves

COLUMNS = (
    "claim",
    "model",
    "comparison",
    "endpoint",
    "estimate",
    "low",
    "high",
    "margin",
    "p",
    "p_holm",
    "p_fdr",
    "decides",
    "prompts",
    "verdict",
    "reason",
)
"""Columns of `claims` and `speed_claims`. `p_holm` stands where a primary claim is decided, `p_fdr`
where another is."""

NOTHING_WRITTEN = "It takes generated texts, and in lockstep nothing is generated."

VERDICT_COLUMNS = ("claim", "model", "verdict", "estimate", "low", "high", "prompts", "reason")
"""Columns of `verdicts` and `speed_verdicts`."""


@dataclass(frozen=True)
class Outcome:
    """What came out for a claim and a model: comparisons, or what is missing for any."""

    claim: str
    model: str
    rows: tuple[Comparison, ...]
    missing: str = ""


def make_claims(
    design: Design,
    cells: Cells,
    curves: TextCurves,
    knobs: KnobCurves,
    rounds: Sequence[Mapping[str, Any]],
    intervals: Intervals,
) -> dict[str, DataFrame]:
    """The tables `claims`, `speed_claims`, `verdicts` and `speed_verdicts`."""
    import pandas as pd

    tables: dict[str, DataFrame] = {}
    for prefix, timed in (("", False), ("speed_", True)):
        outcomes = []
        for claim in CLAIMS:
            for model in design.models:
                if (claim in SPEED_CLAIMS) == timed:
                    evidence = Evidence(design, model, cells, curves, knobs, rounds, intervals)
                    found: Found = NOTHING_WRITTEN
                    if not (design.lockstep and claim in TEXT_CLAIMS):
                        found = TESTS[claim](evidence)
                    missing = found if isinstance(found, str) else ""
                    rows = () if isinstance(found, str) else tuple(found)
                    outcomes.append(Outcome(claim, model, rows, missing))
        adjusted = adjust(design, outcomes, intervals.alpha)
        rows_of = [row for outcome, extra in adjusted for row in _rows(outcome, extra)]
        tables[f"{prefix}claims"] = pd.DataFrame(rows_of, columns=list(COLUMNS))
        found_verdicts = [verdict_row(outcome) for outcome, _ in adjusted]
        tables[f"{prefix}verdicts"] = pd.DataFrame(found_verdicts, columns=list(VERDICT_COLUMNS))
    return tables


def adjust(
    design: Design, outcomes: Sequence[Outcome], alpha: float
) -> list[tuple[Outcome, list[dict[str, float]]]]:
    """The outcomes with what is no longer confirmed after adjustment, and for each row its
    `p_holm` and `p_fdr`."""
    places = [
        (number, place, design.claims[outcome.claim].primary)
        for number, outcome in enumerate(outcomes)
        for place, row in enumerate(outcome.rows)
        if row.decides
    ]
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name, method, primary in (("p_holm", holm, True), ("p_fdr", benjamini_hochberg, False)):
        chosen = [(number, place) for number, place, kind in places if kind == primary]
        values = method([outcomes[number].rows[place].p for number, place in chosen])
        found |= {key: {name: float(value)} for key, value in zip(chosen, values)}
    result = []
    for number, outcome in enumerate(outcomes):
        extra = [found.get((number, place), {}) for place in range(len(outcome.rows))]
        rows = [
            _sustained(row, values, alpha) for row, values in zip(outcome.rows, extra, strict=True)
        ]
        result.append((replace(outcome, rows=tuple(rows)), extra))
    return result


def _sustained(row: Comparison, adjusted: Mapping[str, float], alpha: float) -> Comparison:
    if row.verdict == "confirmed" and any(not p <= alpha for p in adjusted.values()):
        why = row.clauses["confirmed"] + ", but not after the correction for many comparisons"
        return replace(row, verdict="inconclusive", clauses={**row.clauses, "inconclusive": why})
    return row


def _rows(outcome: Outcome, extra: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    head = {"claim": outcome.claim, "model": outcome.model}
    if not outcome.rows:
        blank = dict.fromkeys(COLUMNS[4:11], math.nan)
        words = {"verdict": "not testable", "reason": outcome.missing}
        yield {**head, "comparison": "", "endpoint": "", **blank, "decides": True, "prompts": 0,
               **words}  # fmt: skip
    for row, adjusted in zip(outcome.rows, extra):
        yield {
            **head,
            "comparison": row.comparison,
            "endpoint": row.endpoint,
            "estimate": row.finding.estimate,
            "low": row.finding.low,
            "high": row.finding.high,
            "margin": row.margin,
            "p": row.p,
            "p_holm": adjusted.get("p_holm", math.nan),
            "p_fdr": adjusted.get("p_fdr", math.nan),
            "decides": row.decides,
            "prompts": row.prompts,
            "verdict": row.verdict,
            "reason": row.reason(),
        }


def verdict_row(outcome: Outcome) -> dict[str, Any]:
    """One verdict on a claim for a model, with the comparison that tells most."""
    head = {"claim": outcome.claim, "model": outcome.model}
    rows = [row for row in outcome.rows if row.decides]
    if not rows:
        blank = dict.fromkeys(("estimate", "low", "high"), math.nan)
        return {**head, "verdict": "not testable", **blank, "prompts": 0, "reason": outcome.missing}
    word = combined(outcome.claim, rows)
    alike = [row for row in rows if row.verdict == word] or rows
    telling = max(alike, key=_weight)
    count = f" ({len(alike)} of {len(rows)} comparisons are {word})" if len(rows) > 1 else ""
    return {
        **head,
        "verdict": word,
        "estimate": telling.finding.estimate,
        "low": telling.finding.low,
        "high": telling.finding.high,
        "prompts": telling.prompts,
        "reason": telling.reason()[:-1] + count + ".",
    }


def _weight(row: Comparison) -> float:
    """How much a row tells: of confirmed ones the least certain, else the furthest off."""
    if row.verdict == "confirmed":
        return row.p if not math.isnan(row.p) else 0.0
    far = abs(row.finding.estimate - row.centre) / (row.margin or 1.0)
    return 0.0 if math.isnan(far) else far


def combined(claim: str, rows: Sequence[Comparison]) -> str:
    """One verdict from the comparisons that decide a claim: all must hold; for C7 and C9 one is
    enough; C4 has rules of its own for each arm."""
    words = [row.verdict for row in rows]
    if claim in ("C7", "C9"):
        return any_of(words)
    if claim == "C4":
        arms = dict.fromkeys(row.comparison for row in rows)
        words = [
            sensitive([row.verdict for row in rows if row.comparison == arm]) for arm in arms
        ]
    return all_of(words)


def all_of(words: Sequence[str]) -> str:
    """The verdict on "all of these hold"."""
    return next(word for word in ("refuted", "inconclusive", "confirmed") if word in words)


def any_of(words: Sequence[str]) -> str:
    """The verdict on "some of these hold"."""
    return next(word for word in ("confirmed", "inconclusive", "refuted") if word in words)


def sensitive(words: Sequence[str]) -> str:
    """From (contrast, interactions): the contrast and one of the interactions must hold."""
    first, *others = words
    return all_of([first, any_of(others)])
