"""Loading a model from a folder: seconds and peak memory, against one bare pass over the file.

    python benchmarks/loading.py FOLDER --formats nf4 int8 --threads 1 2 --json loading.json

The bare pass reads the same mapped weights and quantizes them, with the same vector code and on as
many threads, into a small buffer that it forgets: what loading would cost if nothing had to be laid
out, or kept. It and loading take turns in one process; `share` is the median over rounds of pass /
load. What is kept needs memory, which the system clears when it is first touched: `touch` is what
that takes for as many bytes (a virtual machine whose free memory went back to its host takes long),
and `share_with_memory` is the median of (pass + touch) / load. The files should be in the system's
cache, which the first round sees to.

Peak memory is that of a process of its own, beyond what it had before loading, over the bytes that
the model holds plus its largest layer in the file. --bitsandbytes loads the same folder once
with transformers and bitsandbytes, also in a process of its own. Needs pip install "qllm[test]".
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import qllm
from qllm import _core
from qllm.checkpoint import Checkpoint
from qllm.layers import FLOAT_DTYPES, dtype_of

FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8", "bf16", "f32")


def matrices(checkpoint: Checkpoint, quantized: set[str]) -> list[tuple[Any, bool]]:
    """Every matrix of the folder, and whether loading quantizes it."""
    entries = [checkpoint.entry(name) for name in checkpoint.names()]
    return [(e, e.name.removesuffix(".weight") in quantized) for e in entries if len(e.shape) == 2]


def bare_pass(folder: str, format: str, quantized: set[str], threads: int) -> float:
    """Seconds to open the folder, read its matrices and quantize those that are to be."""
    start = time.perf_counter()
    with Checkpoint(folder) as checkpoint:
        for entry, change in matrices(checkpoint, quantized):
            to = format if change else FLOAT_DTYPES[entry.dtype]
            _core.quantize_pass(entry.numpy(), to, dtype=dtype_of(entry), threads=threads)
            checkpoint.release(entry)
    return time.perf_counter() - start


def load(folder: str, format: str, threads: int) -> tuple[float, qllm.Model]:
    """Seconds to load the folder, and the model."""
    start = time.perf_counter()
    model = qllm.Model.from_pretrained(folder, format, threads=threads)
    return time.perf_counter() - start, model


def touch(nbytes: int) -> float:
    """Seconds until the system has given that much memory."""
    start = time.perf_counter()
    np.ones(nbytes // 8)
    return time.perf_counter() - start


def rounds_of(folder: str, format: str, threads: int, rounds: int) -> dict[str, Any]:
    """Pass, touch and load in turn."""
    seconds: dict[str, list[float]] = {"pass": [], "touch": [], "load": []}
    _, model = load(folder, format, threads)
    held = sum(model.info().bytes.values())
    head = model.architecture.head.module
    quantized = {module for module, found in model.formats.items() if found == format} - {head}
    del model
    for _ in range(rounds):
        gc.collect()
        seconds["pass"].append(bare_pass(folder, format, quantized, threads))
        seconds["touch"].append(touch(held))
        taken, model = load(folder, format, threads)
        seconds["load"].append(taken)
        del model
    shares = [(a / c, (a + b) / c) for a, b, c in zip(*seconds.values())]
    return {
        "seconds": seconds,
        "share": statistics.median(share for share, _ in shares),
        "share_with_memory": statistics.median(share for _, share in shares),
    }


def peak_bytes() -> int:
    """The most memory that this process has had. Linux counts the parent's in getrusage."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(folder: str, format: str, threads: int) -> dict[str, int]:
    """Memory of this process, which has done nothing else."""
    before = peak_bytes()
    _, model = load(folder, format, threads)
    held = sum(model.info().bytes.values())
    largest = max(model.checkpoint.entry(name).nbytes for name in model.checkpoint.names())
    return {"before": before, "peak": peak_bytes(), "held": held, "largest": largest}


def bitsandbytes(folder: str, format: str, threads: int) -> dict[str, float]:
    """Seconds and memory of the same by transformers and bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    config = BitsAndBytesConfig(
        load_in_8bit=format == "int8",
        load_in_4bit=format != "int8",
        bnb_4bit_quant_type=format.removesuffix("-dq") if format != "int8" else "nf4",
        bnb_4bit_use_double_quant=format.endswith("-dq"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    before, start = peak_bytes(), time.perf_counter()
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_bytes()}


def alone(task: str, options: argparse.Namespace, format: str, threads: int) -> dict[str, Any]:
    """`task` in a process of its own."""
    words = [sys.executable, __file__, options.folder, "--task", task, "--formats", format,
             "--threads", str(threads)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True,
                         env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return json.loads(run.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, format: str, threads: int) -> dict[str, Any]:
    """All figures of a format and a number of threads, and a line that tells them."""
    memory = alone("peak", options, format, threads)
    found = rounds_of(options.folder, format, threads, options.rounds)
    taken = memory["peak"] - memory["before"]
    found["memory"] = memory | {"over": taken / (memory["held"] + memory["largest"])}
    median = {name: statistics.median(times) for name, times in found["seconds"].items()}
    line = (f"{format:7} {threads:2} threads  load {median['load']:.3f} s, "
            f"pass {median['pass']:.3f}, touch {median['touch']:.3f}: share {found['share']:.2f}, with memory "
            f"{found['share_with_memory']:.2f}; peak {taken / 1e6:.0f} MB, "
            f"{found['memory']['over']:.2f} of model and layer")
    if options.bitsandbytes and format in ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8"):
        peer = found["bitsandbytes"] = alone("bitsandbytes", options, format, threads)
        line += (f"; bitsandbytes {peer['seconds']:.1f} s, "
                 f"{(peer['peak'] - peer['before']) / 1e6:.0f} MB")
    print(line, flush=True)
    return {"format": format, "threads": threads, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time loading a model against one pass of reading and quantizing.",
        epilog="example: python benchmarks/loading.py FOLDER --formats nf4 --threads 1 2",
    )
    parser.add_argument("folder", help="a model's folder, or a name such as demo:llama")
    parser.add_argument("--formats", nargs="+", default=["nf4"], choices=FORMATS)
    parser.add_argument("--threads", nargs="+", type=int,
                        default=[1, _core.cpu_info()["threads_available"]])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bitsandbytes", action="store_true", help="also load with the peer, once")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--task", choices=("peak", "bitsandbytes"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = peak if options.task == "peak" else bitsandbytes
        print(json.dumps(task(options.folder, options.formats[0], options.threads[0])))
        return
    with Checkpoint.open(options.folder) as checkpoint:
        options.folder = str(checkpoint.folder)
    info = _core.cpu_info()
    print(f"{info['model']}, {info['default']}, medians of {options.rounds} rounds")
    results = [measure(options, format, threads)
               for format in options.formats for threads in options.threads]
    if options.json:
        found = {"machine": {key: info[key] for key in ("model", "default", "features")},
                 "folder": options.folder, "results": results,
                 "versions": {"python": sys.version, "qllm": qllm.__version__}}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
