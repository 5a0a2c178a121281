"""Packed weights as runs of bytes: equal to the weight they were made of, opened whatever is in
them, and products by address, also in another library's threads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import _core

FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8", "bf16", "f16", "f32")
SHAPES = ((96, 128), (5, 40), (3, 7), (1, 2), (300, 172), (33, 64))
RNG = np.random.default_rng(1)


def matrix(rows: int, cols: int) -> np.ndarray:
    return RNG.standard_normal((rows, cols)).astype(np.float32)


def bits_of(dtype: int, values: np.ndarray) -> np.ndarray:
    """float32 values as an array of dtype number 0, 1 or 2."""
    if dtype == 0:
        return values.astype(np.float32)
    if dtype == 1:
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def values_of(dtype: int, array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == 2 else (
        array.astype(np.float32))


def placed(image: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that begins `offset` bytes behind a multiple of 64."""
    memory = np.empty(image.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    memory[start : start + image.nbytes] = image
    return memory[start : start + image.nbytes]


def product(
    image: np.ndarray, x: np.ndarray, bias: np.ndarray | None, rows: int, compute: str = "exact",
    dtype: int = 0, nbytes: int | None = None,
) -> np.ndarray:
    y = np.empty((len(x), rows), x.dtype)
    _core.image_linear(
        image.ctypes.data, image.nbytes if nbytes is None else nbytes, x.ctypes.data, dtype,
        len(x), x.shape[1], 0 if bias is None else bias.ctypes.data, 0, y.ctypes.data, rows,
        compute, 6.0,
    )
    return y


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_holds_the_weight(format: str, shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    weight = qllm.quantize(w, format)
    image = _core.image(weight)
    assert image.dtype == np.uint8 and image.flags.writeable and image.ctypes.data % 64 == 0
    assert np.array_equal(image, _core.image_from_source(w, format))
    assert (image.nbytes, weight.nbytes) == _core.image_sizes(format, *shape, 64)
    back = _core.image_weight(image, "float16")
    for part in ("format", "shape", "blocksize", "offset"):
        assert getattr(back, part) == getattr(weight, part)
    for part in ("packed", "absmax", "absmax_codes", "nested_absmax", "quant_map", "scb"):
        mine, theirs = getattr(back, part), getattr(weight, part)
        assert (mine is None) == (theirs is None) and (mine is None or np.array_equal(mine, theirs))
    assert back.dtype_name == "float16"
    assert _core.image_error(image, w) == weight.error(w)
    values = weight.dequantize()
    assert np.array_equal(_core.image_dequantize(image, 0, shape[0]), values)
    first = shape[0] // 2
    assert np.array_equal(_core.image_dequantize(image, first, 1), values[first : first + 1])
    for number, name in enumerate(("float32", "float16", "bfloat16")):
        rounded = _core.image_dequantize(image, 0, shape[0], name)
        assert np.array_equal(rounded, bits_of(number, values))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_products_by_address_are_those_of_the_weight(
    format: str, compute: str, dtype: int
) -> None:
    """Also of more 16-bit rows than are widened at a time (512)."""
    for (rows, cols), m in (((96, 128), 3), ((300, 172), 1), ((20, 64), 700), ((7, 9), 0)):
        weight = qllm.quantize(matrix(rows, cols), format)
        bias = matrix(1, rows)[0]
        x = bits_of(dtype, matrix(m, cols))
        expected = weight.matmul(values_of(dtype, x), bias, compute=compute)
        found = product(_core.image(weight), x, bias, rows, compute, dtype)
        assert np.array_equal(found, bits_of(dtype, expected))
    assert format in _core.image_linear_name(_core.image(weight), 1, compute)


@pytest.mark.parametrize("isa", _core.cpu_info()["isas"])
def test_every_instruction_set_reads_the_same_values(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [qllm.quantize(matrix(40, 192), format, 32) for format in FORMATS]
    monkeypatch.setenv("QLLM_CPU", isa)
    for weight in weights:
        values, image = weight.dequantize(), _core.image(weight)
        for number, name in enumerate(("float32", "float16", "bfloat16")):
            found = _core.image_dequantize(image, 3, 30, name)
            assert np.array_equal(found, bits_of(number, values[3:33]))


def test_an_image_that_is_none_is_refused() -> None:
    image = _core.image(qllm.quantize(matrix(20, 64), "nf4"))
    x = matrix(2, 64)
    for bad in (np.zeros(4096, np.uint8), np.zeros(3, np.uint8), np.empty(0, np.uint8)):
        with pytest.raises(qllm.QllmValueError, match="holds none: it was not set, or something"):
            _core.image_weight(bad)
    with pytest.raises(qllm.QllmValueError, match="is damaged; load the layer's state dict"):
        product(image, x, None, 20, nbytes=image.nbytes - 64)
    with pytest.raises(qllm.QllmValueError, match="not aligned to 64 bytes"):
        _core.image_weight(placed(image, 4))
    with pytest.raises(qllm.QllmValueError, match=r"takes 64"):
        product(image, matrix(2, 63), None, 20)
    with pytest.raises(qllm.QllmValueError, match=r"rows: 19 were asked for"):
        product(image, x, None, 19)
    with pytest.raises(qllm.QllmValueError, match=r"rows: 2 from 19 on"):
        _core.image_dequantize(image, 19, 2)
    with pytest.raises(qllm.QllmValueError, match="'float64' is unknown"):
        _core.image_dequantize(image, 0, 2, "float64")
    with pytest.raises(ValueError, match="dtype number 3"):
        product(image, x, None, 20, dtype=3)


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("shape", [(20, 64), (3, 7)])
def test_whatever_an_image_holds_is_read_within_it(format: str, shape: tuple[int, int]) -> None:
    """Every byte of the header is changed, one at a time: it reads as something, or is refused."""
    image = _core.image(qllm.quantize(matrix(*shape), format))
    x = matrix(2, shape[1])
    header = image.nbytes if shape == (3, 7) else 2600
    refused = 0
    for at in range(0, min(header, image.nbytes)):
        for change in (0xFF, 0x01):
            changed = placed(image)
            changed[at] ^= change
            try:
                product(changed, x, None, shape[0])
            except qllm.QllmError:
                refused += 1
    assert refused >= 30  # magic, length of the header, shape


def test_outliers_and_rounding_of_bitsandbytes() -> None:
    """round_int8 and image_linear_int8 against their definitions in NumPy."""
    weight = qllm.quantize(matrix(30, 70), "int8")
    image = _core.image(weight)
    for m in (1, 9):
        x = (matrix(m, 70) * 2).astype(np.float16)
        x[0, 5], x[-1, 33] = 40, -7
        q, absmax = np.empty((m, 70), np.int8), np.empty(m, np.float32)
        used = np.empty(70, np.uint8)
        _core.round_int8(
            x.ctypes.data, 1, m, 70, 6.0, q.ctypes.data, absmax.ctypes.data, used.ctypes.data
        )
        wide = x.astype(np.float32)
        outlier = np.abs(wide) >= 6
        assert np.array_equal(used, outlier.any(0))
        inner = np.where(outlier, 0, wide)
        assert np.array_equal(absmax, np.abs(inner).max(1))
        expected = np.rint(inner * (np.float32(127) / absmax)[:, None]).astype(np.int8)
        expected[:, used > 0] = 0
        assert np.array_equal(q, expected)
        columns, y = np.flatnonzero(used), np.empty((m, 30), np.float16)
        _core.image_linear_int8(
            image.ctypes.data, image.nbytes, x.ctypes.data, 1, m, 70, 0, 0, y.ctypes.data, 30,
            q.ctypes.data, absmax.ctypes.data, columns.ctypes.data, len(columns),
        )
        rows = q.astype(np.float64) * absmax[:, None] / 127
        rows[:, columns] = wide[:, columns]
        np.testing.assert_allclose(
            y, rows @ weight.dequantize().astype(np.float64).T, rtol=1e-3, atol=1e-3
        )
    columns = np.array([3, 3])
    with pytest.raises(qllm.QllmValueError, match="outlier columns: number 1 is 3; ascending"):
        _core.image_linear_int8(
            image.ctypes.data, image.nbytes, x.ctypes.data, 1, m, 70, 0, 0, y.ctypes.data, 30,
            q.ctypes.data, absmax.ctypes.data, columns.ctypes.data, 2,
        )
    other = _core.image(qllm.quantize(matrix(30, 70), "nf4"))
    with pytest.raises(qllm.QllmValueError, match="the packed weight is nf4; int8 was expected"):
        _core.image_linear_int8(
            other.ctypes.data, other.nbytes, x.ctypes.data, 1, m, 70, 0, 0, y.ctypes.data, 30,
            q.ctypes.data, absmax.ctypes.data, 0, 0,
        )


def test_a_sample_of_words_sees_changes() -> None:
    memory = RNG.integers(0, 256, 100_000).astype(np.uint8)
    before = _core.sample_words(memory.ctypes.data, memory.nbytes)
    assert before == _core.sample_words(memory.ctypes.data, memory.nbytes)
    memory[:] = memory[::-1].copy()
    assert before != _core.sample_words(memory.ctypes.data, memory.nbytes)
    for size in (1, 7, 8, 200):
        for at in range(size):
            small = np.zeros(size, np.uint8)
            before = _core.sample_words(small.ctypes.data, size)
            small[at] = 1
            assert before != _core.sample_words(small.ctypes.data, size)


# --------------------------------------------------------------------------------- another's threads

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Team:
    """A stand-in for an OpenMP library: Python threads."""

    def __init__(self, threads: int) -> None:
        self.threads = self.given = threads
        self.calls: list[int] = []
        self._own = threading.local()
        self.functions = (
            ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
                self._parallel),
            ctypes.CFUNCTYPE(ctypes.c_int)(lambda: self.threads),
            ctypes.CFUNCTYPE(ctypes.c_int)(lambda: self._own.number),
        )

    def _parallel(self, body: Any, data: int, threads: int, flags: int) -> None:
        self.calls.append(threads)

        def run(number: int) -> None:
            self._own.number = number
            body(data)

        # perhaps fewer than were asked for: what is there must do everything
        started = [threading.Thread(target=run, args=(i,)) for i in range(1, self.given)]
        for thread in started:
            thread.start()
        run(0)
        for thread in started:
            thread.join()


@pytest.fixture
def team() -> Iterator[Team]:
    found = Team(3)
    _core.use_team(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found.functions))
    yield found
    _core.use_team(0, 0, 0)


@pytest.mark.parametrize("given", [1, 3])
def test_products_run_in_the_threads_of_a_team(team: Team, given: int) -> None:
    team.given = given
    weight = qllm.quantize(matrix(500, 256), "nf4")
    image, x = _core.image(weight), matrix(40, 256)
    team.calls.clear()
    found = product(image, x, None, 500)
    assert team.calls == [3] * len(team.calls) and team.calls
    assert np.array_equal(found, weight.matmul(x))
    assert np.array_equal(_core.image_dequantize(image, 0, 500), weight.dequantize())
    team.threads = 1  # as a library says that was told to use one thread
    team.calls.clear()
    assert np.array_equal(product(image, x, None, 500), found) and team.calls == []


def test_a_team_calls_all_its_threads_but_fewer_may_work(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLLM_THREADS", "1")
    weight = qllm.quantize(matrix(500, 256), "int8")
    found = product(_core.image(weight), x := matrix(8, 256), None, 500)
    assert np.array_equal(found, weight.matmul(x)) and set(team.calls) <= {3}
    with pytest.raises(qllm.QllmValueError, match="QLLM_THREADS"):
        monkeypatch.setenv("QLLM_THREADS", "many")
        product(_core.image(weight), x, None, 500)
