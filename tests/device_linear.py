"""Weights of a device and linear layers over them, for tests: kernels/weight.h and kernels/skinny.h
through the functions of kernels/test_hooks_linear.cu."""

from __future__ import annotations

import ctypes as ct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import emulated
import numpy as np
from numpy.typing import NDArray

import qllm
from qllm.quantize import FORMATS

FORMAT_NUMBERS = {name: i for i, name in enumerate(
    ["f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])}
DTYPE_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}
NORMS = {None: 0, "rms": 1, "layer": 2}
AFTER = {"store": 0, "add": 1, "act": 2, "gate": 3, "heads": 4, "heads_act": 5}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
assert set(FORMAT_NUMBERS) == set(FORMATS)


class Tensor(ct.Structure):
    _fields_ = [("data", ct.c_void_p), ("nbytes", ct.c_int64), ("dtype", ct.c_int),
                ("rows", ct.c_int64), ("cols", ct.c_int64)]


class HostWeight(ct.Structure):
    _fields_ = [("format", ct.c_int), ("rows", ct.c_int64), ("cols", ct.c_int64),
                ("blocksize", ct.c_int64), ("data", ct.c_void_p), ("data_bytes", ct.c_int64),
                ("absmax", ct.c_void_p), ("absmax_codes", ct.c_void_p),
                ("nested_absmax", ct.c_void_p), ("offset", ct.c_float), ("code", ct.c_float * 16),
                ("nested_code", ct.c_float * 256)]


class DeviceWeight(ct.Structure):
    _fields_ = [("format", ct.c_int), ("rows", ct.c_int64), ("cols", ct.c_int64),
                ("blocksize", ct.c_int64), ("tiled", ct.c_bool), ("data", ct.c_void_p),
                ("absmax", ct.c_void_p), ("absmax_codes", ct.c_void_p),
                ("nested_absmax", ct.c_void_p), ("offset", ct.c_float), ("tables", ct.c_void_p),
                ("standard_tables", ct.c_bool), ("bias", ct.c_void_p), ("bytes", ct.c_int64)]


class Input(ct.Structure):
    _fields_ = [("x", ct.c_void_p), ("stride", ct.c_int64), ("row_of", ct.c_void_p),
                ("rows", ct.c_int), ("norm", ct.c_int), ("scale", ct.c_void_p),
                ("bias", ct.c_void_p), ("eps", ct.c_float), ("threshold", ct.c_float),
                ("scratch", ct.c_void_p)]


class HeadsStruct(ct.Structure):
    _fields_ = [("heads", ct.c_int), ("kv_heads", ct.c_int), ("head_dim", ct.c_int),
                ("half", ct.c_int), ("positions", ct.c_void_p), ("cos", ct.c_void_p),
                ("sin", ct.c_void_p), ("q", ct.c_void_p), ("q_stride", ct.c_int64),
                ("page_index", ct.c_void_p), ("page_base", ct.c_void_p), ("max_pages", ct.c_int),
                ("page_offset", ct.c_int64)]


class Output(ct.Structure):
    _fields_ = [("after", ct.c_int), ("y", ct.c_void_p * 3), ("stride", ct.c_int64 * 3),
                ("activation", ct.c_int), ("heads", HeadsStruct)]


class Library:
    """A device, and what this room's tests do with it."""

    def __init__(self) -> None:
        self.device = emulated.device()
        self.c = self.device.library
        self.pointer = ct.c_void_p()
        for name in ("gpu_test_weight_clear", "gpu_test_weight_release",
                     "gpu_test_multiprocessors"):
            getattr(self.c, name).restype = None
        for name in ("gpu_test_linear_fits", "gpu_test_weight_tiles"):
            getattr(self.c, name).restype = ct.c_bool
        for name in ("gpu_test_linear_scratch", "gpu_test_held"):
            getattr(self.c, name).restype = ct.c_int64
        self.device.call("gpu_test_device", ct.byref(self.pointer))

    def held(self) -> int:
        """Bytes of weights."""
        return int(self.c.gpu_test_held(ct.c_int64(0)))

    def set_multiprocessors(self, n: int) -> None:
        self.c.gpu_test_multiprocessors(self.pointer, n)

    def take(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """What lies at an address of the device."""
        array = np.empty(shape, dtype)
        self.device.call("gpu_test_copy_out", array, ct.c_void_p(address), array.nbytes)
        return array

    # ------------------------------------------------------------------------------- weights

    def set_weight(self, q: qllm.QuantizedTensor, tiled: bool = True,
                   bias: NDArray[np.float32] | None = None) -> DeviceWeight:
        host, weight = host_weight(q), DeviceWeight()
        self.device.call("gpu_test_weight_set", self.pointer, ct.byref(host), tiled,
                         ct.byref(weight))
        if bias is not None:  # the weight frees it
            pointer = ct.c_void_p()
            self.device.call("gpu_test_alloc", bias.nbytes, ct.byref(pointer))
            self.device.call("gpu_test_copy_in", pointer, bias, bias.nbytes)
            weight.bias = pointer.value
        return self.own(weight)

    def own(self, weight: DeviceWeight) -> DeviceWeight:
        """Cleared with the object."""
        held = DeviceWeight.from_buffer_copy(weight)
        weakref.finalize(weight, self.c.gpu_test_weight_clear, ct.byref(held))
        return weight

    def load_weight(self, bits: NDArray[Any], dtype: str, format: str, blocksize: int = 64,
                    tiled: bool = True, name: str = "w") -> DeviceWeight:
        weight = DeviceWeight()
        address, rows = bits.ctypes.data, bits.shape[0]
        tensor = Tensor(address, bits.nbytes, DTYPE_NUMBERS[dtype], rows, bits.shape[1])
        self.device.call("gpu_test_weight_load", self.pointer, ct.byref(tensor),
                         ct.c_int(FORMAT_NUMBERS[format]), blocksize, name, tiled,
                         ct.byref(weight))
        return self.own(weight)

    def get_weight(self, weight: DeviceWeight) -> dict[str, Any]:
        """The arrays of the standard form, copied."""
        host = HostWeight()
        self.device.call("gpu_test_weight_get", self.pointer, ct.byref(weight), ct.byref(host))
        parts = parts_of(host)
        self.c.gpu_test_weight_release(ct.byref(host))
        return parts

    # -------------------------------------------------------------------------- linear layers

    def pointers(self, weights: Sequence[DeviceWeight]) -> Any:
        return (ct.POINTER(DeviceWeight) * len(weights))(*[ct.pointer(w) for w in weights])

    def fits(self, weights: Sequence[DeviceWeight], output: Output) -> bool:
        return bool(self.c.gpu_test_linear_fits(self.pointers(weights), len(weights),
                                                ct.byref(output)))

    def run(self, weights: Sequence[DeviceWeight], before: Before, output: Output) -> None:
        scratch = self.device.empty(self.c.gpu_test_linear_scratch(
            ct.c_int64(before.count), ct.c_int64(weights[0].cols)), np.uint8)
        given, kept = before.place(self.device, scratch)
        self.device.call("gpu_test_linear", self.pointer, self.pointers(weights),
                         ct.c_int(len(weights)), ct.byref(given), ct.byref(output))
        del kept

    def linear(self, weights: Sequence[DeviceWeight], x: NDArray[np.float32],
               after: str = "store", activation: str = "silu",
               y: Sequence[NDArray[np.float32]] | None = None, **before: Any
               ) -> list[NDArray[np.float32]]:
        """The outputs of the weights side by side; y: what they hold before."""
        rows = Before(x, **before)
        outputs = 1 if after == "gate" else len(weights)
        output = Output(after=AFTER[after], activation=ACTIVATIONS[activation])
        gap, arrays = 3, []
        for i in range(outputs):
            width = weights[i].rows + gap
            held = np.full((rows.count, width), 7, np.float32)
            if y is not None:
                held[:, :weights[i].rows] = y[i]
            arrays.append(self.device.array(held))
            output.y[i], output.stride[i] = arrays[i].pointer.value, width
        self.run(weights, rows, output)
        results = []
        for i in range(outputs):
            held = arrays[i].get()
            assert (held[:, weights[i].rows:] == 7).all()
            results.append(held[:, :weights[i].rows])
        return results


@dataclass
class Before:
    """The rows x and what happens to them first."""

    x: NDArray[np.float32]
    norm: str | None = None
    scale: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None
    eps: float = 1e-5
    threshold: float = 6.0
    row_of: Sequence[int] | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.x if self.row_of is None else self.row_of)

    def place(self, device: emulated.Device, scratch: emulated.Array
              ) -> tuple[Input, list[emulated.Array]]:
        """And the arrays that it points to."""
        arrays: list[emulated.Array] = []

        def put(array: Any, dtype: Any = np.float32) -> int | None:
            if array is None:
                return None
            arrays.append(device.array(array, dtype))
            return arrays[-1].pointer.value

        given = Input(x=put(self.x), stride=self.x.shape[1], row_of=put(self.row_of, np.int32),
                      rows=self.count, norm=NORMS[self.norm], scale=put(self.scale),
                      bias=put(self.bias), eps=self.eps, threshold=self.threshold,
                      scratch=scratch.pointer.value)
        return given, arrays


def host_weight(q: qllm.QuantizedTensor) -> HostWeight:
    """Points into the arrays of q."""
    def address(array: NDArray[Any] | None) -> int | None:
        return None if array is None else array.ctypes.data

    host = HostWeight(FORMAT_NUMBERS[q.format], *q.shape, q.blocksize or 0, address(q.packed),
                      q.packed.nbytes, address(q.scb if q.format == "int8" else q.absmax),
                      address(q.absmax_codes), address(q.nested_absmax), q.offset or 0.0)
    if q.quant_map is not None:
        host.code[:] = q.quant_map.tolist()
    if q.nested_quant_map is not None:
        host.nested_code[:] = q.nested_quant_map.tolist()
    return host


def parts_of(host: HostWeight) -> dict[str, Any]:
    def copy(address: int | None, n: int, dtype: Any) -> NDArray[Any] | None:
        if not address:
            return None
        kind = np.dtype(dtype)
        return np.frombuffer(ct.string_at(address, n * kind.itemsize), kind).copy()

    blocks = host.rows if not host.blocksize else -(-host.rows * host.cols // host.blocksize)
    return {
        "packed": copy(host.data, host.data_bytes, np.uint8),
        "absmax": copy(host.absmax, blocks, np.float32),
        "absmax_codes": copy(host.absmax_codes, blocks, np.uint8),
        "nested_absmax": copy(host.nested_absmax, -(-blocks // 256), np.float32),
        "offset": host.offset if host.absmax_codes else None,
        "quant_map": np.array(host.code[:], np.float32) if host.blocksize else None,
    }


def standard_parts(q: qllm.QuantizedTensor) -> dict[str, Any]:
    """What get_weight gives for it."""
    return {
        "packed": q.packed.reshape(-1).view(np.uint8),
        "absmax": q.scb if q.format == "int8" else q.absmax,
        "absmax_codes": q.absmax_codes,
        "nested_absmax": q.nested_absmax,
        "offset": q.offset,
        "quant_map": q.quant_map,
    }
