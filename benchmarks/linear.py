"""One linear layer y = x W^T in every format, beside PyTorch and bitsandbytes, in one process.

    python benchmarks/linear.py --rows 1 --threads 2 --json linear.json

In each round every candidate runs once, in turn, so that all see the same neighbours on the
machine; what counts is the median over rounds of the ratio to the baseline, torch with bf16.
Each candidate owns as many copies of W as make up --memory and takes the next one in every round:
its weights come from memory, as in a large model, not from a cache. Needs
pip install "qllm[test]".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import qllm
from qllm import _core

BASELINE = "torch bf16"
OURS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")


def copies(nbytes: int, memory: int) -> int:
    """How many matrices of `nbytes` fill `memory` bytes; at least one."""
    return max(1, -(-memory // nbytes))


def ours(weight: np.ndarray, x: np.ndarray, format: str, memory: int, threads: int) -> Any:
    """A call that multiplies with the next of several packed copies, and how many there are."""
    first = qllm.quantize(weight, format)
    count = copies(first.nbytes, memory)
    weights = [first, *(qllm.quantize(weight, format) for _ in range(count - 1))]
    turn = cycle(weights)
    for item in weights:
        item.matmul(x, threads=threads)  # packs
    return lambda: next(turn).matmul(x, threads=threads), count


def cycle(items: list[Any]) -> Iterator[Any]:
    """The items, again and again."""
    while True:
        yield from items


def peers(weight: np.ndarray, x: np.ndarray, memory: int) -> dict[str, Any]:
    """The same for torch and bitsandbytes: name -> (call, copies)."""
    import bitsandbytes as bnb
    import torch

    n, k = weight.shape
    w = torch.from_numpy(weight)
    found: dict[str, Any] = {}

    def add(
        name: str, make: Callable[[], torch.nn.Module], dtype: torch.dtype, nbytes: int
    ) -> None:
        count = copies(nbytes, memory)
        turn = cycle([make() for _ in range(count)])
        given = torch.from_numpy(x).to(dtype)

        @torch.inference_mode()
        def call() -> Any:
            return next(turn)(given)

        call()
        found[name] = (call, count)

    def plain(dtype: torch.dtype) -> torch.nn.Module:
        layer = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        layer.weight.data = w.to(dtype).clone()
        return layer.eval()

    def nf4() -> torch.nn.Module:
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16,
                                  compress_statistics=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.to(torch.bfloat16).clone(), requires_grad=False,
                                         compress_statistics=False, quant_type="nf4")
        return layer.to("cpu").eval()

    def int8() -> torch.nn.Module:
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": w.half()})
        return layer.to("cpu").eval()

    add("torch bf16", lambda: plain(torch.bfloat16), torch.bfloat16, 2 * n * k)
    add("torch f32", lambda: plain(torch.float32), torch.float32, 4 * n * k)
    add("bitsandbytes nf4", nf4, torch.bfloat16, n * k * 9 // 16)
    add("bitsandbytes int8", int8, torch.float16, n * k)
    return found


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; the order turns by one from round to round."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):  # two rounds to warm up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time one linear layer in every format beside torch and bitsandbytes.",
        epilog="example: python benchmarks/linear.py --rows 1 --threads 2",
    )
    parser.add_argument("--rows", type=int, default=1, help="rows of x (default 1: decode)")
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=_core.cpu_info()["threads_available"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--memory", type=float, default=0.5, help="GB of weights per candidate")
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.02, (options.out_features, options.in_features)).astype(np.float32)
    x = rng.normal(0, 1, (options.rows, options.in_features)).astype(np.float32)
    memory = int(options.memory * 1e9)
    candidates = peers(weight, x, memory)
    for format in OURS:
        candidates[f"qllm {format}"] = ours(weight, x, format, memory, options.threads)
    seconds = measure({name: call for name, (call, _) in candidates.items()}, options.rounds)
    info = _core.cpu_info()
    print(f"{info['model']}, {info['default']}, {options.threads} threads, "
          f"x ({options.rows}, {options.in_features}), W ({options.out_features}, "
          f"{options.in_features}), medians of {options.rounds} rounds")
    print(f"{'':20} {'ms':>8}  speed relative to {BASELINE}")
    base = seconds[BASELINE]
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times)]
        print(f"{name:20} {1e3 * statistics.median(times):8.3f}  {statistics.median(ratios):.2f}")
    if options.json:
        result = {"machine": {key: info[key] for key in ("model", "default", "features")},
                  "options": {**vars(options), "json": None},
                  "copies": {name: count for name, (_, count) in candidates.items()},
                  "seconds": seconds,
                  "versions": {"python": sys.version, "qllm": qllm.__version__,
                               "torch": torch.__version__, "numpy": np.__version__}}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
