"""Tables on what an arm costs: bytes, error of the weights, memory, speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .cells import SPEED
from .design import Design
from .long_form import Cells, nan
from .statistics import Floats, Intervals

MEMORY = ("weights", "kv", "peak_loading", "peak_running")
"""Columns of `memory`, bytes."""

Phase = tuple[str, int]
"""What is timed: ("prefill", 1), or ("decode", sequences in the batch)."""


def layer_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `layers`."""
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
                    "rmse": nan(layer["rmse"]),
                    "sqnr_db": nan(layer["sqnr_db"]),
                }


def weight_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `weights`: the layers that the arms swap, together: what they hold and how far they
    are from the original. Layers that keep their format everywhere (the output embedding) are
    counted apart."""
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


def memory_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `memory`; NaN where an arm cannot tell."""
    for model in design.models:
        for arm in design.arms:
            held = cells[model, arm.name]["memory"]
            yield {
                "model": model,
                "arm": arm.name,
                **{name: nan(held.get(name)) for name in MEMORY},
            }


# -------------------------------------------------------------------------------------- speed


def speed_round_rows(design: Design, cells: Cells) -> Iterator[dict[str, Any]]:
    """The table `speed_rounds`: tokens per second of every single timing."""
    speed = design.speed
    assert speed is not None
    for model in design.models:
        for found in cells[model, SPEED]["rounds"]:
            seconds: dict[Phase, tuple[int, float]] = {
                ("prefill", 1): (speed.prompt_tokens, found["prefill_seconds"]),
                ("decode", 1): (speed.decode_tokens, found["decode_seconds"]),
            }
            for size, value in found["batch_seconds"].items():
                seconds["decode", int(size)] = (int(size) * speed.decode_tokens, value)
            for (phase, batch), (tokens, value) in seconds.items():
                yield {
                    "model": model,
                    "arm": found["arm"],
                    "round": found["round"],
                    "phase": phase,
                    "batch": batch,
                    "tokens_per_second": tokens / value,
                }


def phases(rounds: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """What was timed, in the order of the rows."""
    return list(dict.fromkeys((found["phase"], found["batch"]) for found in rounds))


def speeds(
    design: Design, rounds: Sequence[Mapping[str, Any]], model: str, phase: Phase
) -> dict[str, Floats]:
    """Tokens per second of each timed arm, by round."""
    found: dict[str, list[float]] = {arm.name: [] for arm in design.timed}
    for timing in rounds:
        if timing["model"] == model and (timing["phase"], timing["batch"]) == phase:
            found[timing["arm"]].append(timing["tokens_per_second"])
    return {arm: np.asarray(values) for arm, values in found.items()}


def speed_rows(
    design: Design, cells: Cells, rounds: Sequence[Mapping[str, Any]], intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """The table `speed`: tokens per second and their ratio to the reference's in the same round,
    medians over the rounds, that of the ratio with its interval; and for decoding the bytes of
    weights that are read per second, in percent of what this machine can read."""
    for model in design.models:
        cell = cells[model, SPEED]
        for phase, batch in phases(rounds):
            found = speeds(design, rounds, model, (phase, batch))
            plain = found[design.reference.name]
            for arm, values in found.items():
                ratio = intervals.median(values / plain)
                middle = float(np.median(values))
                read = cell["bytes_per_token"][arm] * middle / batch
                share = 100 * read / (cell["read_bandwidth"] or math.nan)
                yield {
                    "model": model,
                    "arm": arm,
                    "phase": phase,
                    "batch": batch,
                    "tokens_per_second": middle,
                    "p10": float(np.quantile(values, 0.1)),
                    "p90": float(np.quantile(values, 0.9)),
                    "ratio": ratio.estimate,
                    "low": ratio.low,
                    "high": ratio.high,
                    "rounds": len(values),
                    "bytes_per_token": cell["bytes_per_token"][arm],
                    "percent_of_read": share if phase == "decode" else math.nan,
                }
