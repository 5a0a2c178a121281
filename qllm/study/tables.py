"""From cells to tables: a function of the cells' bodies alone, in the order of the design.

Long tables have a row per measure, with `estimate`, `low`, `high` (the interval) and `clusters`
(how many prompts and texts it rests on). Each text is one average over its tokens, each prompt one
average over its texts, and each estimate the mean over prompts: a prompt counts once, however
long its texts are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QllmFileError
from .cells import SPEED
from .curves import contrast, peak_of
from .design import Design
from .files import write_bytes
from .measures import distinct_n, first_divergence, rep_n, zlib_ratio
from .statistics import Floats, Intervals

if TYPE_CHECKING:
    from pandas import DataFrame

Cells = Mapping[tuple[str, str], Mapping[str, Any]]
"""(model, arm) -> the body of the cell."""

TABLES = {
    "claims": "what the study says about each claim of the paper, those about speed apart",
    "speed_claims": "the same for the claims about speed",
    "checks": "the null arm: the largest difference from the reference in every measure",
    "summary": "one number per measure, model and arm: logits of the arm against the reference",
    "curves": "the same measures at every temperature",
    "sensitivity": "how much more an arm departs in the band, and where it departs the most",
    "generation": "measures of the generated texts at every temperature",
    "survival": "share of texts that still equal the reference's, by position",
    "weights": "memory and error of the quantized layers",
    "layers": "the same for every layer",
    "speed": "tokens per second of prefill and decode",
    "speed_rounds": "every single timing",
    "texts": "per text and temperature: the measures behind summary and curves",
    "samples": "every generated text with its measures",
}
"""Every table and what stands in it. Those named `speed...` differ from run to run."""

UNTIMED = ("speed", "speed_rounds")
"""Tables that are not there when speed was not measured."""

CURVES = ("kl", "kl_reverse", "tv", "disagreement", "entropy_shift", "delta_p", "rms_delta_p")
"""Measures of `curves`."""

GENERATION = (
    "equal",
    "first_divergence",
    "nll_reference",
    "rep_1",
    "rep_2",
    "rep_3",
    "rep_4",
    "distinct_2",
    "distinct_3",
    "zlib_ratio",
    "tokens",
    "eos",
)
"""Measures of `generation`."""

CHECKS = ("model", "arm", "measure", "largest_difference", "exactly_zero")
"""Columns of `checks`."""

SOURCES = ("all", "own", "held")
"""Texts on which logits are compared: all, the reference's own samples, the passages."""


def make_tables(design: Design, cells: Cells) -> dict[str, DataFrame]:
    """All tables of `TABLES`, in its order; those of speed only when it was measured."""
    import pandas as pd

    from .claims import make_claims

    intervals = Intervals(design.confidence, design.bootstrap_draws, design.bootstrap_seed)
    samples = list(_samples(design, cells))
    tables: dict[str, Any] = {
        "texts": list(_texts(design, cells)),
        "samples": samples,
        "layers": list(_layers(design, cells)),
        "weights": list(_weights(design, cells)),
    }
    summary, curves, sensitivity = _logit_tables(design, cells, intervals)
    tables |= {"summary": summary, "curves": curves, "sensitivity": sensitivity}
    tables["generation"] = _generation(design, samples, intervals)
    tables["survival"] = _survival(design, samples, intervals)
    tables["checks"] = _checks(design, cells, samples)
    if design.speed is not None:
        tables["speed_rounds"] = list(_speed_rounds(design, cells))
        tables["speed"] = _speed(design, tables["speed_rounds"], intervals)
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    if not tables["checks"]:  # without a null arm
        frames["checks"] = pd.DataFrame(columns=CHECKS)
    frames |= make_claims(design, cells, frames, intervals)
    return {name: frames[name] for name in TABLES if name in frames}


def write_tables(folder: Path, tables: Mapping[str, DataFrame]) -> None:
    """Each table as CSV (UTF-8, shortest exact decimals) and as Parquet. The same tables give the
    same bytes."""
    for name, frame in tables.items():
        write_bytes(
            folder / f"{name}.csv",
            frame.to_csv(index=False, lineterminator="\n").encode("utf-8", "surrogateescape"),
        )
        write_bytes(folder / f"{name}.parquet", frame.to_parquet(index=False))


def read_table(path: Path) -> DataFrame:
    """A table from its Parquet file."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow has errors of its own
        raise QllmFileError(
            f"{path} cannot be read ({error}); run the study again to make it anew"
        ) from None


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _texts(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    for model in design.models:
        for arm in design.others:
            for text in cells[model, arm.name]["texts"]:
                curves = _columns(text)
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
                        "ln_ppl_ratio": text["ln_ppl_ratio"],
                        "temperature": temperature,
                        **{name: float(values[place]) for name, values in curves.items()},
                    }


def _columns(text: Mapping[str, Any]) -> dict[str, Floats]:
    """The curves of a text by measure; squares stay squares until they are meaned."""
    curves = {name: np.asarray(values, np.float64) for name, values in text["curves"].items()}
    shift = curves["entropy_test"] - curves["entropy_ref"]
    return {**curves, "entropy_shift": shift}


def _clusters(
    texts: Sequence[Mapping[str, Any]], source: str, values: Callable[[Mapping[str, Any]], Floats]
) -> Floats:
    """`values` of each text, meaned over the texts of a cluster by their tokens: (clusters, ...).
    A cluster is a prompt with all its seeds, or a passage."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for text in texts:
        if source in ("all", text["source"]):
            groups.setdefault((text["source"], text["id"]), []).append(text)
    rows = [
        np.average(
            [values(text) for text in group], axis=0, weights=[text["tokens"] for text in group]
        )
        for group in groups.values()
    ]
    return np.asarray(rows, np.float64)


def logit_clusters(texts: Sequence[Mapping[str, Any]], source: str, measure: str) -> Floats:
    """A measure of a cell's texts by cluster: (clusters, temperatures), or (clusters) for
    ln_ppl_ratio and same_top. `rms_delta_p` comes as mean squares."""
    if measure in ("ln_ppl_ratio", "same_top"):
        return _clusters(texts, source, lambda text: np.asarray(text[measure], np.float64))
    name = "delta_p_squared" if measure == "rms_delta_p" else measure
    return _clusters(texts, source, lambda text: _columns(text)[name])


def _row(
    keys: Mapping[str, Any], measure: str, found: Sequence[Any], clusters: int
) -> dict[str, Any]:
    """A row of a long table; mean squares become their root, which keeps the interval right."""
    numbers = [float(number) for number in found]
    if measure.startswith("rms_"):
        numbers = [math.sqrt(number) if number >= 0 else number for number in numbers]
    return {
        **keys,
        "measure": measure,
        "estimate": numbers[0],
        "low": numbers[1],
        "high": numbers[2],
        "clusters": clusters,
    }


def _logit_tables(
    design: Design, cells: Cells, intervals: Intervals
) -> tuple[list[Any], list[Any], list[Any]]:
    summary: list[Any] = []
    curves: list[Any] = []
    sensitivity: list[Any] = []
    for model in design.models:
        for arm in design.others:
            texts = cells[model, arm.name]["texts"]
            for source in SOURCES:
                if source not in ("all", *(text["source"] for text in texts)):
                    continue
                keys = {"model": model, "arm": arm.name, "source": source}
                found = {name: logit_clusters(texts, source, name) for name in CURVES}
                curves += _curve_rows(keys, design, found, intervals)
                summary += _summary_rows(keys, design, texts, found, intervals)
                sensitivity += _sensitivity_rows(keys, design, found, intervals)
    return summary, curves, sensitivity


def _curve_rows(
    keys: Mapping[str, Any], design: Design, found: Mapping[str, Floats], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    means = intervals.mean(np.stack([found[name] for name in CURVES], axis=1))
    clusters = len(found[CURVES[0]])
    for number, name in enumerate(CURVES):
        for place, temperature in enumerate(design.logit_temperatures):
            at = [part[number, place] for part in means]
            yield _row({**keys, "temperature": temperature}, name, at, clusters)


def _summary_rows(
    keys: Mapping[str, Any],
    design: Design,
    texts: Sequence[Mapping[str, Any]],
    found: Mapping[str, Floats],
    intervals: Intervals,
) -> Iterator[dict[str, Any]]:
    """Means over the whole grid of temperatures, and the measures that know no temperature."""
    columns = {
        name: logit_clusters(texts, keys["source"], name) for name in ("ln_ppl_ratio", "same_top")
    }
    columns |= {f"{name}_mean": found[name].mean(axis=1) for name in ("kl", "tv", "disagreement")}
    grid = np.asarray(design.logit_temperatures)
    one = np.flatnonzero(np.abs(grid - 1) < 1e-9)
    if len(one):
        columns |= {f"{name}_at_1": found[name][:, one[0]] for name in CURVES}
    means = intervals.mean(np.stack(list(columns.values()), axis=1))
    for number, name in enumerate(columns):
        yield _row(keys, name, [part[number] for part in means], len(columns[name]))


def _sensitivity_rows(
    keys: Mapping[str, Any], design: Design, found: Mapping[str, Floats], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    grid = np.asarray(design.logit_temperatures)
    for name in ("kl", "tv", "disagreement"):
        values = contrast(grid, found[name], design.band, design.surroundings)
        yield _row({**keys, "kind": "contrast"}, name, intervals.mean(values), len(values))
        at = tuple(part[0] for part in intervals.of(found[name], peak_of(grid), smooth=False))
        if not found[name].any():
            at = (math.nan, math.nan, math.nan)  # the curve of zeros has no peak
        yield _row({**keys, "kind": "peak"}, name, at, len(values))


def _samples(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    kinds = {prompt.id: prompt.kind for prompt in design.prompts}
    for model in design.models:
        plain = {_place(row): row for row in _main(design, cells[model, design.reference.name])}
        for arm in design.arms:
            for row in _main(design, cells[model, arm.name]):
                ids, other = row["ids"], plain[_place(row)]["ids"]
                place = first_divergence(other, ids)
                yield {
                    "model": model,
                    "arm": arm.name,
                    "temperature": row["temperature"],
                    "prompt": row["prompt"],
                    "kind": kinds[row["prompt"]],
                    "seed": row["seed"],
                    "tokens": len(ids),
                    "eos": row["finish"] == "eos",
                    "equal": place is None,
                    # texts that never part count as if they did after their last token
                    "first_divergence": len(ids) if place is None else place,
                    "nll_reference": _nan(row["nll_reference"]),
                    **{f"rep_{n}": rep_n(ids, n) for n in (1, 2, 3, 4)},
                    "zlib_ratio": zlib_ratio(row["text"]),
                    "ids": " ".join(map(str, ids)),
                    "text": row["text"],
                }


def _main(design: Design, cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The generations of a cell with the main top_k."""
    return [row for row in cell["generations"] if row["top_k"] == design.top_k[0]]


def _place(row: Mapping[str, Any]) -> tuple[float, int, str]:
    return row["temperature"], row["seed"], row["prompt"]


def sample_clusters(
    design: Design, samples: Sequence[Mapping[str, Any]], model: str, arm: str
) -> dict[str, Floats]:
    """Measures of the generated texts by prompt: (prompts, temperatures) each, means over seeds.
    NaN where no text of a prompt has the measure."""
    shape = (len(design.prompts), len(design.temperatures))
    found = {name: np.full(shape, np.nan) for name in GENERATION}
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in samples:
        if row["model"] == model and row["arm"] == arm:
            groups.setdefault((row["prompt"], row["temperature"]), []).append(row)
    for line, prompt in enumerate(design.prompts):
        for column, temperature in enumerate(design.temperatures):
            rows = groups[prompt.id, temperature]
            for name in GENERATION:
                if name.startswith("distinct_"):
                    ids = [[int(token) for token in row["ids"].split()] for row in rows]
                    found[name][line, column] = distinct_n(ids, int(name[-1]))
                    continue
                values = [float(row[name]) for row in rows if not math.isnan(row[name])]
                if values:
                    found[name][line, column] = np.mean(values)
    return found


def _generation(
    design: Design, samples: Sequence[Mapping[str, Any]], intervals: Intervals
) -> list[dict[str, Any]]:
    rows = []
    for model in design.models:
        for arm in design.arms:
            found = sample_clusters(design, samples, model, arm.name)
            values = np.stack([found[name] for name in GENERATION], axis=1)
            means, counts = intervals.mean(values), (~np.isnan(values)).sum(axis=0)
            for line, name in enumerate(GENERATION):
                for column, temperature in enumerate(design.temperatures):
                    keys = {"model": model, "arm": arm.name, "temperature": temperature}
                    at = [part[line, column] for part in means]
                    rows.append(_row(keys, name, at, int(counts[line, column])))
    return rows


def _survival(
    design: Design, samples: Sequence[Mapping[str, Any]], intervals: Intervals
) -> list[dict[str, Any]]:
    """At position t (tokens written): the share of texts equal to the reference's up to there."""
    positions = np.arange(design.max_new_tokens + 1)
    parted: dict[tuple[str, str, float, str], list[float]] = {}
    for row in samples:
        key = (row["model"], row["arm"], row["temperature"], row["prompt"])
        parted.setdefault(key, []).append(math.inf if row["equal"] else row["first_divergence"])
    rows = []
    for model in design.models:
        for arm in design.others:
            for temperature in design.temperatures:
                shares = np.stack(
                    [
                        (
                            np.asarray(parted[model, arm.name, temperature, prompt.id])[:, None]
                            >= positions
                        ).mean(axis=0)
                        for prompt in design.prompts
                    ]
                )
                means = intervals.mean(shares)
                keys = {"model": model, "arm": arm.name, "temperature": temperature}
                for place in positions:
                    row = _row(
                        {**keys, "position": int(place)},
                        "equal",
                        [part[place] for part in means],
                        len(shares),
                    )
                    rows.append(row)
    return rows


def _layers(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    for model in design.models:
        for arm in design.arms:
            for layer in cells[model, arm.name]["weights"]:
                yield {
                    "model": model,
                    "arm": arm.name,
                    "module": layer["module"],
                    "format": layer["format"],
                    "shape": "x".join(map(str, layer["shape"])),
                    "bytes": layer["bytes"],
                    "bits_per_weight": layer["bits_per_weight"],
                    "rmse": _nan(layer["rmse"]),
                    "sqnr_db": _nan(layer["sqnr_db"]),
                }


def _weights(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The layers that the arms swap, together: what they hold and how far they are from the
    original. Layers that keep their format everywhere (the output embedding) are counted apart."""
    for model in design.models:
        names = _swapped(design, cells, model)
        for arm in design.arms:
            layers = cells[model, arm.name]["weights"]
            swapped = [layer for layer in layers if layer["module"] in names]
            weights = sum(math.prod(layer["shape"]) for layer in swapped)
            held = sum(layer["bytes"] for layer in swapped)
            yield {
                "model": model,
                "arm": arm.name,
                "format": arm.format,
                "layers": len(swapped),
                "weights": weights,
                "bytes": held,
                "bits_per_weight": 8 * held / weights if weights else math.nan,
                "other_layers_bytes": sum(layer["bytes"] for layer in layers) - held,
                "sqnr_db": _sqnr(swapped),
            }


def _swapped(design: Design, cells: Cells, model: str) -> set[str]:
    """Names of the layers whose format differs between arms; all layers when none does."""
    formats: dict[str, set[str]] = {}
    for arm in design.arms:
        for layer in cells[model, arm.name]["weights"]:
            formats.setdefault(layer["module"], set()).add(layer["format"])
    return {name for name, found in formats.items() if len(found) > 1} or set(formats)


def _sqnr(layers: Sequence[Mapping[str, Any]]) -> float:
    """Signal to noise over several layers, dB; infinite without noise."""
    noise = signal = 0.0
    for layer in layers:
        if layer["rmse"] and layer["sqnr_db"] is not None:
            error = math.prod(layer["shape"]) * layer["rmse"] ** 2
            noise += error
            signal += error * 10 ** (layer["sqnr_db"] / 10)
    return 10 * math.log10(signal / noise) if noise else math.inf


def _checks(
    design: Design, cells: Cells, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each null arm and measure, the largest absolute difference from the reference."""
    plain = {
        (row["model"], *_place(row)): row for row in samples if row["arm"] == design.reference.name
    }
    rows = []
    for model in design.models:
        for arm in design.arms:
            if arm.role != "null":
                continue
            largest = _null_logits(cells[model, arm.name]["texts"])
            mine = [row for row in samples if (row["model"], row["arm"]) == (model, arm.name)]
            pairs = [(row, plain[(model, *_place(row))]) for row in mine]
            largest["texts that differ"] = float(sum(a["ids"] != b["ids"] for a, b in pairs))
            for name in ("nll_reference", "rep_4", "zlib_ratio", "tokens"):
                largest[name] = max((_gap(a[name], b[name]) for a, b in pairs), default=math.nan)
            rows += [
                {
                    "model": model,
                    "arm": arm.name,
                    "measure": name,
                    "largest_difference": value,
                    "exactly_zero": value == 0,
                }
                for name, value in largest.items()
            ]
    return rows


def _null_logits(texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    largest = {}
    for name in CURVES:
        values = [np.abs(logit_clusters([text], "all", name)).max() for text in texts]
        largest[name] = float(max(values))
    largest["1 - same_top"] = max(1 - text["same_top"] for text in texts)
    largest["ln_ppl_ratio"] = max(abs(text["ln_ppl_ratio"]) for text in texts)
    return largest


def _gap(one: float, two: float) -> float:
    """|one - two|; two that are both not there (NaN) are equal."""
    return 0.0 if math.isnan(one) and math.isnan(two) else abs(one - two)


def _speed_rounds(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    speed = design.speed
    assert speed is not None
    for model in design.models:
        for row in cells[model, SPEED]["rounds"]:
            yield {
                "model": model,
                "arm": row["arm"],
                "round": row["round"],
                "prefill": speed.prompt_tokens / row["prefill_seconds"],
                "decode": speed.decode_tokens / row["decode_seconds"],
            }


def _speed(
    design: Design, rounds: Sequence[Mapping[str, Any]], intervals: Intervals
) -> list[dict[str, Any]]:
    """Tokens per second, and the ratio to the reference in the same round: medians over the rounds,
    that of the ratio with its interval."""
    rows = []
    for model in design.models:
        for phase in ("prefill", "decode"):
            found = speeds(design, rounds, model, phase)
            plain = found[design.reference.name]
            for arm, values in found.items():
                ratio = intervals.median(values / plain)
                rows.append(
                    {
                        "model": model,
                        "arm": arm,
                        "phase": phase,
                        "tokens_per_second": float(np.median(values)),
                        "p10": float(np.quantile(values, 0.1)),
                        "p90": float(np.quantile(values, 0.9)),
                        "ratio": ratio.estimate,
                        "low": ratio.low,
                        "high": ratio.high,
                        "rounds": len(values),
                    }
                )
    return rows


def speeds(
    design: Design, rounds: Sequence[Mapping[str, Any]], model: str, phase: str
) -> dict[str, Floats]:
    """Tokens per second of each arm, by round."""
    return {
        arm.name: np.asarray(
            [row[phase] for row in rounds if row["model"] == model and row["arm"] == arm.name]
        )
        for arm in design.timed
    }
