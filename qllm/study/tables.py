"""From cells to tables: a function of the cells' bodies alone, in the order of the design.

`tables_logits`, `tables_texts`, `tables_cost` and `tables_checks` make the tables on what their
names say, `verdicts` those on the claims; here they come together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QllmFileError
from .design import Design
from .files import write_bytes
from .long_form import Cells
from .statistics import Intervals

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = {
    "verdicts": "one verdict on each claim and model, and why; those on speed apart",
    "speed_verdicts": "the same for the claims about speed",
    "claims": "every comparison behind the verdicts",
    "speed_claims": "the same for the claims about speed",
    "checks": "the null arms, which must not differ, and the positive control, which must",
    "summary": "one number per measure, model and arm: logits of the arm against the reference",
    "curves": "the same measures at every temperature",
    "sensitivity": "how much more an arm departs in the band, and where it departs the most",
    "tenths": "differences of logits by confidence of the reference (tenths of its largest"
    " probability)",
    "effective_temperature": "at which temperature the reference is most like the arm",
    "generation": "measures of the generated texts at every temperature",
    "differences": "the same, arm minus reference, prompt by prompt",
    "slopes": "how steeply these measures change in the band and around it, and the excess over"
    " the reference",
    "knobs": "arm minus reference for every top_k and length",
    "survival": "share of texts that still equal the reference's, by position",
    "weights": "memory and error of the quantized layers",
    "layers": "the same for every layer",
    "memory": "bytes of weights, of keys and values, and at most",
    "speed": "tokens per second of prefill and decode",
    "speed_rounds": "every single timing",
    "texts": "per text and temperature: the measures behind summary and curves",
    "samples": "every generated text with its measures",
}
"""Every table and what stands in it. Those named `speed...` differ from run to run."""

UNTIMED = ("speed", "speed_rounds")
"""Tables that are not there when speed was not measured."""

_LONG = ("measure", "estimate", "low", "high", "clusters")
_EMPTY = {
    "summary": ("model", "arm", "source", *_LONG),
    "curves": ("model", "arm", "source", "temperature", *_LONG),
    "sensitivity": ("model", "arm", "source", "kind", *_LONG),
    "tenths": ("model", "arm", "tenth", "temperature", *_LONG, "tokens"),
    "effective_temperature": (
        "model", "arm", "source", "temperature", "estimate", "low", "high", "clusters",
    ),
    "layers": ("model", "arm", "module", "format", "shape", "bytes", "bits_per_weight", "rmse",
               "sqnr_db"),
    "texts": ("model", "arm", "source", "text", "kind", "seed", "tokens", "temperature"),
    "samples": ("model", "arm", "temperature", "prompt", "kind", "seed", "tokens", "eos", "equal",
                "first_divergence", "nll_reference", "rep_1", "rep_2", "rep_3", "rep_4",
                "diversity", "loop", "loop_start", "repeated_sentences", "zlib_ratio", "ids",
                "text"),
    "survival": ("model", "arm", "temperature", "position", "at_risk", "estimate", "low", "high",
                 "hazard", "expected_hazard", "clusters"),
}  # fmt: skip
"""Columns of tables that may have no row."""


def make_tables(design: Design, cells: Cells) -> dict[str, DataFrame]:
    """All tables of `TABLES`, in its order; those of speed only when it was measured."""
    import pandas as pd

    from . import tables_cost, tables_logits, tables_texts
    from .tables_checks import CHECKS, check_rows
    from .verdicts import make_claims

    intervals = Intervals(design.confidence, design.bootstrap_draws, design.bootstrap_seed)
    samples = list(tables_texts.sample_rows(design, cells))
    curves = tables_texts.text_curves(design, cells, samples)
    knobs = tables_texts.knob_curves(design, cells)
    rounds: list[dict[str, Any]] = []
    rows: dict[str, Any] = {
        "texts": tables_logits.text_rows(design, cells),
        "samples": samples,
        "layers": tables_cost.layer_rows(design, cells),
        "weights": tables_cost.weight_rows(design, cells),
        "memory": tables_cost.memory_rows(design, cells),
        **tables_logits.logit_tables(design, cells, intervals),
        "generation": tables_texts.generation_rows(design, curves, intervals),
        "differences": tables_texts.difference_rows(design, curves, intervals),
        "slopes": tables_texts.slope_rows(design, curves, intervals),
        "knobs": tables_texts.knob_rows(design, knobs, intervals),
        "survival": tables_texts.survival_rows(design, cells, samples, intervals),
        "checks": check_rows(design, cells, samples, intervals),
    }
    if design.speed is not None:
        rounds = list(tables_cost.speed_round_rows(design, cells))
        rows["speed_rounds"] = rounds
        rows["speed"] = tables_cost.speed_rows(design, cells, rounds, intervals)
    frames = {name: pd.DataFrame(list(found)) for name, found in rows.items()}
    for name, columns in {**_EMPTY, "checks": CHECKS}.items():
        if not len(frames[name]):
            frames[name] = pd.DataFrame(columns=list(columns))
    frames |= make_claims(design, cells, curves, knobs, rounds, intervals)
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
