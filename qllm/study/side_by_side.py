"""Texts side by side: the same prompt and the same noise in every arm, the first token that
differs marked, and tokens shaded by how unlikely the reference finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .lookup import label, one, rows, shown_temperatures
from .markup import escape, folded
from .measures import divergent_word, first_divergence

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

SHOWN_PROMPTS = 2
"""Prompts whose texts are shown, for every model and temperature chosen."""

LEVELS = (1.0, 2.0, 4.0, 7.0)
"""Nats from which on a token has the next darker shade."""


def side_by_side(study: Study) -> str:
    """The section: models by temperatures by prompts, folded but for one temperature."""
    design, samples = study.design, study.tables["samples"]
    parts = [
        "<h2>The same prompt, the same noise</h2><p>All arms draw with the same random numbers, so"
        f" a text differs from that of {escape(design.reference.name)} only where the format"
        " changed the draw. The first place that differs is <mark>marked</mark>; before it the"
        " texts are equal.",
    ]
    if any(model["texts"] for model in study.play.get("models", ())):
        scale = "".join(
            f'<span class="u{step}"> {text} </span>'
            for step, text in enumerate(("below 1", "1", "2", "4", "7 nats and more"))
        )
        parts.append(
            f" Shades say how unlikely {escape(design.reference.name)} finds a token after all"
            f" that stands before it: {scale}."
        )
    parts.append("</p>")
    chosen = shown_temperatures(design)
    if "top_k" in samples.columns:
        samples = samples[samples["top_k"] == design.top_k[0]]
    for number, model in enumerate(design.models):
        parts.append(f"<h3>{escape(label(model))}</h3>")
        for temperature in chosen:
            found = rows(samples, model=model, temperature=temperature, seed=design.seeds[0])
            texts = "".join(
                _texts_of(study, number, prompt.text, rows(found, prompt=prompt.id))
                for prompt in design.prompts[:SHOWN_PROMPTS]
            )
            parts.append(folded(f"temperature {temperature:g}", texts, temperature == chosen[-1]))
    return "".join(parts)


def _texts_of(study: Study, model: int, prompt: str, shown: DataFrame) -> str:
    plain = one(shown, arm=study.design.reference.name)
    if plain is None:
        return ""
    pieces = _pieces(study, model, plain)
    lines = []
    for arm in study.design.arms:
        row = one(shown, arm=arm.name)
        if arm.role == "null" or row is None:
            continue
        text = (
            _shaded(pieces[plain["arm"]], pieces[arm.name])
            if {plain["arm"], arm.name} <= pieces.keys()
            else _marked(plain, row)
        )
        lines.append(f"<b>{escape(arm.name)}</b><span>{text}</span>")
    return f'<p class="prompt">{escape(prompt)}\u2026</p><div class="texts">{"".join(lines)}</div>'


def _pieces(study: Study, model: int, plain: Any) -> dict[str, Mapping[str, Any]]:
    """Arm -> its text by tokens, for the prompt, temperature and seed of a sample."""
    models = study.play.get("models", ())
    return {
        text["arm"]: text
        for text in (models[model]["texts"] if models else ())
        if (text["prompt"], text["temperature"], text["seed"])
        == (plain["prompt"], plain["temperature"], plain["seed"])
    }


def _shaded(plain: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """A text by tokens: shaded, the part that is equal soft, the first token that differs
    marked."""
    parted = first_divergence(plain["ids"], mine["ids"]) if plain is not mine else None
    found = []
    for number, (piece, nll) in enumerate(zip(mine["pieces"], mine["nll"])):
        text = escape(_one_line(piece))
        if number == parted:
            found.append(f'<mark title="{nll:g} nats">{text or "(no text)"}</mark>')
        elif text:
            level = sum(nll >= bound for bound in LEVELS)
            shade = f'<span class="u{level}" title="{nll:g} nats">{text}</span>'
            found.append(shade if level else text)
    if parted is not None and parted >= len(mine["pieces"]):
        found.append("<mark>(ends)</mark>")
    if parted is None and plain is not mine:
        found.append(' <span class="small">(equal)</span>')
    return "".join(found)


def _marked(plain: Any, row: Any) -> str:
    """A text as a whole, with the first word marked that is not the reference's."""
    text = _one_line(row["text"]).strip(" ")
    if row["arm"] == plain["arm"]:
        return escape(text)
    if row["equal"]:
        return f'<span class="same">{escape(text)}</span> <span class="small">(equal)</span>'
    start = divergent_word(_one_line(plain["text"]).strip(" "), text)
    stop = start
    while stop < len(text) and (stop == start or not text[stop].isspace()):
        stop += 1
    word = escape(text[start:stop]) or "(ends)"
    before, after = escape(text[:start]), escape(text[stop:])
    return f'<span class="same">{before}</span><mark>{word}</mark>{after}'


def _one_line(text: str) -> str:
    """`text` with a sign for every line break."""
    return text.replace("\n", " \u21b5 ")
