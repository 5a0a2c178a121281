"""A study's grid: texts per second of one batch of qllm beside a loop over transformers' generate.

    python benchmarks/study.py --model demo:llama --threads 2 --json study.json
    python benchmarks/study.py --model 1.1b --format nf4 --compute auto --threads 2

A cell is a prompt at a temperature, a top_k, a seed and a length: a finished text. qllm draws the
whole grid as a study does, in one `generate_batch`: prompts are computed once, a text serves all
shorter lengths as well, and a greedy text serves every seed and top_k. The loop makes every cell
with a call of its own, in bfloat16, and beside it with bitsandbytes' nf4. It would take hours, so
in every round it makes some cells drawn from the grid, the same number of each length; all sides
alternate in one process, and what counts is the ratio of the times for a cell within a round.

"1.1b" is the random Llama of benchmarks/model.py. Needs pip install "qllm[test]".
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import llama_folder
import numpy as np

import qllm
from qllm import _core
from qllm.checkpoint import Checkpoint
from qllm.generation import Request
from qllm.study.prompts import OPENINGS

PEERS = {"transformers bf16": ("torch", "transformers"),
         "bitsandbytes nf4": ("torch", "transformers", "bitsandbytes", "accelerate")}


@dataclass(frozen=True)
class Cell:
    """A text to be made; `prompt` is its place in the list of prompts."""

    prompt: int
    temperature: float
    top_k: int
    seed: int
    length: int


def grid(options: argparse.Namespace) -> list[Cell]:
    """All cells."""
    return [Cell(*values) for values in itertools.product(
        range(options.prompts), options.temperatures, options.top_k,
        range(1, options.seeds + 1), sorted(options.lengths))]


def requests(cells: Sequence[Cell], prompts: Sequence[Sequence[int]]) -> list[Request]:
    """What qllm generates for all cells: the longest text of each draw."""
    longest = max(cell.length for cell in cells)
    found: dict[tuple[Any, ...], Request] = {}
    for cell in cells:
        key = (cell.prompt, cell.temperature, cell.top_k, cell.seed)
        config = qllm.GenerationConfig(
            temperature=cell.temperature, top_k=cell.top_k, seed=cell.seed,
            max_new_tokens=longest, ignore_eos=True)
        request = Request(prompts[cell.prompt], config)
        found.setdefault(key if cell.temperature > 0 else key[:1], request)
    return list(found.values())


class Loop:
    """A loop over transformers' generate, a cell at a time."""

    def __init__(self, folder: Path, format: str, threads: int) -> None:
        import engines

        engine = engines.Transformers(folder, format, threads)
        self.torch, self.model = engine.torch, engine.model

    def make(self, cell: Cell, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of a cell."""
        ids = self.torch.tensor([list(prompts[cell.prompt])])
        drawn: dict[str, Any] = {"do_sample": False}
        if cell.temperature > 0:
            drawn = {"do_sample": True, "temperature": cell.temperature, "top_k": cell.top_k}
        self.torch.manual_seed(cell.seed)
        with self.torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), pad_token_id=0,
                min_new_tokens=cell.length, max_new_tokens=cell.length, **drawn)
        tokens: list[int] = found[0, ids.shape[1]:].tolist()
        if len(tokens) != cell.length:
            raise SystemExit(f"transformers made {len(tokens)} tokens, not {cell.length}")
        return tokens


def sample(cells: Sequence[Cell], each: int, rng: np.random.Generator) -> list[Cell]:
    """`each` cells of every length, drawn from the grid."""
    found = []
    for length in sorted({cell.length for cell in cells}):
        of_length = [cell for cell in cells if cell.length == length]
        found += [of_length[i] for i in rng.choice(len(of_length), each, replace=False)]
    return found


def timed(call: Any) -> float:
    """Seconds of a call, after waiting threads of the one before have gone to sleep."""
    time.sleep(common.PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_all(loop: Loop, cells: Sequence[Cell], prompts: Sequence[Sequence[int]]) -> None:
    """Every one of the cells."""
    for cell in cells:
        loop.make(cell, prompts)


def folder_of(options: argparse.Namespace) -> Path:
    """The model's folder, made where it is a random one."""
    if options.model in llama_folder.SHAPES:
        shape = llama_folder.SHAPES[options.model]
        return llama_folder.make(options.folder or llama_folder.default_folder(options.model),
                                 shape)
    with Checkpoint.open(options.model) as checkpoint:
        return checkpoint.folder


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times every side in every round."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folder, cells = folder_of(options), grid(options)
    model = qllm.Model.from_pretrained(folder, options.format, compute=options.compute,
                                       threads=options.threads)
    prompts = [model.encode(text)[:options.prompt_tokens]
               for _, _, text in OPENINGS[:options.prompts]]
    left_out = {name: ", ".join(absent) for name, packages in PEERS.items()
                if (absent := [p for p in packages if not common.installed(p)])}
    loops = {name: Loop(folder, name.split()[1], options.threads)
             for name in PEERS if name not in left_out and common.chosen(name, options.only)}
    wanted = requests(cells, prompts)
    ours = f"qllm {options.format}"
    seconds: dict[str, list[float]] = {name: [] for name in (ours, *loops)}
    rng = np.random.default_rng(0)
    model.generate_batch(wanted[:options.batch_size], batch_size=options.batch_size)
    for loop in loops.values():
        make_all(loop, [min(cells, key=lambda cell: cell.length)], prompts)
    end = None if options.seconds is None else time.monotonic() + options.seconds
    for turn in range(options.rounds):
        if end is not None and turn > 0 and time.monotonic() > end:
            break
        taken = sample(cells, options.sample, rng)
        turns = {ours: lambda: model.generate_batch(wanted, batch_size=options.batch_size)}
        turns |= {name: lambda loop=loop: make_all(loop, taken, prompts)
                  for name, loop in loops.items()}
        names = list(turns)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            count = len(cells) if name == ours else len(taken)
            seconds[name].append(timed(turns[name]) / count)
    return {"benchmark": "study", "machine": common.machine(), "model": options.model,
            "options": {**vars(options), "folder": str(folder), "json": None},
            "cells": len(cells), "texts": len(wanted),
            "tokens": sum(request.config.max_new_tokens for request in wanted),
            "cells_tokens": sum(cell.length for cell in cells), "missing": left_out,
            "kernels": model.info().kernels, "seconds_per_cell": seconds,
            "ratios": {name: common.ratios(seconds[name], seconds[ours]) for name in loops}}


def show(result: dict[str, Any]) -> None:
    """Prints cells per second, and how many times faster than each loop."""
    machine, options = result["machine"], result["options"]
    print(f"{machine['processor']}, {machine['instruction_set']}, {options['threads']} threads,"
          f" {result['model']}, compute {options['compute']}")
    print(f"{result['cells']} cells, {result['cells_tokens']} tokens; qllm writes"
          f" {result['texts']} texts, {result['tokens']} tokens")
    for name, values in result["seconds_per_cell"].items():
        middle = common.spread([1 / value for value in values])
        line = f"  {name:20} {middle['median']:10.2f} cells/s"
        if name in result["ratios"]:
            ratio = common.spread(result["ratios"][name])
            line += (f"   qllm is {ratio['median']:.1f} times as fast ({ratio['low']:.1f} to"
                     f" {ratio['high']:.1f}, {ratio['rounds']} rounds)")
        print(line)
    for name, packages in result["missing"].items():
        print(f"  {name:20} left out: {packages} not installed")


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        description="Time a study's grid beside a loop over transformers' generate.",
        epilog="example: python benchmarks/study.py --model demo:llama --threads 1")
    made.add_argument("--model", default="demo:llama", help="a folder, demo:llama, or a random"
                      f" Llama: {', '.join(llama_folder.SHAPES)} (default: demo:llama)")
    made.add_argument("--folder", type=Path, help="where a random model is or will be (default:"
                      " under the system's folder for temporary files)")
    made.add_argument("--only", nargs="+", metavar="GLOB", help="loops by name")
    made.add_argument("--format", default="nf4", help="qllm's format (default: nf4)")
    made.add_argument("--compute", default="auto", help="qllm's compute mode (default: auto)")
    made.add_argument("--threads", type=int, default=_core.cpu_info()["threads_available"])
    made.add_argument("--temperatures", type=float, nargs="+",
                      default=[0.0, 0.25, 0.5, 0.65, 0.8, 1.0, 1.5])
    made.add_argument("--top-k", type=int, nargs="+", default=[0, 50, 200])
    made.add_argument("--seeds", type=int, default=4)
    made.add_argument("--prompts", type=int, default=8, choices=range(1, len(OPENINGS) + 1))
    made.add_argument("--prompt-tokens", type=int, default=64, help="at most (default: 64)")
    made.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32])
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--sample", type=int, default=4,
                      help="cells of each length that a loop makes in a round (default: 4)")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, help="start no round later than that")
    made.add_argument("--json", type=Path, help="also write every time to this file")
    return made


if __name__ == "__main__":
    common.main(parser(), run, show)
