"""Tables on logits: how an arm's next-token distributions differ from the reference's.

Each text is one average over its tokens, each prompt one average over its texts by their tokens,
and each estimate the mean over prompts and passages: a prompt counts once, however long its texts
are. Only `tenths` counts tokens, since few prompts have some in every tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .curves import contrast, effective_temperature_of, inside, peak_of
from .design import Design
from .long_form import Cells, row
from .statistics import Floats, Intervals

CURVES = ("kl", "kl_reverse", "tv", "disagreement", "entropy_shift", "delta_p", "rms_delta_p")
"""Measures of `curves`."""

SENSITIVITY = ("kl", "tv", "disagreement")
"""Measures of `sensitivity`."""

TENTHS = ("kl", "tv", "disagreement")
"""Measures of `tenths`."""

SOURCES = ("all", "own", "held")
"""Texts on which logits are compared: all, the reference's own samples, the passages."""

LOW_BAND = (0.1, 0.4)
"""The band of the claim's first wording, "lower temperature"."""

Texts = Sequence[Mapping[str, Any]]


def text_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `texts`."""
    for model in design.models:
        for arm in design.others:
            for text in cells[model, arm.name]["texts"]:
                curves = _curves(text)
                for place, temperature in enumerate(design.logit_temperatures):
                    yield {
                        "model": model,
                        "arm": arm.name,
                        "source": text["source"],
                        "text": text["id"],
                        "kind": text["kind"],
                        "seed": -1 if text["seed"] is None else text["seed"],
                        "tokens": text["tokens"],
                        "same_top": text["same_top"],
                        "nll_reference": text["nll_reference"],
                        "ln_ppl_ratio": text["ln_ppl_ratio"],
                        "temperature": temperature,
                        **{name: float(values[place]) for name, values in curves.items()},
                    }


def _curves(text: Mapping[str, Any]) -> dict[str, Floats]:
    """The curves of a text by measure; squares stay squares until they are meaned."""
    curves = {name: np.asarray(values, np.float64) for name, values in text["curves"].items()}
    shift = curves["entropy_test"] - curves["entropy_ref"]
    return {**curves, "entropy_shift": shift}


def _groups(texts: Texts, source: str) -> list[Texts]:
    """The texts of each cluster: a prompt with all its seeds, or a passage."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for text in texts:
        if source in ("all", text["source"]):
            groups.setdefault((text["source"], text["id"]), []).append(text)
    return list(groups.values())


def _clusters(texts: Texts, source: str, values: Callable[[Mapping[str, Any]], Floats]) -> Floats:
    """`values` of each text, meaned over a cluster's texts by their tokens: (clusters, ...)."""
    rows = [
        np.average(
            [values(text) for text in group], axis=0, weights=[text["tokens"] for text in group]
        )
        for group in _groups(texts, source)
    ]
    return np.asarray(rows, np.float64)


def logit_clusters(texts: Texts, source: str, measure: str) -> Floats:
    """A measure of a cell's texts by cluster: (clusters, temperatures), or (clusters) for
    ln_ppl_ratio and same_top. `rms_delta_p` comes as mean squares."""
    if measure in ("ln_ppl_ratio", "same_top"):
        return _clusters(texts, source, lambda text: np.asarray(text[measure], np.float64))
    name = "delta_p_squared" if measure == "rms_delta_p" else measure
    return _clusters(texts, source, lambda text: _curves(text)[name])


def expected_hazards(texts: Texts, design: Design) -> dict[float, float]:
    """Temperature of generation -> how often the next token parts from the reference's where both
    have written the same, after the logits of the reference's own samples: the mean of
    1 - agreement, or of 1 - same_top for greedy texts. Temperatures at which it is unknown are not
    there."""
    top_k = design.top_k[0]
    grid = np.asarray(design.logit_temperatures)
    found: dict[float, float] = {}
    if not _groups(texts, "own"):
        return found
    for temperature in design.temperatures:
        at = np.flatnonzero(inside(grid, temperature, temperature))
        if temperature == 0:
            found[temperature] = 1 - float(logit_clusters(texts, "own", "same_top").mean())
        elif len(at):
            curve = _clusters(
                texts,
                "own",
                lambda text: np.asarray(
                    (text["top_k"][str(top_k)] if top_k else text["curves"])["disagreement"]
                ),
            )
            found[temperature] = float(curve[:, at[0]].mean())
    return found


def logit_tables(
    design: Design, cells: Cells, intervals: Intervals
) -> dict[str, list[dict[str, Any]]]:
    """The tables `summary`, `curves`, `sensitivity`, `tenths` and `effective_temperature`."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in ("summary", "curves", "sensitivity", "tenths", "effective_temperature")
    }
    for model in design.models:
        for arm in design.others:
            texts = cells[model, arm.name]["texts"]
            for source in SOURCES:
                if not _groups(texts, source):
                    continue
                keys = {"model": model, "arm": arm.name, "source": source}
                found = {name: logit_clusters(texts, source, name) for name in CURVES}
                tables["curves"] += _curve_rows(keys, design, found, intervals)
                tables["summary"] += _summary_rows(keys, design, texts, found, intervals)
                tables["sensitivity"] += _sensitivity_rows(keys, design, found, intervals)
                tables["effective_temperature"] += _temperature_rows(
                    keys, design, texts, intervals
                )
            keys = {"model": model, "arm": arm.name}
            if texts:
                tables["tenths"] += _tenth_rows(keys, design, texts, intervals)
    return tables


def _curve_rows(
    keys: Mapping[str, Any], design: Design, found: Mapping[str, Floats], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    means = intervals.mean(np.stack([found[name] for name in CURVES], axis=1))
    clusters = len(found[CURVES[0]])
    for number, name in enumerate(CURVES):
        for place, temperature in enumerate(design.logit_temperatures):
            at = [part[number, place] for part in means]
            yield row({**keys, "temperature": temperature}, name, at, clusters)


def _summary_rows(
    keys: Mapping[str, Any],
    design: Design,
    texts: Texts,
    found: Mapping[str, Floats],
    intervals: Intervals,
) -> Iterator[dict[str, Any]]:
    """Means over the whole grid of temperatures, and the measures that know no temperature."""
    columns = {
        name: logit_clusters(texts, keys["source"], name) for name in ("ln_ppl_ratio", "same_top")
    }
    columns |= {f"{name}_mean": found[name].mean(axis=1) for name in ("kl", "tv", "disagreement")}
    one = np.flatnonzero(inside(np.asarray(design.logit_temperatures), 1, 1))
    if len(one):
        columns |= {f"{name}_at_1": found[name][:, one[0]] for name in CURVES}
    means = intervals.mean(np.stack(list(columns.values()), axis=1))
    for number, name in enumerate(columns):
        yield row(keys, name, [part[number] for part in means], len(columns[name]))


def _sensitivity_rows(
    keys: Mapping[str, Any], design: Design, found: Mapping[str, Floats], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The contrast of the band with its surroundings, that of the lower band, and the peak."""
    grid = np.asarray(design.logit_temperatures)
    for name in SENSITIVITY:
        for kind, band in (("contrast", design.band), ("low_contrast", LOW_BAND)):
            values = contrast(grid, found[name], band, design.surroundings)
            yield row({**keys, "kind": kind}, name, intervals.mean(values), len(values), True)
        at = [part[0] for part in intervals.of(found[name], peak_of(grid), smooth=False)]
        if not found[name].any():
            at = [math.nan] * 3  # the curve of zeros has no peak
        yield row({**keys, "kind": "peak"}, name, at, len(found[name]), True)


def _temperature_rows(
    keys: Mapping[str, Any], design: Design, texts: Texts, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """Effective minus nominal temperature, within the grid, whose ends have but one neighbour."""
    grid = np.asarray(design.logit_temperatures)
    parts = [
        logit_clusters(texts, keys["source"], name) for name in ("cross", "log_z", "entropy_ref")
    ]
    values = np.concatenate(parts, axis=1)
    found = intervals.of(values, effective_temperature_of(grid))
    for place in range(1, len(grid) - 1):
        # logits are float32: what lies beyond the ninth decimal is their rounding
        at = [round(float(part[place] - grid[place]), 9) + 0.0 for part in found]
        yield {
            **keys,
            "temperature": design.logit_temperatures[place],
            "estimate": at[0],
            "low": at[1],
            "high": at[2],
            "clusters": len(values),
        }


def _tenth_rows(
    keys: Mapping[str, Any], design: Design, texts: Texts, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """Means over the tokens of each tenth: their sum over the clusters / their number."""
    size = len(design.logit_temperatures)
    groups = _groups(texts, "all")
    for tenth in range(10):
        sums = np.zeros((len(groups), 1 + len(TENTHS) * size))
        for line, group in enumerate(groups):
            for text in group:
                tenths = text["tenths"]
                if tenths["count"][tenth]:
                    parts = [tenths[name][tenth] for name in TENTHS]
                    sums[line] += np.concatenate([[tenths["count"][tenth]], *parts])
        sums = sums[sums[:, 0] > 0]
        found = intervals.of(sums, _per_token)
        for number, name in enumerate(TENTHS):
            for place, temperature in enumerate(design.logit_temperatures):
                at = [part[number * size + place] for part in found]
                place_keys = {**keys, "tenth": tenth, "temperature": temperature}
                yield {
                    **row(place_keys, name, at, len(sums)),
                    "tokens": int(sums[:, 0].sum()),
                }


def _per_token(means: Floats) -> Floats:
    return means[..., 1:] / means[..., :1]
