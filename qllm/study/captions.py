"""Sentences about a study, computed from its tables: the short answer, and what each figure
shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .lookup import compared, label, one, ordinary, preferred, rows, shown_temperatures, source_of
from .plots_cost import bandwidth, decoding
from .plots_logits import DIFFERENCES, SLOPES
from .plots_texts import hazards
from .wording import estimate, interval, listed, number, percent, size

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

CACHED_BYTES = 100_000_000
"""Models with fewer bytes of weights are called too small for timings to mean much."""


def null_sentence(study: Study) -> tuple[bool, str]:
    """Whether the null arms differ in nothing, and a sentence that says so."""
    design = study.design
    checks = rows(study.tables["checks"], check="null arm")
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
    wrong = rows(checks, exactly_zero=False)
    if len(wrong) == 0:
        return True, (
            f"Null arm {how}: exactly 0 in all {checks['measure'].nunique()} measures, for every"
            " model, text and temperature. What the other arms show is the quantization and"
            " nothing else."
        )
    worst = "; ".join(
        f"{label(row['model'])} {row['arm']} {row['measure']} {number(row['largest_difference'])}"
        for row in wrong.to_dict("records")
    )
    return False, (
        f"Null arm {how}: NOT 0 in {len(wrong)} of {len(checks)} checks ({worst}). Differences of"
        " that size in other arms mean nothing."
    )


def control_sentence(study: Study) -> tuple[bool, str]:
    """Whether the positive control passed its checks, and a sentence that says so."""
    controls = [arm.name for arm in study.design.arms if arm.role == "control"]
    checks = rows(study.tables["checks"], check="positive control")
    if not controls:
        return False, (
            "This study has no positive control, so nothing shows that it could have seen a"
            " difference."
        )
    if not len(checks):
        return False, "The positive control was not compared with the reference."
    shares = [
        f"{label(model)} {percent(row['estimate'])} {_percents(row)}".rstrip()
        for model in study.design.models
        for name in controls
        if (row := _flips(study.tables["summary"], model, name)) is not None
    ]
    missed = [
        f"{row['measure']} in {label(row['model'])}"
        for row in checks.to_dict("records")
        if not row["passed"]
    ]
    verdict = (
        f"seen in {len(checks) - len(missed)} of {len(checks)} checks, but NOT clearly beyond what"
        f" counts as equal in {listed(missed)}: there, damage of that size may go unseen"
        if missed
        else "clearly beyond what counts as equal in every check: damage of that size is seen"
    )
    said = (
        f": at temperature 1 the next token is another one in {listed(shares)} of all places,"
        if shares
        else " is"
    )
    return not missed, (
        f"Positive control (arm {listed(controls)}), a deliberately bad 4-bit format{said}"
        f" {verdict}."
    )


def _percents(row: Any) -> str:
    if math.isnan(row["low"]):
        return ""
    return f"[{percent(row['low'])}, {percent(row['high'])}]"


def _flips(summary: DataFrame, model: str, arm: str) -> Any:
    return one(
        summary, model=model, arm=arm, source=source_of(summary), measure="disagreement_at_1"
    )


def order(study: Study, model: str) -> list[tuple[str, float]]:
    """Arms and their mean KL over all temperatures, the nearest to the reference first."""
    summary = study.tables["summary"]
    found = []
    for arm in ordinary(study.design):
        row = one(
            summary, model=model, arm=arm.name, source=source_of(summary), measure="kl_mean"
        )
        if row is not None:
            found.append((arm.name, float(row["estimate"])))
    return sorted(found, key=lambda pair: pair[1])


def short_answer(study: Study) -> list[str]:
    """The study in a few sentences, one or two about every model."""
    summary, plain, sentences = study.tables["summary"], study.design.reference.name, []
    for model in study.design.models:
        ranked = order(study, model)
        if not ranked:
            continue
        chain = ", ".join(f"{arm} {number(value, 2)}" for arm, value in ranked)
        sentence = (
            f"{label(model)}: {ranked[0][0]} stays closest to {plain}"
            + (f", {ranked[-1][0]} departs the most" if len(ranked) > 1 else "")
            + f" (KL divergence in nats, mean over temperatures: {chain})."
        )
        flips = [(arm, _flips(summary, model, arm)) for arm, _ in ranked]
        shares = [f"{percent(row['estimate'])} ({arm})" for arm, row in flips if row is not None]
        if shares:
            sentence += (
                " At temperature 1 and with the same noise, the next token is another one in"
                f" {', '.join(shares)} of all places."
            )
        sentences.append(sentence + _peaks(study, model, [arm for arm, _ in ranked]))
    return sentences


def _peaks(study: Study, model: str, arms: list[str]) -> str:
    """Between which temperatures the peaks of the arms lie, and whether the band holds them."""
    rows_of = [_sensitivity(study, model, arm, "peak") for arm in arms]
    found = sorted(
        float(row["estimate"])
        for row in rows_of
        if row is not None and not math.isnan(row["estimate"])
    )
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


def _sensitivity(study: Study, model: str, arm: str, kind: str) -> Any:
    table = study.tables["sensitivity"]
    return one(
        table, model=model, arm=arm, source=source_of(table), kind=kind, measure="disagreement"
    )


def divergence(study: Study) -> str:
    """Caption of the figure of that name."""
    design = study.design
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
        if (top := _sensitivity(study, model, worst, "peak")) is not None:
            inside = low - 1e-9 <= top["estimate"] <= high + 1e-9
            lowest = top["estimate"] == min(design.logit_temperatures)
            parts.append(
                f"In {label(model)}, {worst} is the furthest: its 1 \u2212 agreement peaks at"
                f" temperature {estimate(top)}{' (the lowest measured)' if lowest else ''},"
                f" {'inside' if inside else 'outside'} the band."
            )
        contrasts = [(arm, _sensitivity(study, model, arm, "contrast")) for arm, _ in ranked]
        greater = [arm for arm, row in contrasts if row is not None and row["low"] > 0]
        parts.append(
            f"It is clearly higher inside the band than around it for {listed(greater)}."
            if greater
            else "For no arm is it clearly higher inside the band than around it."
        )
    ok, _ = null_sentence(study)
    parts.append("The null arm is exactly 0 everywhere." if ok else "See the note on the null arm.")
    return " ".join(parts)


def tenths(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, rows(study.tables["tenths"], measure="disagreement")
    near = min(table["temperature"].unique(), key=lambda value: abs(value - 1))
    parts = [
        "Where the damage sits: tokens sorted by the probability that"
        f" {design.reference.name} gave its first choice. Left, it was unsure; right, sure."
    ]
    for model in design.models:
        ranked = order(study, model)
        if not ranked:
            continue
        worst = ranked[-1][0]
        part = rows(table, model=model, arm=worst, temperature=near).dropna(subset=["estimate"])
        if len(part) < 2:
            continue
        part = part.sort_values("tenth")
        first, last = part.iloc[0], part.iloc[-1]
        parts.append(
            f"In {label(model)} at temperature {near:g}, {worst} takes another token than"
            f" {design.reference.name} in {percent(first['estimate'])} of the places with"
            f" p below {number((first['tenth'] + 1) / 10)} and in {percent(last['estimate'])} of"
            f" those above {number(last['tenth'] / 10)}, which are"
            f" {percent(last['tokens'] / part['tokens'].sum())} of all."
        )
    return " ".join(parts)


def survival(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["survival"]
    chosen, last = shown_temperatures(design), design.max_new_tokens
    parts = [
        f"Share of texts that still equal the text of {design.reference.name} for the same prompt"
        " and the same noise, against the number of tokens written (Kaplan-Meier)."
    ]
    for model in design.models:
        for temperature in sorted({chosen[0], chosen[-1]}):
            shares = []
            for arm in ordinary(design):
                curve = rows(table, model=model, temperature=temperature, arm=arm.name)
                if len(curve):
                    shares.append(f"{arm.name} {percent(curve['estimate'].iloc[-1])}")
            if shares:
                parts.append(
                    f"{label(model)} at temperature {temperature:g}: after {last} tokens"
                    f" {', '.join(shares)}."
                )
    return " ".join(parts)


def hazard(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, hazards(study).dropna(subset=["expected"])
    parts = [
        "How often a text that was still equal parts at its next token, against what the logits of"
        f" {design.reference.name}'s own texts foresee without any sampling (1 \u2212 agreement at"
        " the same temperature). On the line texts drift just as the logits say, one token at a"
        " time and with no memory."
    ]
    names = [arm.name for arm in ordinary(design)]
    for model in design.models:
        part = rows(table, model=model)
        part = part[part["arm"].isin(names)]
        if len(part):
            parts.append(
                f"{label(model)}: {percent(part['observed'].mean())} observed,"
                f" {percent(part['expected'].mean())} expected, in the mean over arms and"
                " temperatures."
            )
    return " ".join(parts)


def generation(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["generation"]
    plain = design.reference.name
    parts = [
        "The texts themselves: repetition within a text, texts that end in a loop, surprise (how"
        f" unlikely {plain} finds the text), diversity over the seeds of a prompt."
    ]
    for model in design.models:
        ours = rows(table, model=model, arm=plain, measure="nll_reference")
        ours = ours.set_index("temperature")["estimate"].dropna()
        gaps = []
        for arm in ordinary(design):
            theirs = rows(table, model=model, arm=arm.name, measure="nll_reference")
            theirs = theirs.set_index("temperature")["estimate"]
            gap = (theirs - ours).dropna()
            gaps += [(abs(value), value, arm.name, at) for at, value in gap.items()]
        if gaps:
            _, gap, name, temperature = max(gaps)
            parts.append(
                f"In {label(model)}, temperature moves the surprise of {plain}'s own texts from"
                f" {number(ours.iloc[0])} to {number(ours.iloc[-1])} nats per token; the largest"
                f" gap between an arm and {plain} at one temperature is {number(gap, 2)} nats"
                f" ({name} at {temperature:g})."
            )
    return " ".join(parts)


def slopes(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, rows(study.tables["slopes"], kind="interaction")
    low, high = design.band
    names = [arm.name for arm in ordinary(design)]
    parts = [
        f"The band question itself: how much steeper a curve is from {low:g} to {high:g} than"
        " around it (open dots), and how much more so than the reference's (full dots, the"
        f" interaction), with {percent(design.confidence)} intervals. Right of the line: more"
        " sensitive in the band than the reference."
    ]
    for measure in preferred(table, "measure", SLOPES, 3):
        part = rows(table, measure=measure)
        part = part[part["arm"].isin(names)]
        above, below = (_named(part[kept]) for kept in (part["low"] > 0, part["high"] < 0))
        said = [f"above 0 for {listed(above)}"] if above else []
        said += [f"below 0 for {listed(below)}"] if below else []
        name = SLOPES[measure].split(",")[0]
        parts.append(
            f"Interaction in {name}: "
            + ("clearly " + " and ".join(said) if said else "no interval excludes 0")
            + "."
        )
    return " ".join(parts)


def _named(part: DataFrame) -> list[str]:
    """The arms of the rows, each with its model."""
    return [f"{row['arm']} ({label(row['model'])})" for row in part.to_dict("records")]


def differences(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["differences"]
    parts = [
        f"Every arm at every temperature: the paired difference from {design.reference.name},"
        " purple below and orange above it; a dot where the interval excludes 0. With so many"
        " cells a few dots are chance."
    ]
    names = {arm.name for arm in ordinary(design)}
    table = table[table["arm"].isin(names)]
    for measure in (name for name in DIFFERENCES if name in set(table["measure"])):
        part = rows(table, measure=measure).dropna(subset=["low"])
        off = part[(part["low"] > 0) | (part["high"] < 0)]
        parts.append(
            f"{DIFFERENCES[measure].split(',')[0].capitalize()}: {len(off)} of {len(part)} cells"
            " of the arms."
        )
    return " ".join(parts)


def effective_temperature(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["effective_temperature"]
    source = source_of(table)
    parts = [
        f"Does a format heat or cool the model? \u03c4 is the temperature at which"
        f" {design.reference.name} is most like the arm at T. Above 0 the arm acts hotter, below"
        " it colder."
    ]
    for model in design.models:
        said = []
        for arm in ordinary(design):
            part = rows(table, model=model, arm=arm.name, source=source).dropna(subset=["estimate"])
            if len(part):
                row = part.loc[(part["temperature"] - 1).abs().idxmin()]
                said.append(f"{arm.name} {estimate(row, 2)}")
                at = row["temperature"]
        if said:
            parts.append(f"{label(model)} at T = {at:g}: {', '.join(said)}.")
    return " ".join(parts)


def cost(study: Study) -> str:
    """Caption of the figure of that name."""
    design, speed = study.design, study.tables["speed"]
    plain = design.reference.name
    parts = [
        f"Speed of decoding against the bytes of weights that a token takes to read; median of"
        f" {design.speed.rounds if design.speed else 0} rounds, the arms in turn, bars from the"
        " 10th to the 90th percentile."
    ]
    small = []
    for model in design.models:
        found = [
            f"{arm.name} {number(row['ratio'], 2)} {interval(row, 2)}".rstrip()
            for arm in ordinary(design)
            if (row := one(speed, model=model, arm=arm.name, phase="decode", batch=1)) is not None
        ]
        if found:
            parts.append(f"{label(model)}, batch 1, times {plain}: {', '.join(found)}.")
        if not math.isnan(per_second := bandwidth(study, model)):
            shares = [row["percent_of_read"] for _, _, row in decoding(study, model, 1)]
            parts.append(
                f"The machine reads {size(per_second)} per second (the broken line); decoding"
                f" reaches {number(min(shares), 2)} to {number(max(shares), 2)} % of what that"
                " allows."
            )
        held = [weights for arm, weights, _ in decoding(study, model, 1) if arm == plain]
        if held and held[0] < CACHED_BYTES:
            small.append(label(model))
    if small:
        parts.append(
            f"The weights of {listed(small)} are so small that they stay in the processor's"
            " caches, and much of the time is overhead per token: these speeds say little about"
            " real models."
        )
    return " ".join(parts)


def frontier(study: Study) -> str:
    """Caption of the figure of that name."""
    design, table = study.design, study.tables["generation"]
    plain = design.reference.name
    parts = [
        f"Quality against diversity: how unlikely {plain} finds the texts, against how different"
        " the texts of one prompt are. Temperature rises along each curve (numbers: that of"
        f" {plain}). An arm that lies on {plain}'s curve but further along is only shifted, as by"
        " another temperature; one that lies above it is worse."
    ]
    for model in design.models:
        ours = rows(table, model=model, arm=plain, measure="edit_distance").dropna(
            subset=["estimate"]
        )
        if len(ours):
            parts.append(
                f"In {label(model)} the distance goes from {number(ours['estimate'].iloc[0], 2)}"
                f" to {number(ours['estimate'].iloc[-1], 2)}."
            )
    return " ".join(parts)


def explorer(study: Study) -> str:
    """Caption of the still picture of the interactive figure."""
    names = listed([arm.name for arm in compared(study.design)])
    return (
        f"Next-token probabilities of {study.design.reference.name} and {names} at one place of a"
        " text; the ring marks the token that the shared noise picks in each arm."
    )
