"""The operators of torch.ops.qllm, over images: weights packed for the CPU kernels in the bytes of
a uint8 tensor (csrc/cpu/image.h), on the CPU or on a GPU (torch_device.py).

    linear(x, weight, bias, rows, compute, int8_threshold) -> y
        y (..., rows) = x W^T + bias for x (..., cols), in the dtype of x: sums in float32, rounded
        once. Differentiable in x and bias.
    product(a, weight, width, transpose) -> b
        b = a W, or a W^T with transpose, of the dequantized weight and in float32: what gradients
        are made of. `width` is the last dimension of b. Differentiable in a.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..errors import QllmUnsupportedError, QllmValueError
from . import torch_device

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes that x can have, as `_core.image_linear` counts them."""

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in NUMBERS}

_BLOCK_VALUES = 8 << 20
"""Values of W that are dequantized at a time."""

_torch_library: Any = torch.library  # much of it has no types
_LIBRARY = _torch_library.Library("qllm", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int rows, str compute, float int8_threshold)"
    " -> Tensor"
)
_LIBRARY.define("product(Tensor a, Tensor weight, int width, bool transpose) -> Tensor")

linear: Callable[..., Tensor] = torch.ops.qllm.linear.default
product: Callable[..., Tensor] = torch.ops.qllm.product.default


def _join_torch() -> str:
    """Lets products run in torch's own OpenMP threads, which spin for a while after each operator
    of torch and would hold up threads of our own; returns in which they run."""
    process = ctypes.CDLL(None)
    try:
        functions = [
            getattr(process, name)
            for name in ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num")
        ]
    except AttributeError:  # torch was built with something else
        return "qllm"
    if functions[1]() != torch.get_num_threads():  # the OpenMP of another library
        return "qllm"
    _core.use_team(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
    return "torch"


THREADS = _join_torch()
"""Whose threads products run in: torch, or qllm where torch's cannot be joined. As many as torch
takes (`torch.set_num_threads`), and no more than QLLM_THREADS where that is set."""


def number_of(dtype: torch.dtype, name: str) -> int:
    """The number of a dtype. Raises `QllmValueError` for one that is not computed with."""
    number = NUMBERS.get(dtype)
    if number is None:
        raise QllmValueError(
            f"{name} is {dtype}; torch.float32, torch.float16 or torch.bfloat16 was expected"
        )
    return number


def _prepare(
    x: Tensor, bias: Tensor | None, rows: int
) -> tuple[Tensor, int, Tensor, tuple[int, int]]:
    """x without gaps, the number of its dtype, y without values, and address and dtype of bias."""
    number = NUMBERS.get(x.dtype)
    if number is None:
        number = number_of(x.dtype, "x")
    if not x.is_contiguous():
        x = x.contiguous()
    shape = x.shape
    if not shape:
        raise QllmValueError("x has no dimension; (..., in_features) was expected")
    y = x.new_empty((*shape[:-1], rows))
    if bias is None:
        return x, number, y, (0, 0)
    if bias.numel() != rows or not bias.is_contiguous():
        raise QllmValueError(f"bias has the shape {list(bias.shape)}; ({rows},) was expected")
    return x, number, y, (bias.data_ptr(), number_of(bias.dtype, "bias"))


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, compute: str, int8_threshold: float
) -> Tensor:
    """`linear` for tensors on the CPU, without torch's dispatcher."""
    x, number, y, (address, bias_number) = _prepare(x, bias, rows)
    _core.image_linear(
        weight.data_ptr(), weight.numel(), x.data_ptr(), number, y.numel() // rows if rows else 0,
        x.shape[-1], address, bias_number, y.data_ptr(), rows, compute, int8_threshold,
    )
    return y


def multiply_on_device(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, compute: str, int8_threshold: float
) -> Tensor:
    """The same for tensors on a GPU, on its current stream."""
    torch_device.require_one_device(x, weight, bias)
    x, number, y, bias_place = _prepare(x, bias, rows)
    torch_device.multiply(x, weight, y, number, bias_place, compute, int8_threshold)
    return y


def dequantize(
    weight: Tensor, first: int, count: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows [first, first + count) of W, each value rounded to `dtype` once, on W's device."""
    if not weight.is_cpu:
        return _dequantize_on_device(weight, first, count).to(dtype)
    array = _core.image_dequantize(weight.detach().numpy(), first, count, NAMES[dtype])
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _dequantize_on_device(weight: Tensor, first: int, count: int) -> Tensor:
    found = torch_device.dequantize(weight, first, count)
    return dequantize(weight.cpu(), first, count).to(weight.device) if found is None else found


def _product(a: Tensor, weight: Tensor, width: int, transpose: bool) -> Tensor:
    return _product_by(dequantize, a, weight, width, transpose)


def _product_on_device(a: Tensor, weight: Tensor, width: int, transpose: bool) -> Tensor:
    torch_device.require_one_device(a, weight, None)
    return _product_by(_dequantize_on_device, a, weight, width, transpose)


def _product_by(
    values_of: Callable[[Tensor, int, int], Tensor], a: Tensor, weight: Tensor, width: int,
    transpose: bool,
) -> Tensor:
    number_of(a.dtype, "a")
    rows, cols = (width, a.shape[-1]) if transpose else (a.shape[-1], width)
    left = a.reshape(-1, a.shape[-1]).float()
    out = left.new_zeros((left.shape[0], width))
    step = max(16, _BLOCK_VALUES // max(cols, 1) // 16 * 16)
    for first in range(0, rows, step):
        block = values_of(weight, first, min(step, rows - first))
        last = first + len(block)
        if transpose:
            torch.mm(left, block.t(), out=out[:, first:last])
        else:
            out.addmm_(left[:, first:last], block)
    return out.to(a.dtype).reshape(*a.shape[:-1], width)


def _refuse(*args: Any) -> Tensor:
    devices = {str(arg.device) for arg in args if isinstance(arg, Tensor)}
    raise QllmUnsupportedError(
        f"the tensors of this layer are on {' and '.join(sorted(devices))}; qllm multiplies torch "
        'tensors on the CPU and on NVIDIA GPUs: move the module and its input there with '
        '.to("cpu") or .to("cuda")'
    )


for _name, _on_cpu, _on_device in (
    ("linear", multiply, multiply_on_device),
    ("product", _product, _product_on_device),
):
    _LIBRARY.impl(_name, _on_cpu, "CPU")
    _LIBRARY.impl(_name, _on_device, "CUDA")
    _LIBRARY.impl(_name, _refuse, "CompositeExplicitAutograd")


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, compute: str, int8_threshold: float
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fake_product(a: Tensor, weight: Tensor, width: int, transpose: bool) -> Tensor:
    return a.new_empty((*a.shape[:-1], width))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(weight)
    ctx.cols = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = product(grad, weight, ctx.cols, False)
    if ctx.needs_input_grad[2]:
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        bias_grad = bias_grad.to(ctx.bias_dtype)
    return x_grad, None, bias_grad, None, None, None


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, weight, _, transpose = inputs
    ctx.save_for_backward(weight)
    ctx.width, ctx.transpose = a.shape[-1], transpose


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return product(grad, weight, ctx.width, not ctx.transpose), None, None, None


_torch_library.register_fake("qllm::linear", _fake_linear, lib=_LIBRARY)
_torch_library.register_fake("qllm::product", _fake_product, lib=_LIBRARY)
_torch_library.register_autograd(
    "qllm::linear", _linear_backward, setup_context=_save_linear, lib=_LIBRARY
)
_torch_library.register_autograd(
    "qllm::product", _product_backward, setup_context=_save_product, lib=_LIBRARY
)
