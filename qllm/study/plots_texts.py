"""Pictures of the generated texts: when they part from the reference's, and what they are like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figure_style import (
    MARKERS,
    SOFT,
    legend,
    looks,
    marker_handle,
    note_band,
    panels,
    percents,
    ribbon,
    shade,
    styled,
)
from .lookup import label, ordinary, preferred, rows, shown_temperatures

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

QUALITIES = {
    "rep_4": "repetition (rep-4)",
    "loop": "texts that loop",
    "nll_reference": "surprise, nats/token",
    "distinct_2": "diversity",
}
"""Measures of `generation` that are drawn, where the table has them."""


@styled
def plot_survival(study: Study, narrow: bool = False) -> Figure:
    """Share of texts that still equal the reference's, against the tokens written, at up to four
    temperatures."""
    design, survival = study.design, study.tables["survival"]
    chosen, arms, known = shown_temperatures(design), ordinary(design), looks(design)
    figure, grid = panels(
        [*map(label, design.models)],
        ["greedy (T = 0)" if value == 0 else f"T = {value:g}" for value in chosen],
        narrow=narrow,
        x="tokens written",
        height=1.75,
        across=2,
        share_y="all",
    )
    for model, line in zip(design.models, grid):
        for temperature, axes in zip(chosen, line):
            for arm in arms:
                frame = rows(survival, model=model, arm=arm.name, temperature=temperature)
                faint = 0.0 if arm.format.endswith("-dq") else 0.1
                ribbon(axes, known[arm.name], frame, "position", stepped=True, shade=faint)
            axes.set_ylim(-0.02, 1.04)
            axes.set_xlim(0, design.max_new_tokens)
            axes.yaxis.set_major_formatter(percents())
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    legend(figure, design, arms, narrow)
    return figure


def hazards(study: Study) -> DataFrame:
    """Per model, arm and temperature, over all positions: `observed`, texts that part per text and
    token still equal, and `expected`, the mean 1 - agreement of the logits where there is one."""
    table = study.tables["survival"].dropna(subset=["hazard"])
    table = table[table["at_risk"] > 0]
    parted, foreseen = table["hazard"] * table["at_risk"], table["expected_hazard"]
    table = table.assign(parted=parted, foreseen=foreseen * table["at_risk"])
    keys = ["model", "arm", "temperature"]
    sums = table.groupby(keys, sort=False)[["parted", "foreseen", "at_risk"]].sum(min_count=1)
    sums = sums.assign(
        observed=sums["parted"] / sums["at_risk"], expected=sums["foreseen"] / sums["at_risk"]
    )
    return sums.reset_index()[[*keys, "observed", "expected"]]


@styled
def plot_hazard(study: Study, narrow: bool = False) -> Figure:
    """How often a text that was still equal parts at its next token, against what the logits alone
    foresee; on the line, both agree. One point per arm and temperature."""
    design, known = study.design, looks(study.design)
    table = hazards(study).dropna(subset=["expected"])
    temperatures = sorted(table["temperature"].unique())
    marks = {value: MARKERS[place % len(MARKERS)] for place, value in enumerate(temperatures)}
    figure, grid = panels(
        ["observed hazard per token"],
        [*map(label, design.models)],
        narrow=narrow,
        x="expected: 1 \N{MINUS SIGN} agreement of the logits",
        height=2.6,
        share_y="all",
    )
    arms = [arm for arm in ordinary(design) if arm.name in set(table["arm"])]
    shown = table[table["arm"].isin([arm.name for arm in arms])]
    most = 1.08 * max(0.01, float(np.nanmax(shown[["observed", "expected"]].to_numpy())))
    for model, axes in zip(design.models, grid[0]):
        axes.plot([0, most], [0, most], color=SOFT, linewidth=1, zorder=1)
        for arm in arms:
            for temperature, mark in marks.items():
                for _, row in rows(
                    table, model=model, arm=arm.name, temperature=temperature
                ).iterrows():
                    axes.plot(
                        row["expected"],
                        row["observed"],
                        mark,
                        color=known[arm.name].colour,
                        markeredgecolor="white",
                        markeredgewidth=0.6,
                        markersize=7,
                    )
        axes.set_xlim(0, most)
        axes.set_ylim(0, most)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(percents())
            axis.set_major_locator(MaxNLocator(5))
    grid[0][0].set_ylabel("observed hazard per token", fontweight="bold")
    extra = [marker_handle(mark, f"T = {value:g}") for value, mark in marks.items()]
    legend(figure, design, arms, narrow, extra)
    return figure


@styled
def plot_generation(study: Study, narrow: bool = False) -> Figure:
    """Repetition, loops, surprise and diversity of the generated texts against temperature."""
    design, generation = study.design, study.tables["generation"]
    arms = [arm for arm in design.arms if arm.role != "null"]
    known, measures = looks(design), preferred(generation, "measure", QUALITIES, 4)
    figure, grid = panels(
        [*map(label, design.models)],
        [QUALITIES[name] for name in measures],
        narrow=narrow,
        x="temperature",
        height=1.75,
        across=2,
    )
    for model, line in zip(design.models, grid):
        for measure, axes in zip(measures, line):
            shade(axes, design)
            for arm in arms:
                frame = rows(generation, model=model, arm=arm.name, measure=measure)
                frame = frame.dropna(subset=["estimate"])
                more = {"zorder": 2.5} if arm.role == "reference" else {}
                if arm.role in ("control", "ceiling"):
                    more = {"shade": 0.0, "alpha": 0.75}
                ribbon(
                    axes, known[arm.name], frame, "temperature", marker="o", markersize=2.8, **more
                )
            if measure == "loop":
                axes.yaxis.set_major_formatter(percents())
                axes.set_ylim(0, None)
    note_band(grid[0][0], design, "top")
    legend(figure, design, arms, narrow)
    return figure


@styled
def plot_frontier(study: Study, narrow: bool = False) -> Figure:
    """Surprise against diversity of the texts, temperature rising along each curve: an arm that is
    only shifted along the reference's curve is not worse, one that leaves it is."""
    design, generation = study.design, study.tables["generation"]
    arms, known = [arm for arm in design.arms if arm.role != "null"], looks(design)
    figure, grid = panels(
        ["surprise of the texts, nats/token"],
        [*map(label, design.models)],
        narrow=narrow,
        x="edit distance between the texts of a prompt",
        height=2.7,
    )
    for model, axes in zip(design.models, grid[0]):
        for arm in arms:
            part = rows(generation, model=model, arm=arm.name)
            across, up = (
                rows(part, measure=name).set_index("temperature")["estimate"].sort_index()
                for name in ("edit_distance", "nll_reference")
            )
            faint = {} if arm.role in ("arm", "reference") else {"alpha": 0.75}
            axes.plot(
                across, up, marker="o", markersize=3.2, **{**known[arm.name].line(), **faint}
            )
            if arm.role == "reference":
                for temperature in across.index:
                    axes.annotate(
                        f"{temperature:g}",
                        (across[temperature], up[temperature]),
                        xytext=(-4, 5),
                        textcoords="offset points",
                        ha="right",
                        fontsize=8.5,
                        color=SOFT,
                    )
    grid[0][0].set_ylabel("surprise of the texts, nats/token", fontweight="bold")
    legend(figure, design, arms, narrow)
    return figure


