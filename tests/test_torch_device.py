"""qllm.integrations.torch.Linear on a GPU: by the emulation, with tensors of the CPU in the place
of the GPU's, or with QLLM_TEST_CUDA=1 on a real one."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import emulated
import numpy as np
import pytest

import qllm
from qllm import _core

torch = pytest.importorskip("torch", reason="its modules are what is tested")

from qllm.integrations import torch_device, torch_ops  # noqa: E402
from qllm.integrations.torch import Linear, quantize_  # noqa: E402

FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLACE = "cuda" if emulated.ON_A_GPU else "cpu"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.skipif(
    emulated.ON_A_GPU and not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors go to be multiplied on a device: the functions for GPUs under the operators."""
    if emulated.ON_A_GPU:
        yield PLACE
        return
    monkeypatch.setitem(torch_device.NAMES, "cpu", emulated.name())
    monkeypatch.setenv("QLLM_EMULATE_HOST_MEMORY", "1")
    monkeypatch.setattr(torch_ops, "multiply", torch_ops.multiply_on_device)
    monkeypatch.setattr(torch_ops, "dequantize", _dequantize)
    library: Any = torch.library.Library("qllm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        for name, function in (("linear", torch_ops.multiply_on_device),
                               ("product", torch_ops._product_on_device)):
            library.impl(name, function, "CPU", allow_override=True)
    yield PLACE
    library._destroy()
    torch_device._weights.clear()


_on_cpu = torch_ops.dequantize


def _dequantize(weight: Any, first: int, count: int, dtype: Any = torch.float32) -> Any:
    found = torch_device.dequantize(weight, first, count)
    return _on_cpu(weight, first, count, dtype) if found is None else found.to(dtype)


def source(cols: int = 64, rows: int = 48, bias: bool = True, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(cols * rows)
    return torch.nn.Linear(cols, rows, bias=bias).to(dtype)


def made(format: str = "nf4", compute: str = "exact", **options: Any) -> Linear:
    return Linear.from_linear(source(), format, compute=compute, **options)


def random(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def held() -> int:
    return len(torch_device._weights)


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_has_the_bits_of_the_processor(format: str, dtype: Any, device: str) -> None:
    """And of what `QuantizedTensor.matmul` gives, rounded once, by the module and the operator."""
    layer = Linear.from_linear(source(96, 40, dtype=dtype), format, compute="exact",
                               int8_threshold=2.0)
    weight, bias = layer.quantized(), layer.bias.detach().float().numpy()
    layer.to(device)
    for shape in ((96,), (1, 96), (2, 3, 96), (0, 96)):
        x = random(*shape, dtype=dtype)
        expected = torch.from_numpy(weight.matmul(
            x.float().reshape(-1, 96).numpy(), bias, int8_threshold=2.0, compute="exact")
        ).to(dtype).reshape(*shape[:-1], 40)
        with torch.no_grad():
            found = layer(x.to(device))
            again = torch.ops.qllm.linear(x.to(device), layer.weight, layer.bias, 40, "exact", 2.0)
        assert found.dtype == dtype and found.device.type == device
        assert torch.equal(found.cpu(), expected) and torch.equal(again.cpu(), expected)
    assert layer.kernel == f"{format} {emulated.name()}, exact" or device == "cpu"


@pytest.mark.parametrize("format", FORMATS)
def test_auto_is_near_and_its_rows_are_their_own(format: str, device: str) -> None:
    layer, exact = made(format, "auto").to(device), made(format).to(device)
    for dtype in DTYPES:
        x = random(70, 64, dtype=dtype).to(device)
        with torch.no_grad():
            y, near = layer(x), exact(x)
            error = (y - near).float().abs().max() / near.float().abs().max()
            assert error < 2**-6, error
            for rows in (slice(0, 1), slice(2, 9), slice(69, 70)):
                assert torch.equal(layer(x[rows]), y[rows])


def test_what_torch_gives_to_a_linear_layer_is_taken(device: str) -> None:
    layer = made().to(device)
    x = random(6, 128).to(device)
    with torch.no_grad():
        plain = layer(x[:, :64].contiguous())
        assert torch.equal(layer(x[:, :64]), plain)
        assert torch.equal(layer(x[:, :64].T.contiguous().T), plain)
        assert torch.equal(layer(x[::2, :64]), plain[::2])
        flat = torch.cat([x.new_zeros(1), x[:, :64].reshape(-1)])
        assert torch.equal(layer(flat[1:].view(6, 64)), plain)  # at an odd address
        with torch.inference_mode():
            assert torch.equal(layer(x[:, :64]), plain)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(layer(x[:, :64]), layer(x[:, :64].bfloat16()))
        expected = torch.stack([layer(row) for row in x[:, :64]])
        assert torch.equal(torch.vmap(layer)(x[:, :64]), expected)
        without = Linear.from_linear(source(bias=False), compute="exact").to(device)
        assert torch.allclose(without(x[:, :64]) + layer.bias, plain, atol=1e-6)


def test_wrong_inputs_end_in_one_sentence(device: str) -> None:
    layer = made().to(device)
    for x, words in (
        (random(2, 63), "x: the last dimension is 63, but the weight of shape .48, 64. takes"),
        (random(2, 64).double(), "x is torch.float64; torch.float32"),
        (torch.ones(2, 64, dtype=torch.int64), "x is torch.int64"),
        (torch.tensor(1.0), "x has no dimension"),
    ):
        with pytest.raises(qllm.QllmValueError, match=words):
            layer(x.to(device))
    with pytest.raises(qllm.QllmUnsupportedError, match="compute is 'int8', which device"):
        made(compute="int8").to(device)(random(2, 64).to(device))
    layer.bias = torch.nn.Parameter(torch.zeros(47).to(device), requires_grad=False)
    with pytest.raises(qllm.QllmValueError, match=r"bias has the shape \[47\]"):
        layer(random(2, 64).to(device))
    layer.bias = None
    layer.weight = torch.nn.Parameter(random(48, 64).to(device), requires_grad=False)
    with pytest.raises(qllm.QllmValueError, match="image.*uint8|something else was put"):
        layer(random(2, 64).to(device))


def test_tensors_on_several_devices() -> None:
    layer = made()
    with pytest.raises(qllm.QllmValueError,
                       match="x, weight and bias are on cpu and meta; move them to one device"):
        torch_ops.multiply_on_device(
            random(2, 64), layer.weight.to("meta"), layer.bias, 48, "auto", 6.0)
    with pytest.raises(qllm.QllmValueError, match="are on cpu and meta"):
        torch_ops._product_on_device(random(2, 48), layer.weight.to("meta"), 64, False)


@pytest.mark.skipif(torch.cuda.is_available() or emulated.ON_A_GPU, reason="there is a CUDA device")
def test_without_a_gpu_a_sentence_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_device.NAMES, "cpu", "cuda")
    layer = made()
    for _ in range(2):
        with pytest.raises(qllm.QllmUnsupportedError,
                           match="no kernels for it, there is no .*_cuda.so|no GPU can be used"):
            torch_ops.multiply_on_device(
                random(2, 64), layer.weight, layer.bias, 48, "exact", 6.0)
    torch_device._weights.clear()


def test_fake_tensors_of_a_gpu_go_through_the_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(3, 64, device="cuda"), torch.empty(5, device="cuda")
        y = torch.ops.qllm.linear(x.half(), weight, None, 48, "auto", 6.0)
        assert y.shape == (3, 48) and y.dtype == torch.float16 and y.device.type == "cuda"
        assert torch.ops.qllm.product(y, weight, 64, False).shape == (3, 64)
    registered = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    assert registered("qllm::linear", "CUDA") and registered("qllm::product", "CUDA")


# ------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_the_dequantized_weight(
    format: str, compute: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 16 rows, which the device dequantizes."""
    monkeypatch.setattr(torch_ops, "_BLOCK_VALUES", 1)
    layer = made(format, compute)
    weight = layer.dequantize().double()
    layer.to(device)
    x = random(2, 5, 64).to(device).requires_grad_()
    g = random(2, 5, 48, seed=1)
    layer(x).backward(g.to(device))
    expected = g.double() @ weight
    assert x.grad is not None and layer.bias is not None and layer.bias.grad is not None
    assert (x.grad.cpu().double() - expected).abs().max() / expected.abs().max() < 1e-6
    assert torch.allclose(layer.bias.grad.cpu(), g.sum((0, 1)), atol=1e-5)
    assert layer.weight.grad is None
    for dtype in DTYPES:
        assert torch.equal(layer.dequantize(dtype).cpu(), weight.to(dtype))
    half = random(3, 64, dtype=torch.bfloat16).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(layer(half).sum(), half)
    expected = weight.sum(0).expand(3, -1)
    assert grad.dtype == torch.bfloat16
    assert (grad.cpu().double() - expected).abs().max() / expected.abs().max() < 2**-8
    assert layer.to_linear().weight.device.type == device


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_opcheck(format: str, device: str) -> None:
    layer = made(format).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = random(3, 64, dtype=dtype).to(device).requires_grad_()
        torch.library.opcheck(
            torch.ops.qllm.linear.default,
            (x, layer.weight, torch.nn.Parameter(layer.bias.detach().to(dtype)), 48, "exact", 6.0))
    a = random(3, 48).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.qllm.product.default, (a, layer.weight, 64, False),
                          rtol=1e-4, atol=1e-4)


def test_a_compiled_module_has_the_same_bits(device: str) -> None:
    block = torch.nn.Sequential(made("nf4", "auto"), Linear.from_linear(source(48, 64), "int8"))
    block.to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = random(3, 64).to(device)
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))


# ------------------------------------------------------------------- what is kept beside a weight


def test_a_weight_is_copied_once_and_forgotten_with_its_memory(device: str) -> None:
    gc.collect()
    before = held()
    layer = Linear.from_linear(source(bias=False), "nf4-dq").to(device)
    x = random(2, 64).to(device)
    with torch.no_grad():
        layer(x)
        (kept,) = [f for f in torch_device._weights._held.values()][before:]
        first = kept[1]["auto", 6.0]
        layer(x)
        torch.ops.qllm.linear(x, layer.weight, None, 48, "auto", 6.0)
        assert kept[1] == {("auto", 6.0): first} and held() == before + 1
        y = layer(x)
        layer.reset_parameters()  # another weight
        assert not torch.equal(layer(x), y)
        changed = layer(x)
        layer.weight.copy_(made("nf4-dq").weight)  # in place
        assert torch.equal(layer(x), y) and not torch.equal(layer(x), changed)
        layer.compute = "exact"
        assert not torch.equal(layer(x), y)
    del layer, kept, first
    gc.collect()
    assert held() == before


def test_a_backward_before_any_product_takes_no_memory_of_the_device(device: str) -> None:
    layer = made().to(device)
    before = layer.dequantize()
    assert not any(forms for _, forms, _ in torch_device._weights._held.values())
    grad = torch.ops.qllm.product(torch.eye(48).to(device), layer.weight, 64, False)
    assert torch.allclose(grad, before, atol=1e-7)


@emulated.without_a_gpu
def test_memory_that_does_not_suffice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own cache is emptied first, and then the second answer counts."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    layer, x = made().to(device), random(2, 64).to(device)
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", "1000")
    with pytest.raises(qllm.QllmMemoryError, match="a weight: needs 1536 bytes of memory on"):
        layer(x)
    assert emptied == [True]
    monkeypatch.delenv("QLLM_EMULATE_MEMORY")
    monkeypatch.setattr(torch.cuda, "empty_cache",
                        lambda: monkeypatch.delenv("QLLM_EMULATE_MEMORY"))
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", "1000")
    assert torch.isfinite(layer(x)).all()


def test_threads_may_share_a_layer(device: str) -> None:
    layer, x = made("int8", "auto").to(device), random(16, 64).to(device)
    with torch.no_grad():
        expected = layer(x)
    wrong = []

    def work(row: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(layer(x[row]), expected[row]):
                    wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --------------------------------------------------------------------------------- keeping a layer


@pytest.mark.parametrize("format", FORMATS)
def test_layers_move_are_copied_and_kept(format: str, device: str) -> None:
    layer = made(format)
    state, x = layer.state_dict(), random(2, 64)
    expected = qllm_bits(layer, x)
    moved = copy.deepcopy(layer).to(device)
    with torch.no_grad():
        for other in (moved, copy.deepcopy(moved), pickle.loads(pickle.dumps(moved)),
                      copy.deepcopy(moved).cpu().to(device)):
            assert other.weight.device.type == device
            assert torch.equal(other(x.to(device)).cpu(), expected)
        found = moved.state_dict()
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].device.type == device and torch.equal(found[name].cpu(), tensor)
        fresh = Linear(64, 48, format=format, compute="exact").to(device)
        fresh(x.to(device))
        fresh.load_state_dict(state)
        assert fresh.weight.device.type == device
        assert torch.equal(fresh(x.to(device)).cpu(), expected)
    assert moved.cpu().weight.is_cpu and torch.equal(moved.weight, layer.weight)


def qllm_bits(layer: Linear, x: Any) -> Any:
    bias = layer.bias.detach().numpy()
    return torch.from_numpy(np.array(layer.quantized().matmul(x.numpy(), bias, compute="exact")))


def test_a_module_on_the_device_is_quantized_there(device: str) -> None:
    model = torch.nn.Sequential(source(64, 48), torch.nn.ReLU(), source(48, 64)).to(device)
    report = quantize_(model, "nf4", compute="exact")
    assert all(row.changed for row in report)
    assert all(p.device.type == device for p in model.parameters())
    expected = torch.nn.Sequential(
        Linear.from_linear(source(64, 48), compute="exact"), torch.nn.ReLU(),
        Linear.from_linear(source(48, 64), compute="exact"))
    x = random(3, 64)
    with torch.no_grad():
        y = qllm_bits(expected[2], qllm_bits(expected[0], x).relu())
        assert torch.equal(model(x.to(device)).cpu(), y)


# ------------------------------------------------------------------------- what only a GPU has


@on_a_gpu
def test_a_cuda_graph_replays_a_layer() -> None:
    layer, x = made("nf4", "auto").cuda(), random(4, 64).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with pytest.raises(qllm.QllmUnsupportedError, match="call the layer once before"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)
        expected = layer(x + 1)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
        x += 1
        graph.replay()
        assert torch.equal(y, expected)


@on_a_gpu
def test_a_layer_runs_on_the_current_stream_and_leaves_the_device() -> None:
    last = torch.cuda.device_count() - 1
    layer, x = made("int8", "auto").to(f"cuda:{last}"), random(600, 64).to(f"cuda:{last}")
    with torch.no_grad(), torch.cuda.device(0):
        expected = layer(x)
        with torch.cuda.device(last):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = [layer(x * 1) for _ in range(20)]
            torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(y, expected) for y in found)
        assert torch.cuda.current_device() == 0
        del layer
        assert torch.cuda.current_device() == 0
