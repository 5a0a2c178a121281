"""qllm's kernels under the operators of bitsandbytes: registered by the function of the entry
point, within the tolerances of bitsandbytes' own tests, and never a weight of yesterday."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qllm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

torch = pytest.importorskip("torch", reason="bitsandbytes works on its tensors")
bnb = pytest.importorskip("bitsandbytes", reason="its operators are what is replaced")

from qllm.integrations import bitsandbytes as backend  # noqa: E402

torch.set_num_threads(2)
ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cpu_kernels() -> dict[str, bool]:
    """Whether each operator has a kernel of its own for the CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: has(f"bitsandbytes::{name}", "CPU") for name in backend._KERNELS}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without our kernels, which `register` would put in place."""
    monkeypatch.delenv("QLLM_BNB_BACKEND", raising=False)
    backend.unregister()
    yield
    backend.unregister()


@pytest.fixture
def ours(theirs: None) -> None:
    backend.register()


def quantized(rows: int, cols: int, quant_type: str, nested: bool, **options: Any) -> Any:
    weight = torch.randn(rows, cols, **options)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested)
    return weight, packed, state


def values(packed: Any, state: Any) -> Any:
    """Table value times absmax, float32: what the weight is, whatever dequantizes it."""
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[
            : absmax.numel()] + state.offset
    flat = packed.reshape(-1).view(torch.uint8).long()
    codes = torch.stack((flat >> 4, flat & 15), 1).reshape(-1)[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).reshape(state.shape)


# ---------------------------------------------------------------------------------- registration


def test_the_entry_point_names_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["bitsandbytes.backends"] == {
        "qllm": "qllm.integrations.bitsandbytes:register"}
    assert "bitsandbytes" not in " ".join(project["dependencies"])


def test_kernels_are_registered_once_and_not_when_told_so(
    theirs: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    before = cpu_kernels()
    monkeypatch.setenv("QLLM_BNB_BACKEND", "0")
    backend.register()
    assert cpu_kernels() == before and not before["gemm_4bit"]
    monkeypatch.setenv("QLLM_BNB_BACKEND", "no")
    with pytest.raises(qllm.QllmValueError, match="QLLM_BNB_BACKEND is 'no'; 0 or 1"):
        backend.register()
    monkeypatch.setenv("QLLM_BNB_BACKEND", "1")
    backend.register()
    backend.register()
    assert all(cpu_kernels().values()) and not recwarn.list
    backend.unregister()
    assert cpu_kernels() == before


def test_other_operators_than_those_known_are_left_alone(
    theirs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, schema = backend._KERNELS["gemm_4bit"]
    monkeypatch.setitem(backend._KERNELS, "gemm_4bit", (kernel, schema + "x"))
    with pytest.warns(RuntimeWarning, match="its operator gemm_4bit takes other arguments"):
        backend.register()
    monkeypatch.setitem(backend._KERNELS, "gemm_4bit", (kernel, schema))
    monkeypatch.setitem(backend._KERNELS, "gemm_3bit", (kernel, schema))
    with pytest.warns(RuntimeWarning, match="it has no operator gemm_3bit; QLLM_BNB_BACKEND=0"):
        backend.register()
    monkeypatch.delitem(backend._KERNELS, "gemm_3bit")
    assert not cpu_kernels()["gemm_4bit"]


def test_importing_bitsandbytes_loads_the_kernels(tmp_path: Path) -> None:
    """As pip would have it: a distribution with the entry point on the path, nothing else done."""
    info = tmp_path / "qllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qllm\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[bitsandbytes.backends]\nqllm = qllm.integrations.bitsandbytes:register\n")
    code = ("import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
            "import bitsandbytes, torch\n"
            "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
            "print(has('bitsandbytes::gemm_4bit', 'CPU'))")
    package = str(Path(qllm.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    environment.pop("QLLM_BNB_BACKEND", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         timeout=120, env=environment)
    assert run.stdout.strip() == "True", run.stderr


# -------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_4bit_weights(
    ours: None, quant_type: str, nested: bool, dtype: Any
) -> None:
    """Against float64 products of table values, also for widths that are no multiple of 64."""
    torch.manual_seed(5)
    for rows, cols, shape in ((96, 64, (64,)), (48, 128, (2, 3)), (33, 72, (1,)), (96, 64, (0,))):
        _, packed, state = quantized(rows, cols, quant_type, nested)
        a, bias = torch.randn(*shape, cols).to(dtype), torch.randn(rows).to(dtype)
        before = len(backend.weights)
        found = bnb.matmul_4bit(a, packed, state, bias=bias)
        assert found.dtype == dtype and found.shape == (*shape, rows)
        assert len(backend.weights) == before + (a.numel() > 0)
        if a.numel():
            expected = torch.nn.functional.linear(
                a.double(), values(packed, state).double(), bias.double())
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        if shape == (1,) and not nested:
            again = bnb.functional.gemv_4bit(a, packed, state=state)
            assert torch.equal(again, bnb.matmul_4bit(a, packed, state))


def test_many_rows_of_bfloat16_where_torch_is_faster(
    ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed, state = quantized(96, 64, "nf4", False)
    a = torch.randn(backend._MANY_ROWS, 64).bfloat16()
    found = []
    for amx in (True, False):
        monkeypatch.setattr(backend, "_has_amx", amx)
        found.append(bnb.matmul_4bit(a, packed, state).float())
    assert (found[0] - found[1]).abs().max() < 0.02 * found[1].abs().max()


def test_layers_of_bitsandbytes_in_use(theirs: None) -> None:
    """Linear4bit and Linear8bitLt, training and not, before and after: within what their tests
    allow. Evaluation repacks 4-bit weights on processors with bf16 instructions."""
    torch.manual_seed(6)
    source = torch.nn.Linear(128, 96).bfloat16()
    four = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compute_dtype=torch.bfloat16)
    four.weight = bnb.nn.Params4bit(source.weight.data.clone(), requires_grad=False,
                                    quant_type="nf4", module=four)
    eight = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=6.0)
    eight.weight = bnb.nn.Int8Params(
        source.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    x = torch.randn(5, 128).bfloat16()
    x[1, 7], x[3, 100] = 20.0, -9.0
    for layer in (four, eight):
        layer.bias = source.bias
        layer.to("cpu")
    results, grads = [], []
    for on in (False, True):
        if on:
            backend.register()
        for layer, training in ((four, True), (four, False), (eight, False)):
            layer = copy.deepcopy(layer).train(training)
            leaf = x.clone().requires_grad_(training)
            out = layer(leaf)
            results.append(out.detach().float())
            if training:
                out.sum().backward()
                grads.append(leaf.grad)
    expected = torch.nn.functional.linear(x, source.weight, source.bias).float()
    for before, after in zip(results[:3], results[3:]):
        assert (before - after).abs().max() <= 0.02 * before.abs().max()
        assert (after - expected).abs().mean() < 0.115 * expected.abs().max()
    assert torch.allclose(grads[0].float(), grads[1].float(), atol=0.01, rtol=1e-2)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_rounding_of_int8_rows(theirs: None, threshold: float, dtype: Any, rows: int) -> None:
    torch.manual_seed(rows)
    x = (3 * torch.randn(rows, 70)).to(dtype)
    x[0, 3] = 7.5
    expected = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
    backend.register()
    found = torch.ops.bitsandbytes.int8_vectorwise_quant(x, threshold)
    # torch divides by multiplying with the reciprocal, so a code halfway may go either way
    assert (found[0].int() - expected[0].int()).abs().max() <= 1
    assert (found[0] != expected[0]).float().mean() < 0.01
    assert torch.equal(found[1], expected[1])
    assert (found[2] is None) == (expected[2] is None) == (threshold == 0)
    assert threshold == 0 or torch.equal(found[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_int8_rows(theirs: None, dtype: Any) -> None:
    torch.manual_seed(8)
    weight, bias = torch.randn(48, 72), torch.randn(48).to(dtype)
    codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half())
    x = torch.randn(7, 72).to(dtype)
    x[2, 5], x[6, 6] = 11.0, -8.0
    q, absmax, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(x.half(), 6.0)
    calls = (
        lambda: torch.ops.bitsandbytes.int8_scaled_mm(q, codes, absmax, scales, bias, dtype),
        lambda: torch.ops.bitsandbytes.int8_scaled_mm(q, codes, absmax, scales),
        lambda: torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, q, codes, absmax, scales, outliers, bias),
        lambda: torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, q, codes, absmax, scales, torch.empty(0, dtype=torch.int64), None),
    )
    expected = [call() for call in calls]
    backend.register()
    for call, want in zip(calls, expected):
        found = call()
        if isinstance(found, tuple):
            assert torch.equal(found[1], want[1])
            found, want = found[0], want[0]
        assert found.dtype == want.dtype
        # their scale is 1.8e-5 too large, and they round outliers' products to dtype
        bar = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[want.dtype]
        assert (found.float() - want.float()).abs().max() < bar * want.float().abs().max()


def test_compiled_users_of_bitsandbytes(ours: None) -> None:
    """Fake kernels stay those of bitsandbytes, so that graphs are traced as before."""
    _, packed, state = quantized(96, 64, "nf4", True)
    torch.library.opcheck(
        torch.ops.bitsandbytes.gemm_4bit.default,
        (torch.randn(3, 64), packed, list(state.shape), state.state2.absmax, 64, "nf4", None,
         state.absmax, state.state2.code, state.offset), test_utils=("test_schema",
                                                                      "test_faketensor"))
    compiled = torch.compile(
        lambda a: bnb.matmul_4bit(a, packed, state), fullgraph=True, backend="aot_eager")
    a = torch.randn(3, 64)
    assert torch.equal(compiled(a), bnb.matmul_4bit(a, packed, state))


# ------------------------------------------------------------------------------- no weight is stale


def test_packed_forms_follow_their_weights(ours: None) -> None:
    """Changed in place, by .data, by another tensor in its place, freed: each is noticed."""
    _, packed, state = quantized(96, 64, "nf4", False)
    other = quantized(96, 64, "nf4", False)
    a = torch.randn(2, 64)

    def product() -> Any:
        return bnb.matmul_4bit(a, packed, state)

    def reference() -> Any:
        return a @ values(packed, state).T

    held = len(backend.weights)
    steps = (
        lambda: None,
        lambda: packed.copy_(other[1]),
        lambda: state.absmax.mul_(2),
        lambda: packed.data.copy_(packed.data.flip(0)),
        lambda: state.absmax.data.add_(1.0),
        lambda: setattr(state, "absmax", state.absmax + 1),
    )
    for step in steps:
        with torch.no_grad():
            step()
        assert torch.allclose(product(), reference(), rtol=1e-4, atol=1e-4)
        count = len(backend.weights)
        product()
        assert len(backend.weights) == count
    del packed, state, other
    gc.collect()
    assert len(backend.weights) == held


def test_weights_made_in_inference_mode_are_followed_too(ours: None) -> None:
    with torch.inference_mode():
        _, packed, state = quantized(96, 64, "fp4", True)
        a = torch.randn(2, 64)
        for _ in range(2):
            found = bnb.matmul_4bit(a, packed, state)
            assert torch.allclose(found, a @ values(packed, state).T, rtol=1e-4, atol=1e-4)
            packed.copy_(packed.flip(0).clone())
