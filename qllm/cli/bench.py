"""qllm bench: tokens per second of each format on this machine, in alternating rounds, so that what
slows the machine down for a while slows all formats alike."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import __version__
from ..errors import QllmValueError
from ..model import Model
from ..report import size_text, text_table
from .files import print_json
from .models import load


@dataclass
class Result:
    """One format. `prefill` and `decode` are tokens per second, a value a round; `bytes` are those
    of the linear layers, the output embedding left out where the format leaves it alone."""

    format: str
    bytes: int = 0
    bits_per_weight: float = 0.0
    kernels: list[str] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    model = load(arguments)
    needed = arguments.prompt_tokens + arguments.new_tokens
    info = model.info()
    if needed > info.max_positions:
        raise QllmValueError(
            f"--prompt-tokens {arguments.prompt_tokens} and --new-tokens {arguments.new_tokens}"
            f" need {needed} positions, but {arguments.model} has {info.max_positions}")
    results = measure(model, arguments.formats, rounds=arguments.rounds, batch=arguments.batch,
                      prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens)
    facts = {
        "qllm": __version__, "model": arguments.model, "parameters": info.parameters,
        "processor": info.cpu, "device": info.device, "instruction_set": info.isa,
        "threads": info.threads, "compute": info.compute, "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens,
        "batch": arguments.batch,
    }
    if arguments.json:
        print_json(facts | {"formats": [_record(result) for result in results]})
        return
    print(f"{info.cpu}, {info.isa}, {info.threads} threads; {arguments.model},"
          f" {info.parameters:,} parameters")
    print(f"medians of {arguments.rounds} rounds: prefill of {arguments.prompt_tokens} tokens,"
          f" decode of {arguments.new_tokens} tokens in a batch of {arguments.batch}")
    print(text_table(("format", "linear layers", "bits/w", "prefill tok/s", "decode tok/s",
                      "kernels"), [_row(result) for result in results]))


def measure(model: Model, formats: list[str], *, rounds: int, prompt_tokens: int, new_tokens: int,
            batch: int) -> list[Result]:
    """Times each format in every round, swapping in place, so that one model is held at a time.

    Prefill is the time from a prompt to its first token; decode is what `new_tokens` more take, on
    `batch` sequences that share the prompt. One unmeasured pass of each format comes first.
    """
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.info().vocab, prompt_tokens).tolist()
    results = [Result(format) for format in dict.fromkeys(formats)]
    for number in range(-1, rounds):
        for result in results:
            report = model.quantize_(result.format)
            prefill, decode = _times(model, prompt, new_tokens, batch)
            if number < 0:
                result.bytes, result.bits_per_weight = report.bytes, report.bits_per_weight
                result.kernels = model.info().kernels.get(result.format, [])
            else:
                result.prefill.append(prompt_tokens / prefill)
                result.decode.append(batch * new_tokens / decode)
    return results


def _times(model: Model, prompt: list[int], new_tokens: int, batch: int) -> tuple[float, float]:
    """Seconds from the prompt to the first token, and of the rest."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate([prompt] * batch, temperature=0.0, max_new_tokens=count, ignore_eos=True,
                       batch_size=batch)
        return time.perf_counter() - start

    first = seconds(1)
    return first, max(seconds(1 + new_tokens) - first, 1e-9)


def _record(result: Result) -> dict[str, Any]:
    def summary(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        "format": result.format, "linear_bytes": result.bytes,
        "bits_per_weight": result.bits_per_weight, "kernels": result.kernels,
        "prefill_tokens_per_second": summary(result.prefill),
        "decode_tokens_per_second": summary(result.decode),
    }


def _row(result: Result) -> tuple[str, ...]:
    return (result.format, size_text(result.bytes), f"{result.bits_per_weight:.3f}",
            f"{statistics.median(result.prefill):.1f}", f"{statistics.median(result.decode):.1f}",
            "; ".join(result.kernels))
