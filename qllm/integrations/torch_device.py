"""Linear layers on a GPU, for tensors that torch holds there.

A weight is held there twice: as the tensor of its module, in the form that the CPU takes, and as
what the device's kernels read, which is made of the same standard bytes at the first product and
kept until the tensor's memory is freed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..errors import QllmMemoryError, QllmUnsupportedError, QllmValueError
from .packed_weights import PackedWeights

NAMES = {"cuda": "cuda"}
"""The kinds of devices that torch has and qllm multiplies on, and what `qllm.Model` calls them."""

_Layers = dict[tuple[str, float], _core.DeviceLinear]

_weights: PackedWeights[_Layers] = PackedWeights()


def require_one_device(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises `QllmValueError` where the tensors of a product are on several."""
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        devices = {str(t.device) for t in (x, weight, bias) if t is not None}
        raise QllmValueError(
            f"x, weight and bias are on {' and '.join(sorted(devices))}; move them to one device"
        )


def multiply(
    x: Tensor, weight: Tensor, y: Tensor, number: int, bias: tuple[int, int], compute: str,
    int8_threshold: float,
) -> None:
    """y = x W^T + bias on the device's current stream. x and y are contiguous, bias is an address
    and the number of a dtype."""
    cols, rows = x.shape[-1], y.shape[-1]
    layer = _layer(weight, compute, int8_threshold)
    m = y.numel() // rows if rows else 0
    nbytes = layer.scratch(number, m, *bias)
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
    layer.multiply(
        x.data_ptr(), number, m, cols, *bias, y.data_ptr(), rows, scratch.data_ptr(), nbytes,
        _stream(x.device),
    )


def dequantize(weight: Tensor, first: int, count: int) -> Tensor | None:
    """Rows [first, first + count) of W in float32, on the device of the weight; None where that has
    not been in a product."""
    layer = next(iter(_layers(weight).values()), None)
    if layer is None:
        return None
    out = torch.empty((count, layer.shape[1]), dtype=torch.float32, device=weight.device)
    layer.dequantize(first, count, out.data_ptr(), _stream(weight.device))
    return out


def kernel(weight: Tensor, compute: str, int8_threshold: float) -> str:
    """What multiplies one row."""
    return _layer(weight, compute, int8_threshold).kernel(1)


def _layers(weight: Tensor) -> _Layers:
    """What there is of a weight on its device."""
    return _weights.get([weight], (weight.device,), dict)


def _layer(weight: Tensor, compute: str, int8_threshold: float) -> _core.DeviceLinear:
    layers = _layers(weight)
    layer = layers.get((compute, int8_threshold))
    if layer is None:
        layer = layers[compute, int8_threshold] = _make(weight, compute, int8_threshold)
    return layer


def _make(weight: Tensor, compute: str, int8_threshold: float) -> _core.DeviceLinear:
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise QllmUnsupportedError(
            "the first product of a layer copies its weight to the device, which a CUDA graph "
            "cannot record; call the layer once before the graph is captured"
        )
    standard = _core.image_weight(weight.detach().cpu().numpy())
    options: Any = {"compute": compute, "int8_threshold": int8_threshold}
    try:
        return _core.DeviceLinear(standard, _name(weight.device), **options)
    except QllmMemoryError:
        torch.cuda.empty_cache()  # memory that torch keeps for tensors to come
        return _core.DeviceLinear(standard, _name(weight.device), **options)


def _name(device: torch.device) -> str:
    name = NAMES[device.type]
    return name if device.index is None else f"{name}:{device.index}"


def _stream(device: torch.device) -> int:
    """Where torch gives work to the device now, as its handle."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
