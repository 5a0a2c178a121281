"""Random shapes in every format, compute mode and instruction set, against the float64 product.

The error of each output is bounded by what its roundings can add up to; the bounds are derived
below, none is measured. QLLM_SHAPES=1000 takes that many shapes instead of a few.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.quantize import FORMATS

SETS = _core.cpu_info()["isas"]
SHAPES = int(os.environ.get("QLLM_SHAPES", "24"))
FOUR_BIT = ("nf4", "fp4", "nf4-dq", "fp4-dq")
EPS = 2.0**-24  # the relative error of one rounding to float32
F32 = np.float32


def shape(r: np.random.Generator) -> tuple[int, int, int, int]:
    """m, rows, cols, blocksize: odd sizes, and every other time whole blocks."""
    m = int(r.integers(1, 301) if r.random() < 0.2 else r.integers(1, 20))
    blocksize = int(r.choice([32, 64, 128]))
    cols = int(r.integers(1, 300))
    if r.random() < 0.5:
        cols = blocksize * int(r.integers(1, 8))
    return m, int(r.integers(1, 150)), cols, blocksize


def float_sum(terms: np.ndarray, roundings: int) -> np.ndarray:
    """What `roundings` roundings of each term of a sum add up to (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1): gamma_n = n eps / (1 - n eps)."""
    return roundings * EPS / (1 - roundings * EPS) * terms


def block_scales(x: np.ndarray, block: int, limit: int) -> np.ndarray:
    """The scale of its block for every element of x."""
    m, cols = x.shape
    absmax = np.abs(x).reshape(m, cols // block, block).max(2)
    return np.repeat(absmax / limit, block, axis=1)


def budget(q: qllm.QuantizedTensor, x: np.ndarray, name: str) -> np.ndarray:
    """The largest error that the kernel of that name may make against x W^T with W dequantized."""
    w, a = np.abs(q.dequantize()).astype(np.float64), np.abs(x).astype(np.float64)
    cols, products = q.shape[1], a @ w.T
    # a chain of at most 32 in a group, one product with the scale, one rounding a group, the bias
    exact = 32 + 2 + -(-cols // 32) + 1
    if "int16" in name or ("int8 activations" in name):
        limit, code_limit = (4095, 8064) if "int16" in name else (127, 127)
        block = min(64, q.blocksize)
        step = block_scales(a, block, limit) * (0.5 + limit * 4 * EPS)  # half a unit, and roundings
        # half a unit of the code, times absmax: the largest |w| of a block is absmax or less, and
        # its code is the largest of the table where a weight reached it
        absmax = largest_by_block(q) / code_limit * (0.5 + code_limit * 4 * EPS)
        rounding = step @ w.T + a @ absmax.T + step @ absmax.T
        return rounding + float_sum(products + rounding, 6 + cols // block)
    if "bf16x2" in name:
        # x and the codes to 8 bits, and the codes' factor and unit; two chains of 16 in a group,
        # their sum, one rounding a group, one a block, the unit, the bias
        codes = q.format in FOUR_BIT
        step = (1 + 2.0**-8) * (1 + 2.0**-8 + 4 * EPS) - 1 if codes else 2.0**-8
        # a number below the smallest normal one counts as 0: of x, a product or a sum, in units of
        # the codes, which are less than their largest
        scale = largest_by_block(q).T if codes else np.ones(w.T.shape)
        tiny = np.finfo(F32).tiny * (w.sum(1) + 3 * scale.sum(0))
        rounding = products * step + tiny
        return rounding + float_sum(products + rounding, 16 + 1 + 2 * -(-cols // 32) + 2)
    if "bf16 activations" in name:
        rounding = products * 2.0**-8 + cols * np.finfo(F32).tiny
        return rounding + float_sum(products + rounding, exact)
    if name.startswith("int8"):
        kept = np.where(a >= 6, 0, a)
        step = kept.max(1, keepdims=True) / 127 * (0.5 + 127 * 4 * EPS)
        rounding = np.where(a >= 6, 0, step) @ w.T
        return rounding + float_sum(products + rounding, 6 + int((a >= 6).sum(1).max()))
    return float_sum(products, exact)


def largest_by_block(q: qllm.QuantizedTensor) -> np.ndarray:
    """absmax of the block of every weight, from the standard parts."""
    rows, cols = q.shape
    absmax = q.absmax
    if absmax is None:
        of_group = q.nested_absmax[np.arange(q.absmax_codes.size) // 256]
        absmax = q.nested_quant_map[q.absmax_codes] * of_group + F32(q.offset)
    of_each = np.repeat(np.abs(absmax), q.blocksize)[: rows * cols]  # a nested one may be below 0
    return of_each.reshape(rows, cols).astype(np.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_errors_stay_within_their_budget(format: str) -> None:
    r = np.random.default_rng(FORMATS.index(format))
    tiers = set()
    for number in range(SHAPES):
        m, rows, cols, blocksize = shape(r)
        w = r.standard_normal((rows, cols)) * np.exp(r.uniform(-3, 3, (rows, 1)))
        x = (r.standard_normal((m, cols)) * np.exp(r.uniform(-2, 2, (m, cols)))).astype(F32)
        bias = r.standard_normal(rows).astype(F32)
        q = qllm.quantize(w.astype(F32), format, blocksize)
        exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T + bias
        bounds: dict[str, np.ndarray] = {}
        for isa in SETS:
            for mode in ("exact", "auto", "int8"):
                name = _core.linear_name(q, m, isa=isa, compute=mode)
                kind = name.replace(isa, "set")
                tiers.add(kind)
                if kind not in bounds:
                    bounds[kind] = budget(q, x, name) + 2 * EPS * np.abs(exact) + 1e-37
                y = _core.linear(q, x, bias, isa=isa, compute=mode, threads=1 + number % 2)
                error = np.abs(y - exact)
                assert (error <= bounds[kind]).all(), (m, rows, cols, blocksize, name,
                                                       float((error / bounds[kind]).max()))
    if format in FOUR_BIT:
        assert {f"{format} set, int16 activations", f"{format} set, int8 activations"} <= tiers
