"""The bytes of every format, against bitsandbytes on a CPU, published figures and plain NumPy."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm
from qllm import _core, bnb
from qllm.quantize import BLOCKSIZES, FORMATS

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

FOUR_BIT = ("nf4", "fp4", "nf4-dq", "fp4-dq")
SMALLEST_DIVISOR = np.float32(1e-38)


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def bf16(values) -> np.ndarray:
    """float32 values rounded to bfloat16, as bits."""
    return torch.tensor(f32(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def codes(q) -> np.ndarray:
    """The 4-bit codes in order of flat index."""
    pairs = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)
    return pairs[: q.shape[0] * q.shape[1]]


def reference_bnb(array, quant_type, blocksize, nested=False):
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    packed, state = functional.quantize_4bit(
        tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    return packed.numpy().reshape(-1), state


def from_bnb(packed, state):
    """A QuantizedTensor of what bitsandbytes made."""
    parts = {"blocksize": state.blocksize, "quant_map": state.code.numpy()}
    if state.nested:
        parts |= {
            "absmax_codes": state.absmax.numpy(),
            "nested_absmax": state.state2.absmax.numpy(),
            "nested_quant_map": state.state2.code.numpy(),
            "offset": state.offset.item(),
        }
    else:
        parts["absmax"] = state.absmax.numpy()
    name = state.quant_type + ("-dq" if state.nested else "")
    return _core.quantized_from_parts(name, tuple(state.shape), packed, **parts)


def near_threshold(values, blocksize, table, ulps=2) -> np.ndarray:
    """Which values, divided by the absmax of their block, lie within `ulps` of a threshold."""
    blocks = values.reshape(-1, blocksize)
    absmax = np.abs(blocks).max(1, keepdims=True)
    x = (blocks * (np.float32(1) / np.maximum(absmax, SMALLEST_DIVISOR))).reshape(-1)
    ordered = np.sort(np.unique(table))
    thresholds = (ordered[:-1] + ordered[1:]) / np.float32(2)
    place = np.searchsorted(thresholds, x)
    near = np.zeros(x.shape, bool)
    for shift in (-1, 0):
        t = thresholds[np.clip(place + shift, 0, len(thresholds) - 1)]
        near |= np.abs(x - t) <= ulps * np.spacing(np.abs(t))
    return near


# against bitsandbytes ---------------------------------------------------------------------------

SHAPE = (1024, 2048)  # 2 million values of each of five distributions


def distribution(name: str) -> np.ndarray:
    rng = np.random.default_rng(sorted(DISTRIBUTIONS).index(name))
    if name == "normal":
        return f32(rng.standard_normal(SHAPE, np.float32) * 0.02)
    if name == "uniform":
        return f32(rng.uniform(-1, 1, SHAPE))
    if name == "student":
        return f32(rng.standard_t(2.5, SHAPE))
    if name == "bf16":
        bits = bf16(rng.standard_normal(SHAPE, np.float32) * 0.05)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    values = rng.standard_normal(SHAPE, np.float32)
    values[rng.random(SHAPE) < 0.7] = 0
    values[rng.random(SHAPE) < 0.001] *= 1000
    values[::7, :256] = 0  # whole blocks of zeros
    return values


DISTRIBUTIONS = ("normal", "uniform", "student", "bf16", "sparse")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_4bit_bytes_of_bitsandbytes(name, quant_type):
    w = distribution(name)
    packed, state = reference_bnb(w, quant_type, 64)
    q = qllm.quantize(w, quant_type)
    np.testing.assert_array_equal(q.absmax, state.absmax.numpy())
    theirs = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    differ = np.flatnonzero(codes(q) != theirs)
    assert differ.size < 20, "of two million: a value within 2 ulp of a threshold is rare"
    near = near_threshold(w.reshape(-1), 64, q.quant_map) & (w.reshape(-1) != 0)
    assert near[differ].all()
    # whatever the bytes near a threshold are, they mean the same to both
    expected = q.quant_map[codes(q)] * np.repeat(q.absmax, 64)
    np.testing.assert_array_equal(
        q.dequantize().reshape(-1).view(np.uint32), expected.view(np.uint32)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_and_dtype(blocksize, dtype):
    rng = np.random.default_rng(blocksize)
    w = torch.from_numpy(f32(rng.standard_normal((33, 3 * 131)))).to(getattr(torch, dtype))
    for quant_type in ("nf4", "fp4"):
        packed, state = reference_bnb(w, quant_type, blocksize)
        q = qllm.quantize(w, quant_type, blocksize)
        assert q.dtype_name == dtype and q.blocksize == blocksize and q.shape == (33, 393)
        np.testing.assert_array_equal(q.packed, packed)
        np.testing.assert_array_equal(q.absmax, state.absmax.numpy())
        np.testing.assert_array_equal(q.quant_map, state.code.numpy())


@pytest.mark.parametrize("n", [1, 2, 3, 31, 63, 64, 65, 127, 129, 4095, 4097])
def test_tails_and_odd_counts(n):
    w = f32(np.random.default_rng(n).standard_normal((1, n)))
    for quant_type in ("nf4", "fp4"):
        packed, state = reference_bnb(w, quant_type, 64)
        q = qllm.quantize(w, quant_type)
        np.testing.assert_array_equal(q.packed, packed)
        np.testing.assert_array_equal(q.absmax, state.absmax.numpy())
        assert q.dequantize().shape == (1, n)


def test_blocks_run_across_row_ends():
    w = f32(np.random.default_rng(1).standard_normal((48, 100)))
    for quant_type in ("nf4", "fp4"):
        flat, matrix = (qllm.quantize(a, quant_type) for a in (w.reshape(-1), w))
        np.testing.assert_array_equal(flat.packed, matrix.packed)
        np.testing.assert_array_equal(flat.absmax, matrix.absmax)
        assert flat.shape == (1, 4800)


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_states_read_back(quant_type, blocksize):
    """With packed codes of the value 1 the dequantized weights are the absmax values themselves."""
    w = f32(np.random.default_rng(2).standard_normal((512, 520)) * np.linspace(0.01, 3, 520))
    packed, state = reference_bnb(w, quant_type, blocksize, nested=True)
    one = 0xFF if quant_type == "nf4" else 0x33
    q = from_bnb(np.full_like(packed, one), state)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = np.repeat(absmax.numpy(), blocksize)[: w.size]
    np.testing.assert_array_equal(
        q.dequantize().reshape(-1).view(np.uint32), expected.view(np.uint32)
    )
    theirs = from_bnb(packed, state)
    np.testing.assert_array_equal(
        theirs.dequantize().reshape(-1), theirs.quant_map[codes(theirs)] * expected
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_reads_our_nested_states(quant_type):
    w = f32(np.random.default_rng(15).standard_normal((512, 520)) * np.linspace(0.01, 3, 520))
    q = qllm.quantize(w, quant_type + "-dq")
    entries = bnb.state_dict_entries("layer", q)
    prefix = "layer.weight."
    stored = {
        key.removeprefix(prefix): torch.from_numpy(value.copy())
        for key, value in entries.items()
        if key.startswith(prefix)
    }
    state = functional.QuantState.from_dict(stored, torch.device("cpu"))
    assert state.nested and tuple(state.shape) == q.shape and state.quant_type == quant_type
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = q.quant_map[codes(q)] * np.repeat(absmax.numpy(), 64)[: w.size]
    np.testing.assert_array_equal(q.dequantize().reshape(-1), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_our_nested_codes_are_the_nearest(quant_type):
    w = f32(np.random.default_rng(3).standard_t(4, (700, 640)))
    plain, q = qllm.quantize(w, quant_type), qllm.quantize(w, quant_type + "-dq")
    np.testing.assert_array_equal(q.packed, plain.packed)
    offset = np.float32(np.sum(plain.absmax, dtype=np.float64) / plain.absmax.size)
    assert np.float32(q.offset) == offset
    difference = plain.absmax - offset
    padded = np.pad(np.abs(difference), (0, -difference.size % 256))
    largest = padded.reshape(-1, 256).max(1)
    np.testing.assert_array_equal(q.nested_absmax, largest)
    x = (difference / np.repeat(largest, 256)[: difference.size]).astype(np.float64)
    table = q.nested_quant_map.astype(np.float64)
    np.testing.assert_array_equal(q.absmax_codes, np.abs(x[:, None] - table).argmin(1))
    # and no farther from the true scales than what bitsandbytes stores
    _, state = reference_bnb(w, quant_type, 64, nested=True)
    theirs = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
    ours = q.nested_quant_map[q.absmax_codes] * np.repeat(largest, 256)[: x.size] + offset
    mean = [np.abs(a - plain.absmax).mean(dtype=np.float64) for a in (ours, theirs)]
    assert mean[0] <= mean[1] * (1 + 1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_entries_of_bitsandbytes(name):
    """What qllm quantizes is stored under the names and bytes that bitsandbytes writes."""
    w = torch.from_numpy(f32(np.random.default_rng(11).standard_normal((64, 96))))
    entries = bnb.state_dict_entries("layer", qllm.quantize(w.to(torch.bfloat16), name))
    if name == "int8":
        assert list(entries) == ["layer.weight", "layer.SCB", "layer.weight_format"]
        return
    packed, state = reference_bnb(w.to(torch.bfloat16), name[:3], 64, name.endswith("-dq"))
    theirs = {"weight": packed.reshape(-1, 1)} | {
        "weight." + key: value.numpy() for key, value in state.as_dict(packed=True).items()
    }
    assert set(entries) == {"layer." + key for key in theirs}
    for key, value in theirs.items():
        ours = entries["layer." + key]
        assert ours.dtype == value.dtype and ours.shape == value.shape
        if name.endswith("-dq") and key.split(".")[-1] in ("absmax", "bitsandbytes__" + name[:3]):
            continue  # our codes are the nearest, and the mean may differ in the last place
        np.testing.assert_array_equal(ours, value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_int8_of_bitsandbytes(dtype):
    """Linear8bitLt casts weights to float16 first, whatever their dtype."""
    rng = np.random.default_rng(4)
    w = f32(rng.standard_normal((300, 1000)) * np.geomspace(1e-5, 3000, 300)[:, None])
    w[7] = 0
    w[8, ::2] = 0
    w[9] = 0
    w[9, 500] = 1
    tensor = torch.from_numpy(w).to(getattr(torch, dtype))
    weights, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
    q = qllm.quantize(tensor, "int8")
    np.testing.assert_array_equal(q.packed[[7]], 0)
    keep = np.arange(300) != 7  # theirs converts NaN to integers there
    np.testing.assert_array_equal(q.packed[keep], weights.numpy()[keep])
    np.testing.assert_array_equal(q.scb, scales.numpy())
    np.testing.assert_array_equal(
        q.dequantize(), q.packed.astype(np.float32) * (q.scb * np.float32(1 / 127))[:, None]
    )


def test_int8_layer_of_bitsandbytes():
    layer = torch.nn.Linear(128, 96, bias=False).to(torch.bfloat16)
    from bitsandbytes.nn import Int8Params

    parameter = Int8Params(layer.weight.data.clone(), requires_grad=False).to("cpu")
    q = qllm.quantize(layer.weight, "int8")
    np.testing.assert_array_equal(q.packed, parameter.CB.numpy())
    np.testing.assert_array_equal(q.scb, parameter.SCB.numpy())


def test_int8_rows_that_float16_would_lose():
    rng = np.random.default_rng(5)
    w = f32(rng.uniform(-1, 1, (4, 64)))
    w[:, 0] = 1
    w *= f32([1e6, 65519, 1e-9, 1e30])[:, None]
    for array, dtype in ((w, None), (bf16(w), "bfloat16")):
        q = qllm.quantize(array, "int8", dtype=dtype)
        values = w if dtype is None else (array.astype(np.uint32) << 16).view(np.float32)
        bound = np.abs(values).max(1, keepdims=True) * (0.5 / 127 + 0.0006)
        assert (np.abs(q.dequantize() - values) <= bound).all()
        assert (np.abs(q.packed).max(1) == 127).all()


# published figures ------------------------------------------------------------------------------


def test_published_vector():
    """From the thresholds that bitsandbytes publishes; no value is near one."""
    w = f32((2 * np.arange(64) - 63) / 16)
    for array, dtype in ((w, None), (w.astype(np.float16), None), (bf16(w), "bfloat16")):
        nf4, fp4 = (qllm.quantize(array, name, dtype=dtype) for name in ("nf4", "fp4"))
        assert (
            nf4.packed.tobytes().hex()
            == "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
        )
        assert (
            fp4.packed.tobytes().hex()
            == "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333"
        )
        assert nf4.absmax == fp4.absmax == f32([3.9375])


MEANS = {
    "nf4": (
        (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547),
        (0.189726, 0.203339, 0.215237, 0.226105, 0.236079, 0.245370, 0.254163, 0.262473),
    ),
    "fp4": (
        (0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536),
        (0.242443, 0.260125, 0.275817, 0.289831, 0.302881, 0.315000, 0.326607, 0.337169),
    ),
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_published_error_means(quant_type):
    """Mean absolute and relative errors of standard normal weights in the tests of bitsandbytes."""
    w = np.random.default_rng(6).standard_normal((1024, 1024), np.float32)
    for blocksize, absolute, relative in zip(BLOCKSIZES, *MEANS[quant_type]):
        q = qllm.quantize(w, quant_type, blocksize)
        figures = q.error(w)
        assert figures["mean_abs"] == pytest.approx(absolute, abs=6e-4)
        errors = np.abs(q.dequantize().astype(np.float64) - w)
        assert (errors / (np.abs(w) + 1e-8)).mean() == pytest.approx(relative, abs=3e-3)
        assert figures["mean_abs"] == pytest.approx(errors.mean(), rel=1e-12)


def test_codebooks():
    assert _core.codebook("nf4").tolist() == functional.get_4bit_type("nf4", "cpu").tolist()
    assert _core.codebook("fp4").tolist() == functional.get_4bit_type("fp4", "cpu").tolist()
    assert not np.signbit(_core.codebook("fp4")[8])
    theirs = functional.create_dynamic_map().numpy()
    np.testing.assert_array_equal(_core.codebook("dynamic").view(np.uint32), theirs.view(np.uint32))
    i, j = np.concatenate([[(i, j) for j in range(2**i)] for i in range(7)]).T
    formula = 10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2.0**i)
    formula = np.sort(np.concatenate([formula, -formula, [0, 1]]))
    np.testing.assert_allclose(theirs, formula, rtol=3e-7, atol=0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_thresholds_and_ties(quant_type):
    """Around every threshold, with an absmax of 1: a tie takes the lower value."""
    table = _core.codebook(quant_type)
    ordered = np.unique(table)
    thresholds = (ordered[:-1] + ordered[1:]) / np.float32(2)
    for below, t, above in zip(ordered, thresholds, ordered[1:]):
        w = np.zeros((1, 64), np.float32)
        w[0, :4] = 1, np.nextafter(t, f32(-2)), t, np.nextafter(t, f32(2))
        q = qllm.quantize(w, quant_type)
        assert q.dequantize()[0, :4].tolist() == [1, below, below, above]


def test_codes_of_zero():
    w = np.zeros((1, 64), np.float32)
    w[0, 0], w[0, 1], w[0, 2], w[0, 3] = 1, 1e-4, -1e-4, -0.0
    assert codes(qllm.quantize(w, "nf4"))[:5].tolist() == [15, 7, 7, 7, 7]
    assert codes(qllm.quantize(w, "fp4"))[:5].tolist() == [3, 8, 0, 0, 0]
    np.testing.assert_array_equal(qllm.quantize(w, "fp4").packed, reference_bnb(w, "fp4", 64)[0])


# unusual values ---------------------------------------------------------------------------------


def test_zero_blocks():
    w = np.zeros((3, 65), np.float32)
    w[0, 0] = 2
    for name, byte in (("nf4", 0x77), ("fp4", 0x00)):
        q = qllm.quantize(w, name)
        assert q.absmax.tolist() == [2, 0, 0, 0], "the tail of zeros too"
        assert (q.packed[1:] == byte).all()
        np.testing.assert_array_equal(q.dequantize(), w)
    np.testing.assert_array_equal(qllm.quantize(w, "int8").dequantize()[1:], 0)
    for name in ("nf4-dq", "fp4-dq"):
        zeros = np.zeros((4, 64), np.float32)
        np.testing.assert_array_equal(qllm.quantize(zeros, name).dequantize(), 0)
        np.testing.assert_array_equal(qllm.quantize(w, name).dequantize()[1:], 0)


def test_denormals():
    tiny = np.float32(1e-45)
    w = np.tile(f32([0, 1, -3, 1000]), 48).reshape(3, 64) * tiny
    w[1] *= 10000  # absmax 1.4e-38, just above the smallest divisor
    assert (np.abs(w) > 0).any()
    for name in ("nf4", "fp4"):
        packed, state = reference_bnb(w, name, 64)
        q = qllm.quantize(w, name)
        np.testing.assert_array_equal(q.packed, packed)
        np.testing.assert_array_equal(q.absmax, state.absmax.numpy())
        assert np.abs(q.dequantize() - w).max() <= 1.4e-38
    halves = np.arange(-64, 64, dtype=np.float32).reshape(2, 64) * np.float32(2**-24)
    for name in ("nf4", "fp4"):
        packed, state = reference_bnb(halves.astype(np.float16), name, 64)
        np.testing.assert_array_equal(qllm.quantize(halves.astype(np.float16), name).packed, packed)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_one_outlier(quant_type):
    w = np.full((2, 64), 1e-3, np.float32)
    w[0, 40] = -1e4
    q = qllm.quantize(w, quant_type)
    result = q.dequantize()
    assert result[0, 40] == -1e4 and (np.delete(result[0], 40) == 0).all()
    np.testing.assert_array_equal(result[1], w[1])


def test_largest_finite_values():
    for array, dtype in (
        (np.full((2, 64), 65504, np.float16), None),
        (np.full((2, 64), 0x7F7F, np.uint16), "bfloat16"),
        (np.full((2, 64), np.finfo(np.float32).max, np.float32), None),
    ):
        values = qllm.quantize(array, "f32", dtype=dtype).packed
        for name in FOUR_BIT:
            np.testing.assert_array_equal(
                qllm.quantize(array, name, dtype=dtype).dequantize(), values
            )
        np.testing.assert_allclose(
            qllm.quantize(array, "int8", dtype=dtype).dequantize(), values, rtol=1e-6
        )


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (0,)])
@pytest.mark.parametrize("name", FORMATS)
def test_no_elements(shape, name):
    q = qllm.quantize(np.zeros(shape, np.float32), name)
    expected = shape if len(shape) == 2 else (1, 0)
    assert q.shape == expected and q.dequantize().shape == expected
    assert q.error(np.zeros(shape, np.float32)) == {
        "mean_abs": 0,
        "max_abs": 0,
        "rmse": 0,
        "sqnr_db": np.inf,
    }
    assert q.bits_per_weight == 0
    assert pickle.loads(pickle.dumps(q)).shape == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_allowed_on_request(bad):
    w = f32(np.random.default_rng(7).standard_normal((40, 512)))
    spoiled = w.copy()
    spoiled[20, 300] = bad
    for name in ("nf4", "fp4", "int8"):
        good = qllm.quantize(w, name).dequantize()
        result = qllm.quantize(spoiled, name, allow_nonfinite=True).dequantize()
        lost = np.zeros(w.shape, bool)
        lost[20, 256:320] = True
        lost[20] |= name == "int8"
        assert np.isnan(result[lost]).all()
        np.testing.assert_array_equal(result[~lost], good[~lost])
    for name in ("nf4-dq", "fp4-dq"):
        q = qllm.quantize(spoiled, name, allow_nonfinite=True)
        result = q.dequantize().reshape(-1)
        group = (20 * 512 + 300) // (64 * 256)
        lost = np.zeros(w.size, bool)
        lost[group * 64 * 256 : (group + 1) * 64 * 256] = True
        assert np.isnan(result[lost]).all() and np.isfinite(result[~lost]).all()
        assert np.isfinite(q.offset)
    for name in ("f32", "f16", "bf16"):
        result = qllm.quantize(spoiled, name, allow_nonfinite=True).dequantize()
        np.testing.assert_array_equal(result[20, 300], bad)
    q = qllm.quantize(spoiled, "nf4", allow_nonfinite=True)
    again = pickle.loads(pickle.dumps(q))
    np.testing.assert_array_equal(again.absmax, q.absmax)
    assert np.isnan(q.error(spoiled)["max_abs"])


# properties -------------------------------------------------------------------------------------

arrays = st.builds(
    lambda seed, rows, cols, scale, zeros: f32(
        np.random.default_rng(seed).standard_normal((rows, cols))
        * scale
        * (np.random.default_rng(seed + 1).random((rows, cols)) >= zeros)
    ),
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e4, 1e30]),
    st.sampled_from([0.0, 0.5, 0.99]),
)


@settings(max_examples=150, deadline=None)
@given(arrays, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES))
def test_error_is_at_most_half_the_widest_gap(w, name, blocksize):
    q = qllm.quantize(w, name, blocksize)
    gap = np.diff(np.unique(q.quant_map)).max()
    absmax = np.repeat(q.absmax, blocksize)[: w.size]
    assert (np.abs(q.dequantize() - w).reshape(-1) <= absmax * (gap / 2 + 1e-6)).all()
    padded = np.pad(np.abs(w).reshape(-1), (0, -w.size % blocksize)).reshape(-1, blocksize)
    np.testing.assert_array_equal(q.absmax, padded.max(1))


@settings(max_examples=150, deadline=None)
@given(arrays, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES))
def test_quantizing_twice_changes_nothing(w, name, blocksize):
    once = qllm.quantize(w, name, blocksize).dequantize()
    np.testing.assert_array_equal(qllm.quantize(once, name, blocksize).dequantize(), once)


@settings(max_examples=100, deadline=None)
@given(arrays)
def test_int8_error_is_half_a_step(w):
    q = qllm.quantize(w, "int8")
    absmax = np.abs(w).max(1, keepdims=True)
    # half a step, the rounding to float16 (2^-11 of a value, 2^-25 of the smallest), float32
    bound = absmax * (0.5 / 127 + 2.0**-11 + 1e-6)
    bound += np.where(absmax > 2.0**-25, 2.0**-25, 0)
    assert (np.abs(q.dequantize().astype(np.float64) - w) <= bound).all()


@settings(max_examples=60, deadline=None)
@given(arrays, st.sampled_from(FOUR_BIT), st.sampled_from(BLOCKSIZES))
def test_codes_say_what_dequantize_gives(w, name, blocksize):
    q = qllm.quantize(w, name, blocksize)
    if q.absmax is None:
        groups = np.repeat(q.nested_absmax, 256)[: q.absmax_codes.size]
        absmax = q.nested_quant_map[q.absmax_codes] * groups + np.float32(q.offset)
    else:
        absmax = q.absmax
    expected = q.quant_map[codes(q)] * np.repeat(absmax, blocksize)[: w.size]
    np.testing.assert_array_equal(
        q.dequantize().reshape(-1).view(np.uint32), expected.view(np.uint32)
    )
