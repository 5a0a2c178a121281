"""What a study can say about the claims of arXiv 2309.05210, by rules fixed in the design.

Equality claims are tested for equivalence: confirmed when the interval lies inside the margin,
refuted when it lies outside. Claims that something is greater are confirmed when the whole interval
is, refuted when none of it exceeds the smallest effect that would count. Everything else is
inconclusive. Only the abstract of the paper is available, so "quality" and "sensitivity" are
defined here, not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .curves import slope_contrast
from .design import Arm, Claim, Design
from .statistics import Intervals, effect, equivalence, superiority
from .tables import Cells, logit_clusters, sample_clusters, speeds

if TYPE_CHECKING:
    from pandas import DataFrame

CLAIMS = {
    "C1a": "nf4 and fp4 are equally fast",
    "C1b": "nf4 and fp4 need the same memory",
    "C1c": "nf4 and fp4 give the same quality",
    "C2": "on Llama 2, nf4 withstands changes of a low temperature better than fp4",
    "C3": "on Falcon, fp4 and fp4-dq are the better choice",
    "C4": "4-bit models are more sensitive to temperature from 0.5 to 0.8 than the original",
    "C5": "int8 is clearly slower than the original",
    "C6": "the original in bf16 is the fastest",
    "C7": "the 4-bit formats differ from each other as the temperature varies",
    "C8": "quantized models perform about as well as their original",
    "C9": "top_k and max_new_tokens change how quantized models respond",
}
"""Claims of the paper (its abstract, in both wordings that are known), in our words."""

DEFAULT_CLAIMS: Mapping[str, Claim] = {
    "C1a": Claim("equivalence", {"tokens_per_second": 0.05}),
    "C1b": Claim("equivalence", {"bytes": 0.02}),
    "C1c": Claim("equivalence", {"ln_ppl": 0.01, "rep_4": 0.01}),
    "C4": Claim(
        "greater",
        {"contrast_disagreement": 0.002, "interaction_nll": 0.1, "interaction_rep_4": 0.05},
    ),
    "C5": Claim("greater", {"tokens_per_second": 0.05}),
    "C6": Claim("greater", {"tokens_per_second": 0.0}),
}
"""The test, endpoints and margins of every claim that is tested, unless a design says otherwise."""

SPEED_CLAIMS = ("C1a", "C5", "C6")
"""Claims that are tested by timing."""

NOT_TESTED = {
    "C2": "a claim about Llama 2",
    "C3": "a claim about Falcon",
    "C7": "needs a comparison of whole curves",
    "C8": "needs tasks with right and wrong answers",
    "C9": "needs several values of top_k and max_new_tokens",
}
"""Claims on which this study says nothing, and why."""

VERDICTS = ("confirmed", "refuted", "inconclusive", "not tested")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the test of a claim may look at: the design, one model, and all that was measured."""

    design: Design
    model: str
    cells: Cells
    frames: Mapping[str, DataFrame]
    samples: list[dict[str, Any]]
    intervals: Intervals


def make_claims(
    design: Design, cells: Cells, frames: Mapping[str, DataFrame], intervals: Intervals
) -> dict[str, DataFrame]:
    """The tables `claims` and `speed_claims`: a row for every claim, model, comparison and
    endpoint."""
    import pandas as pd

    samples = frames["samples"].to_dict("records")
    rows: list[dict[str, Any]] = []
    for claim in CLAIMS:
        for model in design.models:
            if claim in NOT_TESTED:
                rows.append(_untested(claim, model))
                continue
            found = list(_TESTS[claim](Evidence(design, model, cells, frames, samples, intervals)))
            rows += [{"claim": claim, "model": model, **row} for row in found] or [
                _untested(claim, model, "the design has not the arms for it, or no timing")
            ]
    columns = [
        "claim",
        "model",
        "comparison",
        "endpoint",
        "estimate",
        "low",
        "high",
        "margin",
        "verdict",
        "note",
    ]
    frame = pd.DataFrame(rows, columns=columns)
    about_speed = frame["claim"].isin(SPEED_CLAIMS)
    return {
        "claims": frame[~about_speed].reset_index(drop=True),
        "speed_claims": frame[about_speed].reset_index(drop=True),
    }


def overall(verdicts: Sequence[str]) -> str:
    """One verdict from those of several rows that must all hold."""
    for word in ("refuted", "inconclusive", "confirmed"):
        if word in verdicts:
            return word
    return "not tested"


def _untested(claim: str, model: str, why: str | None = None) -> dict[str, Any]:
    reason = why or NOT_TESTED[claim]
    if claim in ("C2", "C3"):
        reason += (
            ": not testable with demo models, which are a demonstration"
            if model.startswith("demo:")
            else ": needs checkpoints of both families in several sizes in one study"
        )
    return {
        "claim": claim,
        "model": model,
        "comparison": "",
        "endpoint": "",
        "estimate": math.nan,
        "low": math.nan,
        "high": math.nan,
        "margin": math.nan,
        "verdict": "not tested",
        "note": reason,
    }


def _row(
    comparison: str,
    endpoint: str,
    found: Sequence[Any],
    margin: float,
    verdict: str,
    note: str = "",
) -> dict[str, Any]:
    estimate, low, high = (float(number) for number in found)
    return {
        "comparison": comparison,
        "endpoint": endpoint,
        "estimate": estimate,
        "low": low,
        "high": high,
        "margin": margin,
        "verdict": verdict,
        "note": note,
    }


def _arm(design: Design, name: str) -> Arm | None:
    """The first ordinary arm of a format."""
    return next((arm for arm in design.arms if arm.role == "arm" and arm.format == name), None)


def _pairs(design: Design) -> list[tuple[Arm, Arm]]:
    """nf4 with fp4, and their double-quantized forms with each other."""
    found = [(_arm(design, f"nf4{end}"), _arm(design, f"fp4{end}")) for end in ("", "-dq")]
    return [(one, two) for one, two in found if one is not None and two is not None]


def _four_bit(design: Design) -> list[Arm]:
    return [
        arm for arm in design.arms if arm.role == "arm" and arm.format.startswith(("nf4", "fp4"))
    ]


def _ratios(e: Evidence, phase: str, one: Arm, two: Arm) -> tuple[float, float, float]:
    """Tokens per second, one / two in the same round of timing: median, low, high."""
    found = speeds(e.design, e.frames["speed_rounds"].to_dict("records"), e.model, phase)
    ratio = e.intervals.median(found[one.name] / found[two.name])
    return ratio.estimate, ratio.low, ratio.high


def _c1a(e: Evidence) -> Iterator[dict[str, Any]]:
    margin = e.design.claims["C1a"].endpoints["tokens_per_second"]
    for one, two in _pairs(e.design) if e.design.speed else ():
        for phase in ("decode", "prefill"):
            found = _ratios(e, phase, one, two)
            yield _row(
                f"{one.name} / {two.name}",
                f"tokens/s, {phase}",
                found,
                margin,
                equivalence(found[1] - 1, found[2] - 1, margin),
            )


def _c1b(e: Evidence) -> Iterator[dict[str, Any]]:
    margin = e.design.claims["C1b"].endpoints["bytes"]
    held = {
        row["arm"]: row["bytes"]
        for row in e.frames["weights"].to_dict("records")
        if row["model"] == e.model
    }
    for one, two in _pairs(e.design):
        ratio = held[one.name] / held[two.name]
        yield _row(
            f"{one.name} / {two.name}",
            "bytes of the swapped layers",
            [ratio] * 3,
            margin,
            equivalence(ratio - 1, ratio - 1, margin),
            "counted, so without an interval",
        )


def _c1c(e: Evidence) -> Iterator[dict[str, Any]]:
    for one, two in _pairs(e.design):
        name = f"{one.name} \u2212 {two.name}"
        sides = [
            logit_clusters(e.cells[e.model, arm.name]["texts"], "all", "ln_ppl_ratio")
            for arm in (one, two)
        ]
        found = e.intervals.mean(sides[0] - sides[1])
        margin = e.design.claims["C1c"].endpoints["ln_ppl"]
        yield _row(
            name,
            "ln perplexity",
            found,
            margin,
            equivalence(float(found[1]), float(found[2]), margin),
        )
        curves = [
            sample_clusters(e.design, e.samples, e.model, arm.name)["rep_4"] for arm in (one, two)
        ]
        found = e.intervals.mean(np.nanmean(curves[0] - curves[1], axis=1))
        margin = e.design.claims["C1c"].endpoints["rep_4"]
        yield _row(
            name,
            "rep-4, mean over temperatures",
            found,
            margin,
            equivalence(float(found[1]), float(found[2]), margin),
        )


def _c4(e: Evidence) -> Iterator[dict[str, Any]]:
    """Both must hold: the arm parts from the reference more inside the band than around it, and
    its texts change faster with temperature there than the reference's do."""
    sensitivity = e.frames["sensitivity"]
    grid = np.asarray(e.design.temperatures)
    plain = sample_clusters(e.design, e.samples, e.model, e.design.reference.name)
    for arm in _four_bit(e.design):
        chosen = sensitivity[
            (sensitivity["model"] == e.model)
            & (sensitivity["arm"] == arm.name)
            & (sensitivity["source"] == "all")
            & (sensitivity["kind"] == "contrast")
            & (sensitivity["measure"] == "disagreement")
        ].iloc[0]
        rows = []
        margin = e.design.claims["C4"].endpoints["contrast_disagreement"]
        found = [chosen["estimate"], chosen["low"], chosen["high"]]
        rows.append(
            _row(
                arm.name,
                "1 - A, band minus surroundings",
                found,
                margin,
                effect(found[1], found[2], margin),
            )
        )
        mine = sample_clusters(e.design, e.samples, e.model, arm.name)
        for measure, label in (("nll_reference", "NLL of the texts"), ("rep_4", "rep-4")):
            endpoint = f"interaction_{measure.removesuffix('_reference')}"
            margin = e.design.claims["C4"].endpoints[endpoint]
            values = slope_contrast(
                grid, mine[measure] - plain[measure], e.design.band, e.design.surroundings
            )
            found = [float(part) for part in e.intervals.mean(values)]
            rows.append(
                _row(
                    arm.name,
                    f"{label}, extra slope in the band",
                    found,
                    margin,
                    effect(found[1], found[2], margin),
                )
            )
        together = _c4_verdict([row["verdict"] for row in rows])
        for row in rows:
            row["note"] = f"for {arm.name} together: {together}"
        yield from rows


def _c4_verdict(verdicts: Sequence[str]) -> str:
    """From (contrast, two interactions): the first and one of the others must be confirmed; it is
    refuted when the first or both of the others are."""
    first, *others = verdicts
    if first == "confirmed" and "confirmed" in others:
        return "confirmed"
    if first == "refuted" or all(word == "refuted" for word in others):
        return "refuted"
    return "inconclusive"


def _c5(e: Evidence) -> Iterator[dict[str, Any]]:
    arm, margin = _arm(e.design, "int8"), e.design.claims["C5"].endpoints["tokens_per_second"]
    if arm is None or e.design.speed is None:
        return
    for phase in ("decode", "prefill"):
        found = _ratios(e, phase, arm, e.design.reference)
        slower = superiority(1 - found[2], 1 - found[1], margin)
        yield _row(
            f"{arm.name} / {e.design.reference.name}", f"tokens/s, {phase}", found, margin, slower
        )


def _c6(e: Evidence) -> Iterator[dict[str, Any]]:
    if e.design.speed is None:
        return
    for arm in e.design.arms:
        if arm.role != "arm":
            continue
        for phase in ("decode", "prefill"):
            found = _ratios(e, phase, arm, e.design.reference)
            faster = "confirmed" if found[2] < 1 else "refuted" if found[1] > 1 else "inconclusive"
            yield _row(
                f"{arm.name} / {e.design.reference.name}", f"tokens/s, {phase}", found, 0.0, faster
            )


_TESTS = {"C1a": _c1a, "C1b": _c1b, "C1c": _c1c, "C4": _c4, "C5": _c5, "C6": _c6}


def verdicts(design: Design, claims: DataFrame) -> DataFrame:
    """One verdict per claim and model: (claim, model, verdict). Speed claims by decode alone; C1c
    when every endpoint holds, C4 when it holds for every 4-bit arm."""
    import pandas as pd

    rows = []
    for (claim, model), part in claims.groupby(["claim", "model"], sort=False):
        if claim in SPEED_CLAIMS:
            decode = part[part["endpoint"].str.contains("decode")]
            part = decode if len(decode) else part
        words = list(part["verdict"])
        if claim == "C4" and words != ["not tested"]:
            by_arm = part.groupby("comparison", sort=False)["verdict"]
            words = [_c4_verdict(list(group)) for _, group in by_arm]
        rows.append({"claim": claim, "model": model, "verdict": overall(words)})
    return pd.DataFrame(rows)
