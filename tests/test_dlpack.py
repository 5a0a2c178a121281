"""Arrays of other libraries go in by `__array__` and DLPack without a copy, and quantized tensors go
out as arrays."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import _core


class OnlyDlpack:
    """An array that offers nothing but DLPack, with or without the words of version 1."""

    def __init__(self, array: np.ndarray, versioned: bool = True) -> None:
        self.array, self.versioned, self.asked = array, versioned, []

    def __dlpack__(self, **words: Any) -> Any:
        self.asked.append(words)
        if not self.versioned and words:
            raise TypeError("__dlpack__() takes no keyword arguments")
        return self.array.__dlpack__(**words)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((24, 128)).astype(np.float32)


def same(a: qllm.QuantizedTensor, b: qllm.QuantizedTensor) -> None:
    np.testing.assert_array_equal(a.packed, b.packed)
    np.testing.assert_array_equal(a.absmax, b.absmax)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_both_versions_of_the_protocol(dtype: Any, versioned: bool) -> None:
    w = weights().astype(dtype)
    given = OnlyDlpack(w, versioned)
    same(qllm.quantize(given, "nf4"), qllm.quantize(w, "nf4"))
    assert given.asked == ([{"max_version": (1, 0)}] if versioned else [{"max_version": (1, 0)}, {}])


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[::-1, ::2],
        lambda w: w[3:7, 5:100],
        lambda w: np.broadcast_to(w[0], (5, 128)),
        lambda w: w[:, :1],
        lambda w: w[4],
    ],
)
def test_any_strides(view: Any) -> None:
    w = view(weights())
    same(qllm.quantize(OnlyDlpack(w), "nf4", 32), qllm.quantize(w, "nf4", 32))


def test_memory_that_may_not_be_written() -> None:
    w = weights()
    w.setflags(write=False)
    same(qllm.quantize(OnlyDlpack(w), "nf4"), qllm.quantize(weights(), "nf4"))


def test_the_memory_is_given_back() -> None:
    class Array(np.ndarray):
        pass

    w = weights().view(Array)
    gone = weakref.ref(w)
    given = OnlyDlpack(w)
    del w
    qllm.quantize(given, "nf4")
    with pytest.raises(qllm.QllmValueError):
        qllm.quantize(given, "nf4").matmul(OnlyDlpack(np.zeros((1, 3), np.int8)))
    del given
    gc.collect()
    assert gone() is None


def test_activations_ids_and_vectors() -> None:
    q = qllm.quantize(weights(), "nf4")
    x = weights(1)[:3]
    np.testing.assert_array_equal(q.matmul(OnlyDlpack(x)), q.matmul(x))
    logits = weights(2)[:1]
    for kind in (np.uint8, np.int16, np.int32, np.int64):
        ids = np.array([5], kind)
        assert _core.logprobs(logits, OnlyDlpack(ids)) == _core.logprobs(logits, ids)
    with pytest.raises(qllm.QllmValueError, match="x: expected dtype float32, found .*float64"):
        q.matmul(OnlyDlpack(x.astype(np.float64)))
    with pytest.raises(qllm.QllmValueError, match="x: expected dtype float32, found .*bool"):
        q.matmul(OnlyDlpack(x > 0))
    with pytest.raises(qllm.QllmValueError, match="x: DLPack's element type 5 of 64 bits has no"):
        q.matmul(OnlyDlpack(x.astype(np.complex64)))


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]


class Producer:
    """Hands out what was put into it, field by field."""

    def __init__(self, values: np.ndarray, shape: list[int], major: int = 1, **fields: Any) -> None:
        self.values, self.shape = values, (ctypes.c_int64 * max(len(shape), 1))(*shape)
        tensor = {"data": values.ctypes.data, "device_type": 1, "ndim": len(shape), "code": 2,
                  "bits": 32, "lanes": 1, "shape": self.shape} | fields
        self.managed = Versioned(major=major, tensor=Tensor(**tensor))

    def __dlpack__(self, **words: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p,
                                                       ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.managed.tensor.device_type, 0


def test_an_offset_and_no_strides() -> None:
    w = weights()
    given = Producer(w, [20, 128], byte_offset=4 * 128 * 4)
    same(qllm.quantize(given, "nf4"), qllm.quantize(w[4:], "nf4"))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"shape": [2, -1]}, "DLPack gave a dimension of -1"),
        ({"shape": [2**62, 4]}, "DLPack gave a dimension of 4611686018427387904"),
        ({"shape": [1] * 33}, "DLPack gave 33 dimensions, expected 0 to 32"),
        ({"shape": [4, 4], "lanes": 4}, "DLPack gave elements of 4 lanes, expected 1"),
        ({"shape": [4, 4], "data": None}, "DLPack gave no memory"),
        ({"shape": [4, 4], "bits": 24}, "DLPack's element type 2 of 24 bits has no place here"),
        ({"shape": [4, 4], "major": 2}, "version 2 of DLPack was given, expected 1"),
        ({"shape": [4, 4], "device_type": 10}, "is on a ROCm device; copy it to the CPU first"),
        ({"shape": [1, 1, 1]}, "expected 1 to 2 dimensions, found 3"),
    ],
)
def test_what_cannot_be_used(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(qllm.QllmValueError, match="^layer: .*" + words):
        qllm.quantize(Producer(weights(), **fields), "nf4", name="layer")


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the other library of this test")
    w = torch.from_numpy(weights())
    for tensor in (w, w.to(torch.bfloat16), w.to(torch.float16), w.T, torch.nn.Parameter(w)):
        bits = tensor.detach().float().numpy()
        same(qllm.quantize(tensor, "nf4"), qllm.quantize(bits, "nf4"))
    q = qllm.quantize(w, "nf4")
    assert q.matmul(w[:2]).tobytes() == q.matmul(w.numpy()[:2]).tobytes()
    with pytest.raises(qllm.QllmValueError, match="x: expected dtype float32, found bfloat16"):
        q.matmul(w.to(torch.bfloat16))
    with pytest.raises(qllm.QllmValueError, match="x: Parameter gives no NumPy array: .*grad"):
        q.matmul(torch.nn.Parameter(w))
    with pytest.raises(qllm.QllmValueError, match="said to be 'float32' but .* bfloat16"):
        qllm.quantize(w.to(torch.bfloat16), "nf4", dtype="float32")
    read_back = torch.from_dlpack(q)
    np.testing.assert_array_equal(read_back.numpy(), q.dequantize())
    logits = torch.from_dlpack(q.matmul(w.numpy()[:2]))
    assert logits.shape == (2, 24)


def test_arrays_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read-only, and have bfloat16 in a type of NumPy's that is not NumPy's own."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax = pytest.importorskip("jax", reason="the other library of this test")
    jnp = jax.numpy
    w, rows = weights(), weights(2)
    for array in (jnp.asarray(w), jnp.asarray(w, jnp.float16), jnp.asarray(w, jnp.bfloat16),
                  jnp.asarray(w).T, jnp.asarray(w)[::2, 64:]):
        same(qllm.quantize(array, "nf4", 32), qllm.quantize(np.asarray(array, np.float32), "nf4",
                                                            32))
    q = qllm.quantize(jnp.asarray(w), "nf4")
    x, bias = jnp.asarray(w[:2]), jnp.ones(24)
    assert q.matmul(x, bias).tobytes() == q.matmul(w[:2], np.ones(24, np.float32)).tobytes()
    assert q.error(jnp.asarray(w)) == q.error(w)
    with pytest.raises(qllm.QllmValueError, match="x: expected dtype float32, found .*bfloat16"):
        q.matmul(x.astype(jnp.bfloat16))
    with pytest.raises(qllm.QllmValueError, match="array: .*Tracer gives no NumPy array"):
        jax.jit(lambda a: qllm.quantize(a, "nf4"))(x)
    assert qllm.sample(jnp.asarray(rows[0]), seed=1) == qllm.sample(rows[0], seed=1)
    found = qllm.logit_stats(jnp.asarray(rows), jnp.asarray(rows + 1), jnp.asarray([0.5, 1.0]))
    np.testing.assert_array_equal(found.kl, qllm.logit_stats(rows, rows + 1, [0.5, 1.0]).kl)
    prompts_are_taken(jnp.asarray)


def prompts_are_taken(array: Any) -> None:
    """Token ids, and options for each of several prompts, in arrays of another library."""
    model = qllm.Model.from_pretrained("demo:llama")
    ids, temperatures = [5, 6, 7], [0.5, 1.0]
    logits = model.logits(ids)
    np.testing.assert_array_equal(model.logits(array(ids)), logits)
    np.testing.assert_array_equal(model.logits(array([ids, ids]))[1], logits)
    np.testing.assert_array_equal(model.logits(list(array(ids))), logits)
    expected = model.generate([ids, ids], temperature=temperatures, max_new_tokens=2)
    found = model.generate(array([ids, ids]), temperature=array(temperatures), max_new_tokens=2)
    assert [one.ids for one in found] == [one.ids for one in expected]
    with pytest.raises(qllm.QllmValueError, match="the prompt is a .*; token ids were expected"):
        model.logits(array(5))


def test_token_ids_in_arrays_of_numpy_and_torch() -> None:
    torch = pytest.importorskip("torch", reason="the other library of this test")
    prompts_are_taken(np.asarray)
    prompts_are_taken(torch.tensor)


def test_arrays_on_a_gpu_are_refused_by_every_entry() -> None:
    """Those of CuPy: no NumPy array by themselves, and memory of which nobody here may ask."""

    class OnGpu:
        def __array__(self, *args: Any, **words: Any) -> Any:
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

        def __dlpack__(self, **words: Any) -> Any:
            raise AssertionError("memory of a GPU was asked for")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    q, rows = qllm.quantize(weights(), "nf4"), weights(2)
    for name, call in {
        "array": lambda a: qllm.quantize(a, "nf4"),
        "x": q.matmul,
        "bias": lambda a: q.matmul(rows, a),
        "logits": lambda a: qllm.sample(a, seed=1),
        "ref": lambda a: qllm.logit_stats(a, rows, [1.0]),
        "test": lambda a: qllm.logit_stats(rows, a, [1.0]),
    }.items():
        with pytest.raises(qllm.QllmValueError,
                           match=f"^{name}: the .*OnGpu is on a CUDA device; copy it to the CPU"):
            call(OnGpu())


def test_a_quantized_tensor_is_an_array_of_its_values() -> None:
    q = qllm.quantize(weights(), "nf4")
    values = q.dequantize()
    np.testing.assert_array_equal(np.asarray(q), values)
    assert np.asarray(q, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.from_dlpack(q), values)
    np.testing.assert_array_equal(np.subtract(q, values), 0)
    with pytest.raises(ValueError, match="copy=False: .* cannot be avoided"):
        np.array(q, copy=False)
    with pytest.raises(TypeError):
        q.__array__(1, 2, 3)
    same(qllm.quantize(q, "nf4"), qllm.quantize(values, "nf4"))
    for view in (q.packed, q.absmax):
        assert memoryview(view).readonly and memoryview(view).obj is not None
