"""What is computed in one cell of a study: a model in one arm. Needs nothing but its task, gives
plain lists, numbers and strings, and gives the same ones wherever it runs.

All prompts, temperatures, top_k values and seeds of a cell are one batch. An arm's cell holds two
models, the reference and the arm, and compares their logits text by text, so that no more than one
text's logits exist at a time.

The body of a cell (`T` stands for the design's `logit_temperatures`):

* `generations`: temperature, top_k, seed, prompt, prompt_ids, ids, text, finish ("length", "eos"),
  `token_nll` (of each new token under the reference at temperature 1, nats, 6 decimals, so that the
  mean of the first n is that of the text's beginning of n tokens) and `nll_reference`, their mean
  (None without tokens).
* `texts`, of arms that are not the reference: source ("own" or "held"), id, kind, seed, tokens,
  same_top, nll_reference, nll, ln_ppl_ratio; `curves` (means over the tokens at each T, by
  measure); `top_k` (for each value of the design that is not 0, tv and disagreement at each T of
  the distributions cut to it); `tenths` (sums by confidence of the reference, see `_tenths`).
* `play`: what the interactive figure shows, see `play.rows`.
* `weights` (rows by layer), `memory` (bytes by `arms.MEMORY`), `environment`.

The body of the cell `SPEED` is described in `timing.speed_cell`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QllmValueError
from .arms import LoadedArm, OwnArm, load, load_own, logprobs
from .design import Design, Text
from .play import pieces, play_rows
from .timing import speed_cell

SPEED = "speed"
"""The cell in which the speed of all arms is taken, in place of an arm's name."""

MEASURES = {
    "kl": "kl",
    "kl_reverse": "kl_reverse",
    "tv": "tv",
    "disagreement": "disagreement",
    "entropy_ref": "entropy_ref",
    "entropy_test": "entropy_test",
    "max_ref": "max_ref",
    "delta_p": "delta_p",
    "cross": "cross",
    "log_z": "log_z_ref",
}
"""The curves of a text, and what `qllm.logit_stats` calls the values of which they are means."""

TENTHS = 10
TENTH_MEASURES = ("kl", "tv", "disagreement")


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
    design = task.design
    if task.arm == SPEED:
        return speed_cell(design, task.model)
    reference = load_own(task.model, design.reference, design)
    arm = design.arm(task.arm)
    if arm.role == "reference":
        return cell_body(task, reference, reference)
    return cell_body(task, load(task.model, arm, design, reference), reference)


def cell_body(task: Task, model: LoadedArm, reference: OwnArm) -> dict[str, Any]:
    """The body of an arm's cell from its loaded model and that of the reference, which is the same
    object in the reference's own cell."""
    texts = [] if model is reference else list(_texts(task, reference))
    return {
        "generations": _generations(task.design, model, reference),
        "texts": [_compare(text, model, reference) for text in texts],
        "play": play_rows(task.design, model, reference),
        "weights": model.layers(),
        "memory": model.memory(),
        "environment": model.environment(),
    }


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


# ------------------------------------------------------------------------------------ generation


def _generations(design: Design, model: LoadedArm, reference: OwnArm) -> list[dict[str, Any]]:
    """A row for every temperature, top_k, seed and prompt, drawn as one batch. Greedy texts need no
    noise and no top_k: one of each prompt is computed and stands for all. The texts that the report
    shows token by token have their `pieces`."""
    from ..config import GenerationConfig
    from ..generation import Request

    grid = [
        (temperature, top_k, seed, prompt)
        for temperature in design.temperatures
        for top_k in design.top_k
        for seed in design.seeds
        for prompt in design.prompts
    ]
    requests: dict[tuple[Any, ...], Request] = {}
    for temperature, top_k, seed, prompt in grid:
        config = GenerationConfig(
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            max_new_tokens=design.max_new_tokens,
            ignore_eos=design.ignore_eos,
            keep_ties=design.keep_ties,
            logits_dtype=design.logits_dtype,
        )
        key = _draw(temperature, top_k, seed, prompt)
        requests.setdefault(key, Request(prompt.text, config))
    samples = dict(zip(requests, model.generate(list(requests.values())), strict=True))
    texts = [(sample.prompt_ids, sample.ids) for sample in samples.values()]
    scores = dict(zip(samples, reference.score_all(texts), strict=True))
    shown, rows = design.prompts[: design.play], []
    for temperature, top_k, seed, prompt in grid:
        key = _draw(temperature, top_k, seed, prompt)
        sample, nll = samples[key], [-score for score in scores[key]]
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
        if prompt in shown and (top_k, seed) == (design.top_k[0], design.seeds[0]):
            rows[-1]["pieces"] = pieces(reference, sample.prompt_ids, sample.ids)
    return rows


def _draw(temperature: float, top_k: int, seed: int, prompt: Text) -> tuple[Any, ...]:
    """What decides a text, beside the model."""
    return (temperature, top_k, seed, prompt.id) if temperature > 0 else (temperature, prompt.id)


# ---------------------------------------------------------------------------------------- logits


@dataclass(frozen=True)
class _Reading:
    """Token ids to be read; the tokens from `start` on are those which are compared."""

    source: str
    id: str
    kind: str
    seed: int | None
    ids: tuple[int, ...]
    start: int


def _texts(task: Task, reference: OwnArm) -> Iterator[_Reading]:
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


def _compare(text: _Reading, model: LoadedArm, reference: OwnArm) -> dict[str, Any]:
    """How the arm's next-token distributions differ from the reference's, meaned over the text."""
    read, targets = text.ids[:-1], text.ids[text.start :]
    before = text.start - 1
    ref, test = reference.logits(read)[before:], model.logits(read)[before:]
    return {
        "source": text.source,
        "id": text.id,
        "kind": text.kind,
        "seed": text.seed,
        **compare_logits(
            model.design, ref, test, targets, text.id, reference.threads, reference.model.decoder
        ),
    }


def compare_logits(
    design: Design,
    ref: np.ndarray,
    test: np.ndarray,
    targets: Sequence[int],
    what: str,
    threads: int | None,
    decoder: Any = None,
) -> dict[str, Any]:
    """The measures of a text `what` from the logits of reference and arm, (tokens, vocab) float32,
    and the token that follows each; on the device of `decoder` where it offers that."""
    from .. import logit_stats

    grid = design.logit_temperatures
    found = logit_stats(
        ref,
        test,
        np.asarray([*grid, 1.0], np.float64),
        targets=list(targets),
        threads=threads,
        decoder=decoder,
    )
    confidence = found.max_ref[:, -1]  # of the reference at temperature 1, wherever the grid ends
    values = {name: getattr(found, field)[:, :-1] for name, field in MEASURES.items()}
    values["delta_p_squared"] = np.square(values["delta_p"])
    nll_reference = -float(np.mean(logprobs(ref, targets)))
    nll = -float(np.mean(logprobs(test, targets)))
    return {
        "tokens": len(targets),
        "same_top": float(np.mean(found.same_top)),
        "nll_reference": nll_reference,
        "nll": nll,
        "ln_ppl_ratio": nll - nll_reference,
        "curves": {name: _means(rows, name, what) for name, rows in values.items()},
        "tenths": _tenths(confidence, values),
        "top_k": {
            str(top_k): _after_top_k(design, ref, test, top_k, threads, decoder)
            for top_k in design.top_k
            if top_k > 0
        },
    }


def _means(values: np.ndarray, name: str, what: str) -> list[float]:
    """(tokens, temperatures) -> the mean over the tokens at each temperature."""
    means = np.asarray(values, np.float64).mean(axis=0)
    if not np.isfinite(means).all():
        raise QllmValueError(
            f"the mean of {name} over the text {what!r} is {means[~np.isfinite(means)][0]} at a"
            " temperature; leave out the lowest of logit_temperatures"
        )
    return [float(mean) for mean in means]


def _tenths(confidence: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Where the differences sit: tokens in ten groups by the reference's largest probability at
    temperature 1, [0, 0.1), [0.1, 0.2) ... [0.9, 1].

    `count` (10 numbers of tokens) and, by measure, 10 lists of sums over the tokens of a group at
    each temperature (9 digits), an empty list for a group without tokens.
    """
    group = np.minimum((confidence * TENTHS).astype(np.int64), TENTHS - 1)
    members = [np.flatnonzero(group == number) for number in range(TENTHS)]
    sums = {
        name: [
            [float(f"{total:.9g}") for total in values[name][chosen].sum(axis=0)]
            if len(chosen)
            else []
            for chosen in members
        ]
        for name in TENTH_MEASURES
    }
    return {"count": [len(chosen) for chosen in members], **sums}


def _after_top_k(
    design: Design,
    ref: np.ndarray,
    test: np.ndarray,
    top_k: int,
    threads: int | None,
    decoder: Any,
) -> dict[str, list[float]]:
    """The measures that stay finite when both distributions are cut to their own `top_k` tokens,
    meaned over the tokens."""
    from .. import logit_stats

    found = logit_stats(
        keep_top_k(ref, top_k, design.keep_ties),
        keep_top_k(test, top_k, design.keep_ties),
        np.asarray(design.logit_temperatures, np.float64),
        threads=threads,
        decoder=decoder,
    )
    return {
        name: [float(mean) for mean in getattr(found, name).mean(axis=0)]
        for name in ("tv", "disagreement")
    }


def keep_top_k(logits: np.ndarray, top_k: int, keep_ties: bool) -> np.ndarray:
    """(n, vocab) float32 logits with -inf in place of all but the `top_k` largest of each row;
    among equals the lower ids stay, or with `keep_ties` all of them."""
    if top_k >= logits.shape[1]:
        return logits
    last = np.partition(logits, -top_k, axis=1)[:, -top_k, None]
    kept = logits >= last
    if not keep_ties:
        equal = logits == last
        room = top_k - (logits > last).sum(axis=1, keepdims=True)
        kept &= ~equal | (np.cumsum(equal, axis=1) <= room)
    return np.where(kept, logits, np.float32(-np.inf))
