"""The pictures of a study: what there is, what each needs, and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import captions
from .explorer import plot_play
from .figure_style import rendered
from .files import write_bytes
from .lookup import missing, ordinary
from .plots_cost import plot_cost
from .plots_logits import (
    plot_differences,
    plot_divergence,
    plot_effective_temperature,
    plot_slopes,
    plot_tenths,
)
from .plots_texts import plot_frontier, plot_generation, plot_hazard, plot_survival

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import Study

_INTERVAL = ("estimate", "low", "high")


@dataclass(frozen=True)
class Picture:
    """A picture: its heading in the report, the tables and columns that it needs, the function that
    draws it, and the one that says in words what is to be seen."""

    heading: str
    needs: dict[str, tuple[str, ...]]
    draw: Callable[..., Figure]
    caption: Callable[[Study], str]


PICTURES = {
    "divergence": Picture(
        "Where an arm departs from the original",
        {"curves": _INTERVAL, "sensitivity": _INTERVAL},
        plot_divergence,
        captions.divergence,
    ),
    "tenths": Picture(
        "Sure and unsure places",
        {"tenths": (*_INTERVAL, "tokens")},
        plot_tenths,
        captions.tenths,
    ),
    "effective_temperature": Picture(
        "Hotter or colder",
        {"effective_temperature": _INTERVAL},
        plot_effective_temperature,
        captions.effective_temperature,
    ),
    "slopes": Picture(
        "Is the band special?", {"slopes": _INTERVAL}, plot_slopes, captions.slopes
    ),
    "survival": Picture(
        "How soon texts part",
        {"survival": ("position", *_INTERVAL)},
        plot_survival,
        captions.survival,
    ),
    "hazard": Picture(
        "Why texts part",
        {"survival": ("at_risk", "hazard", "expected_hazard")},
        plot_hazard,
        captions.hazard,
    ),
    "generation": Picture(
        "What becomes of the texts",
        {"generation": _INTERVAL},
        plot_generation,
        captions.generation,
    ),
    "differences": Picture(
        "Every difference at a glance",
        {"differences": _INTERVAL},
        plot_differences,
        captions.differences,
    ),
    "frontier": Picture(
        "Worse, or only shifted?", {"generation": _INTERVAL}, plot_frontier, captions.frontier
    ),
    "cost": Picture(
        "Memory and speed",
        {"speed": ("batch", "p10", "p90", "bytes_per_token", "percent_of_read")},
        plot_cost,
        captions.cost,
    ),
    "play": Picture("One place of a text", {}, plot_play, captions.explorer),
}
"""Name -> picture, in the order of the report."""


_OF_TEXTS = ("survival", "hazard", "generation", "differences", "frontier")
"""Pictures of generated texts."""


def absent(study: Study, name: str) -> str | None:
    """Why the study has not this picture, in a clause; None when it can be drawn."""
    if not ordinary(study.design):
        return "the design has no arm but the reference and its controls"
    if name == "play":
        return None if study.play else "the design asks for no prompts to play with"
    if (why := missing(study, PICTURES[name].needs)) is not None:
        return why
    if name in _OF_TEXTS and study.design.lockstep:
        return "texts were read layer by layer, and none was generated"
    if name == "frontier" and not (study.tables["generation"]["measure"] == "edit_distance").any():
        return "edit distances need two seeds at least"
    if name == "hazard" and study.tables["survival"]["expected_hazard"].isna().all():
        return "no temperature of generation has a curve of the reference's own texts"
    return None


@dataclass(frozen=True)
class Drawn:
    """A picture as SVG, for a page and for a phone."""

    wide: bytes
    narrow: bytes


def write_plots(study: Study, folder: Path) -> dict[str, Drawn]:
    """Every picture that the study has, as PNG and SVG into `folder`; returns them for the report,
    which shows the narrow form on phones."""
    drawn = {}
    for name, picture in PICTURES.items():
        if absent(study, name) is not None:
            continue
        figure = picture.draw(study)
        wide = rendered(figure, "svg")
        write_bytes(folder / f"{name}.png", rendered(figure, "png"))
        write_bytes(folder / f"{name}.svg", wide)
        drawn[name] = Drawn(wide, rendered(picture.draw(study, narrow=True), "svg"))
    return drawn
