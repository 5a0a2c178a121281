"""What a GPU can do, and how near to it whole models come: one command for each table.

    python benchmarks/gpu.py limits  --json limits.json
    python benchmarks/gpu.py decode  --shapes 7b 13b --json decode.json
    python benchmarks/gpu.py prefill --shapes 7b --json prefill.json
    python benchmarks/gpu.py peers   --shapes 7b --json peers.json

limits   its memory's bandwidth, by a kernel that only reads and by a copy, and the time from one
         kernel of a graph to the next, plain and where each may start before the last one ends
decode   tokens per second of every format, with 1, 8 and 64 sequences, and which share that is of
         what the bandwidth allows: a step reads the weights once, and each sequence's keys and
         values
prefill  tokens per second from a prompt to its first token
peers    decode beside transformers in bfloat16, and with bitsandbytes' layers, on PyTorch

Weights are random (csrc/core/random_weight.h) and made on the device; the output embedding stays
bfloat16. A model is made for one shape and format at a time. What cannot be made or run, for want
of memory or of a package, is left out with the reason, and the rest goes on; so is what was not
begun after --seconds. A step is timed from the call to its token on the host; the median of all
steps of all rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch_models

from qllm import QllmError, _core
from qllm.cli.bench_models import SHAPES, Random

FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
READ_BYTES = 4 << 30  # or a quarter of what is free
KEY_BYTES = {"auto": 2, "exact": 4}  # of a value that is held

Row = dict[str, Any]


def device_name(options: argparse.Namespace) -> str:
    """The device, whose library is loaded first where one is named."""
    return _core._load_device(options.library) if options.library else str(options.device)


def limits_of(device: str, nbytes: int | None) -> Row:
    """What the device can do."""
    try:
        info = _core.device_info(device)
        if info is None:
            raise SystemExit(f"{device} is not a GPU; see qllm bench")
        found = _core.device_limits(device, nbytes or min(READ_BYTES, info["free"] // 4))
    except QllmError as error:
        raise SystemExit(str(error)) from None
    return {**info, **(found or {})}


# ------------------------------------------------------------------------------------ our decoder


def step_seconds(decoder: Any, vocab: int, options: argparse.Namespace, batch: int) -> list[float]:
    """Of every decode step of `batch` sequences that share a prompt, which is not timed; the steps
    of one unmeasured round come first."""
    rng = np.random.default_rng(0)
    prompt, rows, times = rng.integers(0, vocab, options.context), np.arange(batch), []
    for number in range(-1, options.rounds):
        first = decoder.sequence()
        want = np.arange(len(prompt)) == len(prompt) - 1
        tokens = decoder.step_draw([first] * len(prompt), prompt, want, [0], temperature=0.0)[0]
        sequences = [first, *(first.fork() for _ in range(batch - 1))]
        tokens = np.repeat(tokens, batch)
        for _ in range(options.new_tokens):
            start = time.perf_counter()
            tokens = decoder.step_draw(sequences, tokens, None, rows, temperature=0.0)[0]
            if number >= 0:
                times.append(time.perf_counter() - start)
    return times


def prefill_seconds(decoder: Any, vocab: int, options: argparse.Namespace,
                    tokens: int) -> list[float]:
    """From a prompt of so many tokens to its first token; one unmeasured time comes first."""
    prompt, times = np.random.default_rng(1).integers(0, vocab, tokens), []
    want = np.arange(tokens) == tokens - 1
    for number in range(-1, options.rounds):
        start, sequence = time.perf_counter(), decoder.sequence()
        decoder.step_draw([sequence] * tokens, prompt, want, [0], temperature=0.0)
        if number >= 0:
            times.append(time.perf_counter() - start)
    return times


def decode(subject: Random, format: str, options: argparse.Namespace, read: float) -> Row:
    """The entry of a format in the table of decode."""
    ready, found = subject.ready(format), {}
    positions = options.context + (options.new_tokens + 1) / 2  # of a step, on average
    kv = positions * subject.kv_bytes(KEY_BYTES[options.compute])
    for batch in options.batch:
        seconds = common.spread(step_seconds(ready.decoder, subject.vocab, options, batch))
        least = (ready.bytes_per_token + batch * kv) / read
        found[str(batch)] = {"step_seconds": seconds, "least_seconds": least,
                             "tokens_per_second": batch / seconds["median"],
                             "share": least / seconds["median"]}
    return {"bytes_per_token": ready.bytes_per_token, "bits_per_weight": ready.bits_per_weight,
            "kernels": ready.kernels, "decode": found}


def prefill(subject: Random, format: str, options: argparse.Namespace, read: float) -> Row:
    """The entry of a format in the table of prefill."""
    ready, found = subject.ready(format), {}
    for tokens in options.tokens:
        seconds = common.spread(prefill_seconds(ready.decoder, subject.vocab, options, tokens))
        found[str(tokens)] = {"seconds": seconds, "tokens_per_second": tokens / seconds["median"],
                              "operations_per_second":
                                  2 * subject.weights * tokens / seconds["median"]}
    return {"kernels": ready.kernels, "prefill": found}


def ours(shape: str, format: str, options: argparse.Namespace, device: str, read: float,
         measure: Callable[[Random, str, argparse.Namespace, float], Row]) -> Row:
    """A model of one shape and format, measured; or why not."""
    try:
        subject = Random(shape, [format], device=device, compute=options.compute, threads=None,
                         isa=None)
        return measure(subject, format, options, read)
    except QllmError as error:
        return {"left_out": str(error)}
    finally:
        gc.collect()  # the memory of the device


def pairs(options: argparse.Namespace) -> Iterator[tuple[str, str, str | None]]:
    """Shapes and formats, and why one is not begun."""
    end = None if options.seconds is None else time.monotonic() + options.seconds
    for shape in options.shapes:
        for format in options.formats:
            late = end is not None and time.monotonic() > end
            yield shape, format, f"not begun after {options.seconds:g} s" if late else None


def table(options: argparse.Namespace,
          measure: Callable[[Random, str, argparse.Namespace, float], Row]) -> Row:
    """The limits of the device, and an entry for each shape and format."""
    device = device_name(options)
    limits, rows = limits_of(device, options.bytes), []
    for shape, format, late in pairs(options):
        found = {"left_out": late} if late else ours(
            shape, format, options, device, limits["read_bytes_per_second"], measure)
        rows.append({"shape": shape, "format": format, **found})
        keep(options, limits, rows)
    return result(options, limits=limits, rows=rows)


def keep(options: argparse.Namespace, limits: Row, rows: list[Row]) -> None:
    """A line and the JSON as soon as an entry is there: an interruption loses none."""
    row = rows[-1]
    print(f"# {row['shape']} {row.get('engine', 'qllm')} {row['format']}: "
          f"{row.get('left_out', 'measured')}", flush=True)
    common.write_json(options.json, result(options, limits=limits, rows=rows))


def result(options: argparse.Namespace, **found: Any) -> Row:
    """What is written to --json: after each entry, and at the end."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in vars(options).items() if key != "json"}
    return {"benchmark": f"gpu {options.table}", "machine": common.machine(), "options": settings,
            **found}


# ------------------------------------------------------------------------------------------ peers


def peers(options: argparse.Namespace) -> Row:
    """Decode of ours and of PyTorch's engines, for each shape and format."""
    device = device_name(options)
    limits, rows = limits_of(device, options.bytes), []
    for shape, format, late in pairs(options):
        for engine in ("qllm", "torch"):
            if late:
                found: Row = {"left_out": late}
            elif engine == "qllm":
                found = ours(shape, format, options, device, limits["read_bytes_per_second"],
                             decode)
            else:
                found = torch_models.measure(SHAPES[shape], format, options)
            rows.append({"shape": shape, "format": format, "engine": engine, **found})
            keep(options, limits, rows)
    return result(options, limits=limits, rows=rows)


# --------------------------------------------------------------------------------------- printing


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A table in Markdown."""
    for line in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(line) + " |")


def show_limits(found: Row) -> None:
    limits = found["limits"]
    print_table(["what", "measured"], [
        ["device", f"{limits['name']}, {limits['variant']}, driver for {limits['driver']}"],
        ["memory", f"{limits['memory'] / 1e9:.1f} GB, {limits['free'] / 1e9:.1f} GB free"],
        ["reading", f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s"],
        ["copying, reads and writes", f"{limits['copy_bytes_per_second'] / 1e9:.1f} GB/s"],
        ["from one kernel of a graph to the next", f"{1e6 * limits['edge_seconds']:.2f} us"],
        ["the same, starting early", f"{1e6 * limits['dependent_edge_seconds']:.2f} us"],
    ])


def show_decode(found: Row) -> None:
    batches = [str(batch) for batch in found["options"]["batch"]]
    head = ["shape", "engine", "format", "bytes/token"]
    for batch in batches:
        head += [f"tok/s, {batch}", "of bandwidth", "of bf16"]
    speeds = {(row["shape"], row.get("engine"), batch): entry["tokens_per_second"]
              for row in found["rows"] if row["format"] == "bf16"
              for batch, entry in row.get("decode", {}).items()}
    rows = []
    for row in found["rows"]:
        cells = [row["shape"], row.get("engine", "qllm"), row["format"]]
        cells.append(f"{row['bytes_per_token'] / 1e9:.2f} GB" if "bytes_per_token" in row else "")
        for batch in batches:
            entry = row.get("decode", {}).get(batch)
            base = speeds.get((row["shape"], row.get("engine"), batch))
            cells += [f"{entry['tokens_per_second']:.1f}",
                      f"{100 * entry['share']:.0f} %" if "share" in entry else "",
                      f"{entry['tokens_per_second'] / base:.2f}x" if base else "",
                      ] if entry else ["", "", ""]
        rows.append(cells)
    print_table(head, rows)
    show_left_out(found)


def show_prefill(found: Row) -> None:
    tokens = [str(n) for n in found["options"]["tokens"]]
    head = ["shape", "format"]
    for n in tokens:
        head += [f"tok/s, {n} tokens", "Tflop/s"]
    rows = []
    for row in found["rows"]:
        cells = [row["shape"], row["format"]]
        for n in tokens:
            entry = row.get("prefill", {}).get(n)
            cells += [f"{entry['tokens_per_second']:.0f}",
                      f"{entry['operations_per_second'] / 1e12:.1f}"] if entry else ["", ""]
        rows.append(cells)
    print_table(head, rows)
    show_left_out(found)


def show_left_out(found: Row) -> None:
    for row in found["rows"]:
        if "left_out" in row:
            print(f"{row['shape']} {row.get('engine', 'qllm')} {row['format']} is left out: "
                  f"{row['left_out']}")
        elif row.get("kernels"):
            print(f"{row['shape']} {row['format']}: {'; '.join(row['kernels'])}")


def parser() -> argparse.ArgumentParser:
    """The options of each table."""
    made = argparse.ArgumentParser(description="Measure a GPU and the models on it.",
                                   epilog="example: python benchmarks/gpu.py decode --shapes 7b")
    tables = made.add_subparsers(dest="table", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", default="cuda")
    shared.add_argument("--library", type=Path, help="a library of kernels to load first, whose "
                        "device is then measured")
    shared.add_argument("--bytes", type=int, help="of memory that the limits are measured on "
                        "(default: 4 GiB, or a quarter of what is free)")
    shared.add_argument("--json", type=Path, help="also write everything to this file")
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), metavar="SHAPE",
                        default=["7b", "13b", "70b", "falcon-7b", "falcon-40b"],
                        help=f"out of {', '.join(SHAPES)}")
    models.add_argument("--formats", nargs="+", choices=FORMATS, metavar="FORMAT",
                        default=list(FORMATS), help=f"out of {', '.join(FORMATS)}")
    models.add_argument("--compute", choices=sorted(KEY_BYTES), default="auto")
    models.add_argument("--rounds", type=int, default=3)
    models.add_argument("--seconds", type=float, help="begin no model later than that")
    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    steps.add_argument("--new-tokens", type=int, default=64)
    steps.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="N")

    tables.add_parser("limits", parents=[shared])
    tables.add_parser("decode", parents=[shared, models, steps])
    tables.add_parser("prefill", parents=[shared, models]).add_argument(
        "--tokens", nargs="+", type=int, default=[512, 2048], metavar="N")
    tables.add_parser("peers", parents=[shared, models, steps]).add_argument(
        "--torch-device", default="cuda", help="where PyTorch computes (default: cuda)")
    return made


def run(options: argparse.Namespace) -> Row:
    """Measures a table."""
    if options.table == "limits":
        return result(options, limits=limits_of(device_name(options), options.bytes))
    if options.table == "peers":
        return peers(options)
    return table(options, decode if options.table == "decode" else prefill)


def show(found: Row) -> None:
    """Prints it."""
    printers = {"limits": show_limits, "prefill": show_prefill}
    printers.get(found["options"]["table"], show_decode)(found)


if __name__ == "__main__":
    common.main(parser(), run, show)
