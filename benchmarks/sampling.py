"""Drawing one token, and comparing two rows of logits, beside PyTorch and transformers, in one
process.

    python benchmarks/sampling.py --vocab 150000 --json sampling.json

In each round every candidate runs once, in turn, so that all see the same neighbours on the
machine; medians over rounds are printed, and medians of the ratios to ours. Every candidate draws
from the same row with the same settings: torch with topk, softmax, cumsum and multinomial as
small generators do, transformers with its logits processors, softmax and multinomial. Ours also
gives the two log-probabilities. logit_stats compares a row at all temperatures with the direct
float64 sums of the same measures in torch, which leave out the coupled agreement. Needs
pip install "qllm[test]".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qllm
from qllm import _core

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k 200, top_p 0.9": {"temperature": 0.7, "top_k": 200, "top_p": 0.9},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "all tokens": {"temperature": 0.7},
    "top_k 200, top_p 0.9, penalty": {
        "temperature": 0.7, "top_k": 200, "top_p": 0.9, "repetition_penalty": 1.1,
    },
}  # fmt: skip

Calls = dict[str, Callable[[], Any]]


def row(vocab: int, seed: int) -> np.ndarray:
    """Logits with the shape of a language model's: a broad bulk and a few likely tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.0, vocab)
    likely = rng.choice(vocab, min(vocab, 60), replace=False)
    logits[likely] += rng.gamma(3.0, 2.0, len(likely))
    return logits.astype(np.float32)


def by_torch(logits: Any, history: Any, setting: dict[str, Any]) -> Any:
    """One token, with plain torch functions."""
    import torch

    penalty = setting.get("repetition_penalty", 1.0)
    if penalty != 1.0:
        chosen = logits[history]
        logits = logits.scatter(0, history, torch.where(chosen < 0, chosen * penalty,
                                                        chosen / penalty))
    if setting["temperature"] == 0:
        return logits.argmax()
    ids = None
    logits = logits / setting["temperature"]
    if "top_k" in setting:
        logits, ids = logits.topk(setting["top_k"])
    p = torch.softmax(logits, -1)
    if "top_p" in setting:
        if ids is None:
            p, ids = p.sort(descending=True)
        p = torch.where(p.cumsum(-1) - p < setting["top_p"], p, 0.0)
    if "min_p" in setting:
        p = torch.where(p >= setting["min_p"] * p.max(), p, 0.0)
    drawn = torch.multinomial(p, 1)
    return drawn if ids is None else ids[drawn]


def transformers_call(logits: Any, history: Any, setting: dict[str, Any]) -> Callable[[], Any]:
    """One token, with the logits processors of transformers."""
    import torch
    from transformers.generation import logits_process as hf

    steps: list[Any] = []
    if "repetition_penalty" in setting:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
    if setting["temperature"] > 0:
        steps.append(hf.TemperatureLogitsWarper(setting["temperature"]))
    if "top_k" in setting:
        steps.append(hf.TopKLogitsWarper(setting["top_k"]))
    if "top_p" in setting:
        steps.append(hf.TopPLogitsWarper(setting["top_p"]))
    if "min_p" in setting:
        steps.append(hf.MinPLogitsWarper(setting["min_p"]))

    @torch.inference_mode()
    def call() -> Any:
        scores = logits[None]
        for step in steps:
            scores = step(history[None], scores)
        if setting["temperature"] == 0:
            return scores.argmax(-1)
        return torch.multinomial(torch.softmax(scores, -1), 1)

    return call


def sampling_calls(vocab: int, setting: dict[str, Any]) -> Calls:
    """The candidates that draw one token."""
    import torch

    logits, history = row(vocab, 1), np.arange(0, min(vocab, 2000), 2)
    tensor, past = torch.from_numpy(logits), torch.from_numpy(history)
    step = iter(range(1 << 30))
    penalized = {"history": history} if "repetition_penalty" in setting else {}

    @torch.inference_mode()
    def torch_call() -> Any:
        return by_torch(tensor, past, setting)

    return {
        "qllm": lambda: qllm.sample(logits, seed=1, step=next(step), **penalized, **setting),
        "torch": torch_call,
        "transformers": transformers_call(tensor, past, setting),
    }


def stats_calls(vocab: int, temperatures: np.ndarray) -> Calls:
    """The candidates that compare two rows at all temperatures."""
    import torch

    ref = row(vocab, 2)
    test = (ref + np.random.default_rng(3).normal(0, 0.1, vocab)).astype(np.float32)
    a, b = (torch.from_numpy(x).double() for x in (ref, test))

    @torch.inference_mode()
    def torch_call() -> Any:
        found = []
        for temperature in temperatures:
            log_p, log_q = ((x / temperature).log_softmax(-1) for x in (a, b))
            p, q = log_p.exp(), log_q.exp()
            found.append((
                (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum(), (p - q).abs().sum() / 2,
                -(p * log_p).sum(), -(q * log_q).sum(), p.max(),
            ))  # fmt: skip
        return found

    return {"qllm": lambda: qllm.logit_stats(ref, test, temperatures), "torch": torch_call}


def measure(calls: Calls, rounds: int) -> dict[str, list[float]]:
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
        description="Time the sampler and logit_stats beside torch and transformers.",
        epilog="example: python benchmarks/sampling.py --vocab 150000",
    )
    parser.add_argument("--vocab", type=int, default=150_000, help="tokens (default 150000)")
    parser.add_argument("--stats-vocab", type=int, default=32_000, help="for logit_stats")
    parser.add_argument("--temperatures", type=int, default=40, help="for logit_stats")
    parser.add_argument("--threads", type=int, default=1, help="of torch; a row is ours on one")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    info = _core.cpu_info()
    print(f"{info['model']}, {info['default']}, torch on {options.threads} threads, medians of "
          f"{options.rounds} rounds in ms, and times ours")
    jobs = {f"sample {options.vocab}: {name}": sampling_calls(options.vocab, setting)
            for name, setting in SETTINGS.items()}
    temperatures = np.linspace(0.05, 2.0, options.temperatures)
    jobs[f"logit_stats {options.stats_vocab}, {options.temperatures} temperatures"] = stats_calls(
        options.stats_vocab, temperatures)
    seconds = {}
    for job, calls in jobs.items():
        seconds[job] = measure(calls, options.rounds)
        ours = seconds[job]["qllm"]
        parts = [f"qllm {1e3 * statistics.median(ours):.3f}"]
        for name, times in seconds[job].items():
            if name != "qllm":
                ratio = statistics.median(t / o for t, o in zip(times, ours))
                parts.append(f"{name} {1e3 * statistics.median(times):.3f} ({ratio:.1f}x)")
        print(f"{job:52} {', '.join(parts)}")
    if options.json:
        report = {"cpu": info["model"], "isa": info["default"], "threads": options.threads,
                  "vocab": options.vocab, "stats_vocab": options.stats_vocab,
                  "temperatures": temperatures.tolist(), "seconds": seconds}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
