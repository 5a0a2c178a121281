"""What is computed in one cell of a study: a model in one arm. Needs nothing but its task, gives
plain lists, numbers and strings, and gives the same ones wherever it runs.

All prompts, temperatures and seeds of a cell are one batch. An arm's cell holds two models, the
reference and the arm, and compares their logits text by text, so that no more than one text's
logits exist at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QllmValueError
from .arms import LoadedArm, load, swap
from .design import Design, Text

if TYPE_CHECKING:
    from ..model import Model

SPEED = "speed"
"""The cell in which the speed of all arms is taken, in place of an arm's name."""

MEASURES = (
    "kl",
    "kl_reverse",
    "tv",
    "disagreement",
    "entropy_ref",
    "entropy_test",
    "max_ref",
    "delta_p",
)
"""What `qllm.logit_stats` gives for every token and temperature and a cell keeps the mean of."""


@dataclass(frozen=True)
class OwnText:
    """A sample of the reference that all arms read: the ids of its prompt and of what followed."""

    prompt: str
    seed: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A cell to compute: a model's name, an arm's name or `SPEED`, and for arms the reference's own
    samples."""

    design: Design
    model: str
    arm: str
    own: tuple[OwnText, ...] = ()


def compute(task: Task) -> dict[str, Any]:
    """The body of the task's cell. Deterministic, `SPEED` apart."""
    if task.arm == SPEED:
        return _speed_cell(task)
    design, arm = task.design, task.design.arm(task.arm)
    model = reference = load(task.model, arm, design)
    if arm.role != "reference":
        reference = load(task.model, design.reference, design)
    body: dict[str, Any] = {
        "generations": _generations(design, model, reference),
        "texts": [],
        "weights": model.layers(),
        "environment": model.environment(),
    }
    if arm.role != "reference":
        body["texts"] = [
            _compare(text, model, reference, design.logit_temperatures)
            for text in _texts(task, reference)
        ]
    return body


def own_texts(design: Design, body: dict[str, Any]) -> tuple[OwnText, ...]:
    """The reference's samples at `design.own_temperature`, from the body of its cell; samples
    without a token are left out."""
    return tuple(
        OwnText(sample["prompt"], sample["seed"], tuple(sample["prompt_ids"]), tuple(sample["ids"]))
        for sample in body["generations"]
        if sample["temperature"] == design.own_temperature
        and sample["top_k"] == design.top_k[0]
        and sample["ids"]
    )


def _generations(
    design: Design, model: LoadedArm, reference: LoadedArm
) -> list[dict[str, Any]]:
    """A row for every temperature, top_k, seed and prompt, drawn as one batch. Greedy texts need no
    noise and no top_k: one of each prompt is computed and stands for all."""
    from ..config import GenerationConfig
    from ..generation import Request

    grid = [
        (temperature, top_k, seed, prompt)
        for temperature in design.temperatures
        for top_k in design.top_k
        for seed in design.seeds
        for prompt in design.prompts
    ]
    requests = {
        _draw(*place): Request(
            place[3].text,
            GenerationConfig(
                temperature=place[0],
                top_k=place[1],
                seed=place[2],
                max_new_tokens=design.max_new_tokens,
                ignore_eos=design.ignore_eos,
            ),
        )
        for place in reversed(grid)  # so that the first of several equal draws is the one made
    }
    samples = dict(zip(requests, model.generate(list(requests.values())), strict=True))
    scores: dict[tuple[int, ...], list[float]] = {}
    rows = []
    for temperature, top_k, seed, prompt in grid:
        sample = samples[_draw(temperature, top_k, seed, prompt)]
        start = len(sample.prompt_ids)
        whole = (*sample.prompt_ids, *sample.ids)
        if whole not in scores:
            scores[whole] = _nll(reference, whole, start)
        nll = scores[whole]
        rows.append(
            {
                "temperature": temperature,
                "top_k": top_k,
                "seed": seed,
                "prompt": prompt.id,
                "prompt_ids": [int(token) for token in sample.prompt_ids],
                "ids": [int(token) for token in sample.ids],
                "text": sample.text or "",
                "finish": sample.finish_reason,
                "nll_reference": float(np.mean(nll)) if nll else None,
                "token_nll": [round(value, 6) for value in nll],
            }
        )
    return rows


def _draw(temperature: float, top_k: int, seed: int, prompt: Text) -> tuple[Any, ...]:
    """What decides a text, beside the model."""
    return (temperature, top_k, seed, prompt.id) if temperature > 0 else (temperature, prompt.id)


def _nll(reference: LoadedArm, ids: Sequence[int], start: int) -> list[float]:
    """Negative log-probabilities of the tokens from `start` on, nats."""
    if len(ids) <= start:
        return []
    return [-float(value) for value in reference.logprobs(ids, start)]


@dataclass(frozen=True)
class _Reading:
    """Token ids to be read; the tokens from `start` on are those which are compared."""

    source: str
    id: str
    kind: str
    seed: int | None
    ids: tuple[int, ...]
    start: int


def _texts(task: Task, reference: LoadedArm) -> Iterator[_Reading]:
    kinds = {prompt.id: prompt.kind for prompt in task.design.prompts}
    for own in task.own:
        ids = own.prompt_ids + own.ids
        yield _Reading("own", own.prompt, kinds[own.prompt], own.seed, ids, len(own.prompt_ids))
    for text in task.design.texts:
        ids = tuple(int(token) for token in reference.model.encode(text.text))
        if len(ids) < 2:
            raise QllmValueError(
                f"the text {text.id!r} is {len(ids)} token for {task.model}; at least two are"
                " needed to compare anything"
            )
        yield _Reading("held", text.id, text.kind, None, ids, 1)


def _compare(
    text: _Reading, model: LoadedArm, reference: LoadedArm, temperatures: Sequence[float]
) -> dict[str, Any]:
    """How the arm's next-token distributions differ from the reference's, meaned over the text."""
    from .. import logit_stats

    read, targets = text.ids[:-1], np.asarray(text.ids[text.start :], np.int64)
    before = text.start - 1
    found = logit_stats(
        reference.logits(read)[before:],
        model.logits(read)[before:],
        np.asarray(temperatures, np.float64),
        targets=targets,
        threads=model.threads,
    )
    values = {name: getattr(found, name) for name in MEASURES}
    values["delta_p_squared"] = np.square(found.delta_p)
    curves = {name: _means(rows, name, text) for name, rows in values.items()}
    nll_reference = -float(np.mean(reference.logprobs(text.ids, text.start)))
    nll = -float(np.mean(model.logprobs(text.ids, text.start)))
    return {
        "source": text.source,
        "id": text.id,
        "kind": text.kind,
        "seed": text.seed,
        "tokens": len(targets),
        "same_top": float(np.mean(found.same_top)),
        "nll_reference": nll_reference,
        "nll": nll,
        "ln_ppl_ratio": nll - nll_reference,
        "curves": curves,
    }


def _means(values: np.ndarray, name: str, text: _Reading) -> list[float]:
    """(tokens, temperatures) -> the mean over the tokens at each temperature."""
    means = np.asarray(values, np.float64).mean(axis=0)
    if not np.isfinite(means).all():
        raise QllmValueError(
            f"the mean of {name} over the text {text.id!r} is {means[~np.isfinite(means)][0]} at a"
            " temperature; leave out the lowest of logit_temperatures"
        )
    return [float(mean) for mean in means]


def _speed_cell(task: Task) -> dict[str, Any]:
    """Seconds of every arm in every round, the arms in turn on one model in one process, each
    round beginning with another arm."""
    design, speed = task.design, task.design.speed
    assert speed is not None
    arms = list(design.timed)
    loaded = load(task.model, arms[0], design)
    model = loaded.model
    ids = _timing_ids(model, design, speed.prompt_tokens)
    rows: list[dict[str, Any]] = []
    for turn in range(speed.rounds):
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            swap(model, arm, design)
            for _ in range(speed.warmups):
                _timed(model, ids, 1)
                _timed(model, ids[:1], speed.decode_tokens)
            rows.append(
                {
                    "arm": arm.name,
                    "round": turn,
                    "prefill_seconds": _timed(model, ids, 1),
                    "decode_seconds": _timed(model, ids[:1], speed.decode_tokens),
                }
            )
    rows.sort(key=lambda row: (row["round"], [arm.name for arm in arms].index(row["arm"])))
    return {"rounds": rows, "environment": {**loaded.environment(), "threads": loaded.threads}}


def _timing_ids(model: Model, design: Design, length: int) -> list[int]:
    """`length` token ids of the design's own texts, repeated as often as needed."""
    text = " ".join(text.text for text in (*design.texts, *design.prompts))
    ids = [int(token) for token in model.encode(text)]
    return (ids * (length // len(ids) + 1))[:length]


def _timed(model: Model, ids: Sequence[int], tokens: int) -> float:
    """Seconds to read `ids` and write `tokens`, greedily. One id read and n tokens written are n
    steps of one token each."""
    start = time.perf_counter()
    model.generate(list(ids), temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
    return time.perf_counter() - start
