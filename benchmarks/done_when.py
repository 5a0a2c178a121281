"""The targets of docs/performance.md: what is measured, the bar, and the figure from the results of
the benchmarks' parts. A figure is a list with a value a round, so that its spread can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common

Results = dict[str, dict[str, Any]]
FOUR_BIT_PEERS = ("onnxruntime MatMulNBits 32", "onnxruntime MatMulNBits 64", "torch int4pack",
                  "ggml Q4_0", "ggml Q4_K", "ggml IQ4_NL")
MEMORY_LIMIT = 0.85  # of the read loop: a kernel that comes as near is limited by memory


@dataclass(frozen=True)
class Target:
    """`figure` gives the values from the results, and raises KeyError where a part of them was not
    measured. A value meets the bar when it is at least (or, with `most`, at most) as great."""

    part: str
    what: str
    bar: float | Callable[[Results], float]
    figure: Callable[[Results], list[float]]
    unit: str = "x"
    most: bool = False


def seconds(results: Results, job: str, name: str) -> list[float]:
    """Seconds of a candidate of linear.py."""
    return results[job]["seconds"][name]


def faster(results: Results, job: str, ours: str, theirs: str) -> list[float]:
    """How many times faster than another candidate of linear.py."""
    return common.ratios(seconds(results, job, theirs), seconds(results, job, ours))


def of_read(results: Results, job: str, name: str) -> list[float]:
    """Share of the read loop, in percent."""
    nbytes = results[job]["candidates"][name]["nbytes"]
    limit = seconds(results, job, "read")
    return [100 * nbytes * r for r in common.ratios(limit, seconds(results, job, name))]


def of_peak(results: Results, job: str, name: str) -> list[float]:
    """Share of the peak of the unit that multiplies, in percent."""
    candidate = results[job]["candidates"][name]
    limit = seconds(results, job, f"peak {candidate['peak']}")
    return [100 * candidate["operations"] * r
            for r in common.ratios(limit, seconds(results, job, name))]


def best_peer(results: Results, job: str) -> list[float]:
    """How many times faster nf4 is than the fastest 4-bit peer of each round."""
    peers = [seconds(results, job, name) for name in FOUR_BIT_PEERS
             if name in results[job]["seconds"]]
    if not peers:
        raise KeyError("no 4-bit peer")
    return common.ratios([min(times) for times in zip(*peers)],
                         seconds(results, job, "qllm nf4 auto"))


def best_peer_bar(results: Results, job: str) -> float:
    """1.05 where memory limits our kernel or the best of theirs, else 1.3."""
    names = ["qllm nf4 auto", *(n for n in FOUR_BIT_PEERS if n in results[job]["seconds"])]
    nearest = max(common.spread(of_read(results, job, name))["median"] for name in names)
    return 1.05 if nearest > 100 * MEMORY_LIMIT else 1.3


def tokens(results: Results, group: str, ours: str, theirs: str,
           workload: str = "decode") -> list[float]:
    """Tokens per second of one candidate of model.py over another's."""
    speeds = results[f"model {group}"]["tokens_per_second"]
    return common.ratios(speeds[ours][workload], speeds[theirs][workload])


def has_bf16(results: Results) -> bool:
    """Whether the processor has AVX512-BF16."""
    for result in results.values():
        if features := result.get("machine", {}).get("features"):
            return "avx512bf16" in features
    raise KeyError("no result names the machine's features")


def decode_targets() -> list[Target]:
    """Kernels with one row of x."""
    found = []
    for name, one, two in (("bf16 auto", 95, 95), ("int8 auto", 92, 92), ("nf4 auto", 88, 90),
                           ("fp4 auto", 88, 90), ("nf4-dq auto", 75, 88)):
        for threads, bar in ((1, one), (2, two)):
            found.append(Target(
                "decode", f"{name.removesuffix(' auto')} decode, share of a plain read loop, "
                f"{threads} thread{'s' * (threads > 1)}", bar,
                lambda r, n=name, t=threads: of_read(r, f"decode {t}", f"qllm {n}"), "%"))
    for threads in (1, 2):
        found.append(Target(
            "decode", f"nf4 decode, share of its own speed on one matrix over and over, {threads} "
            f"thread{'s' * (threads > 1)}", 95, lambda r, t=threads: [100 * v for v in faster(
                r, f"decode {t}", "qllm nf4 auto", "qllm nf4 auto, one matrix")], "%"))
    for mode, bar in (("auto", 3.2), ("exact", 3.0)):
        found.append(Target(
            "decode", f"nf4 {mode} over our own bf16, kernel, 2 threads", bar,
            lambda r, m=mode: faster(r, "decode 2", f"qllm nf4 {m}", "qllm bf16 auto")))
    for threads in (1, 2):
        found.append(Target(
            "decode", f"kernel, nf4 auto against the best 4-bit peer, {threads} "
            f"thread{'s' * (threads > 1)}", lambda r, t=threads: best_peer_bar(r, f"peers {t}"),
            lambda r, t=threads: best_peer(r, f"peers {t}")))
    for threads in (1, 2):
        found.append(Target(
            "decode", f"8 rows at once, nf4 auto: time over 1 row, {threads} "
            f"thread{'s' * (threads > 1)}", 1.6,
            lambda r, t=threads: common.ratios(
                seconds(r, f"decode {t}", "qllm nf4 auto, 8 rows"),
                seconds(r, f"decode {t}", "qllm nf4 auto")), most=True))
    return found


def prefill_targets() -> list[Target]:
    """Kernels with 512 rows of x."""
    found = [Target("prefill", f"prefill of 512 tokens, nf4 auto against {peer}", bar,
                    lambda r, p=peer: faster(r, "prefill 2", "qllm nf4 auto", p))
             for peer, bar in (("bitsandbytes nf4", 1.2), ("ggml Q4_0", 1.2), ("torch bf16", 1.0))]
    return found + [
        Target("prefill", f"prefill of 512 tokens, share of the multiply peak: {name}", bar,
               lambda r, n=name: of_peak(r, "prefill 2", f"qllm {n}"), "%")
        for name, bar in (("nf4 exact", 87), ("nf4 auto", 80), ("int8 auto", 85))]


def model_targets() -> list[Target]:
    """Whole models."""
    found = [Target("model", f"{ours} over bf16 in tokens/s, whole model, 2 threads", bar,
                    lambda r, o=ours: tokens(r, "ours", f"qllm {o}", "qllm bf16"))
             for ours, bar in (("nf4", 3.0), ("int8", 1.8))]
    pairs = (("4bit", "nf4 head int8", "Q4_0"), ("4bit", "nf4 head int8", "Q4_K_M"),
             ("4bit", "nf4 head int8", "IQ4_NL"), ("8bit", "int8 head int8", "Q8_0"),
             ("bf16", "bf16", "BF16"))
    for workload, what, bar in (("decode", "tokens/s", 1.15),
                                ("batch", "tokens/s with 16 sequences that share a prompt", 1.5)):
        found += [Target("model", f"{what}: {ours.replace(' head', ', output embedding')} against "
                         f"llama.cpp {kind}", bar,
                         lambda r, g=group, o=ours, k=kind, w=workload: tokens(
                             r, f"llama.cpp-{g}", f"qllm {o}", f"llama.cpp {k}", w))
                  for group, ours, kind in pairs]
    for kind in ("nf4", "fp4"):
        found.append(Target(
            "model", f"tokens/s: {kind} against transformers + bitsandbytes",
            lambda r: 1.5 if has_bf16(r) else 5.0,
            lambda r, k=kind: tokens(r, "transformers-4bit", f"qllm {k}", f"bitsandbytes {k}")))
    found.append(Target(
        "model", "tokens/s: int8 against transformers + bitsandbytes", 2.0,
        lambda r: tokens(r, "transformers-8bit", "qllm int8", "bitsandbytes int8")))
    return found


def other_targets() -> list[Target]:
    """Loading, sampling, logit_stats, and a study's grid."""

    def of_step(r: Results) -> list[float]:
        draws = r["sampling"]["seconds"]["sample 150000: top_k 200, top_p 0.9"]["qllm"]
        speeds = r["model ours"]["tokens_per_second"]["qllm nf4"]["decode"]
        return [100 * t * common.spread(speeds)["median"] for t in draws]

    def stats(r: Results) -> list[float]:
        job = r["sampling"]["seconds"]["logit_stats 32000, 40 temperatures"]
        return [1e3 * t for t in job["qllm"]]

    def loading(r: Results) -> dict[str, Any]:
        return r["loading"]["results"][-1]  # on all threads

    def against_bare(r: Results) -> list[float]:
        times = loading(r)["seconds"]
        return [100 * v for v in common.ratios(times["pass"], times["load"])]

    def against_bitsandbytes(r: Results) -> list[float]:
        return [loading(r)["bitsandbytes"]["seconds"] / t for t in loading(r)["seconds"]["load"]]

    return [
        Target("loading", "loading bf16 to nf4, share of a bare loop that reads and quantizes", 80,
               against_bare, "%"),
        Target("loading", "loading bf16 to nf4, against transformers + bitsandbytes", 10,
               against_bitsandbytes),
        Target("loading", "peak resident memory over the quantized model plus one layer", 1.15,
               lambda r: [loading(r)["memory"]["over"]], most=True),
        Target("sampling", "sampling from 150,000 logits, top_k 200, top_p 0.9, share of the nf4 "
               "decode step of the 1.1 B shape", 1, of_step, "%", most=True),
        Target("sampling", "logit_stats, 40 temperatures, vocabulary 32,000, one core, ms", 3,
               stats, " ms", most=True),
        Target("study", "texts of a study's grid, nf4 against a loop over transformers' generate, "
               "demo model", 200, lambda r: r["study demo"]["ratios"]["transformers bf16"]),
        Target("study", "the same, 1.1 B shape", 20,
               lambda r: r["study 1.1b"]["ratios"]["transformers bf16"]),
    ]


def targets() -> list[Target]:
    """All of them, in the order of the page."""
    return [*decode_targets(), *prefill_targets(), *model_targets(), *other_targets()]


def evaluate(target: Target, results: Results) -> dict[str, Any]:
    """The bar, the figure with its spread, and whether it is met; figure None where parts were not
    measured."""
    found: dict[str, Any] = {"part": target.part, "what": target.what, "unit": target.unit,
                             "most": target.most, "figure": None, "met": None, "bar": None}
    try:
        found["bar"] = target.bar if isinstance(target.bar, (int, float)) else target.bar(results)
        found["figure"] = common.spread(target.figure(results))
    except KeyError:
        return found
    median = found["figure"]["median"]
    found["met"] = median <= found["bar"] if target.most else median >= found["bar"]
    return found


def number(value: float, unit: str) -> str:
    """A figure as the page shows it."""
    digits = 1 if unit == "%" else 2
    return f"{value:.{digits}f}{' ' * (unit == '%')}{unit}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `evaluate` in Markdown."""
    lines = ["| what | bar | measured | middle half of the rounds | met |", "|---|---|---|---|---|"]
    for row in rows:
        sign = "at most" if row["most"] else "at least"
        bar = "" if row["bar"] is None else f"{sign} {row['bar']:g}{' ' * (row['unit'] == '%')}"
        bar += row["unit"] if bar else ""
        if row["figure"] is None:
            lines.append(f"| {row['what']} | {bar} | not measured | | |")
            continue
        figure = row["figure"]
        low, high = (number(figure[key], row["unit"]) for key in ("low", "high"))
        lines.append(f"| {row['what']} | {bar} | {number(figure['median'], row['unit'])} | {low} "
                     f"to {high} | {'yes' if row['met'] else '**no**'} |")
    return "\n".join(lines)
