"""One linear layer in other libraries: torch, bitsandbytes, onnxruntime, ggml.

Every maker takes W (n, k), x (m, k), how many copies of W to go through, and threads, and returns
a call that multiplies x by all copies, the bytes of one copy, and a function that gives the product
with the last copy as float32 (m, n), so that a test can see that it is one. A maker whose library
is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Peer(NamedTuple):
    """A layer that is ready to be timed."""

    call: Callable[[], Any]
    nbytes: int
    result: Callable[[], np.ndarray]


Maker = Callable[[np.ndarray, np.ndarray, int, int], Peer]


def _torch_layers(make: Callable[[Any], Callable[[Any], Any]], dtype: str, nbytes: int,
                  x: np.ndarray, count: int, threads: int) -> Peer:
    """`make` is called `count` times; each of its layers maps x of `dtype` to y."""
    import torch

    torch.set_num_threads(threads)
    layers = [make(torch) for _ in range(count)]
    given = torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))
    last: list[Any] = []

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            y = layer(given)
        last[:] = [y]

    call()
    return Peer(call, nbytes, lambda: last[0].float().numpy())


def torch_plain(dtype: str) -> Maker:
    """torch.nn.Linear in one of torch's dtypes."""

    def make(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
        n, k = weight.shape

        def layer(torch: Any) -> Any:
            result = torch.nn.Linear(k, n, bias=False, dtype=getattr(torch, dtype))
            result.weight.data = torch.from_numpy(weight).to(getattr(torch, dtype)).clone()
            return result.eval()

        width = 4 if dtype == "float32" else 2
        return _torch_layers(layer, dtype, width * n * k, x, count, threads)

    return make


def torch_int4pack(group: int) -> Maker:
    """torch's weight-only int4 product: asymmetric codes, bf16 scale and zero per group."""

    def make(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
        n, k = weight.shape
        codes, scale, low = affine_codes(weight, group)
        middle = low + 8 * scale  # the product uses (code - 8) * scale + zero

        def layer(torch: Any) -> Any:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                torch.from_numpy(codes.astype(np.int32)), 2)
            pairs = torch.from_numpy(np.stack([scale.T, middle.T], axis=-1)).to(torch.bfloat16)
            pairs = pairs.contiguous()
            return lambda given: torch.ops.aten._weight_int4pack_mm_for_cpu(given, packed, group,
                                                                            pairs)

        return _torch_layers(layer, "bfloat16", n * k // 2 + n * k // group * 4, x, count, threads)

    return make


def affine_codes(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes 0 to 15 (n, k) uint8, and scale and lowest value of each group (n, k / group): weight
    is about code * scale + low."""
    n, k = weight.shape
    groups = weight.reshape(n, k // group, group)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / 15, 1e-12).astype(np.float32)
    codes = np.rint((groups - low[..., None]) / scale[..., None]).clip(0, 15)
    return codes.reshape(n, k).astype(np.uint8), scale, low


def bitsandbytes_4bit(kind: str) -> Maker:
    """bitsandbytes' Linear4bit with bf16 activations, which takes its fastest way on the CPU."""

    def make(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
        import bitsandbytes as bnb

        n, k = weight.shape

        def layer(torch: Any) -> Any:
            result = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16,
                                       compress_statistics=False, quant_type=kind)
            values = torch.from_numpy(weight).to(torch.bfloat16).clone()
            result.weight = bnb.nn.Params4bit(values, requires_grad=False,
                                              compress_statistics=False, quant_type=kind)
            return result.to("cpu").eval()

        return _torch_layers(layer, "bfloat16", n * k * 9 // 16, x, count, threads)

    return make


def bitsandbytes_int8(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
    """bitsandbytes' Linear8bitLt with its usual threshold of outliers."""
    import bitsandbytes as bnb

    n, k = weight.shape

    def layer(torch: Any) -> Any:
        result = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        result.load_state_dict({"weight": torch.from_numpy(weight).half()})
        return result.to("cpu").eval()

    return _torch_layers(layer, "float16", n * k + 4 * n, x, count, threads)


def another(values: np.ndarray, i: int) -> np.ndarray:
    """A copy that differs from all others in a bit, copy 0 from `values` in none: onnxruntime keeps
    equal weights once, and would read them from the cache."""
    copy = values.copy()
    if i > 0:
        copy.reshape(-1).view(np.uint8)[i] ^= 1
    return copy


def _onnx(node: Callable[[int], Any], tensors: dict[str, np.ndarray], nbytes: int,
          weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
    """A model of `count` nodes; node(i) uses the tensors under the names name_i, `another` of
    each."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    onnxruntime.set_default_logger_severity(3)  # errors
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    nodes = [node(i) for i in range(count)]
    initializers = [numpy_helper.from_array(another(values, i), f"{name}_{i}")
                    for i in range(count) for name, values in tensors.items()]
    outputs = [helper.make_tensor_value_info(f"Y_{i}", TensorProto.FLOAT, [len(x), len(weight)])
               for i in range(count)]
    inputs = [helper.make_tensor_value_info("A", TensorProto.FLOAT, list(x.shape))]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=9, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    given = {"A": np.ascontiguousarray(x, np.float32)}
    last: list[Any] = []

    def call() -> None:
        last[:] = session.run(None, given)

    call()
    return Peer(call, nbytes, lambda: last[0])


def onnx_nbits(block: int) -> Maker:
    """onnxruntime's MatMulNBits: symmetric 4-bit codes, a float32 scale per block, int8
    activations (accuracy level 4)."""

    def make(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
        from onnx import helper

        n, k = weight.shape
        groups = weight.reshape(n, k // block, block)
        scale = (np.abs(groups).max(-1) / 7.5).astype(np.float32)
        codes = (np.rint(groups / scale[..., None]) + 8).clip(0, 15).astype(np.uint8)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4

        def node(i: int) -> Any:
            return helper.make_node("MatMulNBits", ["A", f"B_{i}", f"S_{i}"], [f"Y_{i}"], K=k, N=n,
                                    bits=4, block_size=block, accuracy_level=4,
                                    domain="com.microsoft")

        return _onnx(node, {"B": packed, "S": scale.reshape(-1)}, n * k // 2 + 4 * scale.size,
                     weight, x, count, threads)

    return make


def onnx_bnb4(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
    """onnxruntime's MatMulBnb4 on nf4, whose bytes are ours."""
    from onnx import helper

    import qllm

    n, k = weight.shape
    quantized = qllm.quantize(weight, "nf4")
    assert quantized.absmax is not None

    def node(i: int) -> Any:
        return helper.make_node("MatMulBnb4", ["A", f"B_{i}", f"S_{i}"], [f"Y_{i}"], K=k, N=n,
                                block_size=64, quant_type=1, domain="com.microsoft")

    return _onnx(node, {"B": quantized.packed, "S": quantized.absmax}, quantized.nbytes, weight, x,
                 count, threads)


def ggml(kind: str) -> Maker:
    """One of ggml's types, where llama.cpp would put it."""

    def make(weight: np.ndarray, x: np.ndarray, count: int, threads: int) -> Peer:
        import ggml_layer

        layer = ggml_layer.Layer(weight, x, kind, count, threads)
        layer.run()
        return Peer(layer.run, layer.nbytes, lambda: layer.result(count - 1))

    return make


# name -> the packages it needs, bits per weight about (to know how many copies fill memory), maker
PEERS: dict[str, tuple[tuple[str, ...], float, Maker]] = {
    "torch bf16": (("torch",), 16, torch_plain("bfloat16")),
    "torch f32": (("torch",), 32, torch_plain("float32")),
    "torch int4pack": (("torch",), 4.5, torch_int4pack(64)),
    "bitsandbytes nf4": (("bitsandbytes",), 4.5, bitsandbytes_4bit("nf4")),
    "bitsandbytes fp4": (("bitsandbytes",), 4.5, bitsandbytes_4bit("fp4")),
    "bitsandbytes int8": (("bitsandbytes",), 8, bitsandbytes_int8),
    "onnxruntime MatMulNBits 32": (("onnxruntime", "onnx"), 5, onnx_nbits(32)),
    "onnxruntime MatMulNBits 64": (("onnxruntime", "onnx"), 4.5, onnx_nbits(64)),
    "onnxruntime MatMulBnb4": (("onnxruntime", "onnx"), 4.5, onnx_bnb4),
    **{f"ggml {kind}": (("llama-cpp-python",), bits, ggml(kind))
       for kind, bits in (("Q4_0", 4.5), ("Q4_K", 4.5), ("IQ4_NL", 4.5), ("Q8_0", 8.5),
                          ("BF16", 16))},
}
