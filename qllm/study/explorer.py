"""The interactive figure: the data that its JavaScript reads, and its still picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from .figure_style import legend, looks, marker_handle, panels, styled
from .lookup import label
from .markup import printable

if TYPE_CHECKING:
    from .result import Study

SHOWN_TOKENS = 8
"""Tokens of the still picture, those that are picked apart."""


def explorer_html(study: Study, still: str) -> str:
    """The section: a sentence, the place that JavaScript fills, `still` (a figure) for print and
    for readers without JavaScript, and the data."""
    return (
        '<section id="explorer"><h2>Look and play</h2>'
        "<p>One place of a text, all arms, any temperature. Bars are probabilities of the next"
        " token; the ring marks the one that an arm draws. All arms draw with the same noise, so"
        " where they take different tokens, the format did it. Everything shown was computed"
        " beforehand over the whole vocabulary; the page only looks it up.</p>"
        f'<div class="live" hidden></div><div class="still">{still}</div>'
        f'<script type="application/json" id="play-data">{script_data(study)}</script></section>'
    )


def script() -> str:
    """The JavaScript of the interactive figure."""
    return files(__package__).joinpath("explorer.js").read_text("utf-8")


def script_data(study: Study) -> str:
    """The figure's data as JSON that may stand in a script element: in ASCII, without any `<`, `>`
    or `&`, whatever a model wrote."""
    known = looks(study.design)
    data = {
        "temperatures": study.play["temperatures"],
        "seed": study.play["seed"],
        "reference": study.design.reference.name,
        "arms": [{"name": name, "colour": known[name].colour} for name in study.play["arms"]],
        "models": [
            {"name": label(model["name"]), "prompts": model["prompts"]}
            for model in study.play["models"]
            if model["prompts"]
        ],
    }
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def visible(piece: str) -> str:
    """A token's text with signs for what cannot be seen."""
    return printable(piece).replace(" ", "\u00b7").replace("\n", "\u21b5") or "(no text)"


def parting(play: Mapping[str, Any], reference: str) -> tuple[int, int, int, int]:
    """(model, prompt, place, temperature), as numbers, at which the most arms draw another token
    than the reference; among equals that nearest to temperature 0.8, then the first."""
    best: tuple[tuple[int, float], tuple[int, int, int, int]] | None = None
    for m, model in enumerate(play["models"]):
        for p, prompt in enumerate(model["prompts"]):
            for k, place in enumerate(prompt["places"]):
                for t, temperature in enumerate(play["temperatures"]):
                    picks = {arm: row["pick"][t] for arm, row in place["arms"].items()}
                    parted = sum(pick != picks[reference] for pick in picks.values())
                    score = (parted, -abs(temperature - 0.8))
                    if best is None or score > best[0]:
                        best = score, (m, p, k, t)
    assert best is not None
    return best[1]


@styled
def plot_play(study: Study, narrow: bool = False) -> Figure:
    """The most probable next tokens in every arm at the place and temperature at which the most
    arms part; the ring is the token that the shared noise picks."""
    design, play, known = study.design, study.play, looks(study.design)
    m, p, k, t = parting(play, design.reference.name)
    model, temperature = play["models"][m], play["temperatures"][t]
    prompt = model["prompts"][p]
    place = prompt["places"][k]
    chances = {
        arm: {
            token: math.exp(logit / temperature - row["log_z"][t])
            for token, logit in zip(row["at"], row["logits"])
        }
        for arm, row in place["arms"].items()
    }
    tokens = _tokens_shown(place, chances, t)
    context = printable(prompt["text"] + place["context"]).replace("\n", " ")
    where = f"{label(model['name'])}, temperature {temperature:g}"
    figure, grid = panels(
        [""],
        [f"\u2026{context[-22 if narrow else -60 :]} __\n{where}"],
        narrow=narrow,
        x="probability of the next token",
        height=0.19 * len(tokens) * (1 + 0.12 * len(chances)),
        names=["m" * 11],
    )
    axes, thick = grid[0][0], 0.84 / len(chances)
    for number, (arm, found) in enumerate(chances.items()):
        at = np.arange(len(tokens))[::-1] + 0.42 - thick * (number + 0.5)
        shares = [found.get(token, 0.0) for token in tokens]
        axes.barh(at, shares, height=0.86 * thick, color=known[arm].colour)
        drawn = tokens.index(place["arms"][arm]["pick"][t])
        axes.plot(
            shares[drawn], at[drawn], "o", color=known[arm].colour, markersize=5,
            markerfacecolor="white", markeredgewidth=1.4, clip_on=False, zorder=5,
        )  # fmt: skip
    names = [_plain_glyphs(visible(place["tokens"][token][1])) for token in tokens]
    axes.set_yticks(np.arange(len(tokens))[::-1], names)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(left=0)
    arms = [design.arm(name) for name in chances]
    legend(figure, design, arms, narrow, [marker_handle("o", "drawn", markerfacecolor="white")])
    return figure


def _plain_glyphs(text: str) -> str:
    """At most 14 characters, those which the font of the pictures may lack as their names; `$` is
    no mathematics here."""
    shown = "".join(sign if ord(sign) < 0x2500 else f"[{ord(sign):x}]" for sign in text)
    return (shown if len(shown) <= 14 else shown[:13] + "\u2026").replace("$", r"\$")


def _tokens_shown(
    place: Mapping[str, Any], chances: Mapping[str, Mapping[int, float]], t: int
) -> list[int]:
    """The most probable tokens in any arm and those that are picked, most probable first."""
    highest: dict[int, float] = {}
    for found in chances.values():
        for token, chance in found.items():
            highest[token] = max(chance, highest.get(token, 0.0))
    ranked = sorted(highest, key=lambda token: (-highest[token], token))
    picked = {row["pick"][t] for row in place["arms"].values()}
    first = ranked[:SHOWN_TOKENS]
    return first + [token for token in ranked[SHOWN_TOKENS:] if token in picked]


