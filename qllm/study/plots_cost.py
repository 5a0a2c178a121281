"""The picture of what a format costs: bytes and speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .figure_style import SOFT, legend, looks, marker_handle, panels, styled
from .lookup import label, one, rows

if TYPE_CHECKING:
    from .result import Study


READING: Any = {"color": SOFT, "linewidth": 1.2, "linestyle": (0, (5, 2))}


def decoding(study: Study, model: str, batch: int) -> Iterator[tuple[str, float, Any]]:
    """(arm, bytes that it reads for a step, row of `speed`) for the decoding of a batch."""
    speed = study.tables["speed"]
    for arm in study.design.arms:
        row = one(speed, model=model, arm=arm.name, phase="decode", batch=batch)
        if row is not None:
            yield arm.name, float(row["bytes_per_token"]), row


def bandwidth(study: Study, model: str) -> float:
    """Bytes per second that the machine reads, as the table `speed` implies them; NaN without."""
    found = [
        float(row["tokens_per_second"]) * held / (float(row["percent_of_read"]) / 100)
        for _, held, row in decoding(study, model, 1)
        if row["percent_of_read"] > 0
    ]
    return float(np.median(found)) if found else math.nan


@styled
def plot_cost(study: Study, narrow: bool = False) -> Figure:
    """Tokens per second of decoding against the bytes read for a token, both axes logarithmic. The
    line is what the machine's memory would allow if a token cost nothing but reading its weights
    once; bars go from the 10th to the 90th percentile of the timings."""
    design, known = study.design, looks(study.design)
    batches = sorted(rows(study.tables["speed"], phase="decode")["batch"].unique())
    figure, grid = panels(
        ["tokens/s, decoding"],
        [*map(label, design.models)],
        narrow=narrow,
        x="MB read for a token",
        height=2.7,
        names=["100,000"],
        share_x="column",
    )
    for model, axes in zip(design.models, grid[0]):
        for batch in batches:
            for arm, held, row in decoding(study, model, batch):
                first = batch == batches[0]
                colour = known[arm].colour
                axes.plot([held / 1e6] * 2, [row["p10"], row["p90"]], color=colour, alpha=0.4)
                axes.plot(
                    held / 1e6,
                    row["tokens_per_second"],
                    "o" if first else "s",
                    color=colour,
                    markersize=7,
                    markerfacecolor=colour if first else "white",
                    zorder=4,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _line_of_reading(axes, bandwidth(study, model))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.set_minor_locator(NullLocator())
    grid[0][0].set_ylabel("tokens/s, decoding", fontweight="bold")
    extra = [
        marker_handle(
            "o" if batch == batches[0] else "s",
            f"batch {batch}",
            markerfacecolor=SOFT if batch == batches[0] else "white",
        )
        for batch in batches
    ]
    if not all(math.isnan(bandwidth(study, model)) for model in design.models):
        extra.append(Line2D([], [], label="limit of reading", **READING))
    arms = [arm for arm in design.arms if arm.name in set(study.tables["speed"]["arm"])]
    legend(figure, design, arms, narrow, extra)
    return figure


def _line_of_reading(axes: Axes, per_second: float) -> None:
    if math.isnan(per_second):
        return
    left, right = axes.get_xlim()
    held = np.geomspace(left, right, 16)
    axes.plot(held, per_second / (held * 1e6), **READING)
    axes.set_xlim(left, right)
