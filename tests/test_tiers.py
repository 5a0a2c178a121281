"""Compute tiers: activations rounded to int16, int8, or bf16 in two orders (csrc/core/linear_ref.h).

The plain reference is held against the definition computed here with NumPy and exact fractions, and
every instruction set, forced by name, against the bits of the reference.
"""

from __future__ import annotations

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.errors import QllmUnsupportedError, QllmValueError
from qllm.quantize import FORMATS
from test_linear_ref import fma, weight_and_scales

SETS = _core.cpu_info()["isas"]
FOUR_BIT = ("nf4", "fp4", "nf4-dq", "fp4-dq")
LIMITS = {"int16": (4095, 8064), "int8": (127, 127)}
MODES = {"int16": "auto", "int8": "int8"}
F32 = np.float32

# (rows, cols, blocksize): whole tiles and not, one and many units of nested absmax, changes of the
# second level inside a unit, blocks of 32 and larger ones
SHAPES = [
    (1, 32, 32), (1, 64, 64), (16, 64, 32), (17, 128, 64), (33, 160, 32), (70, 320, 64),
    (64, 256, 256), (130, 448, 64), (7, 1024, 1024), (3, 8192, 4096), (90, 4096, 32),
    (1, 16416, 32), (200, 192, 64),
]


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def weight(rows: int, cols: int, format: str, blocksize: int = 64) -> qllm.QuantizedTensor:
    """Rows of different size, so that scales differ."""
    r = rng(rows, cols)
    values = r.standard_normal((rows, cols)) * np.exp(r.uniform(-2, 2, (rows, 1)))
    return qllm.quantize(values.astype(F32), format, blocksize)


def inputs(m: int, cols: int) -> np.ndarray:
    """Blocks of very different size, some all zero."""
    r = rng(m, cols, 7)
    x = r.standard_normal((m, cols)) * np.exp(r.uniform(-6, 6, (m, cols)))
    x[r.random((m, cols)) < 0.1] = 0
    return x.astype(F32)


def bits(y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(y), F32(np.nan), y).view(np.uint32)


def rounded(x: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """x (blocks, n) -> integers and the scale of each block, every operation in float32."""
    absmax = np.abs(x).max(1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factor = F32(limit) / absmax
    usable = np.isfinite(absmax) & np.isfinite(factor)
    q = np.where(usable, np.rint(x * np.where(usable, factor, F32(0))), 0)
    scale = np.where(usable, absmax / F32(limit), np.where(np.isfinite(absmax), 0, np.nan))
    return q.astype(np.int64), scale[:, 0].astype(F32)


def integer_reference(q: qllm.QuantizedTensor, x: np.ndarray, tier: str) -> np.ndarray:
    """The documented sum, by exact fractions."""
    limit, code_limit = LIMITS[tier]
    rows, cols = q.shape
    block = min(64, q.blocksize)
    largest = np.abs(q.quant_map).max()
    table = np.rint(q.quant_map * (F32(code_limit) / largest)).astype(np.int64)
    codes = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)[: rows * cols]
    c = table[codes].reshape(rows, cols // block, block)
    y = np.zeros((len(x), rows), F32)
    for i, row in enumerate(x):
        values, scales = rounded(row.reshape(-1, block), limit)
        d = (c * values).sum(2)
        for r in range(rows):
            absmax = weight_and_scales(q, r)[1][:: block // 32]
            total = F32(0)
            for b, scale in enumerate(scales):
                total = fma(absmax[b] * scale, F32(d[r, b]), total)
            y[i, r] = total * (largest / F32(code_limit))
    return y


@pytest.mark.parametrize("tier", LIMITS)
@pytest.mark.parametrize("format", FOUR_BIT)
def test_the_integer_reference_is_the_documented_sum(format: str, tier: str) -> None:
    for rows, cols, blocksize in ((3, 64, 64), (2, 96, 32), (2, 512, 128)):
        q, x = weight(rows, cols, format, blocksize), inputs(2, cols)
        bias = rng(1).standard_normal(rows).astype(F32)
        expected = integer_reference(q, x, tier)
        assert np.array_equal(bits(q.matmul_reference(x, tier=tier)), bits(expected))
        assert np.array_equal(bits(q.matmul_reference(x, bias, tier=tier)), bits(expected + bias))


def test_fp4_codes_are_exact_integers_of_the_int16_tier() -> None:
    """8064 is a multiple of 192, so that only the activations are rounded: none here."""
    q = weight(40, 256, "fp4")
    x = np.zeros((4, 256), F32)
    x[:] = rng(3).integers(-4095, 4096, (4, 256))
    x[:, ::64] = 4095
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    error = np.abs(q.matmul_reference(x, tier="int16") - exact)
    assert (error <= 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(q.dequantize()).T)).all()


def bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; subnormal numbers become 0."""
    x = np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x).astype(F32)
    b = x.view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(F32)


@pytest.mark.parametrize("cols", [1, 2, 31, 32, 33, 77, 96])
def test_the_bf16_reference_is_the_documented_sum(cols: int) -> None:
    q, x = weight(3, cols, "bf16"), inputs(2, cols)
    w, x16 = q.dequantize(), bf16(x)
    got = q.matmul_reference(x, tier="bf16")
    pad = np.zeros((1,), F32)
    for i in range(2):
        for r in range(3):
            y = F32(0)
            for first in range(0, cols, 32):
                p = F32(0)
                a = np.concatenate([w[r, first : first + 32], pad])
                b = np.concatenate([x16[i, first : first + 32], pad])
                for k in range(0, len(a) - 1, 2):
                    p = fma(a[k], b[k], fma(a[k + 1], b[k + 1], p))
                y = F32(y + p)
            assert got[i, r] == y


def pairs_of(values: np.ndarray, distance: int) -> np.ndarray:
    """(n, 32 i) -> (n, i, 2, 16): the two chains of every group."""
    n, cols = values.shape
    k = [j for j in range(32) if j // distance % 2 == 0]
    groups = values.reshape(n, cols // 32, 32)
    return np.stack([groups[:, :, k], groups[:, :, [j + distance for j in k]]], 2)


def pairs_reference(q: qllm.QuantizedTensor, x: np.ndarray) -> np.ndarray:
    """The documented sum of tier bf16x2, by exact fractions; no subnormal numbers."""
    rows, cols = q.shape
    codes = q.format != "bf16"
    pad = ((0, 0), (0, -cols % 32))
    if codes:
        factor = F32(10176) / np.abs(q.quant_map).max()
        nibbles = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)[: rows * cols]
        w = bf16(q.quant_map * factor)[nibbles].reshape(rows, cols)
    else:
        w = q.dequantize()
    w = pairs_of(np.pad(w, pad), 4 if codes else 1)
    a = pairs_of(np.pad(bf16(x), pad), 4 if codes else 1)
    y = np.zeros((len(x), rows), F32)
    for i in range(len(x)):
        for r in range(rows):
            sums = np.zeros(w.shape[1], F32)
            for g in range(len(sums)):
                p = [F32(0), F32(0)]
                for chain in range(2):
                    for k in range(16):
                        p[chain] = fma(w[r, g, chain, k], a[i, g, chain, k], p[chain])
                sums[g] = p[0] + p[1]
            if codes:
                absmax = weight_and_scales(q, r)[1]
                groups = min(64, q.blocksize) // 32
                for g in range(0, len(sums), groups):
                    block = F32(0)
                    for s in sums[g : g + groups]:
                        block = F32(block + s)
                    y[i, r] = fma(absmax[g], block, y[i, r])
                y[i, r] *= np.abs(q.quant_map).max() / F32(10176)
            else:
                for s in sums:
                    y[i, r] += s
    return y


@pytest.mark.parametrize("format,rows,cols,blocksize", [
    ("bf16", 3, 1, 64), ("bf16", 3, 38, 64), ("bf16", 2, 96, 64), ("nf4", 3, 192, 64),
    ("fp4", 2, 96, 32), ("nf4-dq", 2, 256, 128), ("fp4-dq", 2, 64, 64),
])
def test_the_reference_in_two_chains_is_the_documented_sum(
    format: str, rows: int, cols: int, blocksize: int
) -> None:
    q, x = weight(rows, cols, format, blocksize), inputs(2, cols)
    bias = rng(1).standard_normal(rows).astype(F32)
    expected = pairs_reference(q, x)
    assert np.array_equal(bits(q.matmul_reference(x, tier="bf16x2")), bits(expected))
    assert np.array_equal(bits(q.matmul_reference(x, bias, tier="bf16x2")), bits(expected + bias))


def test_fp4_codes_are_exact_in_bf16() -> None:
    """Under their limit, so that only the activations are rounded: none here."""
    q = weight(40, 256, "fp4")
    x = rng(3).integers(-256, 257, (4, 256)).astype(F32)
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    error = np.abs(q.matmul_reference(x, tier="bf16x2") - exact)
    assert (error <= 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(q.dequantize()).T)).all()


def test_bf16_products_treat_subnormal_numbers_as_zero() -> None:
    tiny = float(np.finfo(F32).tiny)
    w = np.zeros((16, 32), F32)
    w[0, 0], w[1, 0], w[2, 0], w[2, 1] = tiny / 4, tiny, tiny * 1.5, tiny
    x = np.zeros((3, 32), F32)
    x[0, :2], x[1, :2], x[2, :2] = (1, 1), (0.5, 0), (1, -1)
    q = qllm.quantize(w, "bf16")
    expected = q.matmul_reference(x, tier="bf16")
    assert expected[0, 0] == 0 and expected[1, 1] == 0 and expected[2, 2] == 0
    pairs = q.matmul_reference(x, tier="bf16x2")  # here one product is left of every sum
    assert np.array_equal(pairs.view(np.uint32), expected.view(np.uint32))
    for isa in SETS:
        if "bf16" in expected_tier("bf16", isa, "auto"):
            for m in (1, 3):
                y = q.matmul(x[:m], isa=isa, compute="auto")
                assert np.array_equal(y.view(np.uint32), expected[:m].view(np.uint32))


def expected_tier(format: str, isa: str, mode: str) -> str:
    if mode == "exact" or format in ("f32", "f16", "int8"):
        return "exact"
    if format == "bf16":
        return {"avx512bf16": "bf16", "avx512amx": "bf16x2"}.get(isa, "exact")
    return "int8" if mode == "int8" else "bf16x2" if isa == "avx512amx" else "int16"


@pytest.mark.parametrize("mode", ["auto", "int8"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_every_set_has_the_bits_of_the_reference(isa: str, format: str, mode: str) -> None:
    tier = expected_tier(format, isa, mode)
    for i, (rows, cols, blocksize) in enumerate(SHAPES):
        if isa == "scalar" and rows * cols > 50000:
            continue
        q, m = weight(rows, cols, format, blocksize), (1, 2, 3, 4, 7, 8, 13, 17)[i % 8]
        x, bias = inputs(m, cols), rng(1, rows).standard_normal(rows).astype(F32)
        expected = q.matmul_reference(x, bias, tier=tier)
        alone = q.matmul_reference(x[-1], bias, tier=tier)
        assert np.array_equal(bits(expected[-1]), bits(alone))
        for threads in (1, 2):
            y = _core.linear(q, x, bias, isa=isa, threads=threads, compute=mode)
            assert np.array_equal(bits(y), bits(expected)), (rows, cols, blocksize, m, threads)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format,mode", [("nf4", "auto"), ("fp4-dq", "int8"), ("bf16", "auto")])
def test_every_number_of_rows(isa: str, format: str, mode: str) -> None:
    q, x = weight(37, 160 if format != "bf16" else 67, format, 32), inputs(40, 160)
    x = x[:, : q.shape[1]]
    tier = expected_tier(format, isa, mode)
    expected = q.matmul_reference(x, tier=tier)
    for m in range(1, 41):
        y = q.matmul(np.ascontiguousarray(x[:m]), isa=isa, compute=mode)
        assert np.array_equal(bits(y), bits(expected[:m])), m


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format,cols", [("nf4-dq", 576), ("bf16", 579)])
def test_more_rows_and_columns_than_a_pass_takes(isa: str, format: str, cols: int) -> None:
    q, x, bias = weight(37, cols, format), inputs(523, cols), inputs(1, 37)[0]
    tier = expected_tier(format, isa, "auto")
    expected = q.matmul_reference(x, bias, tier=tier)
    assert np.array_equal(bits(_core.linear(q, x, bias, isa=isa, compute="auto")), bits(expected))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format,cols", [("nf4", 1152), ("nf4-dq", 1152), ("fp4", 1100),
                                         ("f32", 1100)])
def test_exact_outputs_wait_between_passes(isa: str, format: str, cols: int) -> None:
    """More rows and columns than a pass of tier exact takes; 37 outputs are two tiles and 5."""
    q, x, bias = weight(37, cols, format), inputs(53, cols), inputs(1, 37)[0]
    expected = np.tile(q.matmul_reference(x, bias), (5, 1))
    y = _core.linear(q, np.tile(x, (5, 1)), bias, isa=isa, compute="exact")
    assert np.array_equal(bits(y), bits(expected))


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
def test_sums_of_bf16_weights_wait_in_y_between_strips_of_columns() -> None:
    q, x, bias = weight(69, 2086, "bf16"), inputs(100, 2086), inputs(1, 69)[0]
    expected = q.matmul_reference(x, bias, tier="bf16x2")
    for m in (33, 48, 100):  # whole panels and not, an odd number of them, a tile of 5 outputs
        for threads in (1, 2):
            y = _core.linear(q, x[:m], bias, isa="avx512amx", threads=threads, compute="auto")
            assert np.array_equal(bits(y), bits(expected[:m])), (m, threads)


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
@pytest.mark.parametrize("format,blocksize", [("nf4", 64), ("nf4-dq", 32), ("fp4-dq", 128)])
def test_more_columns_than_stay_in_the_cache(format: str, blocksize: int) -> None:
    """Of 256 rows, which are two panels of x, 4096 columns at a time."""
    q, x, bias = weight(37, 4992, format, blocksize), inputs(32, 4992), inputs(1, 37)[0]
    expected = np.tile(q.matmul_reference(x, bias, tier="bf16x2"), (8, 1))
    x = np.tile(x, (8, 1))
    y = q.matmul(x, bias, isa="avx512amx", compute="auto")
    assert np.array_equal(bits(y), bits(expected))


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("format", FOUR_BIT)
def test_blocks_of_all_tiles_are_one_stream(format: str, blocksize: int) -> None:
    """Up to 16 rows by 1 to 6 blocks a row, with which a last unit of nested scales has 1 to 4; 37
    outputs are three tiles, one of 5, for one thread or two."""
    for blocks in range(1, 7):
        q, x = weight(37, blocks * blocksize, format, blocksize), inputs(16, blocks * blocksize)
        bias = inputs(1, 37)[0]
        expected = q.matmul_reference(x, bias, tier="bf16x2")
        for m, threads in ((1, 1), (1, 2), (7, 1), (16, 2)):
            y = q.matmul(x[:m], bias, isa="avx512amx", compute="auto", threads=threads)
            assert np.array_equal(bits(y), bits(expected[:m])), (blocks, m, threads)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("mode", ["auto", "int8"])
def test_nan_and_infinity_stay_in_their_row(isa: str, mode: str) -> None:
    for format in ("nf4", "nf4-dq", "bf16"):
        q, x = weight(20, 192, format), inputs(9, 192)
        x[2, 70], x[4, 5], x[8, 191] = np.nan, np.inf, -np.inf
        x[6] = F32(1e-42)
        x[7, :64] = np.finfo(F32).max
        tier = expected_tier(format, isa, mode)
        expected = q.matmul_reference(x, tier=tier)
        y = q.matmul(x, isa=isa, compute=mode)
        assert np.array_equal(bits(y), bits(expected))
        assert np.isnan(y[2]).all() and not np.isfinite(y[4]).any() and np.isfinite(y[5]).all()


def test_names_say_the_tier() -> None:
    for isa in SETS:
        for format in FORMATS:
            q = weight(3, 64, format)
            for mode in ("exact", "auto", "int8"):
                name = _core.linear_name(q, 1, isa=isa, compute=mode)
                tier = expected_tier(format, isa, mode)
                assert name.startswith(f"{format} {isa}, ")
                assert (f"{tier} activations" in name) == (tier != "exact"), name
    ragged = weight(3, 65, "nf4")
    assert "across row ends" in _core.linear_name(ragged, 1, compute="auto")
    y = ragged.matmul(inputs(2, 65), compute="auto")
    assert np.array_equal(y, ragged.matmul_reference(inputs(2, 65)))


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
def test_many_rows_go_to_the_matrix_units() -> None:
    for format in FOUR_BIT:
        q = weight(3, 64, format)
        for m, end in ((11, ""), (12, ", panels of rows"), (512, ", panels of rows")):
            name = _core.linear_name(q, m, isa="avx512amx", compute="int8")
            assert name == f"{format} avx512amx, int8 activations{end}"
            name = _core.linear_name(q, m, isa="avx512amx", compute="auto")
            assert name == f"{format} avx512amx, bf16x2 activations"


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
@pytest.mark.parametrize("format", ["bf16", "nf4"])
def test_sums_on_both_sides_of_the_smallest_normal_number(format: str) -> None:
    """What the matrix units flush to zero: operands, each product and each sum."""
    q = qllm.quantize(np.exp2(rng(5).integers(-8, 9, (48, 256))).astype(F32), format)
    r = rng(6)
    size = np.arange(-146, -113)[:, None] + r.integers(-9, 10, (33, 256))
    x = (np.exp2(size) * r.choice([-1.75, -1, 1, 1.25], (33, 256))).astype(F32)
    expected = q.matmul_reference(x, tier="bf16x2")
    assert np.array_equal(bits(q.matmul(x, isa="avx512amx", compute="auto")), bits(expected))
    assert (np.abs(expected) < np.finfo(F32).tiny).any() and expected.any()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format,mode", [("fp4", "auto"), ("nf4-dq", "auto"), ("nf4", "int8")])
def test_the_largest_sums_of_a_block(isa: str, format: str, mode: str) -> None:
    """Every code and every value of x at its limit: the halves of int16 are at theirs."""
    for blocksize in (32, 64):
        sign = np.sign(rng(blocksize).standard_normal((24, 192))).astype(F32)
        sign[:8] = np.arange(-4, 4)[:, None] >= 0
        sign[:8] = 2 * sign[:8] - 1
        q, x = qllm.quantize(sign, format, blocksize), sign * F32(3)
        expected = q.matmul_reference(x, tier=expected_tier(format, isa, mode))
        assert np.array_equal(bits(q.matmul(x, isa=isa, compute=mode)), bits(expected))


def test_what_does_not_exist_is_refused() -> None:
    q, x = weight(3, 64, "nf4"), inputs(1, 64)
    with pytest.raises(QllmUnsupportedError, match="compute is 'fast'.*exact, auto and int8"):
        q.matmul(x, compute="fast")
    with pytest.raises(QllmValueError, match="tier is 'f16'.*int16"):
        q.matmul_reference(x, tier="f16")
    for format, cols, tier in (("int8", 64, "int16"), ("nf4", 65, "int8"), ("f16", 64, "bf16"),
                               ("nf4", 65, "bf16x2"), ("int8", 64, "bf16x2")):
        with pytest.raises(QllmUnsupportedError, match=f"tier {tier} is not defined.*{format}"):
            weight(3, cols, format).matmul_reference(inputs(1, cols), tier=tier)
