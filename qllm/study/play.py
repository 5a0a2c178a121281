"""What the interactive figure of a report needs of an arm: next-token logits at a few places, and
the token that the shared noise picks there at every temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..tokenizer import TextStream
from .arms import LoadedArm, OwnArm
from .design import Design

SHOWN = 24
"""The most probable tokens of the reference, and of the arm, that are kept at a place."""


def play_rows(design: Design, model: LoadedArm, reference: OwnArm) -> list[dict[str, Any]]:
    """A row for `play_positions` places along the reference's most probable continuation of each of
    the first `play` prompts.

    `prompt`; `position` (tokens written before); `context` (the text up to there); `ids` (rising:
    the union of the reference's most probable tokens, the arm's, and all picks) with `pieces` (the
    text of each) and `logits` (the arm's, 5 decimals); `log_z` (of the arm, log sum exp(logit / T),
    6 decimals) and `pick` (the token drawn with the first seed's noise, out of the whole
    vocabulary) at each of `logit_temperatures`.
    """
    from ..config import GenerationConfig
    from ..generation import Request

    greedy = GenerationConfig(
        temperature=0.0,
        max_new_tokens=design.max_new_tokens,
        ignore_eos=design.ignore_eos,
        logits_dtype=design.logits_dtype,
    )
    chosen = design.prompts[: design.play]
    samples = reference.generate([Request(prompt.text, greedy) for prompt in chosen])
    rows = []
    for prompt, sample in zip(chosen, samples, strict=True):
        ids = [*sample.prompt_ids, *sample.ids]
        start = len(sample.prompt_ids) - 1
        sides = [side.logits(ids[:-1])[start:] for side in (reference, model)]
        for position in _places(len(sample.ids), design.play_positions):
            at = [side[position] for side in sides]
            written = reference.model.tokenizer.continuation(
                sample.prompt_ids, sample.ids[:position]
            )
            rows.append(
                {
                    "prompt": prompt.id,
                    "position": position,
                    "context": prompt.text + written,
                    **_place(design, at[0], at[1], sample.prompt_key, position, reference),
                }
            )
    return rows


def pieces(reference: OwnArm, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each of the tokens `ids` adds to the text after a prompt; one that only begins a
    character adds nothing, and the one that ends it adds it all."""
    stream = TextStream(reference.model.tokenizer, prompt_ids)
    found = [stream.push(token) for token in ids]
    if found:
        found[-1] += stream.finish()
    return found


def _places(length: int, count: int) -> list[int]:
    """Up to `count` of 0 .. length - 1, evenly spread, the first always among them."""
    return sorted({int(place) for place in np.linspace(0, length - 1, min(count, length))})


def _place(
    design: Design, ref: np.ndarray, own: np.ndarray, key: int, position: int, reference: OwnArm
) -> dict[str, Any]:
    """The arm's distribution `own` at one place, where the reference has the logits `ref`."""
    from .. import logit_stats, sample

    grid = list(design.logit_temperatures)
    picks = sample(
        np.repeat(own[None], len(grid), axis=0),
        temperature=grid,
        seed=design.seeds[0],
        prompt=key,
        step=position,
        threads=1,
    ).tokens.tolist()
    top = (np.argsort(-logits, kind="stable")[:SHOWN].tolist() for logits in (ref, own))
    ids = sorted({*picks, *(token for side in top for token in side if np.isfinite(own[token]))})
    log_z = logit_stats(own, own, grid, threads=1).log_z_ref
    return {
        "ids": ids,
        "pieces": [reference.model.decode([token], skip_special_tokens=False) for token in ids],
        "logits": [round(float(own[token]), 5) for token in ids],
        "log_z": [round(float(value), 6) for value in log_z],
        "pick": picks,
    }
