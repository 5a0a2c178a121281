"""qllm info and qllm quantize; and how every command loads a model."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import numpy as np

from .. import __version__, _core
from ..errors import QllmError, QllmValueError
from ..model import Model
from ..report import size_text, text_table
from ..saving import require_possible
from .files import print_json
from .parser import UsageError


def load(arguments: argparse.Namespace, quantization: str | None = None) -> Model:
    """The model of a command line; `quantization` None is its option, where it has one."""
    return Model.from_pretrained(
        arguments.model,
        quantization or getattr(arguments, "quantization", None),
        device=arguments.device,
        threads=arguments.threads,
        revision=arguments.revision,
        isa=arguments.isa,
        compute=arguments.compute,
    )


def info(arguments: argparse.Namespace) -> None:
    """Prints what this build and machine are, or what a model is."""
    if arguments.model is None:
        for name in ("quantization", "revision", "isa", "threads"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"qllm info --{name} needs a MODEL (see qllm info --help)")
        if arguments.device != "cpu":
            raise UsageError("qllm info --device needs a MODEL (see qllm info --help)")
        _print(build_info(), arguments.json)
        return
    with_model = load(arguments).info()
    if arguments.json:
        print_json(with_model.to_dict())
    else:
        print(with_model)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    rows = []
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        rows.append((name.replace("_", " "), text or "none"))
    print(text_table(("", ""), rows))


def build_info() -> dict[str, Any]:
    """Versions, processor, instruction sets, the threads used by default, and whether CUDA can be.

    Cores and logical processors are those that this process may use (affinity mask); the quota is
    that of its control groups, in processors.
    """
    cpu = _core.cpu_info()
    return {
        "qllm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu["model"],
        "features": list(cpu["features"]),
        "instruction_sets_compiled": list(cpu["compiled"]),
        "instruction_sets_usable": list(cpu["isas"]),
        "instruction_set_used": cpu["default"],
        "cores": cpu["cores"],
        "logical_processors": cpu["logical"],
        "processor_quota": cpu["quota"] or "none",
        "threads": cpu["threads_default"],
        "cuda": _cuda(),
    }


def _cuda() -> str:
    """The GPU and its driver, or what the core says when a decoder is asked for on that device."""
    try:
        found = _core.device_info("cuda")
    except QllmError as error:
        return f"no: {error}"
    assert found is not None
    return (
        f"yes: {found['name']} ({found['variant']}), {size_text(found['memory'])} of memory,"
        f" {size_text(found['free'])} free, driver for {found['driver']}"
    )


def quantize(arguments: argparse.Namespace) -> None:
    """Quantizes a model, saves it, and prints what became of every linear layer."""
    require_possible(arguments.out)
    model = load(arguments)
    try:
        report = model.quantize_(
            arguments.to,
            include=arguments.include,
            skip=arguments.skip,
            blocksize=arguments.blocksize,
            quantize_head=arguments.quantize_head,
        )
    except QllmValueError as error:
        raise QllmValueError(f"{arguments.model}: {error}") from None
    model.save(arguments.out)
    print(report)
    print(f"saved in {arguments.out}")
