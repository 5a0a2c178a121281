"""The comparisons behind every claim: which arms, which measure, which interval, which words.

Each test takes the `Evidence` on one model and returns its comparisons, or a sentence that says
what is missing to make any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cells import SPEED
from .curves import RISING, contrast, distance_of, slope_over
from .design import Arm, Design
from .long_form import Cells, TextCurves
from .statistics import (
    Finding,
    Floats,
    Intervals,
    effect,
    equivalence,
    mcnemar,
    permutation,
    superiority,
)
from .tables_cost import Phase, phases, speeds, weight_rows
from .tables_logits import LOW_BAND, logit_clusters
from .tables_texts import KnobCurves, interaction, knob_values, main_rows, over_temperatures

MINUS = "\u2212"
FIRST_HALF = (0.1, 0.5)
"""The low temperatures of C2 and C3."""

MEASURES = {"nll": "nll_reference", "rep_4": "rep_4"}
LABELS = {"nll": "NLL of the texts", "rep_4": "rep-4"}


@dataclass(frozen=True)
class Comparison:
    """One comparison: what of what, the number with its interval, the margin, a p-value on the
    two-sided scale, the verdict, and for each verdict the words that say why. `centre` is the value
    of no difference, `decides` whether the claim's verdict rests on it."""

    comparison: str
    endpoint: str
    finding: Finding
    margin: float
    p: float
    verdict: str
    clauses: Mapping[str, str]
    centre: float = 0.0
    decides: bool = True
    timed: bool = False
    remark: str = ""

    @property
    def prompts(self) -> int:
        """How many prompts and passages it rests on; 0 for what is counted or timed."""
        return 0 if self.timed else self.finding.clusters

    def reason(self) -> str:
        """The sentence that says why the verdict is what it is."""
        found = self.finding
        numbers = _number(found.estimate)
        if math.isnan(found.low):
            why = "has no interval, which needs two prompts at least"
        else:
            if found.low != found.high:
                numbers += f" [{_number(found.low)}, {_number(found.high)}]"
            why = self.clauses[self.verdict]
        remark = f"; {self.remark}" if self.remark else ""
        return f"{self.comparison}, {self.endpoint}: {numbers} {why}{remark}."


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What tests may look at: the design, one model, and all that was measured."""

    design: Design
    model: str
    cells: Cells
    curves: TextCurves
    knobs: KnobCurves
    rounds: Sequence[Mapping[str, Any]]
    intervals: Intervals

    def margin(self, claim: str, endpoint: str) -> float:
        """The margin of an endpoint."""
        return self.design.claims[claim].endpoints[endpoint]

    def texts(self, arm: Arm, measure: str) -> Floats:
        """A measure of an arm's texts: (prompts, temperatures)."""
        return self.curves[self.model, arm.name][measure]

    def logits(self, arm: Arm, measure: str) -> Floats:
        """A measure of an arm's logits by prompt and passage: (clusters, temperatures), or
        (clusters) for ln_ppl_ratio."""
        texts = self.cells[self.model, arm.name]["texts"]
        if not texts:
            shape = () if measure == "ln_ppl_ratio" else (len(self.design.logit_temperatures),)
            return np.empty((0, *shape))
        return logit_clusters(texts, "all", measure)

    def arm(self, format: str) -> Arm | None:
        """The first ordinary arm of a format."""
        return next((arm for arm in self.ordinary() if arm.format == format), None)

    def ordinary(self) -> list[Arm]:
        """The arms that the study is about."""
        return [arm for arm in self.design.arms if arm.role == "arm"]

    def four_bit(self) -> list[Arm]:
        """The ordinary arms in nf4 or fp4, double-quantized or not."""
        return [arm for arm in self.ordinary() if arm.format.startswith(("nf4", "fp4"))]

    def pairs(self) -> list[tuple[Arm, Arm]]:
        """nf4 with fp4, and their double-quantized forms with each other."""
        found = [(self.arm(f"nf4{end}"), self.arm(f"fp4{end}")) for end in ("", "-dq")]
        return [(one, two) for one, two in found if one is not None and two is not None]


NO_PAIR = "It takes an nf4 arm and an fp4 arm, and the design has not both."
NO_SPEED = "Speed was not measured."

Found = list[Comparison] | str


# ------------------------------------------------------------------------- kinds of comparisons


def equal(
    comparison: str, endpoint: str, found: Finding, margin: float, centre: float = 0.0, **more: Any
) -> Comparison:
    """Equal up to the margin, by two one-sided tests."""
    word = equivalence(found.low - centre, found.high - centre, margin)
    p = max(found.p_above(centre - margin), found.p_below(centre + margin))
    around = f"{_number(centre - margin)} to {_number(centre + margin)}"
    clauses = {
        "confirmed": f"lies within {around}",
        "refuted": f"lies outside {around}",
        "inconclusive": f"reaches beyond {around}",
    }
    return Comparison(comparison, endpoint, found, margin, p, word, clauses, centre, **more)


def greater(
    comparison: str, endpoint: str, found: Finding, margin: float, **more: Any
) -> Comparison:
    """Greater than 0, by an amount that counts."""
    clauses = {
        "confirmed": "lies above 0",
        "refuted": f"is less than {margin:g}, the smallest effect that counts",
        "inconclusive": "is not clearly above 0",
    }
    word = effect(found.low, found.high, margin)
    p = found.p_above(0.0)
    return Comparison(comparison, endpoint, found, margin, p, word, clauses, **more)


def slower(
    comparison: str, endpoint: str, found: Finding, margin: float, **more: Any
) -> Comparison:
    """A ratio of speeds below 1 by more than the margin."""
    bound = 1 - margin
    clauses = {
        "confirmed": f"lies below {bound:g}",
        "refuted": f"lies above {bound:g}",
        "inconclusive": f"is not clearly below {bound:g}",
    }
    word = superiority(1 - found.high, 1 - found.low, margin)
    p = found.p_below(bound)
    return Comparison(
        comparison, endpoint, found, margin, p, word, clauses, 1.0, timed=True, **more
    )


# ------------------------------------------------------------------------------ speed and bytes


def _ratios(e: Evidence, one: Arm, two: Arm) -> Iterator[tuple[str, bool, Finding, str]]:
    """Tokens per second, one / two in the same round: (endpoint, whether it decides, median,
    where)."""
    for phase in phases(e.rounds):
        found = speeds(e.design, e.rounds, e.model, phase)
        ratio = e.intervals.median(found[one.name] / found[two.name])
        yield _phase(phase), phase == ("decode", 1), ratio, _where(e, (one, two))


def _phase(phase: Phase) -> str:
    name, batch = phase
    return f"tokens/s, {name}" + (f" in a batch of {batch}" if batch > 1 else "")


def _where(e: Evidence, arms: Sequence[Arm]) -> str:
    """The device and the kernels on which speed was taken."""
    found = e.cells[e.model, SPEED]["environment"]
    names = [name for arm in arms for name in _kernels(e, arm)]
    place = [str(found.get("cpu") or found.get("device") or "an unknown machine")]
    if found.get("isa"):
        place.append(str(found["isa"]))
    threads = found.get("threads")
    if found.get("device") in (None, "cpu"):
        place.append(f"{threads} thread" + ("" if threads == 1 else "s"))
    kernel = f" with the kernels {'; '.join(dict.fromkeys(names))}" if names else ""
    return f"on {', '.join(place)}{kernel}"


def _kernels(e: Evidence, arm: Arm) -> list[str]:
    """The kernels in which an arm's layers are computed, as its own cell names them."""
    kernels = e.cells[e.model, arm.name]["environment"].get("kernels") or {}
    return list(kernels.get(arm.format, ()))


def c1a(e: Evidence) -> Found:
    """Equal speed of nf4 and fp4."""
    if e.design.speed is None:
        return NO_SPEED
    margin = e.margin("C1a", "tokens_per_second")
    pairs = [(one, two) for one, two in e.pairs() if {one, two} <= set(e.design.timed)]
    return [
        equal(f"{one.name} / {two.name}", endpoint, ratio, margin, 1.0, decides=decides,
              timed=True, remark=where)
        for one, two in pairs
        for endpoint, decides, ratio, where in _ratios(e, one, two)
    ] or NO_PAIR  # fmt: skip


def c1b(e: Evidence) -> Found:
    """Equal memory of nf4 and fp4: counted, so without an interval."""
    rows = [row for row in weight_rows(e.design, e.cells) if row["model"] == e.model]
    held = {row["arm"]: row["bytes"] for row in rows}
    return [
        equal(
            f"{one.name} / {two.name}",
            "bytes of the swapped layers",
            Finding.counted(held[one.name] / held[two.name]),
            e.margin("C1b", "bytes"),
            1.0,
            remark="counted, so without an interval",
        )
        for one, two in e.pairs()
        if held[two.name]
    ] or NO_PAIR


def c5(e: Evidence) -> Found:
    """int8 slower than the reference."""
    if e.design.speed is None:
        return NO_SPEED
    arm = e.arm("int8")
    if arm is None or arm not in e.design.timed:
        return "It takes an int8 arm of this package, and the design has none."
    return _slower_arms(e, [(arm, e.design.reference)], e.margin("C5", "tokens_per_second"))


def c6(e: Evidence) -> Found:
    """Every arm slower than the reference."""
    if e.design.speed is None:
        return NO_SPEED
    pairs = [(arm, e.design.reference) for arm in e.design.timed if arm.role == "arm"]
    found = _slower_arms(e, pairs, e.margin("C6", "tokens_per_second"))
    return found or "It takes an arm beside the reference, and none was timed."


def _slower_arms(
    e: Evidence, pairs: Sequence[tuple[Arm, Arm]], margin: float
) -> list[Comparison]:
    return [
        slower(f"{one.name} / {two.name}", endpoint, ratio, margin, decides=decides, remark=where)
        for one, two in pairs
        for endpoint, decides, ratio, where in _ratios(e, one, two)
    ]


# ------------------------------------------------------------------------------------- quality


def c1c(e: Evidence) -> Found:
    """Equal quality of nf4 and fp4."""
    found = []
    for one, two in e.pairs():
        name = f"{one.name} {MINUS} {two.name}"
        gap = e.logits(one, "ln_ppl_ratio") - e.logits(two, "ln_ppl_ratio")
        ppl = e.intervals.finding(gap)
        found.append(equal(name, "ln perplexity", ppl, e.margin("C1c", "ln_ppl")))
        rep = over_temperatures(e.texts(one, "rep_4") - e.texts(two, "rep_4"))
        finding = e.intervals.finding(rep)
        found.append(
            equal(name, "rep-4, mean over temperatures", finding, e.margin("C1c", "rep_4"))
        )
    return found or NO_PAIR


def c8(e: Evidence) -> Found:
    """Every quantized arm about as good as the reference."""
    found = []
    plain = e.design.reference
    for arm in e.ordinary():
        name = f"{arm.name} {MINUS} {plain.name}"
        ppl = e.intervals.finding(e.logits(arm, "ln_ppl_ratio"))
        found.append(equal(name, "ln perplexity", ppl, e.margin("C8", "ln_ppl")))
        gap = e.texts(arm, "nll_reference") - e.texts(plain, "nll_reference")
        nll = e.intervals.finding(over_temperatures(gap))
        label = f"{LABELS['nll']}, mean over temperatures"
        found.append(equal(name, label, nll, e.margin("C8", "nll")))
        if e.design.temperatures[0] == 0:
            found.append(_loops(e, arm, name))
    return found or "It takes an ordinary arm beside the reference, and the design has none."


def _loops(e: Evidence, arm: Arm, name: str) -> Comparison:
    """How many more greedy texts end in a loop, with McNemar's test and the number of texts that
    changed at all."""
    mine, plain = e.texts(arm, "loop")[:, 0], e.texts(e.design.reference, "loop")[:, 0]
    p = mcnemar(int((mine > plain).sum()), int((mine < plain).sum()))
    changed = int((e.texts(arm, "equal")[:, 0] == 0).sum())
    remark = (
        f"McNemar's exact p is {p:.2g}, and {changed} of {len(mine)} greedy texts are not the"
        " reference's"
    )
    finding = e.intervals.finding(mine - plain)
    margin = e.margin("C8", "loops")
    return equal(name, "share of greedy texts that loop", finding, margin, remark=remark)


# --------------------------------------------------------------------------------- temperature


def _family(e: Evidence, wanted: str, family: str) -> str | None:
    """Why the model does not stand for a family; None when it does."""
    if e.model.startswith("demo:"):
        return f"It takes a pretrained model of {family}; a demo model stands for no family."
    found = e.cells[e.model, e.design.reference.name]["environment"].get("architecture")
    if found != wanted:
        other = found or "unknown"
        return f"It takes a model of {family}; the architecture of this one is {other}."
    return None


def c2(e: Evidence) -> Found:
    """On Llama 2: fp4 has the greater slope at low temperatures."""
    if (missing := _family(e, "llama", "Llama 2")) is not None:
        return missing
    return _slopes(e, "C2", [(two, one) for one, two in e.pairs()]) or NO_PAIR


def c3(e: Evidence) -> Found:
    """On Falcon: nf4 has the greater slope, and is further from the reference's curve."""
    if (missing := _family(e, "falcon", "Falcon")) is not None:
        return missing
    found = _slopes(e, "C3", e.pairs())
    for one, two in e.pairs():
        for name, measure in MEASURES.items():
            plain = e.texts(e.design.reference, measure)
            gaps = np.concatenate(
                [e.texts(one, measure) - plain, e.texts(two, measure) - plain], axis=1
            )
            finding = e.intervals.finding(gaps, _further)
            endpoint = f"{LABELS[name]}, largest distance from {e.design.reference.name}"
            margin = e.margin("C3", f"distance_{name}")
            found.append(greater(f"{one.name} {MINUS} {two.name}", endpoint, finding, margin))
    return found or NO_PAIR


def _further(gaps: Floats) -> Floats:
    """How much further the first of two curves is from the reference at its furthest."""
    one, two = np.split(gaps, 2, axis=-1)
    return distance_of(one) - distance_of(two)


def _slopes(e: Evidence, claim: str, pairs: Sequence[tuple[Arm, Arm]]) -> list[Comparison]:
    grid = np.asarray(e.design.temperatures)
    low, high = FIRST_HALF
    found = []
    for one, two in pairs:
        for name, measure in MEASURES.items():
            gap = e.texts(one, measure) - e.texts(two, measure)
            finding = e.intervals.finding(RISING[measure] * slope_over(grid, gap, FIRST_HALF))
            endpoint = f"{LABELS[name]}, slope from {low:g} to {high:g}"
            margin = e.margin(claim, f"slope_{name}")
            found.append(greater(f"{one.name} {MINUS} {two.name}", endpoint, finding, margin))
    return found


def c4(e: Evidence) -> Found:
    """4-bit arms part from the reference more inside the band than around it, and their texts
    change faster with temperature there than the reference's do."""
    found = []
    grid = np.asarray(e.design.logit_temperatures)
    for arm in e.four_bit():
        curves = e.logits(arm, "disagreement")
        margin = e.margin("C4", "contrast_disagreement")
        for band, decides in ((e.design.band, True), (LOW_BAND, False)):
            values = contrast(grid, curves, band, e.design.surroundings)
            label = f"1 {MINUS} A, {band[0]:g} to {band[1]:g} minus the rest"
            if not decides:
                label += " (the claim's first wording)"
            finding = e.intervals.finding(values)
            found.append(greater(arm.name, label, finding, margin, decides=decides))
        for name, measure in MEASURES.items():
            plain = e.texts(e.design.reference, measure)
            values = interaction(e.design, measure, e.texts(arm, measure), plain)
            margin = e.margin("C4", f"interaction_{name}")
            label = f"{LABELS[name]}, extra slope in the band"
            found.append(greater(arm.name, label, e.intervals.finding(values), margin))
    return found or "It takes a 4-bit arm, and the design has none."


def c7(e: Evidence) -> Found:
    """The curves of the 4-bit arms differ from each other."""
    arms = e.four_bit()
    if len(arms) < 2:
        return "It takes two 4-bit arms at least, and the design has not so many."
    curves = {
        "curves_disagreement": (f"1 {MINUS} A", [e.logits(arm, "disagreement") for arm in arms]),
        "curves_nll": (LABELS["nll"], [e.texts(arm, "nll_reference") for arm in arms]),
    }
    found = []
    for endpoint, (label, sides) in curves.items():
        values, margin = np.stack(sides, axis=1), e.margin("C7", endpoint)
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        finding = e.intervals.finding(flat, _gap_of(len(arms)))
        t, p = permutation(values, e.intervals.draws, e.intervals.seed)
        word = "confirmed" if p <= e.intervals.alpha else "inconclusive"
        if finding.high < margin:
            word = "refuted"
        shown = "nan" if math.isnan(p) else f"{p:.2g}"
        clauses = {
            "confirmed": f"with p {shown} for alike arms",
            "refuted": f"is less than {margin:g}, which would still be none",
            "inconclusive": f"with p {shown} for alike arms",
        }
        remark = f"permutation of the arms' labels within prompts, largest |t| {t:.3g}"
        found.append(
            Comparison(
                ", ".join(arm.name for arm in arms),
                f"{label}, largest gap at any temperature",
                finding,
                margin,
                p,
                word,
                clauses,
                remark=remark,
            )
        )
    return found


def _gap_of(arms: int) -> Callable[[Floats], Floats]:
    """The largest gap between any two of several curves: (..., arms * points) -> (..., 1)."""

    def gap(means: Floats) -> Floats:
        curves = means.reshape(*means.shape[:-1], arms, -1)
        return np.asarray(np.ptp(curves, axis=-2).max(axis=-1))[..., None]

    return gap


def c9(e: Evidence) -> Found:
    """The difference between an arm and the reference changes with top_k or with length."""
    main, longest = e.design.top_k[0], e.design.lengths[-1]
    found = []
    for arm in e.ordinary():
        plain = knob_values(e.knobs, e.design, (e.model, arm.name, main, longest))
        others = [("top_k", top_k, (top_k, longest)) for top_k in e.design.top_k[1:]]
        others += [("length", length, (main, length)) for length in e.design.lengths[:-1]]
        for knob, value, place in others:
            values = knob_values(e.knobs, e.design, (e.model, arm.name, *place))
            start = (main or "off") if knob == "top_k" else longest
            for name, measure in MEASURES.items():
                finding = e.intervals.finding(values[measure] - plain[measure])
                label = f"{LABELS[name]}, {knob} {value or 'off'} minus {start}"
                margin = e.margin("C9", f"{knob}_{name}")
                found.append(_changes(f"{arm.name} {MINUS} {e.design.reference.name}", label,
                                      finding, margin))  # fmt: skip
    return found or "It takes several values of top_k or several lengths, and an ordinary arm."


def _changes(comparison: str, endpoint: str, found: Finding, margin: float) -> Comparison:
    """Not 0, in either direction, by an amount that counts."""
    word = "inconclusive"
    if -margin < found.low and found.high < margin:
        word = "refuted"
    elif found.low > 0 or found.high < 0:
        word = "confirmed"
    clauses = {
        "confirmed": "is not 0",
        "refuted": f"lies within {MINUS}{margin:g} to {margin:g}, which would still be none",
        "inconclusive": "is neither clearly 0 nor clearly not",
    }
    return Comparison(comparison, endpoint, found, margin, found.p_other(0.0), word, clauses)


TESTS: Mapping[str, Callable[[Evidence], Found]] = {
    "C1a": c1a,
    "C1b": c1b,
    "C1c": c1c,
    "C2": c2,
    "C3": c3,
    "C4": c4,
    "C5": c5,
    "C6": c6,
    "C7": c7,
    "C8": c8,
    "C9": c9,
}
"""Claim -> its test."""
