"""What all benchmarks share: alternating rounds, paired medians, and the facts of the machine.

Neighbours slow a machine down for minutes, and differently for different kinds of work. So every
candidate runs once in every round, in one process, and what counts is the median over the rounds
of a ratio within the round. Seconds are kept too, all of them, in the JSON.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qllm import _core

PACKAGES = ("qllm", "numpy", "torch", "transformers", "bitsandbytes", "onnxruntime",
            "llama-cpp-python", "gguf")


os.environ.setdefault("QLLM_BNB_BACKEND", "0")  # bitsandbytes computes as it does without qllm

PAUSE = 0.02  # seconds, in which the waiting threads of the candidate before go to sleep


@dataclass
class Candidate:
    """Something to time. A call does `work` units of work (matrices, tokens); `nbytes` are the
    bytes that it reads and `operations` the multiplications and additions, both in one unit, 0
    where they do not count; `peak` names the unit that multiplies."""

    name: str
    call: Callable[[], Any]
    work: int = 1
    nbytes: int = 0
    operations: int = 0
    peak: str = ""


def measure(candidates: Sequence[Candidate], rounds: int, *, warmups: int = 2,
            seconds: float | None = None) -> dict[str, list[float]]:
    """Seconds per unit of work of every candidate in every round; the order turns by one from
    round to round. Libraries keep their threads spinning for a while, so each candidate waits until
    those of the one before have gone to sleep. With `seconds`, no round starts later than that
    (but three are made)."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    end = None if seconds is None else time.monotonic() + seconds
    for turn in range(-warmups, rounds):
        if end is not None and turn >= 3 and time.monotonic() > end:
            break
        shift = turn % len(candidates)
        for candidate in [*candidates[shift:], *candidates[:shift]]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            candidate.call()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                times[candidate.name].append(elapsed / candidate.work)
    return times


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratios within the rounds."""
    return [n / d for n, d in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and how many values there are."""
    low, middle, high = (statistics.quantiles(values, n=4, method="inclusive")
                         if len(values) > 1 else [values[0]] * 3)
    return {"median": middle, "low": low, "high": high, "rounds": len(values)}


def chosen(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether a name matches one of the globs; None takes all."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def machine() -> dict[str, Any]:
    """The processor and the versions of everything that takes part."""
    info = _core.cpu_info()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import qllm

    versions["qllm"] = qllm.__version__
    return {"processor": info["model"], "instruction_set": info["default"],
            "features": list(info["features"]), "threads_available": info["threads_available"],
            "date": datetime.date.today().isoformat(), "versions": versions}


def installed(package: str) -> bool:
    """Whether a package of that name is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result, whole or not at all; nothing for None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict[str, Any]],
         show: Callable[[dict[str, Any]], None]) -> None:
    """Runs a benchmark as a program: measures by its options, prints, and writes its JSON."""
    options = parser.parse_args()
    result = run(options)
    show(result)
    write_json(options.json, result)
