"""Random models on PyTorch: transformers in bfloat16, and with bitsandbytes' layers put in, as its
own integration does; decoded token by token with their cache of keys and values."""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import common

PACKAGES = ("torch", "transformers", "bitsandbytes")


def unusable(device: str) -> str | None:
    """Why there is nothing to measure."""
    absent = [package for package in PACKAGES if not common.installed(package)]
    if absent:
        return f"{', '.join(absent)} is not installed"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def quantized(linear: Any, format: str, device: str) -> Any:
    """A layer of bitsandbytes with the weight of this one."""
    import torch
    from bitsandbytes import nn

    bnb: Any = nn
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data
    if format == "int8":
        layer: Any = bnb.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.Int8Params(weight.to("cpu", torch.float16), requires_grad=False,
                                         has_fp16_weights=False)
    else:
        kind, nested = format.removesuffix("-dq"), format.endswith("-dq")
        layer = bnb.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, quant_type=kind,
                                  compress_statistics=nested)
        layer.weight = bnb.Params4bit(weight.to("cpu"), requires_grad=False, quant_type=kind,
                                         compress_statistics=nested)
    layer.bias = linear.bias
    return layer.to(device)


def make(config: dict[str, Any], format: str, device: str) -> Any:
    """A model of a config.json; the output embedding stays in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            factory: Any = AutoModelForCausalLM
            model = factory.from_config(
                AutoConfig.for_model(config["model_type"], **settings)).eval()
    finally:
        torch.set_default_dtype(before)
    if format != "bf16":
        head = model.get_output_embeddings()
        found = [(parent, name, child) for parent in model.modules()
                 for name, child in parent.named_children()
                 if isinstance(child, torch.nn.Linear) and child is not head]
        while found:
            parent, name, child = found.pop()
            setattr(parent, name, quantized(child, format, device))
    return model


def step_seconds(model: Any, options: argparse.Namespace, batch: int, vocab: int) -> list[float]:
    """Of every decode step, greedy; one unmeasured round comes first."""
    import torch

    device = options.torch_device
    torch.manual_seed(0)
    prompt = torch.randint(0, vocab, (1, options.context), device=device).repeat(batch, 1)
    times = []
    with torch.inference_mode():
        for number in range(-1, options.rounds):
            found = model(prompt, use_cache=True)
            for _ in range(options.new_tokens):
                tokens = found.logits[:, -1:].argmax(-1)
                tokens.tolist()  # on the host, as ours are
                start = time.perf_counter()
                found = model(tokens, past_key_values=found.past_key_values, use_cache=True)
                found.logits[:, -1:].argmax(-1).tolist()
                if number >= 0:
                    times.append(time.perf_counter() - start)
    return times


def measure(config: dict[str, Any], format: str, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of a format in the table of decode; or why there is none."""
    why = unusable(options.torch_device)
    if why:
        return {"left_out": why}
    model, found = None, {}
    try:
        model = make(config, format, options.torch_device)
        for batch in options.batch:
            seconds = common.spread(step_seconds(model, options, batch, config["vocab_size"]))
            found[str(batch)] = {"step_seconds": seconds,
                                 "tokens_per_second": batch / seconds["median"]}
        return {"decode": found}
    except Exception as error:  # out of memory, or what this version of a package does not do
        return {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0]}",
                "decode": found}
    finally:
        del model
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
