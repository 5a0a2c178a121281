"""qllm's kernels under the operators of bitsandbytes, for tensors on the CPU.

bitsandbytes calls `register` when it is imported (entry point group `bitsandbytes.backends`).
QLLM_BNB_BACKEND=0 in the environment leaves its own kernels in place.

    gemm_4bit, gemv_4bit                          matmul_4bit, Linear4bit
    int8_vectorwise_quant, int8_scaled_mm,        matmul, Linear8bitLt in evaluation mode
    int8_mixed_scaled_mm

float16 and bfloat16 inputs are multiplied in the compute mode auto, float32 inputs in exact, and
float16 inputs too where auto rounds to bfloat16 (instruction set avx512amx). Many
rows of bfloat16 and 4-bit weights go through torch where the processor has AMX, as they do without
qllm. A weight is packed at its first product; the packed form is kept beside it, as large as
itself, until its memory is freed, and made anew when its values change.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..errors import QllmValueError
from ..strict_json import quoted
from . import torch_ops
from .packed_weights import PackedWeights
from .torch_ops import NUMBERS

VARIABLE = "QLLM_BNB_BACKEND"

_library: Any = None  # keeps the kernels registered

_MANY_ROWS = 512
"""From here on torch's product of bfloat16 by AMX wins by about what dequantizing costs (measured
with weights of 2048 x 2048 to 4096 x 11008: 1.4 to 1.8 times the time of ours with 256 rows, 0.9 to
1.05 with 512, 0.8 to 0.95 with 640 to 1024)."""

_FINER_THAN_AUTO = (
    {torch.float32, torch.float16}
    if _core.cpu_info()["default"] == "avx512amx"
    else {torch.float32}
)

_has_amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def register() -> None:
    """Puts the kernels under the operators, once. Raises `QllmValueError` for a value of
    QLLM_BNB_BACKEND other than 0 and 1. Where torch or the operators are not those that this was
    written for, a warning says so, and bitsandbytes computes as it does without qllm."""
    global _library
    choice = os.environ.get(VARIABLE, "1")
    if choice not in ("0", "1"):
        raise QllmValueError(f"{VARIABLE} is {quoted(choice)}; 0 or 1 was expected")
    if choice == "0" or _library is not None:
        return
    obstacle = _obstacle()
    if obstacle is not None:
        warnings.warn(
            f"qllm does not speed up bitsandbytes: {obstacle}; {VARIABLE}=0 silences this",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    torch_library: Any = torch.library  # without types
    _library = torch_library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # bitsandbytes has a gemv_4bit of its own for CPUs with bf16 instructions, and torch warns
        # of every kernel that is replaced
        warnings.simplefilter("ignore", UserWarning)
        for name, (kernel, _) in _KERNELS.items():
            _library.impl(name, kernel, "CPU", allow_override=True)


def unregister() -> None:
    """Takes the kernels away again, and forgets the packed weights."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
    weights.clear()


def _obstacle() -> str | None:
    if "allow_override" not in inspect.signature(torch.library.Library.impl).parameters:
        return f"torch {torch.__version__} cannot replace a kernel"
    for name, (_, schema) in _KERNELS.items():
        operator = getattr(torch.ops.bitsandbytes, name, None)
        if operator is None:
            return f"it has no operator {name}"
        if str(operator.default._schema) != f"bitsandbytes::{name}{schema}":
            return f"its operator {name} takes other arguments than those that are known"
    return None


weights: PackedWeights[Tensor] = PackedWeights()


def _product(x: Tensor, image: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    compute = "exact" if x.dtype in _FINER_THAN_AUTO else "auto"
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    bias = None if bias is None else bias.contiguous()
    _core.image_linear(
        image.data_ptr(), image.numel(), x.data_ptr(), NUMBERS[x.dtype], y.numel() // rows,
        x.shape[-1], *_bias(bias), y.data_ptr(), rows, compute, 0.0,
    )
    return y


def _bias(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.data_ptr(), NUMBERS[bias.dtype])


# ------------------------------------------------------------------------------------------ 4 bits


def gemm_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, blocksize: int, quant_type: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None, absmax_offset: Tensor | None = None,
) -> Tensor:
    """A W^T + bias; see the operator of that name in bitsandbytes/_ops.py."""
    parts: dict[str, Any]
    if absmax_8bit is None:
        tensors, parts = [B, absmax], {"absmax": absmax}
    else:
        assert absmax_code is not None and absmax_offset is not None
        tensors = [B, absmax, absmax_8bit, absmax_code, absmax_offset]
        parts = {
            "absmax_codes": absmax_8bit,
            "nested_absmax": absmax,
            "nested_quant_map": absmax_code,
            "offset": absmax_offset,
        }
    image = weights.get(
        tensors,
        (quant_type, *shapeB, blocksize),
        lambda: _pack_4bit(B, shapeB, blocksize, quant_type, parts),
    )
    return _product_4bit(A, image, shapeB, bias)


def _product_4bit(
    A: Tensor, image: Tensor, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    if _has_amx and A.dtype == torch.bfloat16 and A.numel() >= _MANY_ROWS * shape[1]:
        values = torch_ops.dequantize(image, 0, shape[0], A.dtype)
        return torch.nn.functional.linear(A, values, bias)
    return _product(A, image, bias, shape[0])


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    """A W^T for any number of rows. Where absmax is (K / blocksize, N) the weight is in the layout
    into which bitsandbytes repacks weights for processors with bf16 instructions."""
    repacked = absmax.dim() == 2

    def make() -> Tensor:
        quant_type = "fp4" if float(code[1]) > 0 else "nf4"
        if repacked:
            scales = absmax.t().float().reshape(-1)
            return _pack_4bit(_standard(B, shapeB), shapeB, blocksize, quant_type,
                              {"absmax": scales})
        return _pack_4bit(B, shapeB, blocksize, quant_type, {"absmax": absmax})

    image = weights.get([B, absmax, code], (*shapeB, blocksize, repacked), make)
    return _product_4bit(A, image, shapeB, None)


def _pack_4bit(
    B: Tensor, shape: Sequence[int], blocksize: int, quant_type: str, parts: dict[str, Any]
) -> Tensor:
    arrays: dict[str, Any] = {
        name: float(part) if name == "offset" else part.contiguous().numpy().reshape(-1)
        for name, part in parts.items()
    }
    weight = _core.quantized_from_parts(
        quant_type + ("-dq" if "offset" in parts else ""),
        (shape[0], shape[1]),
        B.contiguous().view(torch.uint8).numpy().reshape(-1),
        blocksize=blocksize,
        allow_nonfinite=True,
        **arrays,
    )
    return torch.from_numpy(_core.image(weight))


def _standard(B: Tensor, shape: Sequence[int]) -> Tensor:
    """The standard bytes of a repacked weight: of 32 rows and 2 columns, byte i holds the values
    i (low half) and 32 + i (high half) of the 64, the two columns of a row side by side."""
    rows, cols = shape
    pairs = B.contiguous().view(torch.uint8).reshape(-1, 32)
    codes = torch.cat((pairs & 15, pairs >> 4), 1).reshape(rows // 32, cols // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]


# -------------------------------------------------------------------------------------------- int8


def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 of the shape of A, absmax float32 of its rows, and the outlier columns."""
    A = A.contiguous()
    cols = A.shape[-1]
    rows = A.numel() // cols
    q = torch.empty(A.shape, dtype=torch.int8)
    absmax = torch.empty(rows, dtype=torch.float32)
    used = torch.empty(cols, dtype=torch.uint8)
    _core.round_int8(
        A.data_ptr(), NUMBERS[A.dtype], rows, cols, threshold, q.data_ptr(), absmax.data_ptr(),
        used.data_ptr(),
    )
    return q, absmax, used.nonzero().reshape(-1) if threshold > 0 else None


def int8_scaled_mm(
    A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product of rounded rows A and the int8 weight B (N, K), in their units."""
    return _int8_product(None, A, B, row_stats, col_stats, None, bias, dtype or torch.float16)


def int8_mixed_scaled_mm(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor,
    outlier_cols: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, and the outlier columns of the unrounded rows A by the weight's values."""
    outliers = None if outlier_cols is None or not outlier_cols.numel() else outlier_cols
    y = _int8_product(A.contiguous(), CA, CB, SCA, SCB, outliers, bias, A.dtype)
    return y, A.new_empty(0) if outliers is None else A[:, outliers].contiguous()


def _int8_product(
    x: Tensor | None, q: Tensor, weight: Tensor, absmax: Tensor, scales: Tensor,
    outliers: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    rows, cols = weight.shape
    image = weights.get([weight, scales], ("int8", rows, cols), lambda: _pack_int8(weight, scales))
    q, absmax = q.contiguous(), absmax.contiguous()
    y = torch.empty((*q.shape[:-1], rows), dtype=dtype)
    bias = None if bias is None else bias.contiguous()
    columns = (0, 0) if outliers is None else (outliers.data_ptr(), outliers.numel())
    _core.image_linear_int8(
        image.data_ptr(), image.numel(), 0 if x is None else x.data_ptr(), NUMBERS[dtype],
        q.numel() // cols, cols, *_bias(bias), y.data_ptr(), rows, q.data_ptr(),
        absmax.data_ptr(), *columns,
    )
    return y


def _pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    tensor = _core.quantized_from_parts(
        "int8",
        (weight.shape[0], weight.shape[1]),
        weight.contiguous().numpy(),
        scb=scales.contiguous().float().numpy().reshape(-1),
        allow_nonfinite=True,
    )
    return torch.from_numpy(_core.image(tensor))


_KERNELS: dict[str, tuple[Callable[..., Any], str]] = {
    "gemm_4bit": (
        gemm_4bit,
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
        "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
        "Tensor? absmax_offset=None) -> Tensor",
    ),
    "gemv_4bit": (
        gemv_4bit,
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize)"
        " -> Tensor",
    ),
    "int8_vectorwise_quant": (
        int8_vectorwise_quant,
        "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    ),
    "int8_scaled_mm": (
        int8_scaled_mm,
        "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
        "ScalarType? dtype=None) -> Tensor",
    ),
    "int8_mixed_scaled_mm": (
        int8_mixed_scaled_mm,
        "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
        "Tensor? bias=None) -> (Tensor, Tensor?)",
    ),
}
"""Operator -> our kernel, and the arguments and results that it was written for."""
