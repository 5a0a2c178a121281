"""The reference linear layer: its order of summation bit by bit, its error, and LLM.int8()."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.errors import QllmUnsupportedError, QllmValueError
from qllm.quantize import FORMATS

GROUP = 32
EPS = 2.0**-24  # half an ulp of 1 in float32


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def fma(a, b, c) -> np.float32:
    """a * b + c with one rounding, by exact arithmetic."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    guess = np.float32(float(exact))
    around = (np.nextafter(guess, f32(-np.inf)), guess, np.nextafter(guess, f32(np.inf)))
    distances = [abs(Fraction(float(x)) - exact) for x in around]
    nearest = [x for x, d in zip(around, distances) if d == min(distances)]
    even = [x for x in nearest if int(x.view(np.uint32)) % 2 == 0]
    return (even if len(nearest) > 1 else nearest)[0]


def weight_and_scales(q, row):
    """What the documented sum takes: w_k, and s_g for every group of 32."""
    rows, cols = q.shape
    groups = -(-cols // GROUP)
    if q.blocksize is None or cols % q.blocksize:
        return q.dequantize()[row], np.ones(groups, np.float32)
    codes = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)[: rows * cols]
    absmax = q.absmax
    if absmax is None:
        of_group = q.nested_absmax[np.arange(q.absmax_codes.size) // 256]
        absmax = q.nested_quant_map[q.absmax_codes] * of_group + np.float32(q.offset)
    first = row * cols + np.arange(groups) * GROUP
    return q.quant_map[codes.reshape(rows, cols)[row]], absmax[first // q.blocksize]


@pytest.mark.parametrize("cols", [1, 31, 64, 96, 100, 128])
@pytest.mark.parametrize("name", [f for f in FORMATS if f != "int8"])
def test_order_of_summation(name, cols):
    rng = np.random.default_rng(cols)
    q = qllm.quantize(f32(rng.standard_normal((3, cols))), name, 32 if cols == 96 else 64)
    x, bias = f32(rng.standard_normal((2, cols))), f32(rng.standard_normal(3))
    result = q.matmul_reference(x, bias)
    plain = q.matmul_reference(x)
    for row in range(3):
        w, scales = weight_and_scales(q, row)
        for m in range(2):
            y = np.float32(0)
            for group, scale in enumerate(scales):
                p = np.float32(0)
                for k in range(group * GROUP, min((group + 1) * GROUP, cols)):
                    p = fma(w[k], x[m, k], p)
                y = fma(scale, p, y)
            assert plain[m, row] == y
            assert result[m, row] == y + bias[row]


@pytest.mark.parametrize("shape", [(40, 64), (17, 1000), (5, 4096), (64, 1)])
@pytest.mark.parametrize("name", [f for f in FORMATS if f != "int8"])
def test_error_against_float64(name, shape):
    """A term passes at most 32 roundings in its group, one in the product with the scale of its
    block, and one for every later group: each is at most EPS relative."""
    rng = np.random.default_rng(shape[1])
    q = qllm.quantize(f32(rng.standard_normal(shape)), name)
    x, bias = f32(rng.standard_normal((6, shape[1]))), f32(rng.standard_normal(shape[0]))
    w = q.dequantize().astype(np.float64)
    exact = x.astype(np.float64) @ w.T + bias
    roundings = GROUP + 2 + -(-shape[1] // GROUP) + 1
    budget = roundings * EPS * 1.01 * (np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(bias))
    assert (np.abs(q.matmul_reference(x, bias) - exact) <= budget).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_depends_on_itself_alone(name):
    rng = np.random.default_rng(1)
    q = qllm.quantize(f32(rng.standard_normal((20, 192))), name)
    x = f32(rng.standard_normal((13, 192)) * 3)
    assert (np.abs(x) >= 6).any()
    batch = q.matmul_reference(x)
    for i in range(13):
        alone = q.matmul_reference(x[i])
        assert alone.shape == (20,)
        np.testing.assert_array_equal(alone.view(np.uint32), batch[i].view(np.uint32))


# int8 -------------------------------------------------------------------------------------------


def activation(x, threshold):
    """q, scale and outlier columns of one row, in float32 as documented."""
    outliers = ~(np.abs(x) < threshold) if threshold > 0 else np.zeros(x.shape, bool)
    absmax = np.abs(np.where(outliers, 0, x)).max()
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(127) / absmax
    if not np.isfinite(factor):
        return np.zeros(x.shape, np.int64), np.float32(0), np.flatnonzero(outliers)
    q = np.where(outliers, 0, np.rint(x * factor)).astype(np.int64)
    return q, absmax / np.float32(127), np.flatnonzero(outliers)


def int8_reference(q, x, threshold, columns=None, bias=None):
    scale = q.scb * np.float32(1 / 127)
    y = np.zeros((len(x), q.shape[0]), np.float32)
    for i, row in enumerate(x):
        codes, sx, outliers = activation(row, threshold)
        if columns is not None:
            codes[columns], outliers = 0, columns
        d = codes @ q.packed.T.astype(np.int64)
        for r in range(q.shape[0]):
            total = np.float32(d[r]) * (sx * scale[r])
            for k in outliers:
                total = fma(row[k], np.float32(q.packed[r, k]) * scale[r], total)
            y[i, r] = total if bias is None else total + bias[r]
    return y


def inputs(seed, m=5, rows=12, cols=200):
    rng = np.random.default_rng(seed)
    q = qllm.quantize(f32(rng.standard_normal((rows, cols)) * 0.1), "int8")
    x = f32(rng.standard_normal((m, cols)))
    x[0, 3], x[2, 3], x[2, 150] = 8.5, -6.0, 20
    x[1] = 0
    x[3, :4] = 5.9999995, 6, 6.0000005, -6
    return q, x, f32(rng.standard_normal(rows))


@pytest.mark.parametrize("threshold", [6.0, 0.0, -1.0, 2.5, np.inf])
def test_int8_by_independent_code(threshold):
    q, x, bias = inputs(2)
    for b in (None, bias):
        np.testing.assert_array_equal(
            q.matmul_reference(x, b, threshold),
            int8_reference(q, x, threshold, bias=b),
        )


def test_int8_error_against_float64():
    """Half a step of x on every term that is no outlier, and three roundings."""
    q, x, _ = inputs(3)
    w = q.dequantize().astype(np.float64)
    exact = x.astype(np.float64) @ w.T
    inside = np.where(np.abs(x) < 6, x, 0)
    step = np.abs(inside).max(1, keepdims=True).astype(np.float64) / 127
    budget = 0.5 * step * np.abs(w).sum(1) + 8 * EPS * (np.abs(x).astype(np.float64) @ np.abs(w).T)
    assert (np.abs(q.matmul_reference(x) - exact) <= budget * 1.001).all()


def test_int8_batch_form_by_independent_code():
    q, x, bias = inputs(4)
    columns = np.flatnonzero((np.abs(x) >= 6).any(0))
    assert columns.tolist() == [1, 2, 3, 150]
    np.testing.assert_array_equal(
        q.matmul_reference(x, bias, batch_outliers=True),
        int8_reference(q, x, 6.0, columns, bias),
    )
    np.testing.assert_array_equal(
        q.matmul_reference(x[2:3], batch_outliers=True), q.matmul_reference(x[2:3])
    )
    assert (q.matmul_reference(x, batch_outliers=True) != q.matmul_reference(x))[1:].any()


def test_int8_batch_form_of_bitsandbytes():
    """The same columns, codes and result, up to the constant 6.200124e-05 that bitsandbytes'
    version for CPUs has in the place of 1 / 127^2 (1.8e-5 relative)."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    q, x, _ = inputs(5, m=7, rows=24, cols=256)
    x = x.astype(np.float16).astype(np.float32)  # bitsandbytes casts to float16
    tensor = torch.from_numpy(x.copy())
    codes, scales, columns = functional.int8_vectorwise_quant(tensor.half(), threshold=6.0)
    expected, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        tensor,
        codes,
        torch.from_numpy(q.packed.copy()),
        scales,
        torch.from_numpy(q.scb.copy()),
        columns,
    )
    result = q.matmul_reference(x, batch_outliers=True)
    magnitude = np.abs(x) @ np.abs(q.dequantize()).T
    assert (np.abs(result - expected.numpy()) <= 2.5e-5 * magnitude + 1e-6).all()
    assert columns.tolist() == np.flatnonzero((np.abs(x) >= 6).any(0)).tolist()
    rows = q.matmul_reference(x)
    assert np.abs(rows - expected.numpy()).max() > 1e-3, "the form by rows is another one"


def test_int8_of_unusual_inputs():
    q, x, _ = inputs(6)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[4, 10] = bad
        for threshold in (6.0, 0.0):
            y = q.matmul_reference(spoiled, threshold=threshold)
            assert not np.isfinite(y[4]).any()
            np.testing.assert_array_equal(y[:4], q.matmul_reference(x, threshold=threshold)[:4])
    tiny = np.full((1, 200), 1e-38, np.float32)
    np.testing.assert_array_equal(q.matmul_reference(tiny), 0)
    small = np.full((1, 200), 4e-37, np.float32)
    expected = small.astype(np.float64) @ q.dequantize().T
    np.testing.assert_allclose(q.matmul_reference(small), expected, rtol=1e-3, atol=1e-38)


def test_int8_sum_at_its_limit():
    cols = 133143
    q = _core.quantized_from_parts(
        "int8", (2, cols), np.repeat(np.int8([[127], [-127]]), cols, 1), scb=f32([127, 127])
    )
    x = np.full(cols, 127, np.float32)
    total = np.float32(127 * 127 * cols)
    np.testing.assert_array_equal(q.matmul_reference(x, threshold=0), [total, -total])
    wide = _core.quantized_from_parts(
        "int8", (1, cols + 1), np.zeros((1, cols + 1), np.int8), scb=f32([0])
    )
    x = np.zeros(cols + 1, np.float32)
    with pytest.raises(QllmUnsupportedError, match="133144 columns.*at most 133143"):
        wide.matmul_reference(x)
    with pytest.raises(QllmUnsupportedError, match="133144 columns.*at most 133143"):
        wide.matmul_reference(x, batch_outliers=True)


# arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_empty_batches_and_weights(name):
    q = qllm.quantize(np.ones((3, 64), np.float32), name)
    assert q.matmul_reference(np.zeros((0, 64), np.float32)).shape == (0, 3)
    no_rows = qllm.quantize(np.ones((0, 64), np.float32), name)
    assert no_rows.matmul_reference(np.ones((2, 64), np.float32)).shape == (2, 0)
    no_cols = qllm.quantize(np.ones((3, 0), np.float32), name)
    bias = f32([1, 2, 3])
    np.testing.assert_array_equal(
        no_cols.matmul_reference(np.ones((2, 0), np.float32), bias), [bias, bias]
    )


def test_arguments_that_do_not_fit():
    q = qllm.quantize(np.ones((3, 64), np.float32), "nf4")
    x = np.ones((2, 64), np.float32)
    with pytest.raises(QllmValueError, match=r"x: 63 columns, but the weight .*\(3, 64\) takes 64"):
        q.matmul_reference(x[:, :63])
    with pytest.raises(QllmValueError, match="bias: 2 values, but the weight has 3 rows"):
        q.matmul_reference(x, np.ones(2, np.float32))
    with pytest.raises(QllmValueError, match="threshold: NaN"):
        q.matmul_reference(x, threshold=float("nan"))
    with pytest.raises(QllmValueError, match="int8 only, not for nf4"):
        q.matmul_reference(x, batch_outliers=True)
    with pytest.raises(QllmValueError, match="x: expected dtype float32, found .*float64"):
        q.matmul_reference(x.astype(np.float64))
    with pytest.raises(QllmValueError, match="x: expected 1 to 2 dimensions, found 3"):
        q.matmul_reference(x[None])
    with pytest.raises(QllmValueError, match="bias: expected 1 dimension.*found 2"):
        q.matmul_reference(x, np.ones((3, 1), np.float32))
