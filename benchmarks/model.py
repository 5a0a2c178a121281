"""Whole models: tokens per second of qllm beside llama.cpp and transformers with bitsandbytes.

    python benchmarks/model.py --group llama.cpp-4bit --threads 2 --json llama.json

A random model of a Llama's shape is written once to --folder, and converted to GGUF beside it. Not
all models fit into memory at once, so they come in groups; in a group, every peer alternates with
ours in one process. Three things are measured, in tokens per second:

  decode    64 new tokens, greedy, behind a prompt of 32, the time of the prompt included
  batch     the same in each of 16 sequences that share the prompt
  prefill   a prompt of 512 tokens up to its first token

A name is the library, the format and, where it is not bfloat16, the format of the output embedding:
"qllm nf4 head int8". llama.cpp quantizes the output embedding itself. Needs
pip install "qllm[test,bench]".
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import common
import engines
import llama_folder
import numpy as np
import to_gguf
from common import Candidate

from qllm import _core

# what is compared with what, in one process: they must fit into memory together
GROUPS: dict[str, list[str]] = {
    "ours": ["qllm bf16", "qllm int8", "qllm nf4", "qllm nf4-dq", "qllm fp4", "qllm fp4-dq"],
    "llama.cpp-4bit": ["qllm nf4", "qllm nf4 head int8", "qllm nf4 head nf4", "llama.cpp Q4_0",
                       "llama.cpp Q4_K_M", "llama.cpp IQ4_NL"],
    "llama.cpp-8bit": ["qllm int8", "qllm int8 head int8", "llama.cpp Q8_0"],
    "llama.cpp-bf16": ["qllm bf16", "llama.cpp BF16"],
    "transformers-4bit": ["qllm nf4", "qllm fp4", "bitsandbytes nf4", "bitsandbytes fp4"],
    "transformers-8bit": ["qllm int8", "bitsandbytes int8"],
    "transformers-bf16": ["qllm bf16", "transformers bf16"],
}
PACKAGES = {"llama.cpp": ("llama-cpp-python", "gguf"), "transformers": ("torch", "transformers"),
            "bitsandbytes": ("torch", "transformers", "bitsandbytes")}
WORKLOADS = ("decode", "batch", "prefill")


def missing(name: str) -> str | None:
    """Why a candidate cannot be made, or None."""
    absent = [p for p in PACKAGES.get(name.split()[0], ()) if not common.installed(p)]
    return f"{', '.join(absent)} is not installed" if absent else None


def make(name: str, options: argparse.Namespace, folder: Path) -> engines.Engine:
    """The engine of a name."""
    library, kind, *rest = name.split()
    if library == "qllm":
        head = rest[1] if rest else None
        return engines.Ours(folder, kind, head, options.compute, options.threads)
    if library == "llama.cpp":
        file = to_gguf.ensure(folder, folder / "gguf", kind, options.threads)
        longest = options.prompt_tokens + options.sequences * (options.new_tokens + 1)
        positions = max(longest, options.prefill_tokens) + 8
        return engines.LlamaCpp(file, options.threads, positions, options.sequences)
    return engines.Transformers(folder, kind, options.threads)


def candidates(name: str, engine: engines.Engine, options: argparse.Namespace,
               vocab: int) -> list[Candidate]:
    """What is timed of one engine; a unit of work is a token."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, vocab, options.prompt_tokens).tolist()
    long = rng.integers(3, vocab, options.prefill_tokens).tolist()
    new, several = options.new_tokens, options.sequences
    calls = {
        "decode": (lambda: engine.generate(prompt, new, 1), new),
        "batch": (lambda: engine.generate(prompt, new, several), new * several),
        "prefill": (lambda: engine.generate(long, 1, 1), len(long)),
    }
    return [Candidate(f"{name}|{workload}", *calls[workload]) for workload in options.workloads]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the engines of the group, times them, and returns everything."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    shape = llama_folder.SHAPES[options.shape]
    folder = llama_folder.make(options.folder or llama_folder.default_folder(options.shape), shape)
    names = [name for name in GROUPS[options.group] if common.chosen(name, options.only)]
    left_out = {name: why for name in names if (why := missing(name))}
    made, to_time = {}, []
    for name in names:
        if name not in left_out:
            made[name] = make(name, options, folder)
            to_time += candidates(name, made[name], options, shape["vocab"])
    times = common.measure(to_time, options.rounds, warmups=1, seconds=options.seconds)
    tokens = {name: {workload: [1 / t for t in times[f"{name}|{workload}"]]
                     for workload in options.workloads} for name in made}
    kernels = {name: engine.model.info().kernels for name, engine in made.items()
               if isinstance(engine, engines.Ours)}
    for engine in made.values():
        engine.close()
    return {"benchmark": "model", "machine": common.machine(), "shape": shape,
            "options": {**vars(options), "folder": str(folder), "json": None},
            "missing": left_out, "kernels": kernels, "tokens_per_second": tokens,
            "seconds": times}


def show(result: dict[str, Any]) -> None:
    """Prints the table; ratios are to the first candidate, which is ours."""
    machine, options = result["machine"], result["options"]
    print(f"{machine['processor']}, {machine['instruction_set']}, {options['threads']} threads, "
          f"compute {options['compute']}, Llama {options['shape']}")
    tokens = result["tokens_per_second"]
    first = next(iter(tokens))
    for workload in options["workloads"]:
        print(f"{workload}: tokens/s, and of {first}")
        base = tokens[first][workload]
        for name, values in tokens.items():
            speed = common.spread(values[workload])
            ratio = common.spread(common.ratios(values[workload], base))
            print(f"  {name:24} {speed['median']:9.2f}  ({speed['low']:.2f} to "
                  f"{speed['high']:.2f})  {ratio['median']:.3f}")
    for name, why in result["missing"].items():
        print(f"  {name:24} left out: {why}")


def workloads(word: str) -> list[str]:
    """The workloads of a comma-separated list."""
    found = re.split(r",\s*", word)
    unknown = [name for name in found if name not in WORKLOADS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(WORKLOADS)}")
    return found


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        description="Time whole models of qllm beside llama.cpp and transformers.",
        epilog="example: python benchmarks/model.py --group llama.cpp-8bit --workloads decode")
    made.add_argument("--group", choices=sorted(GROUPS), default="ours")
    made.add_argument("--only", nargs="+", metavar="GLOB", help="candidates of the group by name")
    made.add_argument("--shape", choices=sorted(llama_folder.SHAPES), default="1.1b")
    made.add_argument("--folder", type=Path, help="where the model is or will be (default: under"
                      " the system's folder for temporary files)")
    made.add_argument("--compute", default="auto", help="qllm's compute mode (default: auto)")
    made.add_argument("--workloads", type=workloads, default=list(WORKLOADS), metavar="LIST",
                      help="out of decode, batch, prefill (default: all)")
    made.add_argument("--threads", type=int, default=_core.cpu_info()["threads_available"])
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, help="start no round later than that")
    made.add_argument("--prompt-tokens", type=int, default=32)
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--sequences", type=int, default=16)
    made.add_argument("--prefill-tokens", type=int, default=512)
    made.add_argument("--json", type=Path, help="also write every time to this file")
    return made


if __name__ == "__main__":
    common.main(parser(), run, show)
