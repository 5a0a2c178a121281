"""Weights on a device and linear layers of compute="auto" (kernels/weight.h, skinny.h): packing,
quantization on the device, sums against float64, independence of the batch, what is fused."""

from __future__ import annotations

import ctypes as ct
from typing import Any

import emulated
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import qllm
from device_linear import (
    ACTIVATIONS,
    AFTER,
    Before,
    HeadsStruct,
    Library,
    Output,
    standard_parts,
)
from qllm import _core
from qllm.errors import QllmValueError
from qllm.quantize import FORMATS

NF4 = ["nf4", "fp4", "nf4-dq", "fp4-dq"]
TILED = [*NF4, "int8", "bf16"]
EPS = 2.0**-24


def f32(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def to_bf16(values: Any) -> NDArray[np.uint16]:
    """Bits, rounded to nearest, ties to even."""
    bits = f32(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_bf16(values: Any) -> NDArray[np.float64]:
    return (to_bf16(values).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def gpu() -> Library:
    return Library()


def random(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return f32(np.random.default_rng(seed).standard_normal(shape))


def assert_same_parts(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)


# --------------------------------------------------------------------------------------- packing

SHAPES = [(16, 64), (1, 64), (17, 128), (40, 192), (31, 320)]


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_come_back(gpu: Library, name: str, tiled: bool) -> None:
    shapes = SHAPES if name in NF4 else [*SHAPES, (5, 7), (33, 100), (1, 1), (16, 65)]
    for i, shape in enumerate(shapes):
        q = qllm.quantize(random(shape, i), name)
        weight = gpu.set_weight(q, tiled)
        assert weight.tiled == (tiled and name in TILED)
        assert_same_parts(gpu.get_weight(weight), standard_parts(q))


def test_large_weights_come_back_slab_by_slab(gpu: Library) -> None:
    bits = np.random.default_rng(0).integers(0, 0x4000, (2200, 4096), np.uint16)
    q = qllm.quantize(bits, "bf16", dtype="bfloat16")
    assert_same_parts(gpu.get_weight(gpu.set_weight(q)), standard_parts(q))


def test_other_tables_come_back_and_do_not_share_a_launch(gpu: Library) -> None:
    q = qllm.quantize(random((16, 64)), "nf4")
    assert q.quant_map is not None
    other = _core.quantized_from_parts("nf4", q.shape, q.packed, blocksize=64, absmax=q.absmax,
                                      quant_map=q.quant_map * f32(0.5))
    weights = [gpu.set_weight(q), gpu.set_weight(other)]
    assert_same_parts(gpu.get_weight(weights[1]), standard_parts(other))
    output = Output(after=AFTER["store"])
    assert gpu.fits(weights[:1], output) and gpu.fits(weights[1:], output)
    assert not gpu.fits(weights, output)
    x = random((2, 64), 1)
    np.testing.assert_allclose(gpu.linear(weights[1:], x)[0] * 2, gpu.linear(weights[:1], x)[0],
                               rtol=1e-2, atol=1e-2)


def tile_offset(name: str, cols: int, row: int, col: int) -> int:
    """layout.h in other words: byte of a value in the tiles, and for 4-bit codes of its pair."""
    across, r, c = -(-cols // 64), row % 16, col % 64
    lane, i = r % 8 * 4 + c // 16, c % 16
    if name in NF4:
        place = lane * 16 + r // 8 * 8 + i // 2
        size = 512
    else:
        width = 1 if name == "int8" else 2
        load, byte = divmod(i * width, 8)
        place = load * 512 + lane * 16 + byte // 4 * 8 + r // 8 * 4 + byte % 4
        size = 1024 * width
    return (row // 16 * across + col // 64) * size + place


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "bf16"])
def test_layout_of_tiles(gpu: Library, name: str) -> None:
    rows, cols = 21, 128
    q = qllm.quantize(random((rows, cols)), name)
    weight = gpu.set_weight(q)
    width = {"int8": 1, "bf16": 2}.get(name, 0.5)
    data = gpu.take(weight.data, (int(32 * cols * width),), np.uint8)
    standard = q.packed.reshape(-1).view(np.uint8)
    for row in range(rows):
        for col in range(0, cols, 2 if name in NF4 else 1):
            at, of = tile_offset(name, cols, row, col), int((row * cols + col) * width)
            assert data[at] == standard[of], (row, col)
    if name in NF4:
        dtype = np.uint8 if name == "nf4-dq" else np.float32
        scales = gpu.take(weight.absmax_codes or weight.absmax, (2, 2, 8, 2), dtype)
        expected = q.absmax if q.absmax is not None else q.absmax_codes
        assert expected is not None
        for row in range(32):
            for block in range(2):
                value = expected.reshape(rows, 2)[row, block] if row < rows else 0
                assert scales[row // 16, block, row % 8, row % 16 // 8] == value


def test_what_tiles_can_hold(gpu: Library) -> None:
    def tiles(format: int, rows: int, cols: int, blocksize: int) -> bool:
        return bool(gpu.c.gpu_test_weight_tiles(format, ct.c_int64(rows), ct.c_int64(cols),
                                                ct.c_int64(blocksize)))

    assert tiles(3, 5, 128, 64) and tiles(5, 5, 128, 128)
    assert not tiles(3, 5, 96, 64) and not tiles(3, 5, 128, 32) and not tiles(3, 5, 192, 128)
    assert tiles(2, 5, 7, 0) and tiles(7, 5, 7, 0) and not tiles(7, 5, 133_144, 0)
    assert tiles(2, 2**30, 2**20, 0) and not tiles(2, 2**30 + 1, 64, 0)
    assert not tiles(2, 16, 2**20 + 1, 0)
    assert not tiles(0, 64, 64, 0) and not tiles(1, 64, 64, 0) and not tiles(2, 0, 64, 0)


# ---------------------------------------------------------------------- quantization on the device


def source(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        return values.astype(np.float16)
    return to_bf16(values) if dtype == "bfloat16" else values


def assert_loads_like_core(gpu: Library, values: NDArray[Any], dtype: str, name: str,
                           blocksize: int, tiled: bool) -> None:
    expected = qllm.quantize(values, name, blocksize, dtype=dtype)
    weight = gpu.load_weight(values, dtype, name, blocksize, tiled)
    assert_same_parts(gpu.get_weight(weight), standard_parts(expected))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantizes_like_core(gpu: Library, name: str, dtype: str) -> None:
    for i, (shape, blocksize) in enumerate([((17, 128), 64), ((5, 96), 32), ((3, 50), 64),
                                            ((16, 512), 256), ((1, 1), 64)]):
        values = random(shape, i) * f32(10.0) ** (i - 2)
        assert_loads_like_core(gpu, source(values, dtype), dtype, name, blocksize, i % 2 == 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_quantizes_any_finite_values_like_core(gpu: Library, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    name = data.draw(st.sampled_from(FORMATS))
    rows, cols = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 140))
    size = np.uint32 if dtype == "float32" else np.uint16
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kind = data.draw(st.sampled_from(["any bits", "near zero", "zeros", "few values"]))
    bits = rng.integers(0, np.iinfo(size).max, (rows, cols), size, endpoint=True)
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    if kind == "near zero":
        bits &= size(~exponent & np.iinfo(size).max)
    elif kind == "zeros":
        bits &= size(1) << size(np.iinfo(size).bits - 1)
    elif kind == "few values":
        bits = bits.reshape(-1)[rng.integers(0, min(3, bits.size), bits.shape)]
    bits[bits & size(exponent) == exponent] = 0
    limit = {"f16": 65519.0, "bf16": 3.38e38}.get(name)
    values = bits.view(np.float32) if dtype == "float32" else bits
    if dtype == "float16":
        values = bits.view(np.float16)
    if limit and dtype != "float16":
        wide = values if dtype == "float32" else (bits.astype(np.uint32) << 16).view(np.float32)
        values = np.where(np.abs(wide) > limit, values.dtype.type(0), values)
    assert_loads_like_core(gpu, values, dtype, name,
                           data.draw(st.sampled_from([32, 64, 128])), data.draw(st.booleans()))


def test_values_of_any_alignment_and_many_slabs(gpu: Library) -> None:
    cols = 4096
    rows = 2 * 4096 * 1024 // cols + 17  # two slabs of 16 MiB and a little
    raw = np.empty(rows * cols * 2 + 1, np.uint8)
    values = raw[1:].view(np.uint16).reshape(rows, cols)
    values[:] = to_bf16(random((rows, 64)))[:, np.arange(cols) % 64]
    aligned = values.copy()
    for name in ("nf4-dq", "int8", "bf16"):
        expected = qllm.quantize(aligned, name, dtype="bfloat16")
        weight = gpu.load_weight(values, "bfloat16", name)
        assert_same_parts(gpu.get_weight(weight), standard_parts(expected))


@pytest.mark.parametrize("name", ["nf4", "fp4-dq"])
def test_a_last_short_block_divides_like_core(gpu: Library, name: str) -> None:
    """Values for which dividing by the absmax and multiplying by 1 / absmax give other codes."""
    values = np.sort(_core.codebook("fp4" if name.startswith("fp4") else "nf4"))
    thresholds = (f32(0.5) * (values[:-1] + values[1:]))[:, None]
    absmax = f32(np.random.default_rng(0).uniform(0.5, 2, 20_000))
    found = 0
    for step in (-1, 0, 1):
        x = f32(thresholds * absmax)
        x = (x.view(np.int32) + np.int32(step)).view(np.float32)
        differs = (x / absmax > thresholds) != (x * (f32(1) / absmax) > thresholds)
        for i, j in np.argwhere(differs)[:4]:
            row = f32([[*([0.25] * 64), absmax[j], x[i, j]]])
            assert_loads_like_core(gpu, row, "float32", name, 64, False)
            found += 1
    assert found > 3


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_core_refuses(gpu: Library, name: str, bad: float) -> None:
    values = random((20, 128))
    values[7, 100] = bad
    with pytest.raises(QllmValueError) as expected:
        qllm.quantize(values, name, name="layers.0.q")
    held = gpu.held()
    with pytest.raises(emulated.DeviceError) as got:
        gpu.load_weight(values, "float32", name, name="layers.0.q")
    assert str(got.value) == str(expected.value)
    assert "row 7, column 100" in str(got.value)
    assert gpu.held() == held


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_refuses_values_beyond_the_range(gpu: Library, name: str) -> None:
    values = random((4, 64))
    values[2, 3] = 70000 if name == "f16" else 3.4e38
    with pytest.raises(QllmValueError) as expected:
        qllm.quantize(values, name, name="w")
    with pytest.raises(emulated.DeviceError) as got:
        gpu.load_weight(values, "float32", name)
    assert str(got.value) == str(expected.value)


# ------------------------------------------------------------------------------------------ sums


def rounded_weight(q: qllm.QuantizedTensor) -> NDArray[np.float64]:
    """What the tensor cores multiply: codes of the table rounded to bf16, times absmax."""
    if q.format == "bf16":
        return as_bf16(q.dequantize())
    assert q.quant_map is not None
    codes = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(q.shape)
    absmax = q.absmax
    if absmax is None:
        assert q.nested_quant_map is not None and q.nested_absmax is not None
        assert q.absmax_codes is not None and q.offset is not None
        of_group = q.nested_absmax[np.arange(q.absmax_codes.size) // 256]
        absmax = q.nested_quant_map[q.absmax_codes] * of_group + np.float32(q.offset)
    blocks = np.repeat(absmax.astype(np.float64), q.blocksize or 0).reshape(q.shape)
    return as_bf16(q.quant_map)[codes] * blocks


@pytest.mark.parametrize("name", [*NF4, "bf16"])
def test_sums_against_float64(gpu: Library, name: str) -> None:
    for i, (rows, cols, m) in enumerate([(40, 64, 1), (16, 512, 3), (33, 1088, 8), (7, 704, 20)]):
        w, x = random((rows, cols), i), random((m, cols), i + 1)
        q = qllm.quantize(w, name, 64)
        y = gpu.linear([gpu.set_weight(q)], x)[0]
        rounded, exact_x = rounded_weight(q), as_bf16(x)
        size = np.abs(exact_x) @ np.abs(rounded).T
        assert (np.abs(y - exact_x @ rounded.T) <= 1e-5 * size).all()
        # rounding of x (half an ulp of bf16) and of the codes, against the exact reference
        code_error = np.abs(rounded - q.dequantize().astype(np.float64))
        bound = 2.0**-8 * size * 1.01 + np.abs(x.astype(np.float64)) @ code_error.T
        assert (np.abs(y - q.matmul_reference(x)) <= bound + 1e-5 * size).all()


@pytest.mark.parametrize("blocksize", [128, 512])
@pytest.mark.parametrize("name", ["nf4", "fp4-dq"])
def test_larger_blocks(gpu: Library, name: str, blocksize: int) -> None:
    q = qllm.quantize(random((48, 1024)), name, blocksize)
    x = random((2, 1024), 1)
    y = gpu.linear([gpu.set_weight(q)], x)[0]
    rounded, exact_x = rounded_weight(q), as_bf16(x)
    size = np.abs(exact_x) @ np.abs(rounded).T
    assert (np.abs(y - exact_x @ rounded.T) <= 1e-5 * size).all()


@pytest.mark.parametrize("threshold", [6.0, 1.5, 0.0])
@pytest.mark.parametrize("shape", [(20, 64), (17, 1000), (40, 333), (3, 5)])
def test_int8_has_the_bits_of_core(gpu: Library, shape: tuple[int, int], threshold: float) -> None:
    q = qllm.quantize(random(shape), "int8")
    weight = gpu.set_weight(q, bias=random((shape[0],), 3))
    for m in (1, 8, 21):
        x = random((m, shape[1]), m) * f32(2.5)
        x[0, 0], x[0, 1] = 40.0, threshold
        x[m // 2] *= f32(1e-3)
        expected = q.matmul_reference(x, random((shape[0],), 3), threshold)
        np.testing.assert_array_equal(gpu.linear([weight], x, threshold=threshold)[0], expected)


def test_int8_of_rows_that_are_no_numbers(gpu: Library) -> None:
    q = qllm.quantize(random((20, 128)), "int8")
    weight, x = gpu.set_weight(q), random((6, 128), 1)
    x[0, 3], x[1, 5], x[2], x[3], x[4, 7] = np.nan, np.inf, 0.0, 1e-39, -np.inf
    for threshold in (6.0, 0.0):
        expected = q.matmul_reference(x, threshold=threshold)
        got = gpu.linear([weight], x, threshold=threshold)[0]
        np.testing.assert_array_equal(got, expected)
        assert np.isnan(got).any()


@pytest.mark.parametrize("name", TILED)
def test_a_row_does_not_depend_on_the_others(gpu: Library, name: str) -> None:
    q = qllm.quantize(random((48, 640)), name)
    weight, x = gpu.set_weight(q), random((64, 640), 1)
    whole = gpu.linear([weight], x)[0]
    for first, rows in [(0, 1), (5, 1), (3, 3), (56, 8), (2, 9), (30, 17), (1, 33)]:
        part = gpu.linear([weight], x[first:first + rows])[0]
        np.testing.assert_array_equal(part, whole[first:first + rows])
    order = np.random.default_rng(2).permutation(64)
    np.testing.assert_array_equal(gpu.linear([weight], x[order])[0], whole[order])


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "bf16"])
def test_bits_do_not_depend_on_the_grid(gpu: Library, name: str) -> None:
    q = qllm.quantize(random((208, 192)), name)
    weight, x = gpu.set_weight(q), random((3, 192), 1)
    results = []
    for processors in (1, 2, 5, 132):
        gpu.set_multiprocessors(processors)
        results.append(gpu.linear([weight], x)[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("name", TILED)
def test_many_rows_have_the_bits_of_few(gpu: Library, name: str) -> None:
    """prefill.cu, with one row of tiles for a warp and with two, and rows behind the last 64."""
    for rows, cols in ((40, 64), (300, 640), (16, 1088)):
        weights = [gpu.set_weight(qllm.quantize(random((rows, cols), i), name),
                                  bias=random((rows,), i)) for i in (1, 2)]
        x = random((150, cols), 3) * f32(2)
        for processors in (1, 132):
            gpu.set_multiprocessors(processors)
            many = gpu.linear(weights, x)
            for first, count in ((0, 8), (60, 20), (126, 24)):
                few = gpu.linear(weights, x[first:first + count])
                for whole, part in zip(many, few):
                    np.testing.assert_array_equal(whole[first:first + count], part)


@pytest.mark.parametrize("name", ["nf4-dq", "int8"])
def test_many_rows_before_and_after(gpu: Library, name: str) -> None:
    gate, up = (gpu.set_weight(qllm.quantize(random((200, 192), i), name)) for i in (1, 2))
    x, held = random((70, 192), 3), [random((70, 200), 4)]
    norm: dict[str, Any] = {"norm": "rms", "scale": random((192,), 5)}
    for weights, after in (([gate, up], "gate"), ([gate], "act"), ([up], "add")):
        many = gpu.linear(weights, x, after, y=held, **norm)[0]
        few = gpu.linear(weights, x[40:70], after, y=[held[0][40:70]], **norm)[0]
        np.testing.assert_array_equal(many[40:70], few)


def test_more_rows_than_a_chunk(gpu: Library) -> None:
    q = qllm.quantize(random((16, 64)), "nf4")
    weight, x = gpu.set_weight(q), random((1100, 64), 1)
    y = gpu.linear([weight], x)[0]
    for first in (0, 500, 1090):
        np.testing.assert_array_equal(gpu.linear([weight], x[first:first + 10])[0],
                                      y[first:first + 10])


def test_wide_rows_leave_shared_memory(gpu: Library) -> None:
    """Both ways in which rows are prepared, at the same weight."""
    q = qllm.quantize(random((16, 12_800)), "nf4")
    weight, x = gpu.set_weight(q), random((8, 12_800), 1)
    norm: dict[str, Any] = {"norm": "rms", "scale": random((12_800,), 2)}
    whole = gpu.linear([weight], x, **norm)[0]
    for row in (0, 7):
        np.testing.assert_array_equal(gpu.linear([weight], x[row:row + 1], **norm)[0],
                                      whole[row:row + 1])


# ---------------------------------------------------------------------------- before and after


def normed(x: NDArray[np.float32], norm: str | None, scale: Any, bias: Any, eps: float
           ) -> NDArray[np.float64]:
    v = x.astype(np.float64)
    if norm == "rms":
        v = v / np.sqrt((v * v).mean(1, keepdims=True) + eps) * scale
    elif norm == "layer":
        v = (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + eps) * scale
        v = v if bias is None else v + bias
    return v


@pytest.mark.parametrize("cols", [192, 101, 1100])
@pytest.mark.parametrize("norm,has_bias", [("rms", False), ("layer", False), ("layer", True)])
def test_norms(gpu: Library, norm: str, has_bias: bool, cols: int) -> None:
    """A weight of ones on the diagonal shows the prepared rows."""
    q = qllm.quantize(np.eye(cols, dtype=np.float32), "bf16")
    weight, scale = gpu.set_weight(q), random((cols,), 1)
    bias = random((cols,), 2) if has_bias else None
    for m in (2, 12):
        x = random((m, cols), m) * f32(3) + f32(1)
        y = gpu.linear([weight], x, norm=norm, scale=scale, bias=bias, eps=1e-3)[0]
        expected = normed(x, norm, scale, bias, 1e-3)
        np.testing.assert_array_equal(y, as_bf16(y))
        assert (np.abs(y - expected) <= np.abs(expected) * 2.0**-8 + 1e-5).all()
        assert np.mean(y == as_bf16(f32(expected))) > 0.99


def test_rows_from_anywhere(gpu: Library) -> None:
    weight, x = gpu.set_weight(qllm.quantize(random((20, 64)), "nf4")), random((9, 64), 1)
    rows = [3, 8, 8, 0, -1, 5]
    whole = gpu.linear([weight], x)[0]
    got = gpu.linear([weight], x, row_of=rows)[0]
    np.testing.assert_array_equal(got, np.where(np.array(rows)[:, None] < 0, f32(0), whole[rows]))
    many = list(range(9)) * 4
    np.testing.assert_array_equal(gpu.linear([weight], x, row_of=many)[0], whole[many])


@pytest.mark.parametrize("name", TILED)
def test_weights_side_by_side(gpu: Library, name: str) -> None:
    x, sizes = random((5, 128), 9), [40, 16, 23]
    weights = [gpu.set_weight(qllm.quantize(random((n, 128), n), name), bias=random((n,), n + 1))
               for n in sizes]
    together = gpu.linear(weights, x, norm="rms", scale=random((128,), 3))
    for weight, got in zip(weights, together):
        alone = gpu.linear([weight], x, norm="rms", scale=random((128,), 3))[0]
        np.testing.assert_array_equal(got, alone)


def test_residual_and_activations(gpu: Library) -> None:
    weight, x = gpu.set_weight(qllm.quantize(random((40, 128)), "nf4"), bias=random((40,), 4)), None
    for m in (3, 20):
        x = random((m, 128), m)
        plain = gpu.linear([weight], x)[0]
        held = random((m, 40), 7)
        np.testing.assert_array_equal(gpu.linear([weight], x, "add", y=[held])[0], held + plain)
        for activation, function in ACTS.items():
            got = gpu.linear([weight], x, "act", activation)[0]
            np.testing.assert_allclose(got, function(plain.astype(np.float64)), rtol=2e-6,
                                       atol=1e-7)


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def gelu(x: Any) -> Any:
    from scipy.special import erfc  # type: ignore[import-untyped]

    return x * erfc(-x / np.sqrt(2)) / 2


def gelu_tanh(x: Any) -> Any:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


@pytest.mark.parametrize("rows", [64, 40, 7, 200])
@pytest.mark.parametrize("name", TILED)
def test_gate(gpu: Library, name: str, rows: int) -> None:
    gate, up = (gpu.set_weight(qllm.quantize(random((rows, 192), i), name), bias=random((rows,), i))
                for i in (1, 2))
    for m in (1, 12):
        x = random((m, 192), m)
        plain = gpu.linear([gate, up], x)
        got = gpu.linear([gate, up], x, "gate", "gelu_tanh")[0]
        expected = gelu_tanh(plain[0].astype(np.float64)) * plain[1]
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6)


PAGE = 64


def heads_case(gpu: Library, q: int, kv: int, head_dim: int, half: int, fused: bool, m: int,
               name: str = "nf4", cols: int = 64, inner: int = 0) -> None:
    """inner: rows of a weight beside them, whose outputs go through an activation."""
    rng = np.random.default_rng(q + kv + head_dim + half)
    counts = [(q + 2 * kv) * head_dim] if fused else [q * head_dim, kv * head_dim, kv * head_dim]
    weights = [gpu.set_weight(qllm.quantize(random((n, cols), i), name), bias=random((n,), i))
               for i, n in enumerate([*counts, inner] if inner else counts)]
    x = random((m, cols), 5)
    plain = gpu.linear(weights, x)
    positions = rng.integers(0, 3 * PAGE, m).astype(np.int32)
    angles = rng.standard_normal((3 * PAGE, half))
    cos, sin = f32(np.cos(angles)), f32(np.sin(angles))
    pages = [np.full(2 * kv * PAGE * head_dim * 2, 0x4242, np.uint16) for _ in range(4)]
    bases = [gpu.device.array(page) for page in pages]
    page_index = np.array([[(r + p) % 4 for p in range(4)] for r in range(m)], np.int32)
    page_index[m - 1] = -1  # a row that only fills the batch
    layer_offset = 2 * kv * PAGE * head_dim
    arrays: dict[str, Any] = {
        "positions": positions, "cos": cos, "sin": sin, "page_index": page_index,
        "q": np.zeros((m, q, head_dim), np.float32),
        "page_base": np.array([base.pointer.value for base in bases], np.uint64)}
    placed = {name: gpu.device.array(array) for name, array in arrays.items()}
    heads = HeadsStruct(
        heads=q, kv_heads=kv, head_dim=head_dim, half=half, q_stride=q * head_dim, max_pages=4,
        page_offset=layer_offset, **{name: array.pointer.value for name, array in placed.items()})
    output = Output(after=AFTER["heads_act" if inner else "heads"], heads=heads,
                    activation=ACTIVATIONS["gelu"])
    if inner:
        activated = gpu.device.array(np.full((m, inner + 3), 7, np.float32))
        output.y[1], output.stride[1] = activated.pointer.value, inner + 3
    assert gpu.fits(weights, output)
    gpu.run(weights, Before(x), output)
    if inner:
        found = activated.get()
        (alone,) = gpu.linear(weights[1:], x, "act", "gelu")
        np.testing.assert_array_equal(found[:, :inner].view(np.uint32), alone.view(np.uint32))
        assert (found[:, inner:] == 7).all()

    if fused:
        grouped = plain[0].reshape(m, kv, q // kv + 2, head_dim)
        parts = [grouped[:, :, :-2].reshape(m, q, head_dim), grouped[:, :, -2], grouped[:, :, -1]]
    else:
        parts = [p.reshape(m, -1, head_dim) for p in plain]
    rotated = []
    for part in parts[:2]:
        part = part.astype(np.float64)
        a, b = part[:, :, :half].copy(), part[:, :, half:2 * half].copy()
        c, s = cos[positions][:, None].astype(np.float64), sin[positions][:, None]
        part[:, :, :half], part[:, :, half:2 * half] = a * c - b * s, b * c + a * s
        rotated.append(part)
    np.testing.assert_allclose(placed["q"].get(), rotated[0], rtol=1e-5, atol=1e-5)
    for r in range(m - 1):  # later rows may have gone to the same place
        number, at = page_index[r, positions[r] // PAGE], positions[r] % PAGE
        layers = bases[number].get().reshape(2, kv, 2, PAGE, head_dim)
        others = [i for i in range(m - 1) if i != r and positions[i] % PAGE == at
                  and page_index[i, positions[i] // PAGE] == number]
        if others:
            continue
        key, value = ((layers[1, :, i, at].astype(np.uint32) << 16).view(np.float32)
                      for i in (0, 1))
        np.testing.assert_allclose(key, rotated[1][r], rtol=2.0**-8, atol=1e-4)
        np.testing.assert_array_equal(value, as_bf16(parts[2][r]))
        assert (layers[0] == 0x4242).all()
    written = sum(int((base.get() != 0x4242).sum()) for base in bases)
    assert 0 < written <= (m - 1) * kv * 2 * head_dim


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("q,kv,head_dim,half", [
    (4, 2, 64, 32), (3, 1, 32, 16), (2, 2, 48, 16), (2, 1, 80, 32), (2, 1, 16, 0), (5, 5, 96, 48)])
def test_heads(gpu: Library, q: int, kv: int, head_dim: int, half: int, fused: bool) -> None:
    heads_case(gpu, q, kv, head_dim, half, fused, 4)
    heads_case(gpu, q, kv, head_dim, half, fused, 11)
    heads_case(gpu, q, kv, head_dim, half, fused, 67)


@pytest.mark.parametrize("name", ["nf4-dq", "int8", "bf16"])
def test_heads_of_other_formats(gpu: Library, name: str) -> None:
    heads_case(gpu, 4, 2, 64, 32, False, 5, name, 192)


@pytest.mark.parametrize("rows", [3, 21, 67])
@pytest.mark.parametrize(("name", "inner"), [("nf4", 77), ("nf4-dq", 128), ("int8", 16),
                                             ("bf16", 40)])
def test_heads_beside_inner_activations(gpu: Library, name: str, inner: int, rows: int) -> None:
    heads_case(gpu, 4, 2, 48, 16, True, rows, name, 128, inner)


def test_what_fits_together(gpu: Library) -> None:
    def weight(rows: int, name: str = "nf4", cols: int = 128, **kw: Any) -> Any:
        return gpu.set_weight(qllm.quantize(random((rows, cols)), name, **kw))

    store, gate = Output(after=AFTER["store"]), Output(after=AFTER["gate"])
    heads = Output(after=AFTER["heads"],
                   heads=HeadsStruct(heads=2, kv_heads=1, head_dim=32, half=16))
    a, b = weight(64), weight(32)
    assert gpu.fits([a], store) and gpu.fits([a, b], store) and gpu.fits([a, a], gate)
    assert gpu.fits([a, b, b], heads) and gpu.fits([weight(128)], heads)
    assert not gpu.fits([a, b], gate) and not gpu.fits([a], gate)
    assert not gpu.fits([a, b], heads) and not gpu.fits([a, a, b], heads)
    both = Output(after=AFTER["heads_act"], heads=heads.heads)
    assert gpu.fits([weight(128), b], both) and not gpu.fits([weight(128)], both)
    assert not gpu.fits([weight(128), weight(32, "fp4")], both) and not gpu.fits([a, b, b], both)
    assert not gpu.fits([a, weight(64, "fp4")], store)
    assert not gpu.fits([a, weight(64, blocksize=128)], store)
    assert not gpu.fits([a, weight(64, cols=64)], store)
    assert not gpu.fits([weight(64, "f32")], store)
    for change in ({"half": 8}, {"head_dim": 40, "half": 16}):
        for field, value in change.items():
            setattr(heads.heads, field, value)
        assert not gpu.fits([a, b, b], heads)
    with pytest.raises(emulated.DeviceError, match="2 weights .* do not fit together"):
        gpu.run([a, b], Before(random((1, 128))), gate)
