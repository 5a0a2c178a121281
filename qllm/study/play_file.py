"""What a reader may look at token by token: `play.json`, taken from the cells.

For some prompts, at some places along the reference's most probable text: every arm's logits of the
tokens that matter, the logarithm of its normalization and the token drawn at each temperature, all
computed where the model was; and the texts of these prompts piece by piece, with how unlikely the
reference finds each token. The report computes nothing from it but exp(logit / T - log_z).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .design import Design
from .files import write_text
from .lookup import shown_temperatures

MAX_PLAY_BYTES = 200_000_000
"""Longest play.json that is read."""

Cells = Mapping[tuple[str, str], Mapping[str, Any]]


def play_data(design: Design, cells: Cells) -> dict[str, Any]:
    """The content of play.json: empty when the design asks for none.

    {"temperatures", "seed", "arms": [name], "models": [{"name",
    "prompts": [{"id", "text", "places": [{"position", "context" (what the reference wrote up to
    there), "tokens": [[id, piece]], "arms": {name: {"at" (numbers of tokens), "logits", "log_z",
    "pick" (numbers of tokens)}}}]}],
    "texts": [{"arm", "prompt", "temperature", "seed", "ids", "pieces", "nll"}]}]}
    """
    arms = [arm.name for arm in design.arms if arm.role != "null"]
    if design.play == 0:
        return {}
    models = [
        {
            "name": model,
            "prompts": _prompts(design, {arm: cells[model, arm].get("play", []) for arm in arms}),
            "texts": _texts(design, {arm: cells[model, arm]["generations"] for arm in arms}),
        }
        for model in design.models
    ]
    if not any(model["prompts"] for model in models):
        return {}
    return {
        "temperatures": list(design.logit_temperatures),
        "seed": design.seeds[0],
        "arms": arms,
        "models": models,
    }


def write_play(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes play.json; the same data give the same bytes."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    write_text(folder / "play.json", text + "\n")


def _prompts(design: Design, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    texts = {prompt.id: prompt.text for prompt in design.prompts}
    plain = rows[design.reference.name]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(plain):
        at_place = {arm: others[number] for arm, others in rows.items() if number < len(others)}
        place = _place(texts[row["prompt"]], row, at_place)
        found.setdefault(row["prompt"], []).append(place)
    return [{"id": name, "text": texts[name], "places": places} for name, places in found.items()]


def _place(
    prompt: str, plain: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One place of a text: each token once, and the arms by its number in the list."""
    pieces: dict[int, str] = {}
    for row in rows.values():
        pieces.update(zip(row["ids"], row["pieces"]))
    where = {token: number for number, token in enumerate(pieces)}
    return {
        "position": plain["position"],
        "context": plain["context"].removeprefix(prompt),
        "tokens": [[token, piece] for token, piece in pieces.items()],
        "arms": {
            arm: {
                "at": [where[token] for token in row["ids"]],
                "logits": [round(value, 5) for value in row["logits"]],
                "log_z": [round(value, 5) for value in row["log_z"]],
                "pick": [where[token] for token in row["pick"]],
            }
            for arm, row in rows.items()
        },
    }


def _texts(design: Design, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The texts of the first prompts that have their pieces, at the temperatures that are shown."""
    chosen = shown_temperatures(design)
    return [
        {
            "arm": arm,
            "prompt": row["prompt"],
            "temperature": row["temperature"],
            "seed": row["seed"],
            "ids": row["ids"],
            "pieces": row["pieces"],
            "nll": [round(value, 3) for value in row["token_nll"]],
        }
        for arm, found in rows.items()
        for row in found
        if "pieces" in row and row["temperature"] in chosen
    ]
