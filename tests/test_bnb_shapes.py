"""The shapes and tolerances of bitsandbytes' own tests for Linear4bit, matmul_4bit, gemv_4bit and
Linear8bitLt (tests/ of version 0.50), for our layer in their place."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="its tensors are multiplied")

from qllm import _core  # noqa: E402
from qllm.integrations.torch import Linear  # noqa: E402

torch.set_num_threads(2)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq")


def layer(weight: Any, format: str, bias: Any = None, **options: Any) -> Linear:
    """float32 inputs in exact, as a layer of float32 is expected to have them; float16 inputs too
    where auto rounds to bfloat16."""
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = torch.nn.Parameter(bias)
    rounds = _core.cpu_info()["default"] == "avx512amx"
    exact = weight.dtype == torch.float32 or rounds and weight.dtype == torch.float16
    compute = "exact" if exact else "auto"
    return Linear.from_linear(plain, format, compute=compute, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_4bit(format: str, dtype: Any) -> None:
    """(64 or 0, 64) by (96, 64): mean error to the unquantized product below 0.115, gradients
    within 0.015 + 10 %."""
    torch.manual_seed(11)
    for rows in (64, 0):
        weight = torch.nn.init.xavier_uniform_(torch.empty(96, 64)).to(dtype)
        bias = torch.randn(96).to(dtype)
        ours = layer(weight, format, bias)
        x = torch.randn(rows, 64).to(dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        found = ours(a)
        plain_bias = bias.clone().requires_grad_()
        expected = torch.nn.functional.linear(b, weight, plain_bias)
        assert found.dtype == dtype and found.shape == (rows, 96)
        if rows:
            assert (found - expected).float().abs().mean() < 0.115
        target = torch.randn(rows, 96).to(dtype)
        grad = (expected - target).detach() / max(expected.numel(), 1)
        found.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, atol=0.015, rtol=0.1)
        torch.testing.assert_close(ours.bias.grad, plain_bias.grad)


@pytest.mark.parametrize("format", ["nf4", "fp4-dq"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", [(1, 256, 128), (5, 1024, 128), (40, 8192, 128)])
def test_rows_by_matrices_of_many_shapes(
    format: str, blocksize: int, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    torch.manual_seed(m)
    weight = torch.nn.init.xavier_uniform_(torch.empty(n, k))
    x = torch.randn(m, k)
    with torch.no_grad():
        error = (layer(weight, format, blocksize=blocksize)(x) - x @ weight.T).abs().mean()
    assert error < {"nf4": 0.115, "fp4": 0.16}[format[:3]]


# mean error over sqrt(dim) to the product of the dequantized weight, and its deviation, by whether
# dim is at most 512; and how far the error to the true product may be from that of that product
BARS = {
    torch.float16: ((5.2e-5, 6.3e-6), (1.8e-5, 2.8e-6), 0.005),
    torch.float32: ((2e-8, 2e-9), (1e-8, 2e-9), 0.005),
    torch.bfloat16: ((4.2e-4, 5.9e-5), (1.4e-4, 9.5e-6), 0.05),
}


@pytest.mark.parametrize("kind", ["fc1", "fc2", "attn", "attn_packed"])
@pytest.mark.parametrize("dim", [128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemv_4bit(kind: str, dim: int, dtype: Any) -> None:
    cols, rows = {"fc1": (dim, 4 * dim), "fc2": (4 * dim, dim), "attn": (dim, dim),
                  "attn_packed": (dim, 3 * dim)}[kind]
    torch.manual_seed(dim)
    small, large, ratio_bar = BARS[dtype]
    mean, deviation = small if dim <= 512 else large
    errors, ours_to_truth, theirs_to_truth = [], [], []
    for format in FORMATS[: 2 if dim > 512 else 4]:
        weight = (torch.randn(rows, cols) / math.sqrt(dim)).to(dtype)
        x = torch.randn(1, cols).to(dtype)
        ours = layer(weight, format)
        with torch.no_grad():
            found = ours(x).float()
        dequantized = torch.nn.functional.linear(x, ours.dequantize(dtype)).float()
        truth = torch.nn.functional.linear(x.double(), weight.double()).float()
        errors.append((found - dequantized).abs().mean() / math.sqrt(dim))
        ours_to_truth.append((found - truth).abs().mean())
        theirs_to_truth.append((dequantized - truth).abs().mean())
    assert torch.stack(errors).mean() < mean + 7 * deviation
    ratio = sum(ours_to_truth) / sum(theirs_to_truth)
    assert abs(float(ratio) - 1) < ratio_bar


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dim", [64, 256, 1024, 2048])
def test_the_identity_is_kept(format: str, dim: int) -> None:
    x = torch.randn(2, dim)
    with torch.no_grad():
        found = layer(torch.eye(dim), format)(x)
    if format.endswith("-dq"):  # the second level is exact for equal scales
        assert torch.allclose(found, x, rtol=2e-2)
    else:
        torch.testing.assert_close(found, x)


@pytest.mark.parametrize("format", ["nf4-dq", "fp4-dq"])
def test_linear4bit_serialization(format: str) -> None:
    """300 -> 400, float16: equal after a round trip, and below 0.29 of the size."""
    plain = torch.nn.Linear(300, 400, dtype=torch.float16)
    ours = Linear.from_linear(plain, format)
    buffer, original = io.BytesIO(), io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    torch.save(plain.state_dict(), original)
    assert buffer.tell() < 0.29 * original.tell()
    buffer.seek(0)
    again = Linear(300, 400, format=format, dtype=torch.float16)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.rand(42, 300)
    assert torch.equal(again.weight, ours.weight) and torch.equal(again(x), ours(x))


def test_linear8bitlt() -> None:
    """3 rows by 1024 -> 3072, float16: fewer than 0.025 % off by more than 0.02, over ten layers;
    gradients within 0.01."""
    misses = 0
    for seed in range(10):
        torch.manual_seed(seed)
        plain = torch.nn.Linear(1024, 3072)
        x = torch.randn(3, 1024, dtype=torch.half)
        ours = Linear.from_linear(plain, "int8")
        plain = plain.half()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, found = plain(a).float(), ours(b).float()
        grad = torch.randn_like(expected)
        (expected * grad).mean().backward()
        (found * grad).mean().backward()
        misses += int((~torch.isclose(expected, found, atol=0.02, rtol=1e-5)).sum())
        torch.testing.assert_close(a.grad, b.grad, atol=0.01, rtol=1e-5)
    assert misses < 2.5e-4 * 10 * expected.numel()
    torch.testing.assert_close(expected, found, atol=0.03, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_of_int8(dtype: Any, threshold: float, bias: bool) -> None:
    """(64, 32) by (48, 32), every eighth column 6.0 where outliers are told apart."""
    torch.manual_seed(13)
    x = torch.randn(64, 32).to(dtype)
    if threshold:
        x[:, torch.randint(0, 32, (4,))] = 6.0
    weight = torch.nn.init.xavier_uniform_(torch.empty(48, 32)).to(dtype)
    added = torch.randn(48).to(dtype) if bias else None
    with torch.no_grad():
        found = layer(weight, "int8", added, int8_threshold=threshold)(x)
    expected = torch.nn.functional.linear(x, weight, added)
    assert found.dtype == dtype
    close = torch.isclose(found, expected, atol=0.01, rtol=0.1)
    assert (~close).sum() <= found.numel() * (0.0175 if dtype == torch.float16 else 0.021)
    close = torch.isclose(found, expected, atol=0.035, rtol=0.2)
    assert (~close).sum() <= found.numel() * 0.001


def test_linear8bitlt_serialization() -> None:
    plain = torch.nn.Linear(32, 96)
    ours = Linear.from_linear(plain, "int8")
    buffer, original = io.BytesIO(), io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    torch.save(plain.state_dict(), original)
    assert buffer.tell() < 0.5 * original.tell()
    again = Linear(32, 96, format="int8")
    again.load_state_dict(ours.state_dict())
    x = torch.randn(4, 32, dtype=torch.half)
    assert torch.equal(again(x), ours(x))
