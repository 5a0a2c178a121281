"""The speed of all arms of a model, taken in one cell: last, alone, and the arms in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import _core
from .arms import OwnArm, load_own, swap
from .design import Arm, Design

if TYPE_CHECKING:
    from ..model import Model

READ_BYTES = 1 << 28
"""What is read to learn how fast this machine reads memory; more than caches hold."""

READ_ROUNDS = 5


def speed_cell(design: Design, name: str) -> dict[str, Any]:
    """Seconds of every arm in every round, each round beginning with another arm.

    `rounds`: rows of arm, round, prefill_seconds (to read `prompt_tokens` and write one),
    decode_seconds (to write `decode_tokens` one by one, alone) and batch_seconds (size of a batch
    -> seconds in which each of its sequences writes as many). `bytes_per_token`: arm -> bytes of
    the linear layers, which a step reads once. `read_bandwidth`: bytes per second that this
    machine reads with as many threads, the median of a few readings; None where the models compute
    on another device than the processor.
    """
    speed, arms = design.speed, design.timed
    assert speed is not None
    loaded: dict[tuple[Any, ...], OwnArm] = {}
    for arm in arms:
        if _place(arm, design) not in loaded:
            loaded[_place(arm, design)] = load_own(name, arm, design)
    first_model = next(iter(loaded.values()))
    on_processor = all(arm.model.device == "cpu" for arm in loaded.values())
    ids = _timing_ids(first_model.model, design, speed.prompt_tokens)
    rows: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for turn in range(speed.rounds):
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            model = loaded[_place(arm, design)].model
            sizes[arm.name] = sum(row["bytes"] for row in swap(model, arm, design))
            for _ in range(speed.warmups):
                _measure(model, ids, design)
            rows.append({"arm": arm.name, "round": turn, **_measure(model, ids, design)})
    order = [arm.name for arm in arms]
    rows.sort(key=lambda row: (row["round"], order.index(row["arm"])))
    return {
        "rounds": rows,
        "bytes_per_token": {name: sizes[name] for name in order},
        "read_bandwidth": _read_bandwidth(first_model.threads) if on_processor else None,
        "environment": {**first_model.environment(), "threads": first_model.threads},
    }


def _place(arm: Arm, design: Design) -> tuple[Any, ...]:
    """Arms for which this is equal can be timed on one model."""
    return arm.path, arm.compute or design.compute, arm.device or design.device


def _timing_ids(model: Model, design: Design, length: int) -> list[int]:
    """`length` token ids of the design's own texts, repeated as often as needed."""
    text = " ".join(text.text for text in (*design.texts, *design.prompts))
    ids = [int(token) for token in model.encode(text)]
    return (ids * (length // len(ids) + 1))[:length]


def _measure(model: Model, ids: Sequence[int], design: Design) -> dict[str, Any]:
    speed = design.speed
    assert speed is not None
    return {
        "prefill_seconds": _timed(model, [ids], 1),
        "decode_seconds": _timed(model, [ids[:1]], speed.decode_tokens),
        "batch_seconds": {
            str(size): _timed(model, _different(model, size), speed.decode_tokens)
            for size in speed.batches
        },
    }


def _different(model: Model, count: int) -> list[list[int]]:
    """So many prompts of one token, all different while there are as many tokens, since equal
    texts are computed once."""
    vocab = int(model.architecture.decoder["vocab"])
    return [[(1 + i) % vocab] for i in range(count)]


def _timed(model: Model, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds to read the prompts and write `tokens` after each, greedily. One id read and n tokens
    written are n steps of one token each."""
    start = time.perf_counter()
    model.generate(
        [list(ids) for ids in prompts],
        temperature=0.0,
        max_new_tokens=tokens,
        ignore_eos=True,
        batch_size=len(prompts),
    )
    return time.perf_counter() - start


def _read_bandwidth(threads: int | None) -> float:
    buffer = _core.limit_buffer(READ_BYTES)
    found = []
    for _ in range(READ_ROUNDS):
        start = time.perf_counter()
        _core.read_limit(buffer, 0, buffer.size, threads=threads)
        found.append(buffer.size / (time.perf_counter() - start))
    return statistics.median(found)
