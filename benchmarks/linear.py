"""One linear layer y = x W^T in every format and compute mode, beside other libraries and the
limits of the machine, in one process.

    python benchmarks/linear.py --rows 1 --threads 2 --only 'qllm nf4*' 'ggml*' --json linear.json

In each round every candidate runs once, in turn, so that all see the same neighbours on the
machine; what counts is the median over rounds of ratios within a round. A candidate owns as many
copies of W as make up --memory and goes through all of them in a call: its weights come from
memory, as in a large model, not from a cache. Two candidates are the machine's limits: `read`, a
plain loop over as many bytes, and `peak UNIT`, multiply-adds in registers. Needs
pip install "qllm[test,bench]"; a library that is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Candidate
from layer_peers import PEERS

import qllm
from qllm import _core

BASELINE = "read"
FORMATS = ("bf16", "f16", "f32", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
MODES = ("exact", "auto", "int8")
FEW_ROWS = 64  # from here on a product is no longer limited by memory


def copies(nbytes: int, memory: int) -> int:
    """How many matrices of `nbytes` fill `memory` bytes; at least one."""
    return max(1, -(-memory // nbytes))


def copy_of(weight: Any) -> Any:
    """The same quantized matrix in memory of its own."""
    return _core.quantized_from_parts(
        weight.format, weight.shape, weight.packed, blocksize=weight.blocksize,
        absmax=weight.absmax, absmax_codes=weight.absmax_codes, nested_absmax=weight.nested_absmax,
        nested_quant_map=weight.nested_quant_map, offset=weight.offset,
        quant_map=weight.quant_map, scb=weight.scb, dtype_name=weight.dtype_name)


def takes(weight: Any, mode: str) -> bool:
    """Whether this build multiplies by the weight in that mode."""
    try:
        weight.matmul(np.zeros((1, weight.shape[1]), np.float32), compute=mode)
    except qllm.QllmError:
        return False
    return True


def peak_unit(weight: qllm.QuantizedTensor, mode: str, rows: int) -> str:
    """The unit whose peak limits the kernel for a weight in a mode on this machine."""
    name = _core.linear_name(weight, rows, compute=mode)
    unit = "int8" if weight.format == "int8" else next(
        (unit for unit in ("int8", "int16", "bf16")
         if f"{unit} activations" in name.replace("bf16x2", "bf16")), "f32")
    return unit if unit in _core.multiply_units() else "f32"


def ours(weight: np.ndarray, inputs: dict[str, np.ndarray], format: str, modes: tuple[str, ...],
         memory: int, threads: int, in_cache: bool) -> list[Candidate]:
    """A candidate for every mode and input (what its name ends in -> x), all on the same packed
    copies; `in_cache` adds those that use one copy over and over."""
    first = qllm.quantize(weight, format)
    count = copies(first.nbytes, memory)
    weights = [first, *(copy_of(first) for _ in range(count - 1))]
    several = {"": weights} | ({", one matrix": [first] * count} if in_cache else {})

    def caller(items: list[Any], x: np.ndarray, mode: str) -> Callable[[], None]:
        def call() -> None:
            for item in items:
                item.matmul(x, threads=threads, compute=mode)
        call()  # packs
        return call

    return [Candidate(f"qllm {format} {mode}{rows}{which}", caller(items, x, mode), count,
                      first.nbytes, 2 * weight.size * len(x), peak_unit(first, mode, len(x)))
            for mode in modes if takes(first, mode)
            for rows, x in inputs.items() for which, items in several.items()]


def limits(memory: int, operations: int, threads: int, units: list[str]) -> list[Candidate]:
    """The read loop over `memory` bytes (its unit of work is a byte) and the multiply peaks, with
    about as many operations as a matrix product has (its unit is an operation)."""
    buffer = _core.limit_buffer(memory)
    found = [Candidate(BASELINE,
                       lambda: _core.read_limit(buffer, 0, buffer.size, threads=threads),
                       buffer.size, 1)]
    for unit in units:
        each = 2 * _core.multiply_limit(unit, 1, threads=threads)
        turns = max(1, min(operations, 10**10) // each)

        def call(unit: str = unit, turns: int = turns) -> None:
            _core.multiply_limit(unit, turns, threads=threads)

        found.append(Candidate(f"peak {unit}", call, turns * each, 0, 1))
    return found


def peers(weight: np.ndarray, x: np.ndarray, names: list[str], memory: int,
          threads: int) -> tuple[list[Candidate], dict[str, str]]:
    """The other libraries, and why those that are missing are."""
    found, missing = [], {}
    for name in names:
        packages, bits, make = PEERS[name]
        absent = [package for package in packages if not common.installed(package)]
        if absent:
            missing[name] = f"{', '.join(absent)} is not installed"
            continue
        count = copies(int(weight.size * bits / 8), memory)
        peer = make(weight, x, count, threads)
        found.append(Candidate(name, peer.call, count, peer.nbytes, 2 * weight.size * len(x)))
    return found, missing


def summary(candidates: list[Candidate], times: dict[str, list[float]]) -> dict[str, Any]:
    """For each candidate: ms per matrix, GB/s, GFLOP/s, and the paired shares of the limits."""
    result = {}
    for c in candidates:
        seconds = times[c.name]
        entry: dict[str, Any] = {"work": c.work, "nbytes": c.nbytes, "operations": c.operations,
                                 "seconds": common.spread(seconds)}
        if c.nbytes > 1 and BASELINE in times:
            limit = [c.nbytes * t for t in times[BASELINE]]
            entry["share_of_read"] = common.spread(common.ratios(limit, seconds))
        if c.peak and f"peak {c.peak}" in times:
            limit = [c.operations * t for t in times[f"peak {c.peak}"]]
            entry["peak"] = c.peak
            entry["share_of_peak"] = common.spread(common.ratios(limit, seconds))
        result[c.name] = entry
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the candidates, times them, and returns everything."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    rng = np.random.default_rng(1)
    shape = (options.out_features, options.in_features)
    weight = rng.normal(0, 0.02, shape).astype(np.float32)
    x = rng.normal(0, 1, (options.rows, options.in_features)).astype(np.float32)
    memory = options.memory if options.memory is not None else (
        1.1 if options.rows < FEW_ROWS else 0.1)
    nbytes = int(memory * 1e9)
    names = [name for name in PEERS if common.chosen(name, options.only)]
    candidates, missing = peers(weight, x, names, nbytes, options.threads)
    inputs = {"": x}
    if options.more_rows:
        inputs[f", {options.more_rows} rows"] = rng.normal(
            0, 1, (options.more_rows, options.in_features)).astype(np.float32)
    for format in FORMATS:
        modes = tuple(mode for mode in MODES
                      if common.chosen(f"qllm {format} {mode}", options.only))
        if modes:
            candidates += ours(weight, inputs, format, modes, nbytes, options.threads,
                               options.in_cache)
    units = sorted({c.peak for c in candidates if c.peak}) if options.rows > 1 else []
    candidates = limits(max(nbytes, 1 << 20), 2 * weight.size * options.rows, options.threads,
                        units) + candidates
    times = common.measure(candidates, options.rounds, seconds=options.seconds)
    return {"benchmark": "linear", "machine": common.machine(),
            "options": {**vars(options), "json": None, "memory": memory},
            "missing": missing, "candidates": summary(candidates, times), "seconds": times}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    options, machine = result["options"], result["machine"]
    rounds = len(result["seconds"][BASELINE])
    print(f"{machine['processor']}, {machine['instruction_set']}, {options['threads']} threads, "
          f"x ({options['rows']}, {options['in_features']}), W ({options['out_features']}, "
          f"{options['in_features']}), medians of {rounds} rounds")
    print(f"{'':28} {'ms':>8} {'GB/s':>6} {'GFLOP/s':>8} {'of read':>8} {'of peak':>8}")
    for name, entry in result["candidates"].items():
        seconds = entry["seconds"]["median"]
        ms = f"{1e3 * seconds:8.3f}" if entry["work"] < 1e6 else " " * 8
        speed = f"{entry['nbytes'] / seconds / 1e9:6.1f}" if entry["nbytes"] else " " * 6
        flops = f"{entry['operations'] / seconds / 1e9:8.1f}" if entry["operations"] else " " * 8
        shares = [f"{100 * entry[key]['median']:6.1f} %" if key in entry else " " * 8
                  for key in ("share_of_read", "share_of_peak")]
        print(f"{name:28} {ms} {speed} {flops} {shares[0]} {shares[1]}  {entry.get('peak', '')}")
    for name, why in result["missing"].items():
        print(f"{name:28} left out: {why}")


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        description="Time one linear layer in every format beside other libraries.",
        epilog="example: python benchmarks/linear.py --rows 1 --threads 2 --only 'qllm nf4*'")
    made.add_argument("--rows", type=int, default=1, help="rows of x (default 1: decode)")
    made.add_argument("--more-rows", type=int, metavar="N",
                      help="time ours with N rows too, in the same rounds")
    made.add_argument("--in-cache", action="store_true",
                      help="time ours on one matrix over and over too, which a cache may hold")
    made.add_argument("--out-features", type=int, default=4096)
    made.add_argument("--in-features", type=int, default=11008)
    made.add_argument("--threads", type=int, default=_core.cpu_info()["threads_available"])
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--seconds", type=float, help="start no round later than that")
    made.add_argument("--memory", type=float,
                      help="GB of weights per candidate (default 1.1; 0.1 from 64 rows on)")
    made.add_argument("--only", nargs="+", metavar="GLOB",
                      help="candidates by name: 'qllm nf4 auto', 'ggml*' (default: all, which"
                      " needs some 40 GB)")
    made.add_argument("--json", type=Path, help="also write every time to this file")
    return made


if __name__ == "__main__":
    common.main(parser(), run, show)
