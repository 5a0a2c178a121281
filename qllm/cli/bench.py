"""qllm bench: what this machine can do, and how near to it each format comes, in alternating
rounds, so that what slows the machine down for a while slows all of them alike."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import __version__, _core
from ..errors import QllmValueError
from ..report import size_text, text_table
from .bench_models import Loaded, Random, Ready, Subject
from .files import print_json
from .models import load
from .parser import UsageError

READ_BYTES = 1 << 29  # of the read loop: more than caches hold
DEVICE_READ_BYTES = 1 << 31  # the same of a GPU
PEAK_SECONDS = 0.01  # of each multiply loop


@dataclass
class Result:
    """One format. `prefill` and `decode` are tokens per second, and `of_read` the share of what the
    read loop of the same round allows for the decode, a value a round each."""

    format: str
    bytes_per_token: int
    bits_per_weight: float
    kernels: list[str]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    of_read: list[float] = field(default_factory=list)


@dataclass
class Limits:
    """What the device can do, a value a round: bytes per second of the read loop, and operations
    per second of each unit that multiplies, where the device is the processor."""

    read: list[float] = field(default_factory=list)
    peaks: dict[str, list[float]] = field(default_factory=dict)


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    subject = _subject(arguments)
    needed = arguments.prompt_tokens + arguments.new_tokens
    if needed > subject.max_positions:
        raise QllmValueError(
            f"--prompt-tokens {arguments.prompt_tokens} and --new-tokens {arguments.new_tokens}"
            f" need {needed} positions, but {subject.name} has {subject.max_positions}")
    limits, results, info = measure(subject, arguments)
    facts = {
        "qllm": __version__, "model": subject.name, "parameters": subject.parameters,
        "processor": info["cpu_model"], "device": info["device"], "instruction_set": info["isa"],
        "threads": info["threads"], "compute": info["compute"], "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens,
        "batch": arguments.batch,
    }
    if arguments.json:
        units = _core.multiply_units(isa=arguments.isa) if limits.peaks else {}
        peaks = {unit: {"instruction": units[unit]} | _summary(values)
                 for unit, values in limits.peaks.items()}
        print_json(facts | {
            "limits": {"read_bytes_per_second": _summary(limits.read),
                       "operations_per_second": peaks},
            "formats": [_record(result) for result in results]})
        return
    print(_page(facts, limits, results))


def _subject(arguments: argparse.Namespace) -> Subject:
    """The model that was named, or random weights."""
    if arguments.model is not None:
        if arguments.shape is not None:
            raise UsageError("qllm bench takes a MODEL or --shape, not both (see qllm bench"
                             " --help)")
        return Loaded(load(arguments))
    if arguments.revision is not None:
        raise UsageError("qllm bench --revision needs a MODEL (see qllm bench --help)")
    return Random(arguments.shape or "small", list(dict.fromkeys(arguments.formats)),
                  device=arguments.device, compute=arguments.compute, threads=arguments.threads,
                  isa=arguments.isa)


def measure(subject: Subject,
            arguments: argparse.Namespace) -> tuple[Limits, list[Result], dict[str, Any]]:
    """Times the limits and each format in every round; one unmeasured round comes first.

    Prefill is the time from a prompt to its first token; decode is what `new_tokens` more take, on
    `batch` sequences that share the prompt.
    """
    prompt = np.random.default_rng(0).integers(0, subject.vocab, arguments.prompt_tokens)
    results: dict[str, Result] = {}
    limits = Limits()
    probe = (_limit_probe(arguments.isa, arguments.threads) if arguments.device == "cpu"
             else _device_probe(arguments.device))
    for number in range(-1, arguments.rounds):
        measured = probe()
        for format in dict.fromkeys(arguments.formats):
            ready = subject.ready(format)
            prefill, decode = _times(ready.decoder, prompt, arguments.new_tokens, arguments.batch)
            result = results.setdefault(format, Result(
                format, ready.bytes_per_token, ready.bits_per_weight, ready.kernels))
            if number >= 0:
                _add(result, ready, prefill, decode, measured["read"], arguments)
        if number >= 0:
            limits.read.append(measured.pop("read"))
            for unit, speed in measured.items():
                limits.peaks.setdefault(unit, []).append(speed)
    return limits, list(results.values()), ready.decoder.info()


def _add(result: Result, ready: Ready, prefill: float, decode: float, read: float,
         arguments: argparse.Namespace) -> None:
    steps = arguments.new_tokens / decode
    result.prefill.append(arguments.prompt_tokens / prefill)
    result.decode.append(arguments.batch * steps)
    result.of_read.append(ready.bytes_per_token * steps / read)


def _times(decoder: Any, prompt: np.ndarray, new_tokens: int, batch: int) -> tuple[float, float]:
    """Seconds from the prompt to its first token, and of `new_tokens` more in each sequence."""
    start = time.perf_counter()
    sequence = decoder.sequence()
    want = np.arange(len(prompt)) == len(prompt) - 1
    tokens = decoder.step_draw([sequence] * len(prompt), prompt, want, [0], temperature=0.0)[0]
    middle = time.perf_counter()
    sequences = [sequence, *(sequence.fork() for _ in range(batch - 1))]
    tokens, rows = np.repeat(tokens, batch), np.arange(batch)
    for _ in range(new_tokens):
        tokens = decoder.step_draw(sequences, tokens, None, rows, temperature=0.0)[0]
    return middle - start, time.perf_counter() - middle


def _limit_probe(isa: str | None, threads: int | None) -> Callable[[], dict[str, float]]:
    """A function that measures the machine: bytes per second under "read", and operations per
    second under the name of each unit."""
    buffer = _core.limit_buffer(READ_BYTES)
    turns = {unit: 1 << 12 for unit in _core.multiply_units(isa=isa)}

    def probe() -> dict[str, float]:
        start = time.perf_counter()
        _core.read_limit(buffer, 0, buffer.size, isa=isa, threads=threads)
        found = {"read": buffer.size / (time.perf_counter() - start)}
        for unit in turns:
            start = time.perf_counter()
            done = 2 * _core.multiply_limit(unit, turns[unit], isa=isa, threads=threads)
            seconds = time.perf_counter() - start
            found[unit] = done / seconds
            longer = PEAK_SECONDS / max(seconds, 1e-7)
            turns[unit] = max(1 << 12, min(1 << 24, int(turns[unit] * longer)))
        return found

    return probe


def _device_probe(device: str) -> Callable[[], dict[str, float]]:
    """The same for a device that is not the processor, whose multiply units are not measured."""
    def probe() -> dict[str, float]:
        info = _core.device_info(device)
        assert info is not None
        found = _core.device_limits(device, min(DEVICE_READ_BYTES, info["free"] // 4))
        assert found is not None
        return {"read": found["read_bytes_per_second"]}

    return probe


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _record(result: Result) -> dict[str, Any]:
    return {
        "format": result.format, "bytes_per_token": result.bytes_per_token,
        "bits_per_weight": result.bits_per_weight, "kernels": result.kernels,
        "prefill_tokens_per_second": _summary(result.prefill),
        "decode_tokens_per_second": _summary(result.decode),
        "share_of_read": _summary(result.of_read),
    }


def _page(facts: dict[str, Any], limits: Limits, results: list[Result]) -> str:
    """The table for a reader."""
    peaks = ", ".join(f"{unit} {statistics.median(values) / 1e9:.0f}"
                      for unit, values in limits.peaks.items())
    threads = f", {facts['threads']} threads" if limits.peaks else ""
    can = f"reads {statistics.median(limits.read) / 1e9:.1f} GB/s"
    if limits.peaks:
        can += f"; multiplies, billions of operations per second: {peaks}"
    head = [
        f"{facts['processor']}, {facts['instruction_set']}{threads};"
        f" {facts['model']}, {facts['parameters']:,} parameters, compute {facts['compute']}",
        can,
        f"medians of {facts['rounds']} rounds: prefill of {facts['prompt_tokens']} tokens, decode"
        f" of {facts['new_tokens']} tokens in a batch of {facts['batch']}",
    ]
    rows = [(result.format, size_text(result.bytes_per_token), f"{result.bits_per_weight:.3f}",
             f"{statistics.median(result.prefill):.1f}", f"{statistics.median(result.decode):.1f}",
             f"{100 * statistics.median(result.of_read):.0f} %",
             "; ".join(result.kernels))
            for result in results]
    return "\n".join([*head, text_table(
        ("format", "bytes/token", "bits/w", "prefill tok/s", "decode tok/s", "of read", "kernels"),
        rows)])
