"""Quantizing and packing at the speed of memory: every instruction set, any number of threads and
any shape gives the bytes, errors and figures of the plain reference (isa="reference"), which
test_formats.py compares with bitsandbytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm
from qllm import _core
from qllm.errors import QllmValueError
from qllm.quantize import BLOCKSIZES, FORMATS

SETS = _core.cpu_info()["isas"]
FOUR_BIT = ("nf4", "fp4", "nf4-dq", "fp4-dq")
DTYPES = ("float32", "float16", "bfloat16")
F32 = np.float32
PARTS = ("packed", "absmax", "absmax_codes", "nested_absmax", "nested_quant_map", "quant_map",
         "scb")


def as_dtype(values: np.ndarray, dtype: str) -> tuple[np.ndarray, dict[str, Any]]:
    """An array of that dtype, bfloat16 as its bits (cut off, not rounded)."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, F32).view(np.uint32) >> 16
        return bits.astype(np.uint16), {"dtype": "bfloat16"}
    return values.astype(dtype), {}


def assert_same(one: qllm.QuantizedTensor, other: qllm.QuantizedTensor, what: object) -> None:
    assert (one.format, one.shape, one.blocksize) == (other.format, other.shape, other.blocksize)
    for part in PARTS:
        a, b = getattr(one, part), getattr(other, part)
        assert (a is None) == (b is None), (what, part)
        if a is not None:
            same = np.ascontiguousarray(a).view(np.uint8) == np.ascontiguousarray(b).view(np.uint8)
            assert same.all(), f"{what}: {part} differs first at byte {np.flatnonzero(~same)[0]}"
    assert one.offset == other.offset or (np.isnan(one.offset) and np.isnan(other.offset)), what


def check(values: np.ndarray, format: str, blocksize: int = 64, dtype: str = "float32",
          allow_nonfinite: bool = False) -> None:
    """All sets quantize to the bytes of the reference; where values are finite, so do those that
    pack on the way, and they measure the same error."""
    array, how = as_dtype(values, dtype)
    expected = _core.quantize(array, format, blocksize, isa="reference",
                              allow_nonfinite=allow_nonfinite, **how)
    figures = expected.error(array, **how)
    for isa in SETS:
        what = (isa, format, blocksize, dtype, values.shape)
        found = _core.quantize(array, format, blocksize, isa=isa, allow_nonfinite=allow_nonfinite,
                               **how)
        assert_same(found, expected, what)
        assert_same(_core.pack_roundtrip(found, isa=isa), expected, what)
        if not allow_nonfinite:
            for threads in (1, 3):
                packed, error = _core.pack_source(array, format, blocksize, isa=isa,
                                                  threads=threads, **how)
                assert_same(packed, expected, (*what, threads))
                assert error == figures, (*what, threads)


def normal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rows of different size."""
    r = np.random.default_rng([seed, *shape])
    return (r.standard_normal(shape) * np.exp(r.uniform(-3, 3, (shape[0], 1)))).astype(F32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_from_every_dtype(format: str, dtype: str) -> None:
    for shape in ((1, 64), (16, 128), (37, 320), (5, 2048)):
        check(normal(shape), format, dtype=dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("format", FOUR_BIT)
def test_every_blocksize(format: str, blocksize: int) -> None:
    """More than 256 blocks for the small ones, so that second-level scales change inside rows."""
    for dtype in DTYPES:
        check(normal((19, 2 * blocksize if blocksize > 512 else 1024)), format, blocksize, dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_odd_shapes(format: str) -> None:
    """Rows that end inside a block, a vector, a dword or a byte; more rows than threads' parts."""
    for shape in ((1, 1), (3, 7), (17, 33), (2, 95), (33, 63), (16, 100), (40, 1030), (70, 65)):
        for dtype in DTYPES:
            check(normal(shape), format, dtype=dtype)
    for shape in ((0, 64), (4, 0)):
        check(np.zeros(shape, F32), format)


def neighbours(x: np.ndarray) -> np.ndarray:
    """x, and the next float32 on either side."""
    x = x.astype(F32)
    return np.concatenate([x, np.nextafter(x, F32(-9)), np.nextafter(x, F32(9))])


@pytest.mark.parametrize("format", FOUR_BIT)
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-100, 2.0**100, 1.1e-38, 3e-39])
def test_values_at_the_thresholds(format: str, scale: float) -> None:
    """Every midpoint of the codebook, in both roundings of it, and both its neighbours."""
    book = np.sort(_core.codebook("nf4" if format.startswith("nf4") else "fp4").astype(np.float64))
    middles = (book[:-1] + book[1:]) / 2
    x = neighbours(np.concatenate([middles, np.float32(middles), book, [0.0, -0.0]]))
    x = np.concatenate([x, np.zeros(-len(x) % 63, F32)]).reshape(-1, 63)
    x = np.concatenate([x, np.ones((len(x), 1), F32)], 1)  # each block has absmax 1
    with np.errstate(over="ignore", under="ignore"):
        values = x * F32(scale)
    check(np.where(np.isfinite(values), values, 0), format)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_every_value_of_the_short_dtypes(format: str, dtype: str) -> None:
    """Each finite one, beside each other and in blocks of larger ones."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (bits.view(np.float16).astype(F32) if dtype == "float16"
              else (bits.astype(np.uint32) << 16).view(F32))
    values = np.sort(values[np.isfinite(values)])
    values = values[: len(values) // 1024 * 1024].reshape(-1, 1024)
    check(values, format, dtype=dtype)
    check(np.ascontiguousarray(values.T), format, dtype=dtype)


@pytest.mark.parametrize("format", ["nf4-dq", "fp4-dq"])
def test_absmax_values_at_the_thresholds_of_the_second_level(format: str) -> None:
    """The blocks' absmax are the dynamic map's midpoints and their neighbours, around any mean."""
    book = _core.codebook("dynamic").astype(np.float64)
    middles = neighbours((book[:-1] + book[1:]) / 2)
    for seed, offset in enumerate((1.0, 1.5, 4.0)):
        absmax = (middles + F32(offset)).astype(F32)
        absmax = np.concatenate([absmax, F32(2 * offset) - absmax])
        absmax = np.random.default_rng(seed).permutation(absmax)
        absmax = np.abs(absmax[: len(absmax) // 32 * 32])
        blocks = np.repeat(absmax[:, None], 32, 1) * np.linspace(-1, 1, 32, dtype=F32)
        check(blocks.reshape(-1, 32 * 8), format, 32)
    for constant in (0.0, 1.0, 3e-39):  # groups without any difference
        check(np.full((40, 256), constant, F32), format, 32)


@pytest.mark.parametrize("format", ["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_what_is_not_finite_reads_back_as_nan_when_allowed(format: str) -> None:
    for dtype in DTYPES:
        values = normal((40, 512))
        for place, bad in (((0, 3), np.nan), ((7, 511), np.inf), ((39, 64), -np.inf)):
            values[place] = bad
        check(values, format, dtype=dtype, allow_nonfinite=True)
    check(np.full((2, 70), np.nan, F32), format, allow_nonfinite=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_the_words_of_the_reference(
    format: str, dtype: str, bad: float
) -> None:
    for cols in (128, 100):
        values = normal((35, cols))
        values[33, 97] = bad
        values[34, 1] = np.nan
        array, how = as_dtype(values, dtype)
        with pytest.raises(QllmValueError, match="a name: .*row 33, column 97") as expected:
            _core.quantize(array, format, name="a name", isa="reference", **how)
        for isa in SETS:
            for call in (_core.quantize, _core.pack_source):
                with pytest.raises(QllmValueError) as found:
                    call(array, format, name="a name", isa=isa, **how)
                assert str(found.value) == str(expected.value)


def test_values_beyond_the_range_of_a_float_format_are_refused_alike() -> None:
    values = normal((20, 70))
    values[18, 66] = 65520.0
    check(values, "bf16")
    for isa in SETS:
        with pytest.raises(QllmValueError, match="w: the value 65520 at row 18, column 66 is bey"):
            _core.pack_source(values, "f16", name="w", isa=isa)
    values[18, 66] = 65519.0
    check(values, "f16")
    values[3, 0] = 3.4e38
    for isa in SETS:
        with pytest.raises(QllmValueError, match="row 3, column 0 is beyond the range of bf16"):
            _core.pack_source(values, "bf16", name="w", isa=isa)


def test_int8_rows_that_float16_would_lose() -> None:
    """Too large and too small for float16, zeros, and halves that are ties of the rounding."""
    rows = [np.full(70, 1e5), np.linspace(-3e38, 3e38, 70), np.linspace(0, 1e-9, 70), np.zeros(70),
            np.linspace(0, 1e-44, 70), np.arange(-35, 35) + 0.5,
            np.concatenate([[127.0], np.arange(69) - 34.5])]
    for dtype in ("float32", "bfloat16"):
        check(np.array(rows, F32), "int8", dtype=dtype)


def test_views_of_any_alignment() -> None:
    """Bytes of a file begin anywhere."""
    raw = np.random.default_rng(5).standard_normal(4096).astype(F32).tobytes()
    for shift in (2, 6, 30):
        array = np.frombuffer(raw, np.float16, 2048, shift)
        array = np.where(np.isfinite(array), array, 0).astype(np.float16)
        store = np.empty(2048 + 32, np.float16)
        view = store[shift // 2 : shift // 2 + 2048]
        view[:] = array
        for format in ("nf4", "int8", "f16"):
            for isa in SETS:
                assert_same(_core.pack_source(view.reshape(8, 256), format, isa=isa)[0],
                            _core.quantize(array.reshape(8, 256), format, isa="reference"), isa)


@given(rows=st.integers(1, 40), cols=st.integers(1, 300), format=st.sampled_from(FORMATS),
       blocksize=st.sampled_from(BLOCKSIZES[:4]), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 1000), whole=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(rows: int, cols: int, format: str, blocksize: int, dtype: str, seed: int,
                   whole: bool) -> None:
    """`whole`: rows of whole blocks, which have a tile layout of their own."""
    if whole:
        cols = (cols + blocksize - 1) // blocksize * blocksize
    check(normal((rows, cols), seed), format, blocksize, dtype)


def test_quantize_uses_the_set_that_is_asked_for() -> None:
    with pytest.raises(qllm.QllmError, match="isa: .*'mmx'"):
        _core.quantize(np.zeros((2, 64), F32), "nf4", isa="mmx")


def test_a_pass_keeps_nothing_and_takes_what_quantize_takes() -> None:
    array = normal((40, 300))
    for format in FORMATS:
        for threads in (1, 2):
            assert _core.quantize_pass(array, format, threads=threads) is None
    with pytest.raises(QllmValueError, match="a pass: blocksize 48"):
        _core.quantize_pass(array, "nf4", 48)
