"""Tables on generated texts. Each prompt has one value per arm and temperature, the mean over its
seeds (or one measure of all its seeds), and each estimate is the mean over prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .curves import RISING, distance_of, kaplan_meier, slopes
from .design import Design
from .long_form import Cells, TextCurves, nan, row
from .measures import (
    distinct_n,
    ended,
    first_divergence,
    loop_start,
    repeated_sentences,
    repetition,
    spread,
    zlib_ratio,
)
from .statistics import Floats, Intervals, complete
from .tables_logits import expected_hazards

GENERATION = (
    "equal",
    "first_divergence",
    "nll_reference",
    "rep_1",
    "rep_2",
    "rep_3",
    "rep_4",
    "diversity",
    "loop",
    "loop_start",
    "repeated_sentences",
    "zlib_ratio",
    "tokens",
    "eos",
    "distinct_2",
    "distinct_3",
    "edit_distance",
)
"""Measures of `generation`; the last three compare the seeds of a prompt."""

DIFFERENCES = tuple(
    name for name in GENERATION if name not in ("equal", "first_divergence", "loop_start")
)
"""Measures of `differences`."""

SLOPES = ("nll_reference", "rep_2", "rep_4", "diversity", "distinct_2", "edit_distance")
"""Measures of `slopes`."""

KNOBS = ("nll_reference", "rep_4", "diversity", "loop", "distinct_2")
"""Measures of `knobs`."""

Rows = Sequence[Mapping[str, Any]]
KnobCurves = Mapping[tuple[str, str, int, int], Mapping[str, Floats]]
"""(model, arm, top_k, length) -> measure -> (prompts, temperatures)."""


def main_rows(design: Design, cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The generations of a cell with the main top_k."""
    return [found for found in cell["generations"] if found["top_k"] == design.top_k[0]]


def place_of(found: Mapping[str, Any]) -> tuple[float, int, str]:
    """What a text of one arm has in common with that of another: temperature, seed, prompt."""
    return found["temperature"], found["seed"], found["prompt"]


def sample_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `samples`: every text of the main top_k with its measures."""
    kinds = {prompt.id: prompt.kind for prompt in design.prompts}
    for model in design.models:
        reference = main_rows(design, cells[model, design.reference.name])
        plain = {place_of(found): found["ids"] for found in reference}
        for arm in design.arms:
            for found in main_rows(design, cells[model, arm.name]):
                ids = found["ids"]
                parted = first_divergence(plain[place_of(found)], ids)
                loop = loop_start(ids)
                yield {
                    "model": model,
                    "arm": arm.name,
                    "temperature": found["temperature"],
                    "prompt": found["prompt"],
                    "kind": kinds[found["prompt"]],
                    "seed": found["seed"],
                    "tokens": len(ids),
                    "eos": ended(ids, found["finish"], design.max_new_tokens),
                    "equal": parted is None,
                    # texts that never part count as if they did after their last token
                    "first_divergence": len(ids) if parted is None else parted,
                    "nll_reference": nan(found["nll_reference"]),
                    **repetition(ids),
                    "loop": loop is not None,
                    "loop_start": nan(loop),
                    "repeated_sentences": repeated_sentences(found["text"]),
                    "zlib_ratio": zlib_ratio(found["text"]),
                    "ids": " ".join(map(str, ids)),
                    "text": found["text"],
                }


def text_curves(design: Design, cells: Cells, samples: Rows) -> TextCurves:
    """Measures of the texts of every model and arm by prompt and temperature; NaN where no text of
    a prompt has the measure."""
    by_arm: dict[tuple[str, str], list[Mapping[str, Any]]] = {key: [] for key in _keys(design)}
    for sample in samples:
        by_arm[sample["model"], sample["arm"]].append(sample)
    curves = {}
    for key, found in by_arm.items():
        single = {name: _grid(design, found, name) for name in GENERATION[:-3]}
        texts = _by_place(main_rows(design, cells[key]))
        curves[key] = {
            **single,
            "distinct_2": _of_seeds(design, texts, lambda ids: distinct_n(ids, 2)),
            "distinct_3": _of_seeds(design, texts, lambda ids: distinct_n(ids, 3)),
            "edit_distance": _of_seeds(design, texts, spread),
        }
    return curves


def _keys(design: Design) -> list[tuple[str, str]]:
    return [(model, arm.name) for model in design.models for arm in design.arms]


def _grid(design: Design, found: Rows, measure: str) -> Floats:
    """Means of a measure over the seeds: (prompts, temperatures)."""
    lines = {prompt.id: line for line, prompt in enumerate(design.prompts)}
    columns = {temperature: column for column, temperature in enumerate(design.temperatures)}
    total, count = np.zeros((2, len(lines), len(columns)))
    for sample in found:
        value = float(sample[measure])
        if not math.isnan(value):
            at = lines[sample["prompt"]], columns[sample["temperature"]]
            total[at] += value
            count[at] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _by_place(found: Rows) -> dict[tuple[str, float], list[list[int]]]:
    """The ids of all seeds by (prompt, temperature)."""
    texts: dict[tuple[str, float], list[list[int]]] = {}
    for text in found:
        texts.setdefault((text["prompt"], text["temperature"]), []).append(text["ids"])
    return texts


def _of_seeds(design: Design, texts: Mapping[tuple[str, float], Any], measure: Any) -> Floats:
    rows = [
        [measure(texts.get((prompt.id, value), [])) for value in design.temperatures]
        for prompt in design.prompts
    ]
    return np.array(rows)


def generation_rows(
    design: Design, curves: TextCurves, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `generation`."""
    for model in design.models:
        for arm in design.arms:
            found = curves[model, arm.name]
            yield from _long({"model": model, "arm": arm.name}, design, found, intervals)


def difference_rows(
    design: Design, curves: TextCurves, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `differences`: every arm minus the reference, prompt by prompt."""
    for model in design.models:
        plain = curves[model, design.reference.name]
        for arm in design.others:
            found = {
                name: curves[model, arm.name][name] - plain[name] for name in DIFFERENCES
            }
            yield from _long({"model": model, "arm": arm.name}, design, found, intervals, True)


def _long(
    keys: Mapping[str, Any],
    design: Design,
    found: Mapping[str, Floats],
    intervals: Intervals,
    signed: bool = False,
) -> Iterator[dict[str, Any]]:
    values = np.stack(list(found.values()), axis=1)
    means, counts = intervals.mean(values), (~np.isnan(values)).sum(axis=0)
    for line, name in enumerate(found):
        for column, temperature in enumerate(design.temperatures):
            at = [part[line, column] for part in means]
            count = int(counts[line, column])
            yield row({**keys, "temperature": temperature}, name, at, count, signed)


def slope_rows(
    design: Design, curves: TextCurves, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `slopes`, per unit of temperature and positive in the direction in which
    temperature moves the measure: mean slopes in the band and around it, their difference B, for
    other arms than the reference its excess over the reference's (the interaction) and the largest
    distance of the two curves."""
    grid = np.asarray(design.temperatures)
    for model in design.models:
        plain = curves[model, design.reference.name]
        for arm in design.arms:
            for name in SLOPES:
                mine, other = curves[model, arm.name][name], plain[name]
                keys = {"model": model, "arm": arm.name}
                band, around = (
                    RISING[name] * part
                    for part in slopes(grid, mine, design.band, design.surroundings)
                )
                values = {"slope_band": band, "slope_around": around, "B": band - around}
                if arm.role != "reference":
                    values["interaction"] = interaction(design, name, mine, other)
                for kind, value in values.items():
                    count = int((~np.isnan(value)).sum())
                    yield _kind(row(keys, name, intervals.mean(value), count, True), kind)
                if arm.role != "reference":
                    gaps = mine - other
                    at = [max(0.0, part[0]) for part in intervals.of(gaps, distance_of)]
                    count = len(complete(gaps))
                    yield _kind(row(keys, name, at, count, True), "distance")


def _kind(found: dict[str, Any], kind: str) -> dict[str, Any]:
    model, arm, measure, *rest = found.items()
    return dict([model, arm, measure, ("kind", kind), *rest])


def interaction(design: Design, measure: str, mine: Floats, plain: Floats) -> Floats:
    """How much more an arm's curve steepens in the band than the reference's: (prompts). `mine` and
    `plain` (prompts, temperatures)."""
    grid = np.asarray(design.temperatures)
    band, around = slopes(grid, mine - plain, design.band, design.surroundings)
    return RISING[measure] * (band - around)


# -------------------------------------------------------------------------------------- knobs


def knob_curves(design: Design, cells: Cells) -> KnobCurves:
    """Measures of the texts for every top_k, cut to every length."""
    curves: dict[tuple[str, str, int, int], Mapping[str, Floats]] = {}
    for model in design.models:
        for arm in design.arms:
            rows = cells[model, arm.name]["generations"]
            for top_k in design.top_k:
                found = [text for text in rows if text["top_k"] == top_k]
                for length in design.lengths:
                    curves[model, arm.name, top_k, length] = _cut(design, found, length)
    return curves


def _cut(design: Design, found: Rows, length: int) -> dict[str, Floats]:
    """Measures of texts cut to `length` tokens."""
    cut = []
    for text in found:
        ids, nll = text["ids"][:length], text["token_nll"][:length]
        cut.append(
            {
                "prompt": text["prompt"],
                "temperature": text["temperature"],
                "ids": ids,
                "nll_reference": sum(nll) / len(nll) if nll else math.nan,
                **repetition(ids),
                "loop": loop_start(ids) is not None,
            }
        )
    single = {name: _grid(design, cut, name) for name in KNOBS[:-1]}
    return {**single, "distinct_2": _of_seeds(design, _by_place(cut), lambda x: distinct_n(x, 2))}


def knob_values(
    curves: KnobCurves, design: Design, key: tuple[str, str, int, int]
) -> dict[str, Floats]:
    """Measure -> arm minus reference, meaned over the temperatures: (prompts)."""
    model, _, top_k, length = key
    plain = curves[model, design.reference.name, top_k, length]
    return {name: over_temperatures(curves[key][name] - plain[name]) for name in KNOBS}


def over_temperatures(values: Floats) -> Floats:
    """Means over axis 1 of what is there: (prompts), NaN where nothing is."""
    there = ~np.isnan(values)
    total, count = np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def knob_rows(
    design: Design, curves: KnobCurves, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `knobs`: arm minus reference for every top_k and length."""
    for model in design.models:
        for arm in design.others:
            for top_k in design.top_k:
                for length in design.lengths:
                    found = knob_values(curves, design, (model, arm.name, top_k, length))
                    means = intervals.mean(np.stack(list(found.values()), axis=1))
                    keys = {"model": model, "arm": arm.name, "top_k": top_k, "length": length}
                    for number, (name, values) in enumerate(found.items()):
                        count = int((~np.isnan(values)).sum())
                        at = [part[number] for part in means]
                        yield row(keys, name, at, count, True)


# ----------------------------------------------------------------------------------- survival


def survival_rows(
    design: Design, cells: Cells, samples: Rows, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `survival`: after so many tokens, the share of texts that still equal the
    reference's (Kaplan-Meier: a text that ended equal is no longer at risk). Greedy texts are the
    same for all seeds and count once."""
    if design.lockstep:  # nothing was generated
        return
    grouped: dict[tuple[str, str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        if sample["temperature"] > 0 or sample["seed"] == design.seeds[0]:
            key = (sample["model"], sample["arm"], sample["temperature"])
            grouped.setdefault(key, {}).setdefault(sample["prompt"], []).append(sample)
    for model in design.models:
        for arm in design.others:
            expected = expected_hazards(cells[model, arm.name]["texts"], design)
            for temperature in design.temperatures:
                texts = list(grouped[model, arm.name, temperature].values())
                parted = np.array([[not text["equal"] for text in group] for group in texts])
                agreed = np.array([[text["first_divergence"] for text in group] for group in texts])
                found = kaplan_meier(agreed + parted, parted, design.max_new_tokens, intervals)
                for position in range(design.max_new_tokens + 1):
                    yield {
                        "model": model,
                        "arm": arm.name,
                        "temperature": temperature,
                        "position": position,
                        "at_risk": int(found.at_risk[position]),
                        "estimate": float(found.estimate[position]),
                        "low": float(found.low[position]),
                        "high": float(found.high[position]),
                        "hazard": float(found.hazard[position]),
                        "expected_hazard": expected.get(temperature, math.nan),
                        "clusters": len(texts),
                    }
