"""The pictures of a study, as matplotlib figures that stand alone: no global state, no window.

An arm has one colour everywhere: the hue is the format (a palette for colour-blind readers, Okabe
and Ito 2008), and a lighter, broken line is its double-quantized form.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from .design import Arm, Design
from .files import write_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

HUES = {
    "bf16": "#222222",
    "f16": "#222222",
    "f32": "#222222",
    "int8": "#0072B2",
    "nf4": "#D55E00",
    "nf4-dq": "#F2A766",
    "fp4": "#009E73",
    "fp4-dq": "#6CCFB0",
}
"""Format -> colour; a double-quantized form has a lighter tone of its base, so that both are seen
where one line lies on the other."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.titlecolor": "#222222",
    "text.color": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "qllm",
}
BAND = "#f3ecd8"
MARKERS = "osD^vP"


class StudyFigure(Figure):
    """A figure that a notebook shows even when pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as a PNG or SVG file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(stream, format=kind, metadata=metadata)
    return stream.getvalue()


def write_plots(study: Study, folder: Path) -> dict[str, bytes]:
    """Every picture of the study as PNG and SVG into `folder`; returns name -> SVG."""
    vectors = {}
    for name in PLOTS:
        figure = PLOTS[name](study)
        vectors[name] = rendered(figure, "svg")
        write_bytes(folder / f"{name}.png", rendered(figure, "png"))
        write_bytes(folder / f"{name}.svg", vectors[name])
    return vectors


def colour(arm: Arm) -> str:
    """The one colour of an arm."""
    return HUES[arm.format]


def label(model: str) -> str:
    """A model's name as it stands in pictures and headings."""
    return os.path.basename(model.rstrip("/")).replace("demo:", "demo ") or model


def _line(arm: Arm) -> dict[str, Any]:
    dashed = arm.format.endswith("-dq")
    return {
        "color": colour(arm),
        "linewidth": 1.5 if dashed else 1.9,
        "linestyle": (0, (3.2, 1.6)) if dashed else "-",
        "solid_capstyle": "round",
        "zorder": 4 if dashed else 3,
    }


def _panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, Any]:
    """A figure with a grid of axes (rows, columns), sizes in inches for one panel."""
    figure = StudyFigure(figsize=(width * columns + 0.6, height * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _legend(figure: Figure, arms: Sequence[Arm], extra: Sequence[Any] = ()) -> None:
    lines = [Line2D([], [], label=arm.name, **_line(arm)) for arm in arms]
    handles = [*lines, *extra]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, len(handles)),
        handlelength=2.2,
        columnspacing=1.6,
        fontsize=10,
    )


def _shade(axes: Axes, design: Design) -> None:
    axes.axvspan(*design.band, color=BAND, linewidth=0, zorder=0)


def _ribbon(axes: Axes, arm: Arm, frame: DataFrame, x: str, **line: Any) -> None:
    """A curve with the interval around it."""
    style = {**_line(arm), **line}
    shade = style.pop("shade", 0.13)
    drawn: dict[str, Any] = {"step": "post"} if style.pop("drawstyle", "") == "steps-post" else {}
    low, high = frame["low"].to_numpy(), frame["high"].to_numpy()
    axes.fill_between(
        frame[x], low, high, color=style["color"], alpha=shade, linewidth=0, zorder=2, **drawn
    )
    axes.plot(frame[x], frame["estimate"], drawstyle="steps-post" if drawn else "default", **style)


def _some(frame: DataFrame, **equal: Any) -> DataFrame:
    """The rows in which every named column has the given value."""
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame


def plot_divergence(study: Study) -> Figure:
    """KL, total variation and 1 - agreement against temperature, a row of panels per model; the dot
    on each line is its peak. The null arm is 0 and has no place on a logarithmic axis."""
    design, curves = study.design, study.tables["curves"]
    titles = {
        "kl": "KL divergence, nats",
        "tv": "total variation",
        "disagreement": "1 \N{MINUS SIGN} agreement",
    }
    arms = [arm for arm in design.others if arm.role == "arm"]
    with matplotlib.rc_context(STYLE):
        figure, grid = _panels(len(design.models), 3, 3.7, 2.7, sharex=True, sharey="col")
        for row, model in enumerate(design.models):
            for column, (measure, title) in enumerate(titles.items()):
                axes = grid[row][column]
                _shade(axes, design)
                for arm in arms:
                    frame = _some(curves, model=model, arm=arm.name, measure=measure, source="all")
                    _ribbon(axes, arm, frame, "temperature")
                    top = frame.loc[frame["estimate"].idxmax()]
                    if top["estimate"] > 0:
                        axes.plot(
                            top["temperature"],
                            top["estimate"],
                            "o",
                            color=colour(arm),
                            markersize=4.5,
                            markeredgecolor="white",
                            markeredgewidth=0.8,
                            zorder=6,
                        )
                axes.set_yscale("log")
                axes.set_xlim(0, max(design.logit_temperatures))
                axes.yaxis.set_minor_formatter(NullFormatter())
                if measure != "kl":  # these span little more than a decade
                    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                _label_outside(axes, title, label(model), "temperature")
        _note_band(grid[0][0], design, "bottom")
        _legend(figure, arms)
    return figure


def _label_outside(axes: Axes, title: str, row: str, x: str) -> None:
    """Titles above the top row of a grid, names of rows at its left, what x is below the last."""
    place = axes.get_subplotspec()
    assert place is not None
    if place.is_first_row():
        axes.set_title(title, loc="left", pad=8)
    if place.is_first_col():
        axes.set_ylabel(row, fontweight="bold", labelpad=8)
    if place.is_last_row():
        axes.set_xlabel(x)


def _note_band(axes: Axes, design: Design, place: str) -> None:
    """Writes the band's limits into it, at the bottom or the top."""
    axes.text(
        sum(design.band) / 2,
        0.02 if place == "bottom" else 0.98,
        f"{design.band[0]:g} to {design.band[1]:g}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va=place,
        fontsize=8,
        color="#8a7434",
    )


def plot_survival(study: Study) -> Figure:
    """Share of texts that still equal the reference's, against position, at four temperatures."""
    design, survival = study.design, study.tables["survival"]
    chosen = survival_temperatures(design)
    arms = [arm for arm in design.others if arm.role == "arm"]
    with matplotlib.rc_context(STYLE):
        figure, grid = _panels(len(design.models), len(chosen), 2.8, 2.4, sharex=True, sharey=True)
        for row, model in enumerate(design.models):
            for column, temperature in enumerate(chosen):
                axes = grid[row][column]
                for arm in arms:
                    frame = _some(survival, model=model, arm=arm.name, temperature=temperature)
                    shade = 0.0 if arm.format.endswith("-dq") else 0.1
                    _ribbon(axes, arm, frame, "position", drawstyle="steps-post", shade=shade)
                axes.set_ylim(-0.02, 1.04)
                axes.set_xlim(0, design.max_new_tokens)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                if row == 0:
                    name = (
                        "greedy (temperature 0)"
                        if temperature == 0
                        else (f"temperature {temperature:g}")
                    )
                    axes.set_title(name, loc="left")
                if column == 0:
                    axes.set_ylabel(f"{label(model)}\n", fontweight="bold")
        figure.supxlabel("tokens written", fontsize=9.5)
        figure.supylabel(f"texts still equal to {design.reference.name}", fontsize=9.5)
        _legend(figure, arms)
    return figure


def survival_temperatures(design: Design) -> list[float]:
    """Up to four temperatures of the design: those nearest to 0, 0.5, 0.8 and 1."""
    near = [
        min(design.temperatures, key=lambda value: abs(value - wanted))
        for wanted in (0.0, 0.5, 0.8, 1.0)
    ]
    return sorted(set(near))


def plot_generation(study: Study) -> Figure:
    """Repetition, diversity and plausibility of the generated texts against temperature."""
    design, generation = study.design, study.tables["generation"]
    plain = design.reference.name
    titles = {
        "rep_2": "repetition (rep-2)",
        "distinct_2": "diversity over seeds (distinct-2)",
        "nll_reference": f"surprise: NLL under {plain}, nats",
    }
    arms = [arm for arm in design.arms if arm.role != "null"]
    with matplotlib.rc_context(STYLE):
        figure, grid = _panels(len(design.models), 3, 3.7, 2.5, sharex=True, sharey="col")
        for row, model in enumerate(design.models):
            for column, (measure, title) in enumerate(titles.items()):
                axes = grid[row][column]
                _shade(axes, design)
                for arm in arms:
                    frame = _some(generation, model=model, arm=arm.name, measure=measure)
                    bold = {"linewidth": 2.6, "zorder": 2.5} if arm.role == "reference" else {}
                    _ribbon(axes, arm, frame, "temperature", marker="o", markersize=2.8, **bold)
                _label_outside(axes, title, label(model), "temperature")
        _note_band(grid[0][0], design, "top")
        _legend(figure, arms)
    return figure


def plot_cost(study: Study) -> Figure:
    """Memory and speed of every format; a marker per model, the bar from the 10th to the 90th
    percentile of the timings."""
    design = study.design
    arms = [arm for arm in design.arms if arm.role != "null"]
    weights, speed = study.tables["weights"], study.tables.get("speed")
    titles = ["bits per weight"] + (
        ["prefill, tokens/s", "decode, tokens/s"] if speed is not None else []
    )
    places = np.arange(len(arms))[::-1]
    shifts = np.linspace(0.16, -0.16, len(design.models)) if len(design.models) > 1 else [0.0]
    with matplotlib.rc_context(STYLE):
        figure, grid = _panels(1, len(titles), 3.7, 2.9, sharey=True)
        for number, (model, shift) in enumerate(zip(design.models, shifts)):
            marker = MARKERS[number % len(MARKERS)]
            for place, arm in zip(places, arms):
                style = {
                    "color": colour(arm),
                    "marker": marker,
                    "markersize": 6.5,
                    "markeredgecolor": "white",
                    "markeredgewidth": 0.8,
                    "zorder": 4,
                }
                held = _some(weights, model=model, arm=arm.name)["bits_per_weight"].iloc[0]
                _dot(grid[0][0], place + shift, held, 0.0, held, style)
                if number == 0:
                    grid[0][0].annotate(
                        f"{held:.2f}",
                        (held, place),
                        xytext=(8, 0),
                        va="center",
                        textcoords="offset points",
                        fontsize=8.5,
                        color="#444444",
                    )
                for column, phase in enumerate(("prefill", "decode") if speed is not None else ()):
                    row = _some(speed, model=model, arm=arm.name, phase=phase).iloc[0]
                    _dot(
                        grid[0][column + 1],
                        place + shift,
                        row["tokens_per_second"],
                        row["p10"],
                        row["p90"],
                        style,
                    )
        for axes, title in zip(grid[0], titles):
            axes.set_title(title, loc="left")
            axes.margins(x=0.14)
            axes.set_xlim(left=0)
            axes.set_yticks(places, [arm.name for arm in arms])
            axes.tick_params(axis="y", length=0, labelsize=10)
            axes.spines["left"].set_visible(False)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(design.models) > 1:
            handles = [
                Line2D(
                    [],
                    [],
                    linestyle="",
                    marker=MARKERS[i % len(MARKERS)],
                    color="#666666",
                    label=label(model),
                )
                for i, model in enumerate(design.models)
            ]
            figure.legend(
                handles=handles, loc="outside upper center", ncols=len(handles), fontsize=10
            )
    return figure


def _dot(
    axes: Axes, place: float, value: float, low: float, high: float, style: dict[str, Any]
) -> None:
    axes.plot(
        [low, high],
        [place, place],
        color=style["color"],
        linewidth=2.2,
        alpha=0.35,
        solid_capstyle="butt",
        zorder=3,
    )
    axes.plot([value], [place], linestyle="", **style)


PLOTS: dict[str, Callable[[Study], Figure]] = {
    "divergence": plot_divergence,
    "survival": plot_survival,
    "generation": plot_generation,
    "cost": plot_cost,
}
"""Name -> function that draws it."""
