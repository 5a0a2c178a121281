"""qllm's layers in torch: what a module costs over its kernel, and a transformers model with them
beside the same model in bfloat16 and with bitsandbytes.

    python benchmarks/beside_torch.py --threads 2 --json torch.json
    python benchmarks/beside_torch.py --backend     bitsandbytes computes with qllm's kernels

Layers: one row of x; the module called as any torch module is, and the kernel called with
addresses, in turn; what counts is the median of the differences. Models: --shape, a random Llama,
and the demo model; greedy, one sequence, the time of the prompt included. They alternate in each
round; what counts is the median of the ratios within the rounds. All in one process. Needs pip install "qllm[test]". (A file named torch.py here would be found
in place of torch.)
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

import common
import llama_folder
from common import Candidate

from qllm import _core

LAYERS = ((64, 16), (1024, 1024), (4096, 4096))  # in_features, out_features
PAIRS = 201  # of calls, for a layer
COPIES = 3   # of a layer, one after the other, as a model's
FORMATS = ("nf4", "int8")
ENGINES = ("bf16", *(f"{library} {format}" for format in FORMATS
                     for library in ("qllm", "bitsandbytes")))


def overheads() -> dict[str, list[float]]:
    """Seconds of a module's call beyond its bare kernel's, for every shape and format: call by call
    in turn, so that both begin with the caches that a kernel leaves behind."""
    import torch

    from qllm.integrations.torch import Linear

    found = {}
    for cols, rows in LAYERS:
        x, y = torch.randn(1, cols), torch.empty(1, rows)
        for format in FORMATS:
            layers = [Linear.from_linear(torch.nn.Linear(cols, rows, bias=False), format)
                      for _ in range(COPIES)]
            calls = [(layer.weight.data_ptr(), layer.weight.numel(), x.data_ptr(), 0, 1, cols, 0, 0,
                      y.data_ptr(), rows, "auto", 6.0) for layer in layers]
            differences = []
            for turn in range(PAIRS + COPIES):
                start = time.perf_counter()
                layers[turn % COPIES](x)
                middle = time.perf_counter()
                _core.image_linear(*calls[(turn + 1) % COPIES])
                differences.append(2 * middle - start - time.perf_counter())
            found[f"{rows} x {cols} {format}"] = differences[COPIES:]
    return found


def load(folder: Path, engine: str) -> Any:
    """The model of a folder in one of ENGINES, as transformers loads it."""
    import torch
    import transformers

    from qllm.integrations.torch import quantize_

    library, _, format = engine.partition(" ")
    options: dict[str, Any] = {}
    if library == "bitsandbytes":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            **({"load_in_8bit": True} if format == "int8" else {
                "load_in_4bit": True, "bnb_4bit_quant_type": format,
                "bnb_4bit_compute_dtype": torch.bfloat16}))
        options["device_map"] = "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **options).eval()
    if library == "qllm":
        quantize_(model, format)
    model.generation_config.eos_token_id = None
    return model


def model_candidates(name: str, folder: Path, options: argparse.Namespace) -> list[Candidate]:
    """One for every engine; a unit of work is a new token."""
    import torch

    found = []
    for engine in ENGINES:
        if engine.startswith("bitsandbytes") and not common.installed("bitsandbytes"):
            continue
        model = load(folder, engine)
        ids = torch.randint(3, model.config.vocab_size, (1, options.prompt_tokens),
                            generator=torch.Generator().manual_seed(1))

        def call(model: Any = model, ids: Any = ids) -> None:
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=options.new_tokens, pad_token_id=0)

        found.append(Candidate(f"{name} {engine}", call, options.new_tokens))
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times the layers, then each model, and returns everything."""
    os.environ["QLLM_THREADS"] = str(options.threads)
    os.environ["QLLM_BNB_BACKEND"] = "0"
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if options.backend:
        os.environ["QLLM_BNB_BACKEND"] = "1"
        import bitsandbytes  # noqa: F401  whose operators there must be

        from qllm.integrations import bitsandbytes as backend

        backend.register()
    with torch.inference_mode():
        beyond = {name: common.spread([1e6 * seconds for seconds in differences])
                  for name, differences in overheads().items()}
    from qllm import demo

    folders = {f"random {options.shape}": llama_folder.make(
        options.folder or llama_folder.default_folder(options.shape),
        llama_folder.SHAPES[options.shape]), "demo:llama": Path(demo.path("llama"))}
    times: dict[str, list[float]] = {}
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in folders.items():
        found = common.measure(model_candidates(name, folder, options), options.rounds, warmups=1,
                               seconds=options.seconds)
        times |= found
        for ours in (f"{name} qllm {format}" for format in FORMATS):
            ratios[ours] = {other: common.spread(common.ratios(found[other], found[ours]))
                            for other in found if other != ours}
    return {"benchmark": "beside_torch", "machine": common.machine(),
            "options": {**vars(options), "folder": None, "json": None}, "backend": options.backend,
            "overhead_microseconds": beyond, "speed_ratios": ratios, "seconds": times}


def show(result: dict[str, Any]) -> None:
    """Prints both tables."""
    print(f"{result['machine']['processor']}, {result['machine']['instruction_set']}, "
          f"{result['options']['threads']} threads"
          + (", bitsandbytes with qllm's kernels" if result["backend"] else ""))
    print("microseconds of a module over its kernel, median (middle half)")
    for name, spread in result["overhead_microseconds"].items():
        print(f"  {name:24s} {spread['median']:7.2f}  ({spread['low']:.2f} to "
              f"{spread['high']:.2f})")
    print("tokens/s, median")
    for name in {n.rpartition(" qllm ")[0]: None for n in result["speed_ratios"]}:
        for engine, times in result["seconds"].items():
            if engine.startswith(name + " "):
                print(f"  {engine:32s} {1 / common.spread(times)['median']:8.1f}")
    print("as many times as fast as, median of the rounds")
    for ours, others in result["speed_ratios"].items():
        cells = ", ".join(f"{other.split(' ', 1)[1] if other.startswith('demo') else other}: "
                          f"{spread['median']:.2f}" for other, spread in others.items())
        print(f"  {ours}: {cells}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=_core.cpu_info()["threads_default"])
    parser.add_argument("--shape", choices=list(llama_folder.SHAPES), default="small")
    parser.add_argument("--folder", type=Path, help="where the random model lies or is made")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, help="of one model, about")
    parser.add_argument("--backend", action="store_true",
                        help="register qllm's kernels with bitsandbytes")
    parser.add_argument("--json", type=Path)
    common.main(parser, run, show)
