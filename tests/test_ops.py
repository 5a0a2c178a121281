"""The small functions of cpu_ops: every instruction set gives the bits of the scalar table, and the
scalar table gives what float64 NumPy says.

Golden values come from NumPy and scipy in float64; the sums of the norms and of attention are also
written out in the documented order with float32 NumPy, and must agree bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from qllm import _core

SETS = _core.cpu_info()["isas"]
FAST = [isa for isa in SETS if isa != "scalar"]
SIZES = [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 192, 255, 300]
F32 = np.float32


def bits(a: np.ndarray) -> np.ndarray:
    """The bits of float32 values, every NaN the same: its payload has no meaning here."""
    a = np.ascontiguousarray(a, F32)
    return np.where(np.isnan(a), np.uint32(0x7FC00000), a.view(np.uint32))


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))


def op(isa: str, name: str, *arrays: np.ndarray, number: float = 0.0) -> np.ndarray:
    return _core._ops_test(isa, name, arrays, number)


def ulps(value: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the true value in float32, subnormal numbers included."""
    spacing = np.spacing(np.abs(true).astype(F32)).astype(np.float64)
    return np.abs(value.astype(np.float64) - true) / spacing


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def normal(r: np.random.Generator, *shape: int) -> np.ndarray:
    return r.standard_normal(shape).astype(F32)


def test_every_compiled_set_is_a_known_name() -> None:
    info = _core.cpu_info()
    assert "scalar" in SETS and set(SETS) <= set(info["compiled"])


# ---------------------------------------------------------------------------------- the exponential


def test_exp_is_within_one_ulp_everywhere() -> None:
    r = rng(1)
    x = np.concatenate([
        r.uniform(-103.9, 88.72, 400_000), r.uniform(-1, 1, 200_000), r.uniform(-104, -87, 50_000),
        np.linspace(-0.35, 0.35, 50_000), np.float64(np.log(2)) * (np.arange(-140, 128) + 0.5),
    ]).astype(F32)
    value, true = op("core", "exp", x), np.exp(x.astype(np.float64))
    assert ulps(value, true).max() <= 1.0


def test_exp_at_its_limits() -> None:
    largest = np.nextafter(F32(88.722839), F32(0))  # the logarithm of the largest float32
    x = np.array([0.0, -0.0, largest, 88.72284, 89.0, 1e4, np.inf, -103.97, -103.98, -104.0, -1e4,
                  -np.inf, np.nan], F32)
    y = op("core", "exp", x)
    assert y[0] == y[1] == 1.0 and np.isfinite(y[2])
    assert np.all(y[3:7] == np.inf)
    assert y[7] == np.float32(1.4e-45) and np.all(y[8:12] == 0.0) and np.isnan(y[12])


def test_exp_rises() -> None:
    y = op("core", "exp", np.linspace(-110, 90, 300_001).astype(F32))
    assert np.all(y[1:] >= y[:-1])


# ------------------------------------------------------------------------------------- activations

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def true_activation(name: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if name == "silu":
        return x * special.expit(x)
    if name == "gelu":
        return x * special.ndtr(x)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_silu_is_accurate_on_both_sides() -> None:
    x = np.concatenate([rng(2).uniform(-80, 80, 100_000), rng(3).normal(0, 2, 100_000)]).astype(F32)
    assert ulps(op("core", "silu", x), true_activation("silu", x)).max() <= 3.0


def test_gelu_is_accurate_on_both_sides() -> None:
    z = np.concatenate([rng(4).uniform(0, 12.9, 200_000), np.abs(rng(5).normal(0, 2, 100_000)),
                        np.geomspace(1e-30, 14.6, 100_000), 1 + np.arange(-99, 99) * 2.0**-24])
    z = z.astype(F32)
    assert ulps(op("core", "gelu", z), true_activation("gelu", z)).max() <= 1.3
    value, true = op("core", "gelu", -z), true_activation("gelu", -z)
    assert ulps(value, true)[z < 12.9].max() <= 7.5
    assert np.max(np.abs(value - true) / np.maximum(np.abs(true), 1e-7)) <= 3.6 * 2.0**-23


def test_gelu_knows_the_error_function() -> None:
    z = np.concatenate([rng(23).uniform(0, 3, 200_000), np.geomspace(1e-20, 14, 50_000)])
    z = z.astype(F32)
    erf = 1 + 2 * op("core", "gelu", -z).astype(np.float64) / z  # gelu(-z) = -z (1 - erf) / 2
    rounding = 2.0**-24 * special.erfc(z / np.sqrt(2))  # of that product
    assert np.max(np.abs(erf - special.erf(z.astype(np.float64) / np.sqrt(2))) - rounding) <= 1e-7


def test_gelu_at_its_limits() -> None:
    x = np.array([0.0, -0.0, 1e-40, 14.5, 3e38, np.inf, -14.5, -3e38, -np.inf, np.nan], F32)
    y = op("core", "gelu", x)
    expected = [0, 0, F32(1e-40) / F32(2), 14.5, F32(3e38), np.inf, 0, 0, 0]
    np.testing.assert_array_equal(y[:9], expected)
    assert not np.signbit(y[0]) and np.signbit(y[1]) and np.isnan(y[9])


def test_gelu_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    x = np.concatenate([rng(24).uniform(-14, 14, 50_000), rng(25).normal(0, 1, 50_000)])
    x = x.astype(F32)
    golden = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(op("core", "gelu", x), golden, rtol=4e-7, atol=1e-14)


def test_gelu_tanh_is_accurate() -> None:
    x = np.concatenate([rng(4).uniform(-12, 12, 100_000), rng(5).normal(0, 2, 100_000)]).astype(F32)
    value, true = op("core", "gelu_tanh", x), true_activation("gelu_tanh", x)
    right = x > -0.5
    assert ulps(value[right], true[right]).max() <= 5.0
    # On the far left the true value is a small difference: the error is small beside x instead.
    assert np.max(np.abs(value - true) / np.abs(x)) <= 1.2e-7


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_bits_of_the_core(isa: str, name: str) -> None:
    special_values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, -3e38, 88.8,
                               -88.8, -104.5, 1.0, -1.0, 0.99999994, 14.5, -14.5, -13.9], F32)
    for n in SIZES:
        x = np.concatenate([special_values, normal(rng(6, n), 300) * 20])
        x = np.resize(x, n + len(special_values))[-n:]
        up = normal(rng(7, n), n)
        y = op("core", name, x)
        assert_same_bits(op(isa, name, x), y)
        with np.errstate(invalid="ignore", over="ignore"):
            assert_same_bits(op(isa, name, x, up), y * up)


@pytest.mark.parametrize("isa", SETS)
@given(x=st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_activations_agree_on_any_float(isa: str, x: list[float]) -> None:
    for name in ACTIVATIONS:
        assert_same_bits(op(isa, name, np.array(x, F32)), op("core", name, np.array(x, F32)))


# ------------------------------------------------------------------------------------------- norms


def lane_sum(x: np.ndarray) -> np.float32:
    """The sum of cpu_ops.h, literally."""
    partial = np.zeros(16, F32)
    for i, value in enumerate(x.astype(F32)):
        partial[i % 16] += value
    for step in (8, 4, 2, 1):
        partial[:step] += partial[step : 2 * step]
    return partial[0]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa: str, n: int) -> None:
    x, w, eps = normal(rng(8, n), n) * F32(3), normal(rng(9, n), n), F32(1e-5)
    y = op(isa, "rms_norm", x, w, number=float(eps))
    scale = F32(1) / np.sqrt(lane_sum(x * x) / F32(n) + eps)
    assert_same_bits(y, w * (x * scale))
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(y, w * x64 / np.sqrt(np.mean(x64**2) + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("n", SIZES)
def test_layer_norm(isa: str, n: int) -> None:
    x, w, b, eps = normal(rng(10, n), n) + F32(0.5), normal(rng(11, n), n), normal(rng(12, n), n), 1e-5
    y = op(isa, "layer_norm", x, w, b, number=eps)
    mean = lane_sum(x) / F32(n)
    d = x - mean
    scale = F32(1) / np.sqrt(lane_sum(d * d) / F32(n) + F32(eps))
    fused = (d * scale).astype(np.float64) * w + b  # the product is exact in float64
    assert_same_bits(y, fused.astype(F32))
    assert_same_bits(op(isa, "layer_norm", x, w, number=eps), (d * scale) * w)
    x64 = x.astype(np.float64)
    true = (x64 - x64.mean()) / np.sqrt(x64.var() + eps) * w + b
    np.testing.assert_allclose(y, true, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("isa", FAST)
def test_norms_have_the_bits_of_the_scalar_table(isa: str) -> None:
    r = rng(13)
    for n in [*SIZES, *r.integers(1, 300, 30)]:
        x, w, b = normal(r, n) * F32(10), normal(r, n), normal(r, n)
        assert_same_bits(op(isa, "rms_norm", x, w, number=1e-6),
                         op("scalar", "rms_norm", x, w, number=1e-6))
        assert_same_bits(op(isa, "layer_norm", x, w, b, number=1e-6),
                         op("scalar", "layer_norm", x, w, b, number=1e-6))


# ---------------------------------------------------------------------------------- rope, addition


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("half", [1, 3, 8, 16, 20, 32, 48, 64, 100])
def test_rope(isa: str, half: int) -> None:
    x, angle = normal(rng(14, half), 2 * half), rng(15, half).uniform(-9, 9, half)
    cos, sin = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
    y = op(isa, "rope", x, cos, sin)
    a, b = x[:half], x[half:]
    first = (a.astype(np.float64) * cos - (b * sin)).astype(F32)
    second = (b.astype(np.float64) * cos + (a * sin)).astype(F32)
    assert_same_bits(y, np.concatenate([first, second]))
    turned = (a + 1j * b) * np.exp(1j * angle)
    np.testing.assert_allclose(y[:half] + 1j * y[half:], turned, atol=2e-6)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("n", SIZES)
def test_add(isa: str, n: int) -> None:
    x, a = normal(rng(16, n), n), normal(rng(17, n), n)
    assert_same_bits(op(isa, "add", x, a), x + a)


# --------------------------------------------------------------------------------------- attention


def panels(k: np.ndarray) -> np.ndarray:
    """Keys (count, head_dim) as the panels of cpu_ops.h; what lies behind the last key is noise."""
    count, head_dim = k.shape
    whole = np.full(((count + 15) // 16 * 16, head_dim), 1e4, F32)
    whole[:count] = k
    return whole.reshape(-1, 16, head_dim).transpose(0, 2, 1).ravel()


def attend(isa: str, q, k, v, counts, begin, end, scale, bias=None, parts=0) -> np.ndarray:
    edges = np.cumsum([0, *counts])
    pairs = list(zip(edges[:-1], edges[1:]))
    return _core._attention_test(isa, q, np.concatenate([panels(k[a:b]) for a, b in pairs]),
                                 v.ravel(), list(counts), bias, begin, end, scale, parts)


ATTENTION_CASES = [
    # heads, head_dim, counts, begin, end
    (1, 64, [1], 0, 1),
    (4, 64, [5], 0, 5),
    (2, 32, [16, 16], 0, 32),
    (3, 64, [17, 3, 40], 0, 60),
    (3, 64, [17, 3, 40], 0, 49),
    (2, 80, [100, 1, 1], 30, 102),
    (2, 8, [33, 50], 40, 70),
    (1, 128, [300], 13, 290),
    (2, 100, [64, 64, 64], 64, 128),
    (1, 7, [20, 1, 30], 19, 22),
    (7, 72, [70, 90], 3, 151),
    (13, 40, [40, 9, 8], 0, 57),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", range(len(ATTENTION_CASES)))
def test_attention(isa: str, case: int, with_bias: bool) -> None:
    heads, head_dim, counts, begin, end = ATTENTION_CASES[case]
    r, total = rng(18, case), sum(counts)
    q, k, v = normal(r, heads, head_dim), normal(r, total, head_dim), normal(r, total, head_dim)
    bias = normal(r, heads, total) if with_bias else None
    scale = F32(head_dim**-0.5)
    y = attend(isa, q, k, v, counts, begin, end, float(scale), bias)
    score = q.astype(np.float64) @ k[begin:end].T.astype(np.float64) * scale
    if bias is not None:
        score += bias[:, begin:end]
    weights = special.softmax(score, axis=1)
    np.testing.assert_allclose(y, weights @ v[begin:end], rtol=2e-5, atol=3e-6)
    assert_same_bits(y, attend("scalar", q, k, v, counts, begin, end, float(scale), bias))
    # how the positions are cut into spans changes nothing, and neither do the other heads
    assert_same_bits(y, attend(isa, q, k, v, [total], begin, end, float(scale), bias))
    for h in range(heads):
        alone = None if bias is None else bias[h:h + 1]
        assert_same_bits(y[h:h + 1], attend(isa, q[h:h + 1], k, v, counts, begin, end,
                                            float(scale), alone))


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", [c for c, (heads, *_) in enumerate(ATTENTION_CASES) if heads <= 4])
def test_attention_in_parts(isa: str, case: int, parts: int) -> None:
    heads, head_dim, counts, begin, end = ATTENTION_CASES[case]
    r, total = rng(28, case), sum(counts)
    q, k, v = normal(r, heads, head_dim), normal(r, total, head_dim), normal(r, total, head_dim)
    bias = normal(r, heads, total)
    whole = attend(isa, q, k, v, counts, begin, end, 0.3, bias)
    assert_same_bits(whole, attend(isa, q, k, v, counts, begin, end, 0.3, bias, parts))


@pytest.mark.parametrize("isa", SETS)
def test_attention_in_the_documented_order(isa: str) -> None:
    r, head_dim, count = rng(19), 24, 37
    q, k, v = normal(r, 1, head_dim), normal(r, count, head_dim), normal(r, count, head_dim)
    fma = lambda a, b, c: F32(np.float64(a) * np.float64(b) + np.float64(c))  # noqa: E731
    score = np.empty(count, F32)
    for j in range(count):
        dot = F32(0)
        for d in range(head_dim):
            dot = fma(q[0, d], k[j, d], dot)
        score[j] = dot * F32(0.25)
    e = op("core", "exp", score - score.max())
    out = np.zeros(head_dim, F32)
    for j in range(count):
        for d in range(head_dim):
            out[d] = fma(e[j], v[j, d], out[d])
    expected = out * (F32(1) / lane_sum(e))
    assert_same_bits(attend(isa, q, k, v, [count], 0, count, 0.25)[0], expected)


@pytest.mark.parametrize("isa", SETS)
def test_attention_with_one_overwhelming_key_is_that_value(isa: str) -> None:
    r = rng(20)
    q, k, v = np.ones((1, 16), F32), normal(r, 40, 16), normal(r, 40, 16)
    k[23] = 1000.0
    np.testing.assert_array_equal(attend(isa, q, k, v, [40], 0, 40, 1.0)[0], v[23])


# ------------------------------------------------------------------------------- int8 activations


def activation(isa: str, x: np.ndarray, threshold: float):
    q, scale, outliers, n = _core._activation_test(isa, x, threshold)
    return q, F32(scale), outliers.view(np.int32)[:n]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("threshold", [6.0, 0.0, 1.0])
def test_int8_activation(isa: str, threshold: float) -> None:
    for n in SIZES:
        x = normal(rng(21, n), n) * F32(3)
        q, scale, outliers = activation(isa, x, threshold)
        above = np.abs(x) >= threshold if threshold > 0 else np.zeros(n, bool)
        np.testing.assert_array_equal(outliers, np.flatnonzero(above))
        kept = np.where(above, F32(0), x)
        absmax = np.abs(kept).max()
        assert scale == absmax / F32(127)
        expected = np.rint(kept * (F32(127) / absmax)) if absmax > 0 else np.zeros(n)
        np.testing.assert_array_equal(q[:n], expected.astype(np.int8))
        assert len(q) % 64 == 0 and not q[n:].any()


@pytest.mark.parametrize("isa", SETS)
def test_int8_activation_of_rows_without_a_scale(isa: str) -> None:
    zero = activation(isa, np.zeros(20, F32), 6.0)
    assert zero[1] == 0 and not zero[0].any() and len(zero[2]) == 0
    tiny = activation(isa, np.full(20, 1e-39, F32), 6.0)
    assert tiny[1] == 0 and not tiny[0].any()
    x = normal(rng(22), 40)
    x[[3, 20, 37]] = np.nan, np.inf, -np.inf
    q, scale, outliers = activation(isa, x, 6.0)
    assert list(outliers) == [3, 20, 37] and np.isfinite(scale) and not q[[3, 20, 37]].any()
    q, scale, outliers = activation(isa, x, 0.0)
    assert len(outliers) == 0 and np.isnan(scale) and not q.any()


@pytest.mark.parametrize("isa", FAST)
@given(x=st.lists(st.floats(width=32), min_size=1, max_size=70),
       threshold=st.sampled_from([0.0, 0.5, 6.0]))
@settings(max_examples=150, deadline=None)
def test_int8_activation_agrees_on_any_float(isa: str, x: list[float], threshold: float) -> None:
    a, b = activation(isa, np.array(x, F32), threshold), activation("scalar", np.array(x, F32), threshold)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[2], b[2])


# ---------------------------------------------------------------------------------------- refusals


def test_the_hooks_refuse_what_does_not_fit() -> None:
    x = np.zeros(4, F32)
    with pytest.raises(ValueError, match="sizes do not fit"):
        op("scalar", "add", x, np.zeros(5, F32))
    with pytest.raises(ValueError, match="unknown"):
        op("scalar", "sin", x)
    with pytest.raises(ValueError, match="not known"):
        op("sse9", "add", x, x)
