"""ggml's matrix products, through the libraries that llama-cpp-python brings.

A graph of many products of one x with different weights, computed by ggml's CPU backend with its
own threads. Weights lie where llama.cpp puts them: in the buffer type that repacks them for this
processor where it supports the product, else in ordinary memory.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "IQ4_NL": 20, "BF16": 30}  # enum ggml_type
OVERHEAD = 1 << 20  # bytes of metadata for a graph, besides those of its tensors
LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SILENT = LOG(lambda level, text, data: None)
BUFFER_OFFSET = 8  # of ggml_tensor.buffer, behind the type, which takes 4 bytes and 4 of padding


class Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64,
                                       c_void_p]),
    "ggml_fp32_to_bf16_row": (None, [c_void_p, c_void_p, c_int64]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
}


def load() -> Any:
    """The functions above by name, from the libraries beside llama_cpp."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    # by the file that libllama loads: another file, even a copy, would be a second library
    libraries = [ctypes.CDLL(str(next(folder / file for file in (f"lib{name}.so.0", f"lib{name}.so")
                                      if (folder / file).exists())))
                 for name in ("ggml-base", "ggml-cpu", "ggml")]
    functions = type("Functions", (), {})()
    for name, (result, arguments) in SIGNATURES.items():
        for library in libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(functions, name, function)
                break
        else:
            raise OSError(f"the ggml libraries in {folder} have no function {name}")
    functions.ggml_log_set(ctypes.cast(SILENT, c_void_p), None)
    return functions


def encode(ggml: Any, weight: np.ndarray, kind: str) -> np.ndarray:
    """W (n, k) float32 in ggml's standard bytes of a type."""
    n, k = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.zeros(n * ggml.ggml_row_size(TYPES[kind], k), np.uint8)
    if kind == "BF16":
        ggml.ggml_fp32_to_bf16_row(weight.ctypes.data, out.ctypes.data, weight.size)
    else:
        ggml.ggml_quantize_chunk(TYPES[kind], weight.ctypes.data, out.ctypes.data, 0, n, k, None)
    return out


class Layer:
    """`count` products y = x W^T of one x (m, k) with as many copies of W (n, k) of a type.

    `buffer` names the kind of memory that the weights lie in. Use `run`, then `result(i)`.
    """

    def __init__(self, weight: np.ndarray, x: np.ndarray, kind: str, count: int,
                 threads: int, try_amx: bool = False) -> None:
        self.ggml = ggml = load()
        self.try_amx = try_amx
        self.shape = (x.shape[0], weight.shape[0])
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        n, k = weight.shape
        tensors = (2 * count + 2) * ggml.ggml_tensor_overhead()
        graph_size = 2 * count + 16
        size = tensors + ggml.ggml_graph_overhead_custom(graph_size, False) + OVERHEAD
        self.contexts = [ggml.ggml_init(Parameters(size, None, True)) for _ in range(2)]
        self.weights = [ggml.ggml_new_tensor_2d(self.contexts[0], TYPES[kind], k, n)
                        for _ in range(count)]
        given = ggml.ggml_new_tensor_2d(self.contexts[1], TYPES["F32"], k, len(x))
        self.results = [ggml.ggml_mul_mat(self.contexts[1], w, given) for w in self.weights]
        self.graph = ggml.ggml_new_graph_custom(self.contexts[1], graph_size, False)
        for result in self.results:
            ggml.ggml_build_forward_expand(self.graph, result)
        kind_of_buffer = self._buffer_type()
        self.buffer = ggml.ggml_backend_buft_name(kind_of_buffer).decode()
        self.buffers = [
            ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.contexts[0], kind_of_buffer),
            ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.contexts[1],
                                                          ggml.ggml_backend_cpu_buffer_type())]
        if not all(self.buffers):
            raise MemoryError(f"ggml could not allocate {count} weights of type {kind}")
        data = encode(ggml, weight, kind)
        self.nbytes = data.nbytes
        for tensor in self.weights:
            ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        x = np.ascontiguousarray(x, np.float32)
        ggml.ggml_backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)

    def _buffer_type(self) -> int:
        """The first of the CPU's special buffer types that supports the product, as in llama.cpp;
        else ordinary memory. That of AMX is left out where its kernels end the process."""
        ggml = self.ggml
        device = ggml.ggml_backend_get_device(self.backend)
        address = ggml.ggml_backend_reg_get_proc_address(
            ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            place = ctypes.cast(self.weights[0] + BUFFER_OFFSET, POINTER(c_void_p))
            for kind in iter_until_null(extra):
                place[0] = ggml.ggml_backend_buft_alloc_buffer(kind, 0)
                supported = ggml.ggml_backend_dev_supports_op(device, self.results[0])
                ggml.ggml_backend_buffer_free(place[0])
                place[0] = None
                name = ggml.ggml_backend_buft_name(kind)
                if supported and (name != b"AMX" or self.try_amx or amx_works()):
                    return int(kind)
        return ggml.ggml_backend_cpu_buffer_type()

    def run(self) -> None:
        """Computes all products."""
        if self.ggml.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise RuntimeError("ggml could not compute the graph")

    def result(self, i: int) -> np.ndarray:
        """Product i, (m, n) float32."""
        out = np.empty(self.shape, np.float32)
        self.ggml.ggml_backend_tensor_get(self.results[i], out.ctypes.data, 0, out.nbytes)
        return out


@functools.cache
def amx_works() -> bool:
    """Whether ggml's kernels for AMX, where it takes them, compute two rows: builds of 2026 end the process instead
    (ggml-org/llama.cpp pull request 26954), so another one tries."""
    tried = subprocess.run([sys.executable, __file__], capture_output=True, timeout=60)
    return tried.returncode == 0


def iter_until_null(pointers: Any) -> Any:
    """The pointers of an array that ends with NULL."""
    i = 0
    while pointers and pointers[i]:
        yield pointers[i]
        i += 1


if __name__ == "__main__":  # see amx_works
    Layer(np.ones((32, 256), np.float32), np.ones((2, 256), np.float32), "Q8_0", 1, 1, True).run()
