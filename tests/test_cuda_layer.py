"""Linear layers alone on a device, by address (kernels/linear_entry.cu, _core.DeviceLinear)."""

from __future__ import annotations

import ctypes as ct
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emulated
import numpy as np
import pytest
from device_linear import Library
from numpy.typing import NDArray

import qllm
from qllm import _core
from qllm.quantize import FORMATS

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
QUANTIZED = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8")


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """In the bytes of a dtype; bfloat16 as uint16."""
    return to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(format: str, rows: int = 40, cols: int = 128, blocksize: int = 64) -> Any:
    return qllm.quantize(random(rows, cols, seed=rows * cols), format, blocksize=blocksize)


def layer(q: Any, compute: str = "exact", threshold: float = 2.0) -> _core.DeviceLinear:
    """The threshold is one that normal numbers pass."""
    return _core.DeviceLinear(q, emulated.name(), compute=compute, int8_threshold=threshold)


def address(array: Any) -> int:
    return 0 if array is None else array.pointer.value


class Call:
    """x and bias in the device's memory, and room for y with 16 bytes before and behind it."""

    def __init__(self, layer: _core.DeviceLinear, x: NDArray[Any], bias: NDArray[Any] | None = None,
                 offset: int = 0) -> None:
        device = emulated.device()
        self.layer, self.shape = layer, (len(x), layer.shape[0])
        self.dtype, self.numbers = x.dtype, {np.float32: 0, np.float16: 1, np.uint16: 2}
        skipped = np.concatenate([np.zeros(offset, x.dtype), x.reshape(-1)])
        self.x = device.array(skipped)
        self.bias = None if bias is None else device.array(bias)
        self.y = device.array(np.full(self.size + 32 // x.itemsize, 7, x.dtype))
        self.kind = self.numbers[x.dtype.type]
        self.bias_kind = 0 if bias is None else self.numbers[bias.dtype.type]
        self.nbytes = layer.scratch(self.kind, len(x), address(self.bias), self.bias_kind)
        self.scratch = device.empty(self.nbytes, np.uint8)
        self.x_address = address(self.x) + offset * x.itemsize

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def run(self, stream: int = 0, **other: int) -> None:
        arguments = {
            "x": self.x_address, "dtype": self.kind, "m": self.shape[0],
            "cols": self.layer.shape[1], "bias": address(self.bias), "bias_dtype": self.bias_kind,
            "y": address(self.y) + 16, "rows": self.shape[1], "scratch": address(self.scratch),
            "nbytes": self.nbytes, "stream": stream,
        }
        self.layer.multiply(*(arguments | other).values())

    def result(self) -> NDArray[Any]:
        found, gap = self.y.get(), 16 // self.dtype.itemsize
        assert (found[:gap] == 7).all() and (found[gap + self.size:] == 7).all()
        return found[gap:gap + self.size].reshape(self.shape)


def product(layer: _core.DeviceLinear, x: NDArray[Any], bias: NDArray[Any] | None = None
            ) -> NDArray[Any]:
    call = Call(layer, x, bias)
    call.run()
    return call.result()


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("cols", [128, 96])  # blocks that end with rows, and others
@pytest.mark.parametrize("format", FORMATS)
def test_exact_has_the_bits_of_the_processor(format: str, cols: int) -> None:
    q = weight(format, cols=cols)
    device = layer(q)
    assert device.shape == q.shape and "exact" in device.kernel(1) and device.nbytes >= q.nbytes
    for dtype in DTYPES:
        for m, bias_dtype in ((1, dtype), (5, "float16"), (3, "float32"), (2, None), (0, dtype)):
            x = rounded(random(m, cols, seed=m), dtype)
            bias = None if bias_dtype is None else rounded(random(40, seed=9), bias_dtype)
            expected = q.matmul(widened(x), None if bias is None else widened(bias),
                                int8_threshold=2.0, compute="exact")
            np.testing.assert_array_equal(product(device, x, bias), rounded(expected, dtype))


@pytest.mark.parametrize("format", [*QUANTIZED, "bf16"])
def test_auto_has_the_bits_of_a_decoder(format: str) -> None:
    """Those of gpu_linear by itself; of a row, whatever stands beside it; and near those of exact:
    x and the codes are rounded to bf16 on the way."""
    q = weight(format)
    device, exact = layer(q, "auto"), layer(q)
    assert "tensor cores" in device.kernel(1) and device.kernel(1) != device.kernel(65)
    library = Library()
    x = random(70, 128, seed=1)
    (expected,) = library.linear([library.set_weight(q)], x, threshold=2.0)
    found = product(device, x)
    np.testing.assert_array_equal(found, expected)
    for some in (slice(0, 1), slice(3, 8), slice(69, 70)):
        np.testing.assert_array_equal(product(device, x[some]), found[some])
    error = np.abs(found - product(exact, x)).max() / np.abs(found).max()
    assert error < (1e-6 if format == "int8" else 2**-7)
    for dtype in ("float16", "bfloat16"):
        half, bias = rounded(x[:3], dtype), rounded(random(40), dtype)
        (sums,) = library.linear([library.set_weight(q, bias=widened(bias))], widened(half),
                                 threshold=2.0)
        np.testing.assert_array_equal(product(device, half, bias), rounded(sums, dtype))


def test_weights_that_fit_no_tiles_run_exactly_and_say_so() -> None:
    for format, cols, blocksize in (("nf4", 96, 64), ("fp4-dq", 128, 32), ("f32", 64, 64)):
        q = weight(format, cols=cols, blocksize=blocksize)
        device = layer(q, "auto")
        assert device.kernel(1) == layer(q).kernel(1) and "exact" in device.kernel(1)
        x = random(2, cols)
        np.testing.assert_array_equal(product(device, x), q.matmul(x, compute="exact"))


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_many_rows_go_a_chunk_at_a_time(format: str, compute: str) -> None:
    device = layer(weight(format, rows=16, cols=64), compute)
    bias = rounded(random(16), "bfloat16")
    x = rounded(random(515, 64, seed=2), "bfloat16")
    found = product(device, x, bias)
    for some in (slice(0, 4), slice(510, 515)):
        np.testing.assert_array_equal(product(device, x[some], bias), found[some])
    # scratch is that of a chunk
    chunk = device.scratch(2, 512, 0, 0)
    assert device.scratch(2, 10**9, 0, 0) == chunk > device.scratch(2, 1, 0, 0)
    assert device.scratch(0, 0, 0, 0) == 0


def test_values_are_rounded_as_those_of_the_processor() -> None:
    """By a weight of ones and zeros: subnormal, tied, infinite and large numbers, and NaN."""
    values = np.array([0, 1e-8, 5.9e-8, 8.9e-8, 6.1e-5, 1.0009766, 1.00048828125, 65519, 65520, 1e9,
                       np.inf, -1e-8, -65520, 3.0e38, 1.00390625, 1.01171875], np.float32)
    q = qllm.quantize(np.eye(1, 64, dtype=np.float32), "f32")
    device, x = layer(q), np.zeros((len(values), 64), np.float32)
    x[:, 0] = values
    for dtype in DTYPES:
        with np.errstate(over="ignore"):
            half = rounded(x, dtype)
            expected = rounded(widened(half[:, :1]), dtype)
        np.testing.assert_array_equal(product(device, half), expected)
    x[:, 0] = np.nan
    for dtype in DTYPES:
        assert np.isnan(widened(product(device, rounded(x, dtype)))).all()


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_dequantized_weight(format: str, compute: str) -> None:
    for cols in (192, 96):  # 3 blocks a row: rows of tiles end inside a group of 256 of them
        q = weight(format, rows=100 if format == "nf4-dq" else 20, cols=cols)
        device, expected = layer(q, compute), q.dequantize()
        for first, n in ((0, q.shape[0]), (17, 2), (3, 0)):
            out = emulated.device().array(np.full(n * cols + 1, 7, np.float32))
            device.dequantize(first, n, address(out), 0)
            found = out.get()
            np.testing.assert_array_equal(found[:-1].reshape(n, cols), expected[first:first + n])
            assert found[-1] == 7
    rows = q.shape[0]
    for first, n in ((-1, 2), (0, rows + 1), (rows, 1), (2, -1), (2**62, 2**62)):
        with pytest.raises(qllm.QllmValueError, match=f"asked for, but the weight has {rows}"):
            device.dequantize(first, n, address(out), 0)


def test_other_tables_and_addresses_at_any_offset() -> None:
    q = weight("nf4")
    table = np.linspace(-1, 1, 16, dtype=np.float32) ** 3
    other = _core.quantized_from_parts("nf4", q.shape, q.packed, blocksize=64, absmax=q.absmax,
                                       quant_map=table)
    x = random(3, 128)
    np.testing.assert_array_equal(product(layer(other), x), other.matmul(x, compute="exact"))
    close = product(layer(other, "auto"), x)
    assert np.abs(close - other.matmul(x, compute="exact")).max() < 2**-7 * np.abs(close).max()
    for compute in ("exact", "auto"):
        for dtype in DTYPES:
            call = Call(layer(q, compute), rounded(x, dtype), offset=1)
            call.run()
            np.testing.assert_array_equal(
                call.result(), product(layer(q, compute), rounded(x, dtype)))


# ----------------------------------------------------------------------------- streams and graphs


@contextmanager
def stream() -> Iterator[int]:
    handle = ct.c_void_p()
    emulated.device().call("gpu_test_stream", ct.byref(handle))
    assert handle.value
    yield handle.value
    emulated.device().library.gpu_test_stream_destroy(handle)


def wait(handle: int) -> None:
    emulated.device().call("gpu_test_stream_wait", ct.c_void_p(handle))


@pytest.mark.parametrize("compute", ["exact", "auto"])
def test_work_is_given_to_the_stream_and_not_waited_for(
    compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, x = layer(weight("nf4"), compute), rounded(random(3, 128), "float16")
    expected = product(device, x, rounded(random(40), "float16"))
    monkeypatch.setenv("QLLM_EMULATE_STREAMS", "late")
    with stream() as handle:
        call = Call(device, x, rounded(random(40), "float16"))
        call.run(handle)
        if not emulated.ON_A_GPU:
            assert (call.result() == 7).all()
        wait(handle)
        np.testing.assert_array_equal(call.result(), expected)


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_a_graph_can_record_it(format: str, compute: str) -> None:
    """Nothing but launches is given to the stream; a replay reads what is in x then."""
    device = layer(weight(format), compute)
    first, second = (rounded(random(2, 128, seed=seed), "bfloat16") for seed in (1, 2))
    expected = product(device, second)
    library = emulated.device()
    with stream() as handle:
        call, graph = Call(device, first), ct.c_void_p()
        library.call("gpu_test_graph_begin", ct.c_void_p(handle))
        call.run(handle)
        library.call("gpu_test_graph_end", ct.c_void_p(handle), ct.byref(graph))
        assert (call.result() == 7).all()
        call.x.set(second)
        library.call("gpu_test_graph_run", graph, ct.c_void_p(handle))
        wait(handle)
        np.testing.assert_array_equal(call.result(), expected)
        library.library.gpu_test_graph_destroy(graph)


# ------------------------------------------------------------------------------------ what is wrong


def test_arguments_that_mean_nothing() -> None:
    q = weight("nf4")
    device = layer(q)
    call = Call(device, rounded(random(3, 128), "float16"))
    for wrong, words in (
        ({"m": -1}, "m: -1 rows of x; 0 or more"),
        ({"cols": 127}, r"x: the last dimension is 127, but the weight of shape \(40, 128\) takes"),
        ({"rows": 41}, r"rows: 41 were asked for, but the weight has the shape \(40, 128\)"),
        ({"dtype": 3}, "dtype number 3; 0 to 2"),
        ({"bias_dtype": -1}, "dtype number -1; 0 to 2"),
        ({"nbytes": call.nbytes - 1}, f"scratch: {call.nbytes - 1} bytes, but {call.nbytes} are"),
    ):
        with pytest.raises(ValueError, match=words):
            call.run(**wrong)
    with pytest.raises(TypeError, match="multiply takes 11 arguments, not 2"):
        device.multiply(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        device.dequantize("0", 1, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        call.run(x="x")  # type: ignore[arg-type]
    assert (call.result() == 7).all()
    for options, words in (
        ({"device": emulated.name() + ":99"}, f"{emulated.name()}:99.: there are"),
        ({"device": "cpu"}, "device 'cpu' makes no linear layers by address; a GPU was expected"),
        ({"device": "tpu"}, "device 'tpu' is not offered by this build"),
        ({"compute": "int8"}, f"compute is 'int8', which device '{emulated.name()}' does not"),
        ({"compute": "fast"}, "compute is 'fast'; use one of|compute.*fast"),
    ):
        with pytest.raises(qllm.QllmValueError, match=words):
            _core.DeviceLinear(q, **({"device": emulated.name()} | options))
    with pytest.raises(TypeError):
        _core.DeviceLinear(np.zeros((2, 2)), emulated.name())  # type: ignore[arg-type]


def free() -> int:
    gc.collect()
    facts = _core.device_info(emulated.name())
    assert facts is not None
    return facts["free"]


@emulated.without_a_gpu
def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    q = weight("nf4-dq", rows=256)
    before = free()
    device = layer(q)
    held = before - free()
    assert held == device.nbytes > 0
    other = layer(q, "auto")
    assert before - free() == held + other.nbytes
    del device, other
    assert free() == before
    fail_at = emulated.device().library.gpu_emulated_fail_at
    for compute in ("exact", "auto"):
        for n in range(1, 12):
            fail_at(ct.c_int64(n))
            try:
                layer(q, compute)
                break
            except qllm.QllmMemoryError as error:
                assert "bytes of memory on emulated GPU" in str(error)
            finally:
                fail_at(ct.c_int64(0))
                assert free() == before
        assert n > 4  # each array was missing once
    taken = 8 * 2**30 - before  # by other tests
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", str(taken + 10000))
    with pytest.raises(qllm.QllmMemoryError, match="a weight: needs 16384 bytes of memory on "
                                                   "emulated GPU, where 9... of 1.* can be used"):
        layer(q)


@emulated.without_a_gpu
def test_the_current_device_of_the_thread_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_EMULATE_DEVICES", "3")

    def current(next: int = -1) -> int:
        index = ct.c_int()
        emulated.device().call("gpu_test_current", next, ct.byref(index))
        return index.value

    before = current(2)
    try:
        device = _core.DeviceLinear(weight("nf4"), "emulated:1")
        assert current() == 2 and device.device == "emulated:1"
        call = Call(device, random(1, 128))
        current(2)  # arrays of tests choose theirs
        call.run()
        assert current() == 2
        device.dequantize(0, 1, address(call.x), 0)
        assert current() == 2
        with pytest.raises(qllm.QllmValueError):
            _core.DeviceLinear(weight("nf4"), "emulated:3")
        assert current() == 2
        del device, call
        assert current() == 2
    finally:
        current(before)
