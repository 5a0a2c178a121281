"""qllm generate and qllm score."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..config import GenerationConfig
from ..errors import QllmValueError
from ..generation import Generation
from ..model import Model
from ..report import text_table
from .files import STDIN, print_json, read_text, shown
from .models import load
from .parser import UsageError

WINDOW = 2048
"""Tokens in a window of `score`, where the model has room for them and no other number is asked."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens",
             "seed", "stop", "keep_ties", "logits_dtype")


# -------------------------------------------------------------------------------------- generate


def generate(arguments: argparse.Namespace) -> None:
    """Continues a prompt: as it is drawn, or whole where more is asked for than the text."""
    config = _config(arguments)
    prompt = _prompt(arguments)
    model = load(arguments)
    if arguments.json or arguments.logprobs or arguments.samples > 1:
        seeds = range(config.seed, config.seed + arguments.samples)
        results = model.generate([prompt] * len(seeds), config=config, seed=list(seeds))
        assert isinstance(results, list)
        _print_results(arguments, model, prompt, results)
        return
    pieces = model.stream(prompt, config=config)  # checks that the prompt can be continued
    last = ""
    try:
        for piece in itertools.chain([prompt] if arguments.echo else [], pieces):
            last = piece
            _write(piece)
    finally:
        if not last.endswith("\n"):
            print()


def _config(arguments: argparse.Namespace) -> GenerationConfig:
    given = {name: getattr(arguments, name) for name in _SAMPLING
             if getattr(arguments, name) is not None}
    try:
        config = GenerationConfig(**given)
        config.replace(seed=config.seed + arguments.samples - 1)
    except QllmValueError as error:
        raise UsageError(f"{error} (see qllm generate --help)") from None
    return config


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None and arguments.prompt != STDIN:
        return str(arguments.prompt)
    text = read_text(arguments.prompt_file or STDIN)
    return text.removesuffix("\n").removesuffix("\r")  # the end of a file's last line


def _write(text: str) -> None:
    sys.stdout.write(shown(text))
    sys.stdout.flush()


def _print_results(arguments: argparse.Namespace, model: Model, prompt: str,
                   results: list[Generation]) -> None:
    for result in results:
        if arguments.json:  # one line each
            print(json.dumps({"model": arguments.model, "prompt": prompt} | _record(model, result),
                             ensure_ascii=False))
            continue
        if arguments.samples > 1:
            print(f"--- seed {result.config.seed} ({result.finish_reason})")
        text = shown((prompt if arguments.echo else "") + str(result))
        print(text.removesuffix("\n"))
        if arguments.logprobs:
            rows = [(str(token), ascii(piece), f"{raw:.4f}", f"{drawn:.4f}")
                    for token, piece, raw, drawn in zip(
                        result.ids, _pieces(model, result), result.logprobs,
                        result.sampling_logprobs)]
            print(text_table(("id", "token", "logprob", "sampling logprob"), rows))


def _pieces(model: Model, result: Generation) -> list[str]:
    return [model.decode([token], skip_special_tokens=False) for token in result.ids]


def _record(model: Model, result: Generation) -> dict[str, Any]:
    """A generation as plain values; log-probabilities are natural logs of the model's own
    distribution and of the one that was drawn from."""
    options = asdict(result.config)
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "formats": sorted(set(model.formats.values())),
        "ids": result.ids,
        "tokens": _pieces(model, result),
        "logprobs": result.logprobs,
        "sampling_logprobs": result.sampling_logprobs,
        "prompt_ids": result.prompt_ids,
        "prompt_key": result.prompt_key,
        "options": options,
    }


# ----------------------------------------------------------------------------------------- score


def score(arguments: argparse.Namespace) -> None:
    """Scores a text in windows that overlap, every token but the first once."""
    text = read_text(arguments.text)
    if arguments.window is not None and (arguments.stride or 1) >= arguments.window:
        raise UsageError(f"--stride {arguments.stride} leaves a window of {arguments.window} tokens"
                         " no context; it must be smaller")
    model = load(arguments)
    facts = {"model": arguments.model, "text": arguments.text,
             "formats": sorted(set(model.formats.values()))}
    facts |= score_text(model, text, arguments.window, arguments.stride)
    if arguments.json:
        print_json(facts)
        return
    print(text_table(("", ""), [
        ("model", f"{arguments.model} ({', '.join(facts['formats'])})"),
        ("tokens", f"{facts['tokens']}, {facts['scored']} of them scored"),
        ("windows", f"{facts['windows']} of at most {facts['window']} tokens"),
        ("nll", f"{facts['nll']:.6g} nats, {facts['nll'] / facts['scored']:.6g} per token"),
        ("perplexity", f"{facts['perplexity']:.6g}"),
        ("per byte", f"{facts['nll_per_byte']:.6g} nats, {facts['bits_per_byte']:.6g} bits over"
         f" {facts['bytes']} bytes"),
    ]))


def score_text(model: Model, text: str, window: int | None = None,
               stride: int | None = None) -> dict[str, Any]:
    """nll (nats, summed), perplexity and figures per byte of `text`. `window` tokens are seen at
    once (None: as many as the model has positions, at most `WINDOW`), `stride` lie from one window
    to the next (None: half a window). Raises `QllmValueError`."""
    positions = model.info().max_positions
    if window is not None and window > positions:
        raise QllmValueError(f"a window of {window} tokens needs as many positions, but the model"
                             f" has {positions}")
    window = window or min(positions, WINDOW)
    stride = stride or max(1, window // 2)
    if stride >= window:
        raise QllmValueError(f"a stride of {stride} leaves a window of {window} tokens no context")
    ids = model.encode(text)
    if len(ids) < 2:
        raise QllmValueError(f"the text has {len(ids)} token; at least 2 are needed, since the"
                             " first one is not predicted")
    parts: list[float] = []
    count = 0
    for begin, first, end in windows(len(ids), window, stride):
        logprobs = model.score(ids[begin:end]).logprobs  # of ids[begin + 1 : end]
        parts += logprobs[first - begin - 1:].tolist()
        count += 1
    nll = -math.fsum(parts)
    size = len(text.encode()) - len(model.decode(ids[:1]).encode())
    mean = nll / len(parts)
    return {
        "tokens": len(ids),
        "scored": len(parts),
        "windows": count,
        "window": window,
        "stride": stride,
        "nll": nll,
        "perplexity": math.exp(mean) if mean < 709 else math.inf,
        "bytes": size,
        "nll_per_byte": nll / size if size else math.nan,
        "bits_per_byte": nll / size / math.log(2) if size else math.nan,
    }


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of windows over `count` tokens: tokens [begin, end) are seen, those of
    [first, end) are scored, and together the latter are 1 .. count - 1, once each."""
    begin, first = 0, 1
    while first < count:
        end = min(begin + window, count)
        yield begin, first, end
        first, begin = end, begin + stride
