"""Sentences about a study, computed from its tables: what a figure shows, in numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .plots import label, survival_temperatures

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from .result import Study

SMALL_BYTES = 100_000_000
"""Models with fewer bytes in their swapped layers are called too small for timings to mean much."""

_RAISED = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits, powers of ten written out as such."""
    if math.isnan(value):
        return "\u2013"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "\u2212")
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        return f"{mantissa} \u00d7 10{str(int(power)).translate(_RAISED)}".replace("-", "\u2212")
    return text.replace("-", "\u2212")


def interval(row: Any, digits: int = 3) -> str:
    """[low, high] of a row, or nothing when it has no interval or no width."""
    if math.isnan(row["low"]) or row["low"] == row["high"]:
        return ""
    return f"[{number(row['low'], digits)}, {number(row['high'], digits)}]"


def percent(value: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * value:.0f} %"


def rows(frame: DataFrame, **equal: Any) -> DataFrame:
    """The rows in which every named column has the given value."""
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame


def one(frame: DataFrame, **equal: Any) -> Series:
    """The first such row."""
    return rows(frame, **equal).iloc[0]


def arms_of(study: Study) -> list[str]:
    """Names of the ordinary arms."""
    return [arm.name for arm in study.design.arms if arm.role == "arm"]


def null_sentence(study: Study) -> tuple[bool, str]:
    """Whether the null arms differ in nothing, and a sentence that says so."""
    design, checks = study.design, study.tables["checks"]
    nulls = [arm for arm in design.arms if arm.role == "null"]
    if not nulls:
        return False, "This study has no null arm, so nothing shows how large its own noise is."
    plain = design.reference
    how = " and ".join(
        f"{arm.name} ({plain.name} computed anew, in batches of"
        f" {arm.batch_size or design.batch_size}"
        f" on {arm.threads or design.threads or 'all'} thread(s) instead of"
        f" {plain.batch_size or design.batch_size} on {plain.threads or design.threads or 'all'})"
        for arm in nulls
    )
    wrong = checks[~checks["exactly_zero"]]
    if len(wrong) == 0:
        return True, (
            f"Null arm {how}: exactly 0 in all {checks['measure'].nunique()} measures, for every"
            " model, text and temperature. What the other arms show is the quantization and"
            " nothing else."
        )
    worst = "; ".join(
        f"{label(row['model'])} {row['measure']} {number(row['largest_difference'])}"
        for _, row in wrong.iterrows()
    )
    return False, (
        f"Null arm {how}: NOT 0 in {len(wrong)} of {len(checks)} checks ({worst}). Differences of"
        " that size in other arms mean nothing."
    )


def order(study: Study, model: str) -> list[tuple[str, float]]:
    """Arms and their mean KL over all temperatures, the nearest to the reference first."""
    summary = study.tables["summary"]
    found = [
        (
            arm,
            float(one(summary, model=model, arm=arm, source="all", measure="kl_mean")["estimate"]),
        )
        for arm in arms_of(study)
    ]
    return sorted(found, key=lambda pair: pair[1])


def short_answer(study: Study) -> list[str]:
    """The study in a few sentences: one about every model, one about memory."""
    design, summary = study.design, study.tables["summary"]
    plain = design.reference.name
    sentences = []
    for model in design.models:
        ranked = order(study, model)
        if not ranked:
            continue
        chain = ", ".join(f"{arm} {number(value, 2)}" for arm, value in ranked)
        sentence = (
            f"{label(model)}: {ranked[0][0]} stays closest to {plain}, {ranked[-1][0]} departs the"
            f" most (KL divergence in nats, mean over temperatures: {chain})."
        )
        flips = rows(summary, model=model, source="all", measure="disagreement_at_1")
        if len(flips):
            sentence += (
                " At temperature 1 and with the same noise, the next token is another one in "
                + ", ".join(
                    f"{number(100 * one(flips, arm=arm)['estimate'], 2)} % ({arm})"
                    for arm, _ in ranked
                )
                + " of all places."
            )
        sentences.append(sentence + _peak_sentence(study, model, [arm for arm, _ in ranked]))
    return sentences


def _peak_sentence(study: Study, model: str, arms: list[str]) -> str:
    """Between which temperatures the peaks of the arms lie, and whether the band holds them."""
    found = [float(_peak(study, model, arm)["estimate"]) for arm in arms]
    found = sorted(value for value in found if not math.isnan(value))
    if not found:
        return ""
    low, high = study.design.band
    inside = sum(low - 1e-9 <= value <= high + 1e-9 for value in found)
    place = (
        f"at temperature {number(found[0])}"
        if found[0] == found[-1]
        else f"at temperatures from {number(found[0])} to {number(found[-1])}, depending on the arm"
    )
    return (
        f" That is most frequent {place}: {inside or 'none'} of {len(found)} peaks in the band"
        f" {low:g} to {high:g}."
    )


def _peak(study: Study, model: str, arm: str) -> Series:
    return one(
        study.tables["sensitivity"],
        model=model,
        arm=arm,
        source="all",
        kind="peak",
        measure="disagreement",
    )


def divergence(study: Study) -> str:
    """Caption of the figure of that name."""
    design, sensitivity = study.design, study.tables["sensitivity"]
    low, high = design.band
    parts = [
        f"How far the next-token distribution is from {design.reference.name}'s at each"
        f" temperature; higher is further. The band {low:g} to {high:g} is shaded, dots are peaks,"
        f" ribbons {percent(design.confidence)} intervals over prompts."
    ]
    for model in design.models:
        ranked = order(study, model)
        if not ranked:
            continue
        worst = ranked[-1][0]
        top = _peak(study, model, worst)
        inside = low - 1e-9 <= top["estimate"] <= high + 1e-9
        edge = " (the lowest measured)" if top["estimate"] == min(design.logit_temperatures) else ""
        parts.append(
            f"In {label(model)}, {worst} is the furthest: its 1 \u2212 agreement peaks at"
            f" temperature {number(top['estimate'])} {interval(top)}{edge},"
            f" {'inside' if inside else 'outside'} the band."
        )
        greater = [
            arm
            for arm, _ in ranked
            if one(
                sensitivity,
                model=model,
                arm=arm,
                source="all",
                kind="contrast",
                measure="disagreement",
            )["low"]
            > 0
        ]
        parts.append(
            f"It is clearly higher inside the band than around it for {', '.join(greater)}."
            if greater
            else "For no arm is it clearly higher inside the band than around it."
        )
    ok, _ = null_sentence(study)
    parts.append("The null arm is exactly 0 everywhere." if ok else "See the note on the null arm.")
    return " ".join(parts)


def survival(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["survival"]
    parts = [
        f"Share of texts that still equal the text of {design.reference.name} for the same prompt"
        " and the same noise, against the number of tokens written."
    ]
    last = design.max_new_tokens
    for model in design.models:
        for temperature in sorted(
            {min(survival_temperatures(design)), max(survival_temperatures(design))}
        ):
            end = rows(table, model=model, temperature=temperature, position=last)
            shares = [(arm, float(one(end, arm=arm)["estimate"])) for arm in arms_of(study)]
            if shares:
                listed = ", ".join(f"{arm} {percent(share)}" for arm, share in shares)
                parts.append(
                    f"{label(model)} at temperature {temperature:g}: after {last} tokens {listed}."
                )
    return " ".join(parts)


def generation(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["generation"]
    plain = design.reference.name
    parts = [
        "The texts themselves: share of word pairs (two tokens) that repeat within a text,"
        f" diversity over the seeds of a prompt, and how unlikely {plain} finds the text."
    ]
    for model in design.models:
        ours = rows(table, model=model, arm=plain, measure="nll_reference")
        gaps = []
        for arm in arms_of(study):
            theirs = rows(table, model=model, arm=arm, measure="nll_reference")
            difference = theirs["estimate"].to_numpy() - ours["estimate"].to_numpy()
            gaps += [
                (abs(gap), gap, arm, temperature)
                for gap, temperature in zip(difference, ours["temperature"])
                if not math.isnan(gap)
            ]
        if gaps:
            _, gap, arm, temperature = max(gaps)
            first, last = ours["estimate"].iloc[0], ours["estimate"].iloc[-1]
            parts.append(
                f"In {label(model)}, temperature moves the surprise of {plain}'s own texts from"
                f" {number(first)} to {number(last)} nats per token; the largest gap between an"
                f" arm and {plain} at one temperature is {number(gap, 2)} nats ({arm} at"
                f" {temperature:g})."
            )
    return " ".join(parts)


def cost(study: Study) -> str:
    """Caption of the figure of that name."""
    design, weights = study.design, study.tables["weights"]
    plain = design.reference.name
    model = design.models[0]
    held = ", ".join(
        f"{arm} {number(one(weights, model=model, arm=arm)['bits_per_weight'], 4)}"
        for arm in [plain, *arms_of(study)]
    )
    parts = [f"Bits per weight in the swapped layers, scales counted in: {held}."]
    speed = study.tables.get("speed")
    if speed is None:
        return parts[0] + " Speed was not measured."
    parts.append(
        f"Speed: median of {design.speed.rounds if design.speed else 0} rounds, the arms in turn;"
        " bars from the 10th to the 90th percentile."
    )
    for model in design.models:
        found = []
        for arm in arms_of(study):
            row = one(speed, model=model, arm=arm, phase="decode")
            found.append(f"{arm} {number(row['ratio'], 2)} {interval(row, 2)}")
        parts.append(f"{label(model)}, decode at batch 1, times {plain}: {', '.join(found)}.")
    small = [
        label(name)
        for name in design.models
        if one(weights, model=name, arm=plain)["bytes"] < SMALL_BYTES
    ]
    if small:
        parts.append(
            f"The layers of {' and '.join(small)} are so small that they stay in the processor's"
            " caches, and much of the time is overhead per token: these speeds say little about"
            " real models."
        )
    return " ".join(parts)


CAPTIONS = {
    "divergence": divergence,
    "survival": survival,
    "generation": generation,
    "cost": cost,
}
"""Figure -> its caption."""
