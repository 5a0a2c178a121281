"""Pictures of what the formats do to next-token distributions: no sampling in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from .design import Arm, Design
from .figure_style import (
    SOFT,
    Look,
    legend,
    looks,
    marker_handle,
    note_band,
    percents,
    panels,
    ribbon,
    shade,
    styled,
)
from .lookup import compared, label, nearest, ordinary, preferred, rows, source_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

DISTANCES = {
    "kl": "KL divergence, nats",
    "tv": "total variation",
    "disagreement": "1 \N{MINUS SIGN} agreement",
}


def _faint(arm: Arm, look: Look) -> dict[str, Any]:
    """Control and ceiling stand behind the arms that the study is about."""
    return {} if arm.role == "arm" else {"shade": 0.0, "linewidth": 1.2, "alpha": 0.75, "zorder": 2}


@styled
def plot_divergence(study: Study, narrow: bool = False) -> Figure:
    """KL, total variation and 1 - agreement against temperature, a line of panels per model; the
    dot on each curve is its peak. A null arm that is 0 has no place on a logarithmic axis."""
    design, curves = study.design, study.tables["curves"]
    arms, known, source = compared(design), looks(design), source_of(curves)
    figure, grid = panels(
        [*map(label, design.models)], [*DISTANCES.values()], narrow=narrow, x="temperature"
    )
    for model, line in zip(design.models, grid):
        for measure, axes in zip(DISTANCES, line):
            shade(axes, design)
            for arm in [*arms, *(arm for arm in design.others if arm.role == "null")]:
                frame = rows(curves, model=model, arm=arm.name, measure=measure, source=source)
                if not (frame["estimate"] > 0).any():
                    continue
                ribbon(axes, known[arm.name], frame, "temperature", **_faint(arm, known[arm.name]))
                if arm.role == "arm":
                    _peak_dot(axes, frame, known[arm.name].colour)
            axes.set_yscale("log")
            axes.set_xlim(0, max(design.logit_temperatures))
            axes.yaxis.set_minor_locator(NullLocator())
            if measure != "kl":  # these span little more than a decade
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    note_band(grid[0][0], design, "bottom")
    legend(figure, design, arms, narrow)
    return figure


def _peak_dot(axes: Axes, frame: DataFrame, colour: str) -> None:
    top = frame.loc[frame["estimate"].idxmax()]
    axes.plot(
        top["temperature"],
        top["estimate"],
        "o",
        color=colour,
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=6,
    )


@styled
def plot_tenths(study: Study, narrow: bool = False) -> Figure:
    """1 - agreement by how sure the reference was of its first choice, at three temperatures; grey
    bars are the share of the tokens, the full height being all."""
    design, table = study.design, rows(study.tables["tenths"], measure="disagreement")
    arms, known = ordinary(design), looks(design)
    chosen = nearest(table["temperature"].unique(), (0.5, 0.8, 1.0))
    figure, grid = panels(
        [*map(label, design.models)],
        [f"temperature {value:g}" for value in chosen],
        narrow=narrow,
        x="probability of the reference's first choice",
        share_y="all",
    )
    for model, line in zip(design.models, grid):
        for temperature, axes in zip(chosen, line):
            part = rows(table, model=model, temperature=temperature)
            for arm in arms:
                frame = rows(part, arm=arm.name).sort_values("tenth")
                frame = frame.assign(middle=(frame["tenth"] + 0.5) / 10).dropna(subset=["estimate"])
                if arm is arms[0]:
                    _token_bars(axes, frame)
                ribbon(axes, known[arm.name], frame, "middle", marker="o", markersize=3)
            axes.set_xlim(0, 1)
            axes.yaxis.set_major_formatter(percents())
            axes.xaxis.set_major_locator(MaxNLocator(5))
    part = table[
        table["arm"].isin([arm.name for arm in arms]) & table["temperature"].isin(chosen)
    ]
    top = float(np.nanmax(part[["estimate", "high"]].to_numpy(np.float64)))
    grid[0][0].set_ylim(0, 1.05 * top or 1.0)
    bars = marker_handle("s", "share of tokens", color="#dcdcdc", markersize=8)
    legend(figure, design, arms, narrow, [bars])
    return figure


def _token_bars(axes: Axes, frame: DataFrame) -> None:
    """Bars behind the curves, in shares of the axes' height."""
    share = frame["tokens"] / frame["tokens"].sum()
    axes.bar(
        frame["middle"],
        share,
        width=0.09,
        color="#e6e6e6",
        zorder=0.5,
        transform=axes.get_xaxis_transform(),
    )


@styled
def plot_effective_temperature(study: Study, narrow: bool = False) -> Figure:
    """How much hotter (above 0) or colder (below) the reference would have to run to be most like
    the arm."""
    design, table = study.design, study.tables["effective_temperature"]
    arms, known, source = compared(design), looks(design), source_of(table)
    figure, grid = panels(
        ["tau \N{MINUS SIGN} T"],
        [*map(label, design.models)],
        narrow=narrow,
        x="temperature T of the arm",
        height=2.3,
        share_y="all",
    )
    for model, axes in zip(design.models, grid[0]):
        shade(axes, design)
        axes.axhline(0, color=SOFT, linewidth=1, zorder=1)
        for arm in arms:
            frame = rows(table, model=model, arm=arm.name, source=source).dropna(
                subset=["estimate"]
            )
            ribbon(axes, known[arm.name], frame, "temperature", **_faint(arm, known[arm.name]))
        axes.set_xlim(0, max(design.logit_temperatures))
    _limit_to_arms(grid[0], table, [arm.name for arm in ordinary(design)], source)
    grid[0][0].set_ylabel("\N{GREEK SMALL LETTER TAU} \N{MINUS SIGN} T", fontweight="bold")
    grid[0][0].xaxis.set_major_locator(MaxNLocator(5))
    note_band(grid[0][0], design, "top")
    legend(figure, design, arms, narrow)
    return figure


def _limit_to_arms(line: list[Axes], table: DataFrame, arms: list[str], source: str) -> None:
    """y limits that hold the curves of the arms; a control may leave the picture."""
    part = table[table["arm"].isin(arms) & (table["source"] == source)]
    found = part[["low", "high", "estimate"]].to_numpy(np.float64)
    if np.isfinite(found).any():
        low, high = min(0.0, np.nanmin(found)), max(0.0, np.nanmax(found))
        pad = 0.08 * (high - low) or 0.01
        line[0].set_ylim(low - pad, high + pad)


SLOPES = {
    "disagreement": "1 \N{MINUS SIGN} agreement",
    "nll_reference": "surprise, nats",
    "rep_4": "repetition (rep-4)",
    "distinct_2": "diversity (distinct-2)",
}
"""Measures of the slopes that are drawn, where the table has them."""


@styled
def plot_slopes(study: Study, narrow: bool = False) -> Figure:
    """Full dots: the interaction, how much more an arm's curve steepens in the band than the
    reference's. Open dots: how much more each curve steepens there at all (B)."""
    design, table = study.design, study.tables["slopes"]
    table = table[table["kind"].isin(("B", "interaction"))]
    known = looks(design)
    measures = preferred(table, "measure", SLOPES, 3)
    arms = [arm for arm in design.arms if arm.name in set(table["arm"])]
    figure, grid = panels(
        [*map(label, design.models)],
        [SLOPES[name] for name in measures],
        narrow=narrow,
        x="slope in the band minus around it",
        height=0.27 * len(arms) + 0.1,
        names=[arm.name for arm in arms],
        share_x="column",
        share_y="all",
    )
    places = np.arange(len(arms))[::-1]
    for model, line in zip(design.models, grid):
        for measure, axes in zip(measures, line):
            axes.axvline(0, color=SOFT, linewidth=1, zorder=1)
            for place, arm in zip(places, arms):
                part = rows(table, model=model, arm=arm.name, measure=measure)
                for kind, shift, full in (("B", 0.16, False), ("interaction", -0.16, True)):
                    for _, row in rows(part, kind=kind).iterrows():
                        dot_and_bar(axes, row, place + shift, known[arm.name].colour, full)
            axes.set_yticks(places, [arm.name for arm in arms])
            axes.set_ylim(-0.7, len(arms) - 0.3)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
    legend(
        figure,
        design,
        [],
        narrow,
        [
            marker_handle("o", "interaction with the reference"),
            marker_handle("o", "the arm's own curve (B)", markerfacecolor="white"),
        ],
    )
    return figure


def dot_and_bar(axes: Axes, row: Any, place: float, colour: str, full: bool = True) -> None:
    """An estimate with its interval, lying."""
    axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.2, alpha=0.45)
    axes.plot(
        row["estimate"],
        place,
        "o",
        color=colour,
        markersize=5.5,
        markerfacecolor=colour if full else "white",
        zorder=4,
    )


DIFFERENCES = {
    "nll_reference": "surprise, nats",
    "rep_4": "repetition (rep-4)",
    "distinct_2": "diversity (distinct-2)",
}
"""Measures of the heat map, where the table has them."""


@styled
def plot_differences(study: Study, narrow: bool = False) -> Figure:
    """Arm by temperature: the paired difference from the reference as a colour, a dot where its
    interval excludes 0."""
    design, table = study.design, study.tables["differences"]
    measures = preferred(table, "measure", DIFFERENCES, 3)
    arms = [arm for arm in design.others if arm.name in set(table["arm"])]
    temperatures = sorted(table["temperature"].unique())
    figure, grid = panels(
        [*map(label, design.models)],
        [DIFFERENCES[name] for name in measures],
        narrow=narrow,
        x="temperature",
        height=0.25 * len(arms),
        names=[arm.name for arm in arms],
        under=0.42,
        share_y="all",
    )
    for place, measure in enumerate(measures):
        most = float(np.nanmax(np.abs(rows(table, measure=measure)["estimate"]))) or 1.0
        image = None
        for model, line in zip(design.models, grid):
            part = rows(table, model=model, measure=measure)
            image = _heat(line[place], part, arms, temperatures, most)
        if image is not None:
            _scale_under(figure, grid[-1][place], image, 0.25 * len(arms))
    legend(
        figure, design, [], narrow, [marker_handle("o", "interval excludes 0", color="#111111")]
    )
    return figure


def _scale_under(figure: Figure, axes: Axes, image: Any, height: float) -> None:
    """The scale of colours, below a panel that is `height` inches high."""
    place = axes.inset_axes((0.04, -0.66 / height, 0.92, 0.11 / height))
    scale = figure.colorbar(image, cax=place, orientation="horizontal")
    scale.ax.tick_params(labelsize=8.5, length=2)
    scale.ax.xaxis.set_major_locator(MaxNLocator(5))
    scale.outline.set_visible(False)


def _heat(
    axes: Axes, part: DataFrame, arms: list[Arm], temperatures: list[float], most: float
) -> Any:
    values = np.full((len(arms), len(temperatures)), np.nan)
    for line, arm in enumerate(arms):
        for column, temperature in enumerate(temperatures):
            for _, row in rows(part, arm=arm.name, temperature=temperature).iterrows():
                values[line, column] = row["estimate"]
                if row["low"] > 0 or row["high"] < 0:
                    axes.plot(column, line, "o", color="#111111", markersize=3)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(temperatures)), [f"{value:g}" for value in temperatures])
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.tick_params(axis="both", length=0)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return image


