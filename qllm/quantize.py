"""Quantizing single arrays: the public way to the formats of docs/formats.md."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core
from ._core import QuantizedTensor
from .errors import QllmValueError

__all__ = ["BLOCKSIZES", "FORMATS", "QuantizedTensor", "bits_per_weight", "quantize"]

FORMATS = ("f32", "f16", "bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
"""Every format, the unquantized ones first."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share one absmax in the 4-bit formats."""

NESTED_BLOCKSIZE = 256
"""Absmax values that share one second-level absmax in the -dq formats."""


def quantize(
    array: Any,
    format: str,
    blocksize: int = 64,
    *,
    allow_nonfinite: bool = False,
    name: str = "array",
    dtype: str | None = None,
) -> QuantizedTensor:
    """Quantizes an array (rows, cols), or (n,) as one row, to `format`, one of `FORMATS`.

    `array` holds float32, float16 or bfloat16: a NumPy array, or an array of torch, JAX, CuPy or
    any other library that offers `__array__`, DLPack or a buffer, in the CPU's memory. bfloat16
    comes as such an array, or as its bits in uint16 with dtype="bfloat16". Contiguous arrays, views
    of mapped files among them, are read in place; other layouts, broadcast views too, are copied
    first.

    `blocksize`, one of `BLOCKSIZES`, is used by the 4-bit formats only.

    NaN and infinity raise `QllmValueError` with `name`, row, column and value. With
    `allow_nonfinite` all that shares a scale with one reads back as NaN: its block, its row (int8),
    or its group of 256 blocks (the -dq formats).

    Raises `QllmValueError` for anything that cannot be quantized, `QllmMemoryError` without memory.
    """
    return _core.quantize(
        _detached(array), format, blocksize, allow_nonfinite=allow_nonfinite, name=name, dtype=dtype
    )


def bits_per_weight(format: str, blocksize: int = 64) -> float:
    """What `format` costs for each weight of a large matrix, in bits: codes, and the scales of the
    4-bit formats; of int8 without the float32 for each row, which is 32 / cols bits more."""
    if format not in FORMATS:
        raise QllmValueError(f"format: {format!r} is unknown; known are " + ", ".join(FORMATS))
    if format in ("f32", "f16", "bf16", "int8"):
        return {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "int8": 8.0}[format]
    if blocksize not in BLOCKSIZES:
        raise QllmValueError(
            f"blocksize: {blocksize!r} was given for {format}; it must be a power of two from "
            f"{BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"
        )
    scale = 8.0 + 32.0 / NESTED_BLOCKSIZE if format.endswith("-dq") else 32.0
    return 4.0 + scale / blocksize


def _detached(array: Any) -> Any:
    """A torch tensor without its gradient, which would forbid others to read it; any other object
    as it is. torch is not imported: who has a tensor has imported it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        return array
    return array.detach()
