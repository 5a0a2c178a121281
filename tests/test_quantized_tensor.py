"""QuantizedTensor as a Python object, the arrays it is made from, and the unquantized formats."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import qllm
from qllm.quantize import BLOCKSIZES, FORMATS, bits_per_weight

torch = pytest.importorskip("torch")


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def bf16(values) -> np.ndarray:
    """float32 values rounded to bfloat16, as bits."""
    return torch.tensor(f32(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


# unquantized formats ----------------------------------------------------------------------------


def test_float_formats_round_to_nearest():
    rng = np.random.default_rng(8)
    w = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 4000).astype(np.uint32) << 16) | 0x8000
    small = (rng.standard_normal(50_000) * 2.0**-18).astype(np.float32)
    w = np.concatenate([w.view(np.float32), ties.view(np.float32), small, f32([65519.99, -65520])])
    half = np.concatenate([small, (np.arange(2**17) * 2.0**-25).astype(np.float32), w[:100]])
    with np.errstate(over="ignore", invalid="ignore"):
        for values in (w, half):
            q = qllm.quantize(values, "f16", allow_nonfinite=True)
            np.testing.assert_array_equal(q.packed[0], values.astype(np.float16))
    expected = torch.tensor(w).to(torch.bfloat16)
    result = torch.from_numpy(
        qllm.quantize(w, "bf16", allow_nonfinite=True).packed[0].view(np.int16).copy()
    ).view(torch.bfloat16)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~expected.isnan()])


def test_float_formats_read_every_half():
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits.view(np.float16)
    result = qllm.quantize(half, "f32", allow_nonfinite=True).packed[0]
    np.testing.assert_array_equal(result, half.astype(np.float32))
    finite = np.isfinite(half)
    back = qllm.quantize(result[finite], "f16").packed[0]
    np.testing.assert_array_equal(back.view(np.uint16), bits[finite])
    wide = qllm.quantize(bits, "f32", dtype="bfloat16", allow_nonfinite=True).packed[0]
    np.testing.assert_array_equal(wide, (bits.astype(np.uint32) << 16).view(np.float32))


def test_float_formats_keep_their_bytes():
    w = f32(np.random.default_rng(9).standard_normal((5, 7)))
    for array, dtype, name in (
        (w, None, "f32"),
        (w.astype(np.float16), None, "f16"),
        (bf16(w), "bfloat16", "bf16"),
    ):
        q = qllm.quantize(array, name, dtype=dtype)
        np.testing.assert_array_equal(q.packed, array)
        assert q.packed.dtype == array.dtype and q.nbytes == array.nbytes
        assert q.error(array, dtype)["sqnr_db"] == np.inf


# the Python object ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_parts_round_trip(name):
    w = f32(np.random.default_rng(10).standard_normal((33, 77)))
    q = qllm.quantize(w, name, 32)
    fields = (
        "format shape blocksize packed absmax absmax_codes nested_absmax nested_quant_map offset "
        "quant_map scb dtype_name nbytes bits_per_weight"
    ).split()
    for again in (pickle.loads(pickle.dumps(q)), copy.copy(q), copy.deepcopy(q)):
        for field in fields:
            np.testing.assert_array_equal(getattr(again, field), getattr(q, field), field)
        np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    assert eval(repr(q).partition("(")[2].partition(",")[0]) == name
    arrays = [getattr(q, f) for f in fields if isinstance(getattr(q, f), np.ndarray)]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    nbytes = q.nbytes
    del q, again
    tables = {"quant_map": 16, "nested_quant_map": 256}
    assert nbytes == sum(a.nbytes for a in arrays if a.size not in tables.values()) + (
        4 if name.endswith("-dq") else 0
    ), "views keep the memory alive"


def test_memory_layouts():
    w = f32(np.random.default_rng(12).standard_normal((24, 40)))
    unaligned = np.frombuffer(b"\0" + w.tobytes(), np.uint8)[1:].view(np.float32).reshape(w.shape)
    assert not unaligned.flags.aligned
    wide = np.repeat(w, 2, axis=1)

    class Subclass(np.ndarray):
        pass

    class Provider:
        def __array__(self, dtype=None, copy=None):
            return w

    read_only = w.copy()
    read_only.flags.writeable = False
    for name in FORMATS:
        expected = qllm.quantize(w, name)
        for other in (
            np.asfortranarray(w),
            wide[:, ::2],
            w[::-1, ::-1].copy()[::-1, ::-1],
            unaligned,
            read_only,
            w.view(Subclass),
            Provider(),
            memoryview(w),
            torch.from_numpy(w),
            torch.nn.Parameter(torch.from_numpy(w)),
        ):
            q = qllm.quantize(other, name)
            np.testing.assert_array_equal(q.packed, expected.packed)
            np.testing.assert_array_equal(q.dequantize(), expected.dequantize())


def test_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w = f32(np.random.default_rng(13).standard_normal((4, 64))).astype(ml_dtypes.bfloat16)
    q = qllm.quantize(w, "nf4")
    assert q.dtype_name == "bfloat16"
    np.testing.assert_array_equal(q.packed, qllm.quantize(bf16(w), "nf4", dtype="bfloat16").packed)


def test_bits_per_weight():
    w = f32(np.random.default_rng(14).standard_normal((512, 2048)))
    for name in FORMATS:
        for blocksize in BLOCKSIZES:
            measured = qllm.quantize(w, name, blocksize).bits_per_weight
            nominal = bits_per_weight(name, blocksize)
            slack = 32 / 2048 if name == "int8" else 33 * 8 / w.size
            assert nominal <= measured <= nominal + slack
    assert bits_per_weight("nf4") == 4.5 and bits_per_weight("nf4-dq") == 4.126953125
