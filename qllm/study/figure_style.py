"""How the pictures of a study look: colours, lines, panels; no picture of its own.

Pictures stand alone: no global state, no window, the same bytes from the same data. Each can be
drawn wide, for a page, and narrow, for a phone, with the same size of letters in both.

An arm has one colour everywhere: the hue is the format (a palette for colour-blind readers, Okabe
and Ito 2008), a lighter, broken line is its double-quantized form, and another arm of a format that
has one already is dotted.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .design import Arm, Design

if TYPE_CHECKING:
    from pandas import DataFrame

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

ROLE_HUES = {"null": "#8c8c8c", "control": "#CC79A7", "ceiling": "#56B4E9"}
"""Colours of the arms that are no formats to be studied."""

FOREIGN_HUES = ("#E69F00", "#882255", "#44AA99", "#999933", "#332288")
"""Colours of arms whose weights come from elsewhere, in the order of the design."""

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
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "qllm",
}
BAND = "#f3ecd8"
SOFT = "#555555"
MARKERS = "osD^vPX*<>"
WIDE, NARROW = 10.8, 3.6
"""Widths of the pictures, inches: those of the report's page and of a phone, on which letters then
keep their size."""

RIGHT = 0.14
"""Inches to the right of the last panel."""


@dataclass(frozen=True)
class Look:
    """Colour and line of an arm."""

    colour: str
    dash: Any = "-"
    width: float = 1.9

    def line(self) -> dict[str, Any]:
        """What matplotlib's `plot` takes."""
        broken = self.dash != "-"
        return {
            "color": self.colour,
            "linewidth": self.width,
            "linestyle": self.dash,
            "solid_capstyle": "round",
            "zorder": 4 if broken else 3,
        }


BROKEN: Any = (0, (3.2, 1.6))
DOTTED: Any = ((0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)), (0, (2, 3)))


def looks(design: Design) -> dict[str, Look]:
    """Arm -> how it is drawn, in every picture of the study."""
    found: dict[str, Look] = {}
    formats: dict[str, int] = {}
    elsewhere = 0
    for arm in design.arms:
        if arm.role == "reference":
            found[arm.name] = Look(HUES.get(arm.format, "#222222"), width=2.4)
        elif arm.role in ROLE_HUES:
            found[arm.name] = Look(ROLE_HUES[arm.role], DOTTED[0], 1.5)
        elif arm.source != "qllm":
            place = elsewhere % len(FOREIGN_HUES)
            found[arm.name] = Look(FOREIGN_HUES[place], DOTTED[1], 1.7)
            elsewhere += 1
        elif (again := formats.get(arm.format, 0)) > 0:
            found[arm.name] = Look(HUES[arm.format], DOTTED[(again - 1) % len(DOTTED)], 1.7)
        else:
            doubled = arm.format.endswith("-dq")
            found[arm.name] = Look(
                HUES[arm.format], BROKEN if doubled else "-", 1.5 if doubled else 1.9
            )
        if arm.role == "arm":
            formats[arm.format] = formats.get(arm.format, 0) + 1
    return found


class StudyFigure(Figure):
    """A figure that a notebook shows even when pyplot was never imported. `above` and `under` are
    inches above the first and under the last line of panels."""

    above = under = 0.0

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")

    def keep_margins(self) -> None:
        """Puts the panels where the margins say, whatever the figure's height is."""
        height = float(self.get_figheight())
        self.subplots_adjust(top=1 - self.above / height, bottom=self.under / height)


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as a PNG or SVG file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(stream, format=kind, metadata=metadata)
    data = stream.getvalue()
    return _shorter(data) if kind == "svg" else data


def _shorter(svg: bytes) -> bytes:
    """The drawing with the coordinates of its paths rounded to a hundredth of a point."""

    def path(found: re.Match[bytes]) -> bytes:
        return re.sub(rb"(\d\.\d\d)\d+", rb"\1", found.group())

    return re.sub(rb' d="[^"]*"', path, svg)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the study's style, whatever the style of the program around it."""

    def within(*arguments: Any, **named: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **named)

    within.__name__, within.__doc__ = draw.__name__, draw.__doc__
    return within


def panels(
    lines: Sequence[str],
    columns: Sequence[str],
    *,
    narrow: bool,
    x: str,
    height: float = 1.9,
    across: int = 1,
    share_x: str = "all",
    share_y: str = "column",
    names: Sequence[str] = (),
    under: float = 0.0,
) -> tuple[StudyFigure, list[list[Axes]]]:
    """A figure with axes [line][column], titled and labelled; sizes are in inches.

    Wide: a grid, columns named above and lines at the left. Narrow: the panels one below the
    other, `across` side by side, each with its own title. A panel is `height` high, with room for
    `names` on its y axis and for `under` below it. `share_x`, `share_y`: which panels have one
    axis, "all" or those of a "column". Margins are fixed rather than fitted, which takes a tenth
    of the time and gives all pictures letters of one size.
    """
    count = len(lines) * len(columns)
    down, wide = (-(-count // across), across) if narrow else (len(lines), len(columns))
    tall = "\n" in columns[0] or (narrow and len(lines) > 1)
    heading = 0.45 if tall else 0.28
    left = 0.45 + 0.085 * max(map(len, names), default=3 if narrow else 6)
    gap = 0.3 if share_y == "all" else 0.68
    between = heading + 0.52 + under if narrow else 0.3 + under
    total = NARROW if narrow else WIDE
    width = (total - left - RIGHT - (wide - 1) * gap) / wide
    under += 0.52
    figure = StudyFigure(
        figsize=(total, heading + down * height + (down - 1) * between + under)
    )
    figure.above, figure.under = heading, under
    figure.subplots_adjust(
        left=left / total,
        right=1 - RIGHT / total,
        wspace=gap / width,
        hspace=between / height,
    )
    figure.keep_margins()
    axes: list[list[Axes]] = []
    for row, name in enumerate(lines):
        axes.append([])
        for column, title in enumerate(columns):
            number = row * len(columns) + column
            first = axes[0][0] if number else None
            above = axes[0][column] if row else None
            place = figure.add_subplot(
                down,
                wide,
                number + 1,
                sharex=first if share_x == "all" else above,
                sharey=first if share_y == "all" else above,
            )
            axes[-1].append(place)
            _label_panel(place, name if len(lines) > 1 else "", title, x, narrow)
            if share_y == "all" and number % wide:
                place.tick_params(axis="y", labelleft=False)
    return figure, axes


def _label_panel(axes: Axes, line: str, column: str, x: str, narrow: bool) -> None:
    place = axes.get_subplotspec()
    assert place is not None
    if narrow:
        axes.set_title("\n".join(filter(None, (line, column))), loc="left", fontsize=10)
    else:
        if place.is_first_row():
            axes.set_title(column, loc="left", pad=8)
        if place.is_first_col() and line:
            axes.set_ylabel(line, fontweight="bold", labelpad=8)
    if narrow or place.is_last_row():
        axes.set_xlabel(x)


def legend(
    figure: StudyFigure,
    design: Design,
    arms: Sequence[Arm],
    narrow: bool,
    extra: Sequence[Any] = (),
) -> None:
    """The arms by colour, above all panels; the figure grows by the room that it takes."""
    known = looks(design)
    lines = [Line2D([], [], label=arm.name, **known[arm.name].line()) for arm in arms]
    handles = [*lines, *extra]
    if not handles:
        return
    total = float(figure.get_figwidth())
    columns = _columns([str(handle.get_label()) for handle in handles], total - 0.1)
    room = 0.12 + 0.19 * -(-len(handles) // columns)
    figure.above += room
    figure.set_figheight(figure.get_figheight() + room)
    figure.keep_margins()
    figure.legend(
        handles=handles,
        loc="upper left" if narrow else "upper center",
        bbox_to_anchor=(0, 1) if narrow else (0.5, 1),
        ncols=columns,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.0,
        borderaxespad=0.1,
    )


def _columns(words: Sequence[str], total: float) -> int:
    """The most columns of a legend that fit into `total` inches, as matplotlib fills them: from top
    to bottom, the first ones higher."""
    for columns in range(len(words), 1, -1):
        filled = [len(words) // columns + (i < len(words) % columns) for i in range(columns)]
        starts = [sum(filled[:i]) for i in range(columns)]
        widest = [max(map(len, words[i : i + n])) for i, n in zip(starts, filled)]
        if sum(0.48 + 0.085 * width for width in widest) <= total:
            return columns
    return 1


def marker_handle(marker: str, text: str, **style: Any) -> Line2D:
    """A mark without a line, for a legend."""
    return Line2D([], [], linestyle="", marker=marker, label=text, **{"color": SOFT, **style})


def percents() -> FuncFormatter:
    """Shares on an axis as percentages, with no more digits than they need."""
    return FuncFormatter(lambda share, _: f"{100 * share:.4g} %".replace("-", "\N{MINUS SIGN}"))


def shade(axes: Axes, design: Design) -> None:
    """Marks the band of the claims."""
    axes.axvspan(*design.band, color=BAND, linewidth=0, zorder=0)


def note_band(axes: Axes, design: Design, place: str) -> None:
    """Writes the band's limits into it, at the bottom or the top."""
    axes.text(
        sum(design.band) / 2,
        0.02 if place == "bottom" else 0.98,
        f"{design.band[0]:g} to {design.band[1]:g}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va=place,
        fontsize=8,
        color="#7a6428",
    )


def ribbon(axes: Axes, look: Look, frame: DataFrame, x: str, **line: Any) -> None:
    """A curve with the interval around it."""
    style = {**look.line(), **line}
    shade = style.pop("shade", 0.13)
    stepped = style.pop("stepped", False)
    drawn: dict[str, Any] = {"step": "post"} if stepped else {}
    at, low, high = (frame[name].to_numpy() for name in (x, "low", "high"))
    if shade:
        axes.fill_between(
            at, low, high, color=style["color"], alpha=shade, linewidth=0, zorder=2, **drawn
        )
    axes.plot(at, frame["estimate"], drawstyle="steps-post" if stepped else "default", **style)
