"""Runs the benchmarks behind docs/performance.md and writes that page.

    python benchmarks/run.py                       every part that has no result yet, then the page
    python benchmarks/run.py decode prefill        only these parts, and the page from all results
    python benchmarks/run.py --fresh model         anew, although there are results

Each part is a few runs of the benchmarks beside this file, each in a process of its own with a
result in JSON under --results; a run that has one is not repeated, so that an interrupted run goes
on. Each machine has results and a page of its own (--results, --page). The page has the machine, the versions, every target with its bar and figure, and what
benchmarks/notes.md says about them; docs/performance.json has the same rows and every run's
summary.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import done_when
import llama_folder

import qllm

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
OURS = ("bf16 auto", "int8 auto", "nf4 auto", "nf4 exact", "nf4 int8", "fp4 auto", "nf4-dq auto")


SLOW = ("transformers-4bit", "transformers-8bit", "transformers-bf16")


def linear(threads: int, *words: str, names: tuple[str, ...]) -> list[str]:
    """The command of a run of linear.py."""
    return ["linear.py", "--threads", str(threads), *words, "--only", *names]


def jobs(folder: Path) -> dict[str, dict[str, list[str]]]:
    """part -> job -> command, without --json and --seconds; `folder` has the whole model."""
    ours = tuple(f"qllm {name}" for name in OURS)
    peers = ("qllm nf4 auto", "bitsandbytes nf4", *done_when.FOUR_BIT_PEERS)
    wide = ("qllm bf16 auto", "qllm nf4 exact", "qllm nf4 auto", "qllm int8 auto",
            "bitsandbytes nf4", "bitsandbytes int8", "ggml Q4_0", "ggml Q8_0", "ggml BF16",
            "torch bf16", "torch int4pack", "onnxruntime MatMulNBits 32")
    decode, prefill = {}, {}
    for threads in (1, 2):
        decode[f"decode {threads}"] = linear(threads, "--more-rows", "8", "--in-cache", names=ours)
        decode[f"peers {threads}"] = linear(threads, names=peers)
        decode[f"wide peers {threads}"] = linear(threads, names=(
            "qllm bf16 auto", "qllm int8 auto", "torch bf16", "ggml BF16", "ggml Q8_0",
            "bitsandbytes int8"))
        decode[f"8 rows {threads}"] = linear(threads, "--rows", "8", names=peers)
        decode[f"16 rows {threads}"] = linear(threads, "--rows", "16", names=peers)
        prefill[f"prefill {threads}"] = linear(threads, "--rows", "512", "--rounds", "9",
                                               names=wide)
    from model import GROUPS

    return {
        "decode": decode,
        "prefill": prefill,
        "model": {f"model {group}": ["model.py", "--group", group, "--threads", "2", "--folder",
                                     str(folder),
                                     *(["--workloads", "decode,prefill"] if group in SLOW else [])]
                  for group in GROUPS},
        "loading": {"loading": ["loading.py", str(folder), "--bitsandbytes"]},
        "sampling": {"sampling": ["sampling.py"]},
        "study": {"study demo": ["study.py", "--threads", "2"],
                  "study 1.1b": ["study.py", "--threads", "2", "--model", "1.1b", "--folder",
                                 str(folder), "--temperatures", "0", "0.5", "0.8", "1",
                                 "--top-k", "0", "200", "--seeds", "3", "--prompts", "4",
                                 "--batch-size", "128", "--sample", "1", "--rounds", "3"]},
    }


PARTS = ("decode", "prefill", "model", "loading", "sampling", "study", "page")
LIMITED = ("linear.py", "model.py", "study.py")  # those that take --seconds


def run_job(name: str, command: list[str], out: Path, seconds: float,
            extra: dict[str, list[str]]) -> str | None:
    """Runs one command; None, or why there is no result."""
    script = HERE / command[0]
    if not script.exists():
        return f"there is no benchmarks/{command[0]}"
    unfinished = out.with_suffix(".unfinished")
    words = [sys.executable, str(script), *command[1:], *extra.get(command[0], ()),
             "--json", str(unfinished)]
    if command[0] in LIMITED:
        words += ["--seconds", str(seconds)]
    package = str(Path(qllm.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    print(f"== {name}: {' '.join(words[1:])}", flush=True)
    try:
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path},
                              timeout=600 + 10 * seconds, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - start:.0f} s"
    if done.returncode != 0 or not unfinished.exists():
        return (done.stderr.strip().splitlines() or ["no result"])[-1]
    unfinished.replace(out)
    print(f"   {time.monotonic() - start:.0f} s", flush=True)
    return None


def result_file(folder: Path, job: str) -> Path:
    """Where the result of a job lies."""
    return folder / f"{job.replace(' ', '-')}.json"


def collect(names: list[str], folder: Path) -> done_when.Results:
    """The results of these jobs that are there."""
    return {job: json.loads(result_file(folder, job).read_text(encoding="utf-8"))
            for job in names if result_file(folder, job).exists()}


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What docs/performance.json keeps of a run: no single times, no folder of one machine."""
    kept = {key: value for key, value in result.items() if key not in ("seconds", "folder")}
    if "options" in kept:
        kept["options"] = {key: v for key, v in kept["options"].items() if key != "folder"}
    if "seconds_per_cell" in kept:
        kept["seconds_per_cell"] = {name: common.spread(values)
                                    for name, values in kept["seconds_per_cell"].items()}
    if "tokens_per_second" in kept:
        kept["tokens_per_second"] = {
            name: {workload: common.spread(values) for workload, values in entry.items()}
            for name, entry in kept["tokens_per_second"].items()}
    return kept


def layers_table(result: dict[str, Any]) -> str:
    """One run of linear.py in Markdown."""
    lines = ["| | ms | GB/s | GFLOP/s | of read | of peak |", "|---|---|---|---|---|---|"]
    for name, entry in result["candidates"].items():
        t = entry["seconds"]["median"]
        ms = f"{1e3 * t:.3f}" if entry["work"] < 1e6 else ""
        speed = f"{entry['nbytes'] / t / 1e9:.1f}" if entry["nbytes"] else ""
        flops = f"{entry['operations'] / t / 1e9:.0f}" if entry["operations"] else ""
        shares = [f"{100 * entry[key]['median']:.0f} %" if key in entry else ""
                  for key in ("share_of_read", "share_of_peak")]
        lines.append(f"| {name} | {ms} | {speed} | {flops} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def models_table(results: done_when.Results) -> str:
    """All runs of model.py in Markdown."""
    lines = ["| run | | decode | 16 sequences | prefill of 512 |", "|---|---|---|---|---|"]
    for job, result in results.items():
        for name, entry in result.get("tokens_per_second", {}).items():
            cells = [f"{common.spread(entry[w])['median']:.1f}" if w in entry else ""
                     for w in ("decode", "batch", "prefill")]
            lines.append(f"| {job.removeprefix('model ')} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def study_table(results: done_when.Results) -> str:
    """All runs of study.py in Markdown."""
    lines = ["| model | | texts/s | qllm is as many times as fast |", "|---|---|---|---|"]
    for result in results.values():
        for name, values in result.get("seconds_per_cell", {}).items():
            speed = common.spread([1 / value for value in values])["median"]
            ratio = result["ratios"].get(name)
            times = "" if ratio is None else f"{common.spread(ratio)['median']:.0f}"
            lines.append(f"| {result['model']} | {name} | {speed:.2f} | {times} |")
    return "\n".join(lines)


def page(results: done_when.Results, rows: list[dict[str, Any]], notes: str) -> str:
    """docs/performance.md."""
    known = [r["machine"] for r in results.values() if "processor" in r.get("machine", {})]
    machine = known[0] if known else common.machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    met = sum(row["met"] is True for row in rows)
    parts = [
        "# How fast", "",
        "Written by `benchmarks/run.py`; notes are at its end. "
        f"Machine: {machine['processor']}, instruction set {machine['instruction_set']}, "
        f"{machine['threads_available']} threads, on {machine['date']}. Versions: {versions}.", "",
        "Candidates alternate within each round, in one process; a figure is the median of the "
        "ratios within the rounds. Layers: W 4096 x 11008, one row of x unless said, weights that "
        "come from memory. Whole model: random weights of a Llama's shape with 1.1 billion of "
        "them, a prompt of 32 tokens, 64 new ones.", "",
        f"{met} of {len(rows)} targets are met{_unmeasured(rows)}.", "", done_when.table(rows), ""]
    for job, result in results.items():
        if "candidates" in result:
            parts += [f"## Layer: {job} thread{'s' * (job[-1] != '1')}", "", layers_table(result),
                      ""]
    if any("tokens_per_second" in result for result in results.values()):
        parts += ["## Whole model, tokens per second", "", models_table(results), ""]
    if any("seconds_per_cell" in result for result in results.values()):
        parts += ["## A study's grid beside a loop over generate", "", study_table(results), ""]
    return "\n".join([*parts, notes.strip(), ""])


def _unmeasured(rows: list[dict[str, Any]]) -> str:
    missing = sum(row["figure"] is None for row in rows)
    return f", {missing} were not measured" if missing else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the benchmarks and write docs/performance.md.",
        epilog="example: python benchmarks/run.py decode prefill --seconds 20")
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help="out of " + ", ".join(PARTS) + " (default: all)")
    parser.add_argument("--results", type=Path,
                        default=Path(tempfile.gettempdir()) / "qllm-bench" / "results")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that have a result")
    parser.add_argument("--seconds", type=float, default=45,
                        help="for the rounds of a run, its preparation left out (default 45)")
    parser.add_argument("--folder", type=Path, default=llama_folder.default_folder("1.1b"),
                        help="where the whole model is or will be")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    parser.add_argument("--page", default="performance", metavar="NAME",
                        help="of the page and its JSON (default performance, which has the notes; "
                        "the page of a second machine has another)")
    for script in ("linear", "model"):
        parser.add_argument(f"--{script}", nargs="+", default=[], metavar="WORD",
                            help=f"further options of {script}.py, after a space: "
                            f"--{script} ' --rounds=5'")
    options = parser.parse_args()
    parts = jobs(options.folder)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    options.results.mkdir(parents=True, exist_ok=True)
    extra = {f"{script}.py": [word.strip() for word in getattr(options, script)]
             for script in ("linear", "model")}
    for part in options.parts or parts:
        for job, command in parts.get(part, {}).items():
            out = result_file(options.results, job)
            if out.exists() and not options.fresh:
                continue
            if str(options.folder) in command and command[0] == "loading.py":
                llama_folder.make(options.folder, llama_folder.SHAPES["1.1b"])
            if why := run_job(job, command, out, options.seconds, extra):
                print(f"   no result: {why}", flush=True)
    results = collect([job for part in parts.values() for job in part], options.results)
    rows = [done_when.evaluate(target, results) for target in done_when.targets()]
    notes = HERE / "notes.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    if options.page != "performance":
        text = "Notes, on this machine too, are on [the page of the first one](performance.md)."
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / f"{options.page}.md").write_text(page(results, rows, text), encoding="utf-8")
    common.write_json(options.docs / f"{options.page}.json",
                      {"targets": rows, "runs": {job: brief(r) for job, r in results.items()}})
    print(done_when.table(rows))


if __name__ == "__main__":
    main()
