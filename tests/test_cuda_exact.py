"""compute="exact" on a GPU, its kernels run on the processor: the bits of the CPU's exact mode.

The CPU's side is the reference linear layer and the scalar table of small functions, which the
tests of the CPU hold against independent implementations.
"""

from __future__ import annotations

import ctypes
from typing import Any

import emulated
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import qllm
from qllm import _core

FORMATS = ["f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"]  # by their number in C
FLOATS = FORMATS[:3]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
F32 = np.float32
PAGE = 64

Array = NDArray[Any]


@pytest.fixture(params=["", "reversed"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> emulated.Device:
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)
    return emulated.device()


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def normal(r: np.random.Generator, *shape: int) -> Array:
    return r.standard_normal(shape).astype(F32)


def assert_same_bits(found: Array, expected: Array) -> None:
    """Every NaN is the same: its payload has no meaning."""
    found, expected = np.ascontiguousarray(found, F32), np.ascontiguousarray(expected, F32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def optional(device: emulated.Device, values: Array | None) -> emulated.Array | None:
    return None if values is None else device.array(values)


# ---------------------------------------------------------------------------------- linear layers


def linear(device: emulated.Device, q: qllm.QuantizedTensor, x: Array, bias: Array | None = None,
           threshold: float = 6.0, batch: bool = False, gap: int = 0) -> Array:
    """x W^T + bias, with `gap` floats between the rows of x and of the result."""
    rows, cols = q.shape
    scales = q.scb if q.format == "int8" else q.absmax
    tables = None
    if q.quant_map is not None:
        nested = [] if q.nested_quant_map is None else [q.nested_quant_map]
        tables = np.concatenate([q.quant_map, *nested])
    wide = np.full((len(x), cols + gap), np.nan, F32)
    wide[:, :cols] = x
    y = device.array(np.full((len(x), rows + gap), 7, F32))
    device.call("gpu_test_exact_linear", FORMATS.index(q.format), rows, cols, q.blocksize or 0,
                device.array(np.frombuffer(q.packed.tobytes(), np.uint8)), optional(device, scales),
                optional(device, q.absmax_codes), optional(device, q.nested_absmax),
                float(q.offset or 0), optional(device, tables), optional(device, bias),
                device.array(wide), cols + gap, len(x), threshold, batch, y, rows + gap)
    result = y.get()
    assert (result[:, rows:] == 7).all()
    return result[:, :rows]


def weight(format: str, rows: int, cols: int, blocksize: int = 64) -> qllm.QuantizedTensor:
    """Rows of different size, so that scales differ."""
    r = rng(rows, cols, blocksize)
    values = r.standard_normal((rows, cols)) * np.exp(r.uniform(-2, 2, (rows, 1)))
    return qllm.quantize(values.astype(F32), format, blocksize)


# One group and a part of one, several blocks of rows, tiles of 1024 columns and what is left over,
# rows that begin in the middle of a byte, blocks that run across row ends
SHAPES = [(1, 1, 32), (3, 31, 32), (5, 33, 32), (17, 64, 64), (40, 96, 32), (9, 100, 64),
          (33, 72, 64), (7, 1024, 1024), (5, 1029, 64), (2, 2112, 64), (70, 40, 4096)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_layer_has_the_bits_of_the_reference(
    device: emulated.Device, format: str, shape: tuple[int, int, int]
) -> None:
    rows, cols, _ = shape
    q = weight(format, *shape)
    r = rng(*shape, 1)
    bias = normal(r, rows)
    for m in (1, 2, 6):
        x = normal(r, m, cols) * F32(3)
        assert_same_bits(linear(device, q, x, bias, gap=m), q.matmul_reference(x, bias))
    assert_same_bits(linear(device, q, x), q.matmul_reference(x))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(format=st.sampled_from(FORMATS), rows=st.integers(1, 50), cols=st.integers(1, 140),
       blocksize=st.sampled_from([32, 64, 128]), m=st.integers(0, 5), biased=st.booleans(),
       seed=st.integers(0, 9))
def test_linear_layers_of_any_shape(device: emulated.Device, format: str, rows: int, cols: int,
                                    blocksize: int, m: int, biased: bool, seed: int) -> None:
    r = rng(seed)
    q = qllm.quantize(normal(r, rows, cols), format, blocksize)
    x = normal(r, m, cols) * np.exp(r.uniform(-3, 3, (m, cols))).astype(F32)
    bias = normal(r, rows) if biased else None
    assert_same_bits(linear(device, q, x, bias), q.matmul_reference(x, bias))


@pytest.mark.parametrize("format", FORMATS)
def test_linear_layers_of_unusual_rows(device: emulated.Device, format: str) -> None:
    q, x = weight(format, 12, 192), normal(rng(3), 7, 192)
    x[0, 5], x[1, 7], x[2, 9] = np.nan, np.inf, -np.inf
    x[3], x[4], x[5, 3] = 0, 1e-38, 3e38
    x[6] = -0.0
    for threshold in (6.0, 0.0):
        assert_same_bits(linear(device, q, x, threshold=threshold),
                         q.matmul_reference(x, threshold=threshold))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.5, 0.0, -1.0, np.inf])
def test_outliers_of_int8(device: emulated.Device, threshold: float, batch: bool) -> None:
    """From none to nearly all columns apart, over more columns than one warp of a row has."""
    for cols in (40, 513, 1200):
        q, x = weight("int8", 19, cols), normal(rng(cols), 6, cols) * F32(1.5)
        x[0, 3], x[2, 3], x[2, 35], x[3, :4] = 8.5, -6.0, 20, [5.9999995, 6, 6.0000005, -6]
        x[1] = 0
        expected = q.matmul_reference(x, threshold=threshold, batch_outliers=batch)
        assert_same_bits(linear(device, q, x, threshold=threshold, batch=batch), expected)
    alone = q.matmul_reference(x, threshold=threshold)
    assert (alone != expected).any() == (batch and 0 < threshold < np.inf)


# ------------------------------------------------------------------------------- rows and elements


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 64, 100, 257, 300, 2048, 2055, 5000])
def test_norms(device: emulated.Device, n: int) -> None:
    r, rows = rng(n), 3
    x, w, b = normal(r, rows, n) * F32(3) + F32(0.5), normal(r, n), normal(r, n)
    for kind, name, bias in ((0, "rms_norm", None), (1, "layer_norm", b), (1, "layer_norm", None)):
        vectors = (w,) if bias is None else (w, bias)
        expected = np.stack([_core._ops_test("scalar", name, (row, *vectors), 1e-5) for row in x])
        y = device.array(x)
        arguments = kind, device.array(w), optional(device, bias), n, 1e-5
        device.call("gpu_test_exact_norm", *arguments, y, None, rows, y)  # in place
        assert_same_bits(y.get(), expected)
        row_of = np.array([2, 0, 2, 1], np.int32)
        y = device.empty((4, n), F32)
        device.call("gpu_test_exact_norm", *arguments, device.array(x), device.array(row_of), 4, y)
        assert_same_bits(y.get(), expected[row_of])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(device: emulated.Device, name: str) -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, -3e38, 88.8, -88.8, 14.5]
    x = np.concatenate([np.array(special, F32), normal(rng(6), 700) * F32(8)])
    up, kind = normal(rng(7), len(x)), ACTIVATIONS.index(name)
    for factor in (None, up):
        y = device.array(x)
        device.call("gpu_test_exact_activate", kind, y, optional(device, factor), len(x), y)
        arrays = (x,) if factor is None else (x, factor)
        assert_same_bits(y.get(), _core._ops_test("scalar", name, arrays, 0.0))


def test_addition(device: emulated.Device) -> None:
    x, a = normal(rng(1), 1000), normal(rng(2), 1000)
    y = device.array(x)
    device.call("gpu_test_exact_add", device.array(a), 1000, y)
    assert_same_bits(y.get(), x + a)


@pytest.mark.parametrize("format", FLOATS)
def test_embedding(device: emulated.Device, format: str) -> None:
    for cols in (1, 5, 32, 300):
        values = normal(rng(cols), 20, cols) * np.exp(rng(3).uniform(-20, 5, (20, 1)))
        q = qllm.quantize(values.astype(F32), format)
        tokens = np.array([3, 19, 0, 3, 7], np.int32)
        y = device.empty((5, cols), F32)
        data = device.array(np.frombuffer(q.packed.tobytes(), np.uint8))
        device.call("gpu_test_exact_embed", FORMATS.index(format), 20, cols, data,
                    device.array(tokens), 5, y)
        assert_same_bits(y.get(), q.dequantize()[tokens])


# -------------------------------------------------------------------------------------- attention


class Heads(ctypes.Structure):
    """gpu_exact_heads of kernels/exact.h."""

    _fields_ = [
        ("heads", ctypes.c_int), ("kv_heads", ctypes.c_int), ("head_dim", ctypes.c_int),
        ("q_group", ctypes.c_int64), ("k", ctypes.c_int64), ("v", ctypes.c_int64),
        ("kv_group", ctypes.c_int64), ("stride", ctypes.c_int64), ("page_offset", ctypes.c_int64),
        ("positions", ctypes.c_void_p), ("page_index", ctypes.c_void_p),
        ("page_base", ctypes.c_void_p), ("max_pages", ctypes.c_int), ("half", ctypes.c_int),
        ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p), ("bias_stride", ctypes.c_int64), ("window", ctypes.c_int64),
    ]


class Case:
    """Rows of one sequence, and what attention makes of them on the CPU."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, rows: int, half: int = 0,
                 fused: bool = False, normed: bool = False, alibi: bool = False,
                 window: int = 0) -> None:
        self.heads, self.kv_heads, self.head_dim, self.rows = heads, kv_heads, head_dim, rows
        self.half, self.fused, self.window = half, fused, window
        r = rng(heads, kv_heads, head_dim, rows)
        self.scale = F32(head_dim**-0.5 * 3)
        self.q = normal(r, rows, heads, head_dim)
        self.k, self.v = normal(r, rows, kv_heads, head_dim), normal(r, rows, kv_heads, head_dim)
        angles = r.uniform(-9, 9, (rows, half))
        self.cos, self.sin = np.cos(angles).astype(F32), np.sin(angles).astype(F32)
        self.norms = [normal(r, head_dim) if normed else None for _ in range(2)]
        self.bias = normal(r, heads, rows + 5) if alibi else None

    def qkv(self) -> Array:
        if not self.fused:
            return np.concatenate([a.reshape(self.rows, -1) for a in (self.q, self.k, self.v)], 1)
        group = self.q.reshape(self.rows, self.kv_heads, -1, self.head_dim)
        parts = [group, self.k[:, :, None], self.v[:, :, None]]
        return np.concatenate(parts, 2).reshape(self.rows, -1)

    def prepared(self, x: Array, norm: Array | None, position: int) -> Array:
        if norm is not None:
            x = _core._ops_test("scalar", "rms_norm", (x, norm), 1e-6)
        turned = 2 * self.half
        if turned > 0:
            table = (x[:turned], self.cos[position], self.sin[position])
            x = np.concatenate([_core._ops_test("scalar", "rope", table, 0.0), x[turned:]])
        return x

    def expected(self) -> Array:
        group, out = self.heads // self.kv_heads, np.empty_like(self.q)
        keys = np.stack([[self.prepared(k, self.norms[1], t) for k in row]
                         for t, row in enumerate(self.k)])
        for t, row in enumerate(self.q):
            begin = max(0, t + 1 - self.window) if self.window else 0
            for h, q in enumerate(row):
                g, n = h // group, t + 1
                panels = np.zeros(((n + 15) // 16 * 16, self.head_dim), F32)
                panels[:n] = keys[:n, g]
                panels = panels.reshape(-1, 16, self.head_dim).transpose(0, 2, 1)
                bias = None if self.bias is None else self.bias[h:h + 1]
                out[t, h] = _core._attention_test(
                    "scalar", self.prepared(q, self.norms[0], t)[None], panels.ravel(),
                    self.v[:n, g].ravel(), [n], bias, begin, n, float(self.scale))[0]
        return out.reshape(self.rows, -1)

    def found(self, device: emulated.Device, chunks: list[int]) -> Array:
        """In chunks of so many rows, over pages in an order of their own; layer 1 of 2."""
        group, dim = self.heads // self.kv_heads, self.head_dim
        layer = self.kv_heads * 2 * PAGE * dim
        count = -(-self.rows // PAGE)
        pages = [device.empty(2 * layer, F32) for _ in range(count)]
        order = rng(count).permutation(count).astype(np.int32)
        bases = device.array(np.array([page.pointer.value for page in pages], np.uint64))
        width, q = (group + 2) * dim, self.heads * dim
        tables = {name: optional(device, values) for name, values in
                  (("cos", self.cos), ("sin", self.sin), ("q_norm", self.norms[0]),
                   ("k_norm", self.norms[1]), ("bias", self.bias))}
        out, first = [], 0
        for rows in chunks:
            index = np.full((rows, 2 * count), -1, np.int32)
            for i in range(rows):
                known = (first + i) // PAGE + 1
                index[i, :known] = order[:known]
            positions = device.array(np.arange(first, first + rows, dtype=np.int32))
            index_there = device.array(index)
            struct = Heads(
                heads=self.heads, kv_heads=self.kv_heads, head_dim=dim,
                q_group=width if self.fused else group * dim,
                k=group * dim if self.fused else q,
                v=(group + 1) * dim if self.fused else q + self.kv_heads * dim,
                kv_group=width if self.fused else dim, stride=q + 2 * self.kv_heads * dim,
                page_offset=layer, positions=positions.pointer, page_index=index_there.pointer,
                page_base=bases.pointer, max_pages=2 * count, half=self.half, eps=1e-6,
                scale=self.scale, bias_stride=self.rows + 5, window=self.window,
                **{name: None if a is None else a.pointer for name, a in tables.items()})
            y = device.empty((rows, q), F32)
            device.call("gpu_test_exact_attention", ctypes.byref(struct),
                        device.array(self.qkv()[first:first + rows]), rows, first + rows, y)
            out.append(y.get())
            first += rows
        assert first == self.rows
        return np.concatenate(out)


CASES = {
    "one head": (Case(1, 1, 8, 3), [3]),
    "rotated": (Case(4, 2, 16, 70, half=8), [66, 1, 1, 2]),
    "a part rotated": (Case(2, 2, 24, 20, half=5), [20]),
    "normed, wide heads": (Case(3, 1, 300, 5, half=150, normed=True), [4, 1]),
    "fused, multi-query": (Case(6, 1, 12, 67, half=6, fused=True), [64, 3]),
    "fused, grouped, normed": (Case(6, 3, 20, 30, half=4, fused=True, normed=True), [30]),
    "alibi": (Case(3, 3, 10, 130, alibi=True), [129, 1]),
    "window": (Case(2, 1, 16, 90, half=8, window=17), [88, 1, 1]),
    "window of one": (Case(2, 1, 16, 20, window=1), [20]),
    "many positions": (Case(1, 1, 5, 600), [598, 2]),
    "many positions in a window": (Case(1, 1, 6, 700, alibi=True, window=333), [700]),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(device: emulated.Device, name: str) -> None:
    case, chunks = CASES[name]
    assert_same_bits(case.found(device, chunks), case.expected())


def test_attention_over_scores_that_are_no_numbers(device: emulated.Device) -> None:
    case = Case(2, 2, 8, 40)
    case.k[3, 0, 2], case.k[9, 1, 0], case.q[30, 1, 4] = np.nan, np.inf, np.nan
    case.v[5, 0] = -np.inf
    assert_same_bits(case.found(device, [40]), case.expected())
