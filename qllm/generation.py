"""The loop of generation: one batch of rows that come and go, each with its own options.

Rows share a batch and, for equal prompts, what is computed of the prompt and of the tokens that
they draw alike; none of it shows in the results: logits are the same in every batch, and a draw
depends on (seed, prompt, step, token) alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .config import GenerationConfig, as_integer
from .errors import QllmUnsupportedError, QllmValueError
from .strict_json import quoted
from .tokenizer import TextStream, Tokenizer

BATCH_SIZE = 64
"""Rows in a batch, unless asked otherwise."""


@dataclass(frozen=True)
class Request:
    """A prompt, text or token ids, and how to go on from it. `prompt_key` names the stream of noise
    (0 to 2^64 - 1); None: a hash of the prompt's token ids, see `prompt_key_of`."""

    prompt: str | Sequence[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    prompt_key: int | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt; `str()` is its text.

    `ids` are the new tokens, the one that ended it (an EOS, or the last of a stop string) included;
    `text` is what they add to the prompt, without special tokens and cut before a stop string, and
    None without a tokenizer. `logprobs` are natural logs of softmax(logits)[id] of the model's own
    logits, `sampling_logprobs` of the distribution that the token was drawn from (0 when greedy).
    `finish_reason` is "length", "eos" or "stop".
    """

    text: str | None
    ids: list[int]
    prompt_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish_reason: str
    config: GenerationConfig
    prompt_key: int

    def __str__(self) -> str:
        return "" if self.text is None else self.text


def prompt_key_of(ids: Sequence[int]) -> int:
    """The default name of a prompt's stream of noise: BLAKE2b with a digest of 8 bytes over the
    token ids as little-endian int64, read as a little-endian integer."""
    data = np.asarray(ids, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(eq=False)
class Row:
    """One generation in progress."""

    index: int
    prompt_ids: tuple[int, ...]
    config: GenerationConfig
    prompt_key: int
    eos: frozenset[int]
    stream: TextStream | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, token: int, logprob: float, sampling_logprob: float) -> None:
        """Takes a drawn token, and sees whether it is the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self.stream is not None:
            self.pieces.append(self.stream.push(token))
        if self.finish_reason is None and self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.ids) >= self.config.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.stream is not None:
            self.pieces.append(self.stream.finish())
            if self.stream.stopped and self.finish_reason == "length":
                self.finish_reason = "stop"

    def result(self, tokenizer: Tokenizer | None) -> Generation:
        """The finished generation."""
        if self.stream is not None:
            text = "".join(self.pieces)
        elif tokenizer is not None:
            shown = self.ids[:-1] if self.finish_reason == "eos" else self.ids
            text = tokenizer.continuation(self.prompt_ids, shown)
        else:
            text = None
        return Generation(
            text,
            self.ids,
            list(self.prompt_ids),
            self.logprobs,
            self.sampling_logprobs,
            self.finish_reason or "length",
            self.config,
            self.prompt_key,
        )


@dataclass(eq=False)
class _Prompt:
    """A prompt and the rows that wait for it; its sequence lives until the last of them starts."""

    ids: tuple[int, ...]
    waiting: deque[Row] = field(default_factory=deque)
    sequence: Any = None
    logits: np.ndarray | None = None  # of its last position, (1, vocab), while rows wait


@dataclass(eq=False)
class _Lane:
    """Rows of a prompt whose tokens are the same so far: one sequence, computed once, serves them
    all until their draws part."""

    rows: list[Row]
    sequence: Any


def run(decoder: Any, rows: Iterable[Row], batch_size: int) -> Iterator[Row]:
    """Generates all `rows`; yields a row after each of its tokens, `finish_reason` set at the last.

    Each round is one step of the decoder: every row in the batch by one token, together with the
    prompts of the rows that enter it. Rows that entered together and have drawn the same tokens are
    computed once. An error or an interrupt leaves the decoder as it was: what the sequences hold is
    freed with them.
    """
    prompts: OrderedDict[tuple[int, ...], _Prompt] = OrderedDict()
    threads = host_threads(decoder)
    for row in rows:
        prompts.setdefault(row.prompt_ids, _Prompt(row.prompt_ids)).waiting.append(row)
    queue = deque(prompts.values())
    lanes: list[_Lane] = []
    while lanes or queue:
        entering = _enter(queue, batch_size - sum(len(lane.rows) for lane in lanes))
        known = [(prompt, rows) for prompt, rows in entering if prompt.sequence is not None]
        new = [(prompt, rows) for prompt, rows in entering if prompt.sequence is None]
        drawn = [row for lane in lanes for row in lane.rows]
        _step(decoder, lanes, new, threads)
        for prompt, started in known:
            assert prompt.logits is not None
            draw(started, np.repeat(prompt.logits, len(started), axis=0), threads)
        for prompt, started in entering:
            lanes.append(_Lane(started, prompt.sequence.fork()))
            if not prompt.waiting:
                prompt.sequence = prompt.logits = None
            drawn += started
        lanes = [part for lane in lanes for part in _parted(lane)]  # frees what none needs
        yield from drawn


def _enter(queue: deque[_Prompt], places: int) -> list[tuple[_Prompt, list[Row]]]:
    """Takes up to `places` rows from the queue, by prompt."""
    entering = []
    while queue and places > 0:
        prompt = queue[0]
        started = [prompt.waiting.popleft() for _ in range(min(places, len(prompt.waiting)))]
        places -= len(started)
        entering.append((prompt, started))
        if not prompt.waiting:
            queue.popleft()
    return entering


def _step(
    decoder: Any, lanes: list[_Lane], new: list[tuple[_Prompt, list[Row]]], threads: int | None
) -> None:
    """Draws the next token of every row of the lanes, then the first one of the rows that start
    with each new prompt, in one step; keeps the logits of prompts that more rows wait for."""
    sequences, tokens = [lane.sequence for lane in lanes], [lane.rows[0].ids[-1] for lane in lanes]
    want = [True] * len(lanes)
    made = [decoder.sequence() for _ in new]
    for (prompt, _), sequence in zip(new, made):
        sequences += [sequence] * len(prompt.ids)
        tokens += prompt.ids
        want += [False] * (len(prompt.ids) - 1) + [True]
    if not sequences:
        return
    groups = [lane.rows for lane in lanes] + [started for _, started in new]
    rows = [row for group in groups for row in group]
    *drawn, logits = decoder.step_draw(
        sequences,
        np.array(tokens, np.int64),
        np.array(want),
        np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        **_options(rows),
        logits=any(prompt.waiting for prompt, _ in new),
        threads=threads,
    )
    _add(rows, drawn)
    for place, ((prompt, _), sequence) in enumerate(zip(new, made), len(lanes)):
        prompt.sequence = sequence
        if prompt.waiting:  # not a view that keeps the whole step alive
            prompt.logits = logits[place : place + 1].copy()


def _parted(lane: _Lane) -> list[_Lane]:
    """The lane after a draw: its unfinished rows by the token that they have drawn. The first goes
    on with the lane's sequence, the others with forks of it."""
    if len(lane.rows) == 1:
        return [] if lane.rows[0].finish_reason is not None else [lane]
    alike: dict[int, list[Row]] = {}
    for row in lane.rows:
        if row.finish_reason is None:
            alike.setdefault(row.ids[-1], []).append(row)
    parts = [_Lane(rows, lane.sequence) for rows in alike.values()]
    for part in parts[1:]:
        part.sequence = lane.sequence.fork()
    return parts


def draw(rows: list[Row], logits: np.ndarray, threads: int | None) -> None:
    """Draws the next token of each row from its logits (rows, vocab), as its options say."""
    if rows:
        _add(rows, _core.sample(logits, **_options(rows), threads=threads))


def _options(rows: list[Row]) -> dict[str, Any]:
    """The options of the next draw of each row, as `_core.sample` takes them."""
    configs = [row.config for row in rows]
    penalized = any(config.repetition_penalty != 1 for config in configs)
    histories = [
        [*row.prompt_ids, *row.ids] if row.config.repetition_penalty != 1 else None for row in rows
    ]
    return {
        "temperature": [0.0 if config.greedy else config.temperature for config in configs],
        "top_k": [config.top_k for config in configs],
        "top_p": [config.top_p for config in configs],
        "min_p": [config.min_p for config in configs],
        "repetition_penalty": [config.repetition_penalty for config in configs],
        "seed": [config.seed for config in configs],
        "prompt": [row.prompt_key for row in rows],
        "step": [len(row.ids) for row in rows],
        "keep_ties": [config.keep_ties for config in configs],
        "round_bf16": [config.logits_dtype == "bfloat16" for config in configs],
        "history": histories if penalized else None,
    }


def _add(rows: list[Row], drawn: Sequence[np.ndarray]) -> None:
    """Gives each row its token, logprob and sampling_logprob."""
    for row, *values in zip(rows, *(array.tolist() for array in drawn)):
        row.add(*values)


def host_threads(decoder: Any) -> int | None:
    """The threads for what is computed here from a decoder's logits: its own, where it computes
    here too, else all (None)."""
    info = decoder.info()
    threads: int = info["threads"]
    return threads if info["device"] == "cpu" else None


# ------------------------------------------------------------------------------- from the caller


def token_ids(value: Any, vocab: int, what: str) -> tuple[int, ...]:
    """Token ids from outside, each an integer from 0 to vocab - 1."""
    ids = []
    _refuse_no_ids(value, what)
    try:
        items = value.tolist() if _dimensions(value) == 1 else list(value)
    except TypeError:
        raise QllmValueError(
            f"{what} is a {type(value).__name__}; token ids were expected"
        ) from None
    for place, item in enumerate(items):
        token = as_integer(item)
        if token is None:
            raise QllmValueError(
                f"{what} has {quoted(item)} at position {place}; a token id was expected"
            )
        if not 0 <= token < vocab:
            raise QllmValueError(
                f"{what} has the token id {quoted(item)} at position {place}; ids from 0 to "
                f"{vocab - 1} were expected"
            )
        ids.append(token)
    return tuple(ids)


def _refuse_no_ids(value: Any, what: str) -> None:
    """Bytes would pass for token ids and are rarely meant as such; a set or a mapping has no
    order."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise QllmValueError(
            f"{what} is a {type(value).__name__}; decode it to a text, or make it a list of token "
            "ids"
        )
    if isinstance(value, (Mapping, Set)):
        raise QllmValueError(
            f"{what} is a {type(value).__name__}; a text or a sequence of token ids was expected"
        )


def _dimensions(value: Any) -> int | None:
    """Of an array of NumPy, torch, JAX or the like; None for anything else."""
    found = getattr(value, "ndim", None)
    return found if isinstance(found, int) and hasattr(value, "tolist") else None


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is several prompts: a sequence of texts or of sequences."""
    if isinstance(prompt, str):
        return False
    _refuse_no_ids(prompt, "the prompt")
    dimensions = _dimensions(prompt)
    if dimensions is not None:
        return dimensions > 1
    if not hasattr(prompt, "__len__") or not hasattr(prompt, "__getitem__"):
        raise QllmValueError(
            f"the prompt is a {type(prompt).__name__}; a text, token ids, or a list of either was "
            "expected"
        )
    if len(prompt) == 0:
        return False
    first = prompt[0]
    return isinstance(first, str) or (_dimensions(first) != 0 and hasattr(first, "__len__"))


def per_prompt(overrides: dict[str, Any], count: int | None) -> list[dict[str, Any]]:
    """The options of each of `count` prompts (None: one prompt that is no list).

    A list, tuple or array has one value per prompt; for stop and eos_token_id, whose values are
    sequences themselves, only when its items are sequences (or None) that are no texts.
    """
    result: list[dict[str, Any]] = [{} for _ in range(1 if count is None else count)]
    for name, value in overrides.items():
        if not _is_list(name, value):
            for options in result:
                options[name] = value
            continue
        if count is None or len(value) != count:
            prompts = "one prompt" if count is None else f"a list of {count} prompts"
            raise QllmValueError(
                f"{name} has {len(value)} values, but there is {prompts}; one value, or one for "
                "each prompt of a list, was expected"
            )
        for options, item in zip(result, value if _dimensions(value) is None else value.tolist()):
            options[name] = item
    return result


def _is_list(name: str, value: Any) -> bool:
    dimensions = _dimensions(value)
    if dimensions is not None:
        return dimensions > (1 if name in ("stop", "eos_token_id") else 0)
    if not isinstance(value, (list, tuple)):
        return False
    if name in ("stop", "eos_token_id"):
        nested = (list, tuple, type(None))
        return bool(value) and all(isinstance(item, nested) for item in value)
    return True


def check_prompt_key(value: Any) -> int:
    key = as_integer(value)
    if key is None or not 0 <= key < 2**64:
        raise QllmValueError(
            f"prompt_key is {quoted(value)}; an integer from 0 to 2^64 - 1 was expected"
        )
    return key


def check_batch_size(value: Any) -> int:
    size = as_integer(value)
    if size is None or size < 1:
        raise QllmValueError(f"batch_size is {quoted(value)}; a positive integer was expected")
    return size


def need_tokenizer(tokenizer: Tokenizer | None, what: str, reason: str) -> Tokenizer:
    """The tokenizer, or the error that says why there is none."""
    if tokenizer is None:
        raise QllmUnsupportedError(f"{what} needs a tokenizer: {reason}")
    return tokenizer


Progress = Callable[[int, int], None]
"""Called with (finished requests, all requests) whenever one has finished."""
