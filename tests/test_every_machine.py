"""The same bits on every machine: results of fixed inputs, as digests that were written down once.

The other tests compare instruction sets with the reference of the same build.  Here every set of
every architecture must give one value, so that a figure made on x86 is the figure made on Arm.  A
digest may change only with the order of summation that core/linear_ref.h and cpu_ops.h promise.
Inputs are multiples of 2^-16 from a counter of integers, so that no library's rounding is in them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.quantize import FORMATS

SETS = _core.cpu_info()["isas"]
F32 = np.float32

# rows, cols, blocksize, rows of x
PRODUCTS = [(40, 256, 64, 1), (33, 192, 32, 3), (70, 160, 32, 13), (21, 1024, 128, 2), (17, 75, 64, 7)]
FUNCTIONS = ("rms_norm", "layer_norm", "rope", "silu", "gelu", "gelu_tanh", "add",
             "int8_activation")

DIGESTS = {
    "f32": "9bef598df3341e53", "f16": "2ef816056f096ba6", "bf16": "3e9a38cd9bf82ff5",
    "int8": "1d50f707ee65b59a", "nf4": "2443937157086412", "nf4-dq": "018cb475c3e5f34c",
    "fp4": "b8916ca8dcc355db", "fp4-dq": "9c7a17f1c44fa3d3", "rms_norm": "27d210c74135700a",
    "layer_norm": "bf61bf5d2a6b01bc", "rope": "362c5c54c0df7fa5", "silu": "15db1f83dc4362df",
    "gelu": "91d818fba458ce06",
    "gelu_tanh": "a3d8f9560fc19444", "add": "72f4066b320f2115",
    "int8_activation": "8ce59949250237a1", "attention": "d814fa967eb4b10f",
    "demo:llama f32": "936ca7544e54ccc8", "demo:llama f16": "5e392994edc08c9f",
    "demo:llama bf16": "936ca7544e54ccc8", "demo:llama int8": "a255e3a606f03375",
    "demo:llama nf4": "83fd7bb4163f8d26", "demo:llama nf4-dq": "73a6ce0b33c0e596",
    "demo:llama fp4": "5d094445b0e581e9", "demo:llama fp4-dq": "2006631a3e94765b",
}


def uniform(*shape: int) -> np.ndarray:
    """Values in (-2, 2); different shapes give different values."""
    count = int(np.prod(shape))
    counter = np.arange(count, dtype=np.uint64) + np.uint64(1000003) * np.uint64(count)
    mixed = counter * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    whole = (mixed >> np.uint64(46)).astype(np.int64) - (1 << 17)
    return (whole * 2.0**-16).astype(F32).reshape(shape)


def digest(*arrays: np.ndarray) -> str:
    """Zeros keep their sign, NaN does not occur."""
    whole = hashlib.sha256()
    for array in arrays:
        assert array.dtype != F32 or np.isfinite(array).all()
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]


def spread(x: np.ndarray) -> np.ndarray:
    """Some of the values 16 times as large: outliers of LLM.int8()."""
    return np.where(np.arange(x.size).reshape(x.shape) % 29 == 7, x * F32(16), x)


def products(isa: str, format: str) -> str:
    results = []
    for rows, cols, blocksize, m in PRODUCTS:
        w = qllm.quantize(uniform(rows, cols), format, blocksize)
        results.append(w.matmul(spread(uniform(m, cols)), uniform(rows), isa=isa))
    return digest(*results)


def functions(isa: str, name: str) -> str:
    results = []
    for n in (16, 75, 300):
        x, w, b = uniform(n) * F32(3), uniform(n + 1)[:n], uniform(n + 2)[:n]
        if name == "rope":
            results.append(_core._ops_test(isa, name, (uniform(2 * n), w, b), 0.0))
        elif name == "int8_activation":
            q, scale, outliers, count = _core._activation_test(isa, x, 5.0)
            results += [q, F32(scale).reshape(1), outliers.view(np.int32)[:count]]
        elif name == "layer_norm":
            results.append(_core._ops_test(isa, name, (x, w, b), 1e-5))
        else:
            results.append(_core._ops_test(isa, name, (x, w), 1e-5))
    return digest(*results)


def attention(isa: str) -> str:
    results = []
    for heads, head_dim, count in ((1, 40, 17), (4, 64, 48), (3, 80, 100)):
        whole = (count + 15) // 16 * 16
        k, v = uniform(whole * head_dim), uniform(count * head_dim + 1)[1:]
        bias = uniform(heads, count)
        for b in (None, bias):
            results.append(_core._attention_test(isa, uniform(heads, head_dim), k, v, [count], b, 2,
                                                 count, 0.125))
    return digest(*results)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_layers(isa: str, format: str) -> None:
    assert products(isa, format) == DIGESTS[format]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(isa: str, name: str) -> None:
    assert functions(isa, name) == DIGESTS[name]


@pytest.mark.parametrize("isa", SETS)
def test_attention(isa: str) -> None:
    assert attention(isa) == DIGESTS["attention"]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_model(isa: str, format: str) -> None:
    model = qllm.Model.from_pretrained("demo:llama", format, isa=isa, compute="exact", threads=1)
    assert digest(model.logits([1, 5, 77, 200, 31, 9])) == DIGESTS[f"demo:llama {format}"]
