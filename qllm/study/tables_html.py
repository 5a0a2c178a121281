"""The numbers of a study as tables to sort: the short ones open, the long ones behind a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .lookup import compared, label, missing, one, rows, source_of
from .markup import Value, folded, html_table, value
from .wording import interval

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

SUMMARY = {
    "kl_mean": "KL, mean over T",
    "kl_at_1": "KL at T 1",
    "disagreement_at_1": "1 \u2212 A at T 1",
    "same_top": "same top",
    "ln_ppl_ratio": "ln PPL ratio",
    "rms_delta_p_at_1": "RMS \u0394p",
}
"""Measures of the summary that are shown, and what they are called."""

MOST_ROWS = 600
"""Rows of a long table that the page holds; the files have all."""


def tables_html(study: Study) -> str:
    """The section."""
    parts = ["<h2>Tables</h2>", _summary(study), _sensitivity(study), _weights(study)]
    parts += [part for part in (_memory(study), _speed(study), _endpoints(study)) if part]
    parts += [
        folded(title, _long(study.tables[name], title))
        for name, title in LONG.items()
        if missing(study, {name: ("estimate",)}) is None
    ]
    return "".join(parts)


def _summary(study: Study) -> str:
    summary, lines = study.tables["summary"], []
    source = source_of(summary)
    names = {name: text for name, text in SUMMARY.items() if name in set(summary["measure"])}
    for model in study.design.models:
        for arm in study.design.others:
            found = [
                one(summary, model=model, arm=arm.name, source=source, measure=name)
                for name in names
            ]
            cells = [_or_dash(row, 3) for row in found]
            lines.append([label(model), arm.name, *cells])
    return html_table(
        f"Logits against {study.design.reference.name}, with intervals over prompts and passages",
        ["model", "arm", *names.values()],
        lines,
    )


def _or_dash(row: Any, digits: int) -> Value:
    return Value("\u2013", math.nan) if row is None else value(row, digits)


def _sensitivity(study: Study) -> str:
    design, lines = study.design, []
    table = study.tables["sensitivity"]
    chosen = rows(table, source=source_of(table), measure="disagreement")
    for model in design.models:
        for arm in compared(design):
            cells = [one(chosen, model=model, arm=arm.name, kind=kind) for kind in KINDS]
            lines.append([label(model), arm.name, *(_or_dash(row, 2) for row in cells)])
    return html_table(
        "Sensitivity in 1 \u2212 agreement: mean in the band"
        f" {design.band[0]:g} to {design.band[1]:g} minus the rest of {design.surroundings[0]:g} to"
        f" {design.surroundings[1]:g}, and the temperature of the peak",
        ["model", "arm", *KINDS.values()],
        lines,
    )


KINDS = {"contrast": "band contrast", "peak": "peak at"}


def _weights(study: Study) -> str:
    columns = ("layers", "weights", "bytes", "bits_per_weight", "sqnr_db")
    return html_table(
        "Weights of the swapped layers: bits per weight, bytes, signal to quantization noise",
        ["model", "arm", "layers", "weights", "bytes", "bits/weight", "SQNR, dB"],
        [
            [label(row["model"]), row["arm"], *(_plain(row[name]) for name in columns)]
            for row in study.tables["weights"].to_dict("records")
        ],
    )


def _plain(item: Any) -> Any:
    """A value of a data frame as Python's own."""
    return item.item() if hasattr(item, "item") else item


def _memory(study: Study) -> str:
    parts = {
        "weights": "weights",
        "kv": "keys and values",
        "peak_loading": "peak while loading",
        "peak_running": "peak while running",
    }
    if missing(study, {"memory": tuple(parts)}) is not None:
        return ""
    return html_table(
        "Memory of the whole model, bytes",
        ["model", "arm", *parts.values()],
        [
            [label(row["model"]), row["arm"], *(_plain(row[name]) for name in parts)]
            for row in study.tables["memory"].to_dict("records")
        ],
    )


def _speed(study: Study) -> str:
    speed = study.tables.get("speed")
    if speed is None:
        return ""
    more = {"batch": "batch", "percent_of_read": "% of what reading allows"}
    more = {name: text for name, text in more.items() if name in speed.columns}
    lines = [
        [
            label(row["model"]),
            row["arm"],
            row["phase"],
            *(_plain(row[name]) for name in more),
            float(row["tokens_per_second"]),
            Value(_ratio(row), float(row["ratio"])),
        ]
        for row in speed.to_dict("records")
    ]
    return html_table(
        f"Speed on {machine(study)}; median ratio to {study.design.reference.name} in the same"
        " round",
        ["model", "arm", "phase", *more.values(), "tokens/s (median)", "ratio"],
        lines,
    )


def _ratio(row: Any) -> str:
    return f"{row['ratio']:.3g} {interval(row)}".rstrip()


def machine(study: Study) -> str:
    """Processor, instruction set and kernels on which speed was taken."""
    found = study.manifest.get("environments", {})
    speeds = [entry for key, entry in found.items() if key.endswith(" speed")] or [*found.values()]
    names = {
        f"{entry.get('cpu')}, {entry.get('isa')}, {entry.get('threads', 'all')} thread(s)"
        for entry in speeds
    }
    return "; ".join(sorted(names)) or "an unknown machine"


def _endpoints(study: Study) -> str:
    claims = study.claims
    tested = claims[claims["estimate"].notna()]
    more = {"p": "p", "p_holm": "p (Holm)", "prompts": "prompts"}
    more = {name: text for name, text in more.items() if name in tested.columns}
    lines = [
        [
            row["claim"],
            label(row["model"]),
            row["comparison"],
            row["endpoint"],
            value(row),
            float(row["margin"]),
            *(float(row[name]) for name in more),
            row["verdict"],
        ]
        for row in tested.to_dict("records")
    ]
    head = ["claim", "model", "comparison", "endpoint", "estimate", "margin", *more.values()]
    table = html_table("Every endpoint behind the verdicts", [*head, "verdict"], lines)
    return folded(f"All {len(lines)} endpoints", table)


LONG = {
    "slopes": "Slopes, interactions and distances of curves",
    "effective_temperature": "Effective temperature minus temperature",
    "differences": "Texts: paired differences from the reference at every temperature",
    "knobs": "The same by top_k and by length",
}
"""Long tables that the page holds, and their titles."""


def _long(frame: DataFrame, title: str) -> str:
    """A table in long form as it stands, estimate and interval in one column."""
    keys = [name for name in frame.columns if name not in ("estimate", "low", "high")]
    shown = frame.iloc[:MOST_ROWS]
    lines: list[Sequence[object]] = [
        [
            *(label(row[name]) if name == "model" else _plain(row[name]) for name in keys),
            value(row),
        ]
        for row in shown.to_dict("records")
    ]
    cut = "" if len(shown) == len(frame) else f" (the first {MOST_ROWS} of {len(frame)} rows)"
    heads = [name.replace("_", " ") for name in keys]
    return html_table(f"{title}{cut}", [*heads, "estimate"], lines)
