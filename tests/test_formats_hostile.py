"""Input that cannot be used ends in the right exception with a sentence that helps."""

from __future__ import annotations

import ctypes
import gc
import pickle
import threading

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.errors import QllmError, QllmMemoryError, QllmValueError
from qllm.quantize import FORMATS, bits_per_weight

SHAPE = (6, 100)  # 600 values: 10 blocks of 64, the last one short; 300 bytes


def matrix(shape=SHAPE, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parts(name: str) -> dict:
    """Arguments of quantized_from_parts which make a good tensor of `name`."""
    q = qllm.quantize(matrix(), name)
    keys = "format shape packed blocksize absmax absmax_codes nested_absmax nested_quant_map"
    keys += " offset quant_map scb dtype_name"
    values = {key: getattr(q, key) for key in keys.split()}
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def build(format_name: str, /, **changes):
    return _core.quantized_from_parts(**(parts(format_name) | {"name": "layer.7"} | changes))


def with_value(array, index, value):
    array = array.copy()
    array.reshape(-1)[index] = value
    return array


# quantized state --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_good_parts(name):
    q = build(name)
    np.testing.assert_array_equal(q.dequantize(), qllm.quantize(matrix(), name).dequantize())


BAD_BLOCKSIZES = [0, -64, 63, 48, 16, 8192, 2**40, -(2**63)]


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq", "fp4-dq"])
def test_blocksize(name):
    sentence = r"blocksize -?\d+ was given for %s; it must be a power of two from 32 to 4096" % name
    for blocksize in BAD_BLOCKSIZES:
        with pytest.raises(QllmValueError, match="layer.7: " + sentence):
            build(name, blocksize=blocksize)
        with pytest.raises(QllmValueError, match="array: " + sentence):
            qllm.quantize(matrix(), name, blocksize)
    for make in (lambda b: build(name, blocksize=b), lambda b: qllm.quantize(matrix(), name, b)):
        with pytest.raises(QllmValueError, match="blocksize: 18446744073709551616 does not fit"):
            make(2**64)
        for wrong in (64.0, "64", [64]):
            with pytest.raises(TypeError, match="blocksize: expected an integer, found"):
                make(wrong)
    assert qllm.quantize(matrix(), name, np.int64(128)).blocksize == 128
    with pytest.raises(QllmValueError, match="layer.7: format %s needs blocksize" % name):
        build(name, blocksize=None)
    with pytest.raises(QllmValueError, match="blocksize: 63 was given for"):
        bits_per_weight(name, 63)


@pytest.mark.parametrize(
    "name, field, size",
    [
        ("nf4", "absmax", 10),
        ("fp4", "absmax", 10),
        ("nf4-dq", "absmax_codes", 10),
        ("fp4-dq", "nested_absmax", 1),
        ("nf4-dq", "nested_quant_map", 256),
        ("nf4", "quant_map", 16),
        ("int8", "scb", 6),
        ("nf4", "packed", 300),
        ("int8", "packed", 600),
        ("bf16", "packed", 600),
        ("f16", "packed", 600),
    ],
)
def test_lengths(name, field, size):
    good = parts(name)[field].reshape(-1)
    for wrong in (good[:-1], np.append(good, good[:1]), good[:0]):
        with pytest.raises(
            QllmValueError,
            match=rf"layer.7.{field}: {wrong.size} elements, but format {name} of shape \(6, 100\) "
            rf"takes {size}",
        ):
            build(name, **{field: wrong})
    build(name, **{field: good})


@pytest.mark.parametrize(
    "name, field",
    [("nf4", "absmax"), ("fp4-dq", "nested_absmax"), ("int8", "scb")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_scales(name, field, value):
    array = parts(name)[field]
    index = array.size - 1
    with pytest.raises(
        QllmValueError,
        match=f"layer.7: {field} holds -?(nan|inf|1) at index {index}; a scale must be finite and "
        "not negative",
    ):
        build(name, **{field: with_value(array, index, value)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tables(value):
    for name, field, index in (("nf4", "quant_map", 15), ("nf4-dq", "nested_quant_map", 255)):
        array = with_value(parts(name)[field], index, value)
        with pytest.raises(
            QllmValueError, match=f"layer.7: {field} holds .* at index {index}; finite values"
        ):
            build(name, **{field: array})
    with pytest.raises(QllmValueError, match="offset (is|.*beyond)|offset: the value is beyond"):
        build("nf4-dq", offset=value)


def test_offset():
    with pytest.raises(QllmValueError, match="layer.7.offset: the value is beyond the range"):
        build("fp4-dq", offset=1e39)
    with pytest.raises(TypeError):
        build("fp4-dq", offset="0.1")
    with pytest.raises(QllmValueError, match="layer.7: the absmax of block 0 reads back as inf"):
        build(
            "fp4-dq",
            nested_absmax=np.float32([3e38]),
            offset=3e38,
            absmax_codes=np.full(10, 255, np.uint8),
        )


def test_int8_contents():
    codes = parts("int8")["packed"]
    with pytest.raises(QllmValueError, match="layer.7: scb is 0 for row 2, whose codes"):
        build("int8", scb=with_value(parts("int8")["scb"], 2, 0))
    codes[2] = 0
    build("int8", packed=codes, scb=with_value(parts("int8")["scb"], 2, 0))
    codes[4, 50] = -128
    with pytest.raises(QllmValueError, match="layer.7: row 4 holds the int8 code -128"):
        build("int8", packed=codes)


def test_parts_that_do_not_belong_together():
    absmax = parts("nf4")["absmax"]
    for name in ("nf4-dq", "int8", "bf16"):
        with pytest.raises(QllmValueError, match=f"layer.7: format {name} has no absmax"):
            build(name, absmax=absmax)
    for name, field in (("nf4", "scb"), ("int8", "quant_map"), ("fp4", "offset")):
        given = {"scb": parts("int8")["scb"], "quant_map": parts("nf4")["quant_map"], "offset": 1.0}
        with pytest.raises(QllmValueError, match=f"layer.7: format {name} has no {field}"):
            build(name, **{field: given[field]})
    for name, field in (
        ("nf4", "absmax"),
        ("nf4-dq", "absmax_codes"),
        ("nf4-dq", "nested_absmax"),
        ("nf4-dq", "offset"),
        ("int8", "scb"),
    ):
        with pytest.raises(QllmValueError, match=f"layer.7: format {name} needs {field}"):
            build(name, **{field: None})
    with pytest.raises(QllmValueError, match="format int8 has no blocksize"):
        build("int8", blocksize=64)


def test_tables_may_be_left_out():
    for name in ("nf4", "fp4-dq"):
        q = build(name, quant_map=None, nested_quant_map=None)
        np.testing.assert_array_equal(q.dequantize(), build(name).dequantize())


@pytest.mark.parametrize("shape", [(6, 101), (7, 100), (100, 6), (2**20, 2**30)])
def test_shape_that_does_not_match(shape):
    if shape == (100, 6):
        with pytest.raises(QllmValueError, match=r"shape \(6, 100\), but the weight has .*100, 6"):
            build("int8", shape=shape)
        return
    with pytest.raises(
        QllmValueError, match=r"layer.7.packed: 300 elements, but format nf4 of shape .* takes \d+"
    ):
        build("nf4", shape=shape)


def test_shape():
    for shape in ((-1, 100), (6, -100)):
        with pytest.raises(QllmValueError, match=r"layer.7: negative shape \("):
            build("nf4", shape=shape)
    for shape in ((2**62, 2**62), (2**31, 2**31)):
        with pytest.raises(QllmValueError, match=r"layer.7: shape \(\d+, \d+\) is too large"):
            build("nf4", shape=shape)
    with pytest.raises(QllmValueError, match="shape: .* does not fit in 64 bits"):
        build("nf4", shape=(2**70, 1))
    for shape in ((600,), (1, 6, 100), ()):
        with pytest.raises(QllmValueError, match="shape: expected .rows, cols., found"):
            build("nf4", shape=shape)
    for shape in ((6.0, 100), ("6", "100")):
        with pytest.raises(TypeError, match="shape: expected an integer"):
            build("nf4", shape=shape)
    with pytest.raises(TypeError, match="shape: expected"):
        build("nf4", shape=600)


def test_more_than_2_31_elements():
    """Sizes are counted in 64 bits; nothing is allocated before they fit the parts."""
    for shape, expected in (((2**16, 2**15 + 1), 2**30 + 2**15), ((3, 2**31 + 1), 3221225474)):
        with pytest.raises(QllmValueError, match=f"takes {expected}$"):
            build("nf4", shape=shape)
        with pytest.raises(QllmValueError, match=f"takes {shape[0] * shape[1]}$"):
            build("int8", shape=shape, packed=np.zeros(4, np.int8), scb=np.zeros(1, np.float32))


def test_odd_element_count():
    with pytest.raises(QllmValueError, match=r"packed: 2 elements, .* \(1, 5\) takes 3"):
        _core.quantized_from_parts(
            "nf4", (1, 5), np.zeros(2, np.uint8), blocksize=32, absmax=np.ones(1, np.float32)
        )
    q = _core.quantized_from_parts(
        "nf4", (1, 5), np.uint8([0x0F, 0xF0, 0xF3]), blocksize=32, absmax=np.float32([2])
    )
    assert q.dequantize().tolist() == [[-2, 2, 2, -2, 2]]


@pytest.mark.parametrize("name", ["load", "", "NF4", "nf4 ", "int4", "float32", "__class__"])
def test_names_of_formats_and_dtypes(name):
    with pytest.raises(QllmValueError, match=f"format: '{name}' is unknown; known are nf4, fp4"):
        qllm.quantize(matrix(), name)
    with pytest.raises(QllmValueError, match=f"format: '{name}' is unknown; known are nf4, fp4"):
        build("nf4", format=name)
    with pytest.raises(QllmValueError, match="is unknown; known are"):
        bits_per_weight(name)
    with pytest.raises(QllmValueError, match=f"name: '{name}' is unknown; known are 'nf4'"):
        _core.codebook(name)
    if name != "float32":
        with pytest.raises(QllmValueError, match=f"layer.7: dtype_name '{name}' is unknown"):
            build("nf4", dtype_name=name)


def test_kinds_of_arguments():
    with pytest.raises(TypeError):
        qllm.quantize(matrix(), None)
    with pytest.raises(TypeError, match="name: expected a string, found int"):
        _core.codebook(3)
    with pytest.raises(TypeError):
        _core.QuantizedTensor()
    with pytest.raises(TypeError):
        type("Sub", (_core.QuantizedTensor,), {})
    with pytest.raises(TypeError):
        _core.QuantizedTensor.format = "nf4"
    with pytest.raises(AttributeError):
        qllm.quantize(matrix(), "nf4").format = "fp4"


# values to quantize -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nonfinite_values(dtype, value):
    w = matrix((70, 100))
    w[69, 98] = value
    if dtype == "bfloat16":
        w = (w.view(np.uint32) >> 16).astype(np.uint16)
        w[69, 98] |= 0x40 if np.isnan(value) else 0
    else:
        w = w.astype(dtype)
    for name in FORMATS:
        with pytest.raises(
            QllmValueError,
            match=f"model.layers.3.up: the value at row 69, column 98 is {value}; repair",
        ):
            qllm.quantize(w, name, name="model.layers.3.up", dtype=dtype)
        with pytest.raises(QllmValueError, match="row 0, column 6998"):
            qllm.quantize(w.reshape(-1), name, dtype=dtype)
    stored = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    with pytest.raises(QllmValueError, match=f"layer.7: the value at row 69, column 98 is {value}"):
        build(stored, shape=(70, 100), packed=w)


def test_a_value_beyond_2_31_elements_is_found_and_counted():
    """The zeros take no memory: the system maps them when they are written."""
    try:
        w = np.zeros((1, 2**31 + 64), np.float16)
    except MemoryError:
        pytest.skip("this system does not lend 4 GiB of addresses")
    w[0, 2**31 + 1] = np.nan
    with pytest.raises(QllmValueError, match="row 0, column 2147483649 is nan"):
        qllm.quantize(w, "nf4")


def test_values_beyond_the_range_of_a_float_format():
    w = matrix()
    w[3, 9] = -65520
    with pytest.raises(
        QllmValueError,
        match="the value -65520 at row 3, column 9 is beyond the range of f16; use bf16 or f32",
    ):
        qllm.quantize(w, "f16")
    assert qllm.quantize(w, "f16", allow_nonfinite=True).packed[3, 9] == -np.inf
    w[3, 9] = np.nextafter(np.float32(65520), np.float32(0))
    assert qllm.quantize(w, "f16").packed[3, 9] == 65504
    w[5, 99] = np.finfo(np.float32).max
    with pytest.raises(QllmValueError, match="row 5, column 99 is beyond .* bf16; use f32"):
        qllm.quantize(w, "bf16")


# arrays at the C boundary -----------------------------------------------------------------------


class Lying:
    """Claims memory that it does not own."""

    __array_interface__ = {"shape": (2**40,), "typestr": "<f4", "data": (8, False), "version": 3}


class OnlyDlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnAnotherDevice(OnlyDlpack):
    def __dlpack_device__(self):
        return 2, 0  # CUDA


def used_capsule():
    """A DLPack capsule whose memory somebody has taken already."""
    capsule = matrix().__dlpack__()
    np.from_dlpack(Handing(capsule))
    return capsule


class Handing:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **kwargs):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0  # CPU


def misnamed_capsule():
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(8, b"dltensr", None)


class FailingProvider:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("it is on the moon")


class BadProvider:
    def __array__(self, dtype=None, copy=None):
        return [1.0, 2.0]


@pytest.mark.parametrize(
    "array, words",
    [
        (matrix().astype(np.float64), "expected float32, float16 or bfloat16 .*found float64"),
        (matrix().astype(np.int32), "expected float32, float16 or bfloat16 .*found int32"),
        (matrix().astype(np.complex64), "expected float32, .*found complex64"),
        (matrix().astype(np.uint16), "expected .*uint16 with dtype=.bfloat16.*found uint16"),
        (matrix().astype(">f4"), "dtype .* has the other byte order; convert it with"),
        (matrix().astype(object), "expected float32, .*found object"),
        (np.array(["a"]), "expected float32, .*found str"),
        (np.zeros(3, [("a", "f4")]), "expected float32, .*found void"),
        (np.float32(1), "expected .*(NumPy array, found|1 to 2 dimensions, found 0)"),
        (np.zeros((), np.float32), "expected 1 to 2 dimensions, found 0"),
        (np.zeros((1, 1, 1, 1, 1), np.float32), "expected 1 to 2 dimensions, found 5"),
        (np.ma.masked_array(matrix(), matrix() > 0), "a masked array was given"),
        ([1.0, 2.0], "expected a NumPy array, found list"),
        (None, "expected a NumPy array, found NoneType"),
        ("weights", "expected a NumPy array, found str"),
        (b"weights", "expected float32, .*found uint8"),
        (Lying(), "expected a NumPy array, found .*Lying"),
        (BadProvider(), "__array__ of .*BadProvider gave no NumPy array"),
        (OnlyDlpack(matrix().astype(np.int32)), "expected float32, .*found int32"),
        (Handing(used_capsule()), "__dlpack__ gave PyCapsule, expected an unused DLPack capsule"),
        (Handing(misnamed_capsule()), "__dlpack__ gave PyCapsule, expected an unused DLPack"),
        (Handing(7), "__dlpack__ gave int, expected an unused DLPack capsule"),
        (matrix().__dlpack__(), "expected a NumPy array, found PyCapsule"),
        (used_capsule(), "expected a NumPy array, found PyCapsule"),
        (misnamed_capsule(), "expected a NumPy array, found PyCapsule"),
        (OnAnotherDevice(matrix()), "the .*OnAnotherDevice is on a CUDA device; copy it to the"),
        (FailingProvider(), ".*FailingProvider gives no NumPy array: it is on the moon"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "words",
)
def test_arrays(array, words):
    with pytest.raises(QllmValueError, match="layer.7: " + words):
        qllm.quantize(array, "nf4", name="layer.7")
    with pytest.raises(QllmValueError, match="source: " + words):
        qllm.quantize(matrix(), "nf4").error(array)
    with pytest.raises(QllmValueError, match="x: .*(expected|byte order|masked|NumPy array|device)"):
        qllm.quantize(matrix(), "nf4").matmul_reference(array)
    with pytest.raises(QllmValueError, match="layer.7(: format nf4 needs packed|.packed: )"):
        build("nf4", absmax=array, packed=array)


def test_dtype_that_is_not_that_of_the_array():
    with pytest.raises(QllmValueError, match="said to be 'bfloat16' but the array holds float32"):
        qllm.quantize(matrix(), "nf4", dtype="bfloat16")
    with pytest.raises(QllmValueError, match="found uint16"):
        qllm.quantize(matrix().astype(np.uint16), "nf4", dtype="float32")
    with pytest.raises(QllmValueError, match="layer.7.packed: .*'float16' but .* float32"):
        build("f16", packed=matrix())


def test_interrupts_of_a_foreign_array_pass_through():
    class Interrupted:
        def __array__(self, dtype=None, copy=None):
            raise error

    for error in (KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)) as caught:
            qllm.quantize(matrix(), "nf4").matmul(Interrupted())
        assert caught.value is error


def test_nothing_is_written_into_the_arrays_of_the_caller():
    """There are no output arguments: every result is new memory, apart from the inputs."""
    logits, x = matrix((3, 100), 1), matrix((3, 100), 2)
    bias, history = matrix((1, 6)).reshape(-1), np.arange(3)
    tokens = np.array([1, 2, 3])
    given = [matrix(), logits, x, bias, history, tokens]
    for array in given:
        array.flags.writeable = False
    before = [array.copy() for array in given]
    results = []
    for name in FORMATS:
        q = qllm.quantize(given[0], name)
        q.error(given[0])
        results += [q.packed, q.dequantize(), q.matmul(x, bias), q.matmul_reference(x, bias)]
    sampled = qllm.sample(logits, history=[history] * 3, repetition_penalty=1.5, top_p=0.9)
    stats = qllm.logit_stats(logits, x, [0.5, 1.0], tokens)
    results += [sampled.tokens, sampled.logprobs, stats.kl, _core.logprobs(logits, tokens)]
    assert not any(np.shares_memory(result, array) for result in results for array in given)
    assert all(np.array_equal(a, b) for a, b in zip(given, before))


def test_dlpack_by_way_of_numpy():
    q = qllm.quantize(np.from_dlpack(OnlyDlpack(matrix())), "nf4")
    np.testing.assert_array_equal(q.packed, qllm.quantize(matrix(), "nf4").packed)


def test_layouts_of_parts():
    """Strided, reversed, Fortran-ordered and misaligned parts have the same values."""
    for name in ("nf4-dq", "int8", "f32"):
        expected = build(name).dequantize()
        for key, value in parts(name).items():
            if not isinstance(value, np.ndarray):
                continue
            raw = np.frombuffer(b"\0" + value.tobytes(), np.uint8)[1:]
            for other in (
                np.repeat(value, 2, axis=-1)[..., ::2],
                value[::-1].copy()[::-1],
                np.asfortranarray(value),
                raw.view(value.dtype).reshape(value.shape),
            ):
                np.testing.assert_array_equal(build(name, **{key: other}).dequantize(), expected)


def test_broadcast_views_are_copied():
    row = matrix((1, 100))
    w = np.broadcast_to(row, (6, 100))
    assert w.strides[0] == 0
    np.testing.assert_array_equal(
        qllm.quantize(w, "nf4").packed, qllm.quantize(w.copy(), "nf4").packed
    )


def test_source_of_another_shape():
    q = qllm.quantize(matrix(), "nf4")
    with pytest.raises(QllmValueError, match=r"source: shape \(6, 99\) does not match"):
        q.error(matrix()[:, :99])
    assert q.error(matrix(), name="up")["max_abs"] > 0
    with pytest.raises(QllmValueError, match=r"up: shape"):
        q.error(matrix()[1:], name="up")


def test_buffer_is_held_during_the_call_and_not_after():
    buffer = bytearray(parts("nf4")["packed"].tobytes())
    view = memoryview(buffer)
    q = build("nf4", packed=view)
    view.release()
    buffer.clear()  # would raise BufferError if the tensor still held it
    np.testing.assert_array_equal(q.dequantize(), build("nf4").dequantize())


def test_buffer_that_another_thread_resizes_during_calls():
    """The call holds the buffer, so that the resize fails or comes between two calls."""
    good, expected = parts("nf4")["packed"].tobytes(), build("nf4").dequantize()
    buffer, stop, refused = bytearray(good), threading.Event(), []

    def resize():
        while not stop.is_set():
            try:
                buffer.extend(bytes(10**5))
                del buffer[len(good) :]
            except BufferError:
                refused.append(1)

    worker = threading.Thread(target=resize)
    worker.start()
    try:
        for _ in range(300):
            try:
                result = build("nf4", packed=buffer).dequantize()
            except QllmValueError as error:
                assert "elements, but format nf4" in str(error)
            else:
                np.testing.assert_array_equal(result, expected)
    finally:
        stop.set()
        worker.join()
    with memoryview(buffer):  # what the calls rely on
        with pytest.raises(BufferError):
            buffer.extend(b"x")


def test_array_freed_meanwhile():
    """The call holds its array: another thread that drops the last other reference is harmless."""
    w = {0: matrix((512, 1024))}
    expected = qllm.quantize(w[0], "nf4").packed.copy()
    results = []
    worker = threading.Thread(target=lambda: results.append(qllm.quantize(w[0], "nf4")))
    worker.start()
    while worker.is_alive():  # replaces the array over and over, while the worker may be reading it
        w[0] = w[0].copy()
    worker.join()
    gc.collect()
    np.testing.assert_array_equal(results[0].packed, expected)
    packed = qllm.quantize(matrix((512, 1024)), "nf4").packed
    gc.collect()
    np.testing.assert_array_equal(packed, expected)


def test_one_tensor_in_many_threads():
    q = qllm.quantize(matrix((300, 512)), "nf4-dq")
    x = matrix((4, 512), 1)
    expected = q.dequantize(), q.matmul_reference(x)
    failures = []

    def work():
        for _ in range(5):
            results = q.dequantize(), q.matmul_reference(x)
            if any((a != b).any() for a, b in zip(results, expected)):
                failures.append(1)
            q.packed, q.nested_absmax, repr(q)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_long_names_are_cut_in_one_piece():
    name = "\u00e9" * 400
    with pytest.raises(QllmValueError, match="^\u00e9+"):
        qllm.quantize(matrix(), "nf4", 3, name=name)
    w = matrix()
    w[0, 0] = np.nan
    with pytest.raises(QllmValueError) as caught:
        qllm.quantize(w, "nf4", name="x" + name)
    assert len(str(caught.value)) > 100
    with pytest.raises(QllmValueError, match="^\u00e9{99}"):
        build("nf4", packed=np.zeros(3, np.uint8), name=name)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    with pytest.raises(QllmValueError, match="layer.7: Tensor gives no NumPy array: .*meta"):
        qllm.quantize(torch.zeros(3, 4, device="meta"), "nf4", name="layer.7")
    with pytest.raises(QllmValueError, match="found float64"):
        qllm.quantize(torch.zeros(3, 4, dtype=torch.float64), "nf4")
    with pytest.raises(QllmValueError, match="said to be 'float16' but"):
        qllm.quantize(torch.zeros(3, 4, dtype=torch.bfloat16), "nf4", dtype="float16")


# memory -----------------------------------------------------------------------------------------


def fails_everywhere(action) -> int:
    """Lets each allocation of `action` fail in turn; returns how many there are."""
    for n in range(1, 20):
        _core._alloc_fail_at(n)
        try:
            action()
            return n - 1
        except QllmMemoryError as error:
            assert isinstance(error, MemoryError) and isinstance(error, QllmError)
            assert "could not allocate" in str(error)
        finally:
            _core._alloc_fail_at(0)
    raise AssertionError("an allocation that fails every time")


@pytest.mark.parametrize("name", FORMATS)
def test_allocation_failures(name):
    w, x = matrix(), matrix((3, 100), 1)
    q, expected = build(name), build(name).dequantize()
    given = parts(name)
    owned = {"nf4": 2, "fp4": 2, "nf4-dq": 3, "fp4-dq": 3, "int8": 2}.get(name, 1)
    assert fails_everywhere(lambda: _core.quantized_from_parts(**given)) == owned
    assert fails_everywhere(lambda: qllm.quantize(w, name)) == owned + 2 * name.endswith("-dq")
    assert fails_everywhere(lambda: q.matmul_reference(x)) == 2
    if name == "int8":
        assert fails_everywhere(lambda: q.matmul_reference(x, batch_outliers=True)) == 3
    assert fails_everywhere(q.dequantize) == 0
    assert fails_everywhere(lambda: q.error(w)) == 0
    stored = pickle.dumps(q)
    assert fails_everywhere(lambda: pickle.loads(stored)) == owned
    np.testing.assert_array_equal(q.dequantize(), expected)

