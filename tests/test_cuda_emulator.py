"""The emulation of a GPU: each primitive of kernels/gpu.h against NumPy, whichever lane goes first,
and mistakes that it must not let pass (planted_bugs.cu)."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import emulated
import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[np.float32]


@pytest.fixture(params=["in order", "reversed", "two threads"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> emulated.Device:
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)
    monkeypatch.setenv("QLLM_EMULATE_THREADS", "2" if request.param == "two threads" else "1")
    return emulated.device()


# Enough for the primitives alone.
PARTS = ["kernels/runtime.cu", "kernels/test_hooks.cu", "csrc/core/status.c", "csrc/core/dtype.c"]


@functools.cache
def slow_device() -> emulated.Device:
    """With the switch of stacks that other machines than x86-64 use."""
    return emulated.Device(emulated.build("ucontext", PARTS))


def bf16(x: Floats) -> npt.NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------------- the primitives


def check_shuffles(device: emulated.Device) -> None:
    rng = np.random.default_rng(1)
    n = 256
    v = rng.integers(0, 1000, n, dtype=np.uint32)
    v[32:64] = 7
    v[64:96] += 500
    lanes = rng.integers(0, 32, n, dtype=np.int32)
    out = device.empty((6, n), np.uint32)
    device.call("gpu_test_shuffles", device.array(v), device.array(lanes), 500, out, n)
    warps, lane = v.reshape(-1, 32), np.arange(32)
    every = np.ones_like(warps)
    small = warps < 500
    assert {0, 32} < set(small.sum(1))  # none, all and some of a warp
    expected = [np.take_along_axis(warps, lanes.reshape(-1, 32), 1), warps[:, lane ^ 5],
                warps[:, np.where(lane + 3 < 32, lane + 3, lane)],
                every * np.sum((warps & 1) << lane.astype(np.uint32), 1, keepdims=True),
                every * small.any(1, keepdims=True), every * small.all(1, keepdims=True)]
    np.testing.assert_array_equal(out.get(), np.reshape(expected, (6, n)))


def test_shuffles_and_votes(device: emulated.Device) -> None:
    check_shuffles(device)


def test_shuffles_among_some_lanes_of_doubles(device: emulated.Device) -> None:
    v = np.random.default_rng(2).standard_normal(128)
    out = device.empty(128, np.float64)
    device.call("gpu_test_sum_eights", device.array(v), out, 128)
    eights = v.reshape(-1, 8)
    # as the butterfly adds: pairs, then pairs of pairs
    sums = ((eights[:, 0] + eights[:, 1]) + (eights[:, 2] + eights[:, 3])) + (
        (eights[:, 4] + eights[:, 5]) + (eights[:, 6] + eights[:, 7]))
    expected = np.repeat(sums[:, None], 8, 1).reshape(-1, 32)
    expected[:, 24:] = v.reshape(-1, 32)[:, 24:]
    np.testing.assert_allclose(out.get(), expected.ravel(), rtol=1e-15)
    np.testing.assert_array_equal(out.get().reshape(-1, 32)[:, 24:], expected[:, 24:])


def check_mma_bf16(device: emulated.Device) -> None:
    rng = np.random.default_rng(3)
    a, b = (bf16(rng.standard_normal(shape).astype(np.float32)) for shape in ((16, 16), (16, 8)))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    out = device.array(d)
    device.call("gpu_test_mma_bf16", device.array(a), device.array(b), out)
    a64, b64 = from_bf16(a).astype(np.float64), from_bf16(b).astype(np.float64)
    size = np.abs(a64) @ np.abs(b64) + np.abs(d)
    assert np.all(np.abs(out.get() - (a64 @ b64 + d)) <= 1e-6 * size)
    assert np.all(np.abs(out.get() - d) > 0)


def test_mma_bf16(device: emulated.Device) -> None:
    check_mma_bf16(device)


def test_mma_s8(device: emulated.Device) -> None:
    rng = np.random.default_rng(4)
    a = rng.integers(-128, 128, (16, 32)).astype(np.int8)
    b = rng.integers(-128, 128, (32, 8)).astype(np.int8)
    a[0], b[:, 0] = -128, -128
    d = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    out = device.array(d)
    device.call("gpu_test_mma_s8", device.array(a), device.array(b), out)
    np.testing.assert_array_equal(out.get(), a.astype(np.int32) @ b.astype(np.int32) + d)


def test_load_matrices(device: emulated.Device) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    out = device.empty((2, 32, 4), np.uint32)
    device.call("gpu_test_load_matrices", device.array(matrices), out)
    for form, values in enumerate((matrices, matrices.transpose(0, 2, 1))):
        # lane 4 g + t: of each matrix row g, columns 2 t and 2 t + 1
        pairs = np.ascontiguousarray(values).reshape(4, 32, 2).view(np.uint32)[..., 0].T
        np.testing.assert_array_equal(out.get()[form], pairs)


@pytest.mark.parametrize("turns", [1, 2, 3, 10])
def test_asynchronous_copies_in_a_ring(device: emulated.Device, turns: int) -> None:
    words = np.random.default_rng(5).integers(0, 1 << 20, (turns, 64, 4), dtype=np.uint32)
    out = device.empty(64, np.uint32)
    device.call("gpu_test_ring", device.array(words), out, turns)
    np.testing.assert_array_equal(out.get(), words.sum(0, dtype=np.uint32) @
                                  np.array([1, 2, 3, 4], np.uint32))


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_barrier_of_a_block(device: emulated.Device, threads: int) -> None:
    x = np.random.default_rng(6).standard_normal((3, 4, threads)).astype(np.float32)
    out = device.empty(x.shape, np.float32)
    device.call("gpu_test_reverse", device.array(x), out, 4, 3, threads * 4, threads)
    np.testing.assert_array_equal(out.get(), x[:, :, ::-1])


def test_atomics(device: emulated.Device) -> None:
    v = np.random.default_rng(7).integers(0, 1 << 32, 640, dtype=np.uint32)
    out = device.array(np.array([5, 0, 0xFFFFFFFF, 0], np.uint32))
    device.call("gpu_test_atomics", device.array(v), out, 640)
    np.testing.assert_array_equal(out.get(), [(5 + int(v.sum(dtype=np.uint64))) & 0xFFFFFFFF,
                                              v.max(), v.min(), np.bitwise_or.reduce(v)])


def test_conversions(device: emulated.Device) -> None:
    rng = np.random.default_rng(8)
    x, y = (rng.integers(0, 1 << 32, 640, dtype=np.uint32).view(np.float32) for _ in range(2))
    x[:4] = [np.inf, -0.0, 1.00390625, 1.01171875]  # the last two: ties
    x[np.isnan(x)], y[np.isnan(y)] = 1, 2
    half = rng.integers(0, 1 << 16, 640, dtype=np.uint16)
    half[np.isnan(half.view(np.float16))] = 0
    out = device.empty((5, 640), np.uint32)
    device.call("gpu_test_convert", device.array(x), device.array(y), device.array(half), out,
                640)
    got, a, b = out.get(), x.view(np.uint32), y.view(np.uint32)
    np.testing.assert_array_equal(got[0], bf16(x))
    np.testing.assert_array_equal(got[1], bf16(x) | bf16(y).astype(np.uint32) << 16)
    np.testing.assert_array_equal(got[2].view(np.float32), half.view(np.float16))
    bytes_a, bytes_b = (v.view(np.uint8).reshape(-1, 4) for v in (a, b))
    np.testing.assert_array_equal(got[3].view(np.uint8).reshape(-1, 4), np.stack(
        [bytes_b[:, 0], bytes_a[:, 1], bytes_a[:, 2], bytes_b[:, 3]], 1))
    sums = np.sum(bytes_a.view(np.int8).astype(np.int32) * bytes_b.view(np.int8), 1)
    ones = np.unpackbits(bytes_a, axis=1).sum(1)
    np.testing.assert_array_equal(got[4].view(np.int32), sums + ones)


def test_the_portable_switch_of_stacks() -> None:
    check_shuffles(slow_device())
    check_mma_bf16(slow_device())
    x = np.arange(64, dtype=np.float32)
    out = slow_device().empty(64, np.float32)
    slow_device().call("gpu_test_reverse", slow_device().array(x), out, 1, 1, 256, 64)
    np.testing.assert_array_equal(out.get(), x[::-1])


# ------------------------------------------------------------------- streams, graphs, memory


def graph_results(y: Floats, values: Floats) -> tuple[Floats, list[float]]:
    results = []
    for value in values:
        y = (y * 2 + value) * 2 + value
        results.append(float(y[0]))
    return y, results


@pytest.mark.parametrize("streams", ["at once", "late"])
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_graphs(monkeypatch: pytest.MonkeyPatch, streams: str, graphs: str) -> None:
    monkeypatch.setenv("QLLM_EMULATE_STREAMS", streams)
    monkeypatch.setenv("QLLM_EMULATE_GRAPHS", graphs)
    device = emulated.device()
    y, values = np.arange(32, dtype=np.float32), np.array([1, -3, 0.5], np.float32)
    on_device, results, recorded = device.array(y), np.empty(3, np.float32), np.empty(1, np.bool_)
    device.call("gpu_test_graph", on_device, device.empty(1, np.float32), values, 3, results,
                recorded)
    expected, firsts = graph_results(y, values)
    assert recorded[0] == (graphs == "1")
    np.testing.assert_array_equal(results, firsts)
    np.testing.assert_array_equal(on_device.get(), expected)


@pytest.mark.parametrize(("streams", "before"), [("at once", 7.0), ("late", -1.0)])
def test_streams(monkeypatch: pytest.MonkeyPatch, streams: str, before: float) -> None:
    """`late`: who does not wait sees nothing."""
    monkeypatch.setenv("QLLM_EMULATE_STREAMS", streams)
    device = emulated.device()
    seen = np.empty(2, np.float32)
    device.call("gpu_test_late", device.array(np.full(32, 2, np.float32)),
                device.array(np.full(1, 3, np.float32)), seen[:1], seen[1:])
    assert seen.tolist() == [before, 7.0]


def test_memory_is_counted_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    device = emulated.device()
    held = device.library.gpu_test_held
    before = held(3)
    array = device.empty(1000, np.uint8)
    assert held(3) == before + 1000
    assert array.get().tolist() == [255] * 1000
    del array
    assert held(3) == before
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", "1000000")
    sentence = r"needs 1000001 bytes of memory on emulated GPU, where \d+ of \d+ can be used"
    with pytest.raises(emulated.DeviceError, match=sentence) as caught:
        device.empty(1000001, np.uint8)
    assert caught.value.status == "MEMORY"
    monkeypatch.delenv("QLLM_EMULATE_MEMORY")
    device.library.gpu_emulated_fail_at(2)
    first = device.empty(8, np.uint8)
    with pytest.raises(emulated.DeviceError, match="needs 8 bytes"):
        device.empty(8, np.uint8)
    device.empty(8, np.uint8)
    assert held(3) == before + first.nbytes


def test_other_devices_are_refused() -> None:
    for index in (-1, 1):
        with pytest.raises(emulated.DeviceError, match=f"emulated:{index}.*are 1") as caught:
            emulated.device().call("gpu_test_open", index)
        assert caught.value.status == "VALUE"


@pytest.mark.parametrize(("columns", "rows", "shared", "threads", "sentence"), [
    (1, 1, 1024, 100, "100 threads in a block"),
    (1, 1, 1024, 2048, "2048 threads in a block"),
    (0, 1, 1024, 256, r"a grid of \(0, 1, 1\)"),
    (1, 65536, 1024, 256, r"a grid of \(1, 65536, 1\)"),
    (1, 1, 227 * 1024 + 1, 256, "232449 bytes of shared memory")])
def test_launches_have_the_limits_of_a_gpu(columns: int, rows: int, shared: int, threads: int,
                                           sentence: str) -> None:
    device = emulated.device()
    x = device.array(np.zeros(256, np.float32))
    with pytest.raises(emulated.DeviceError, match=f"reverse_blocks: {sentence}") as caught:
        device.call("gpu_test_reverse", x, x, columns, rows, shared, threads)
    assert caught.value.status == "INTERNAL"


# ------------------------------------------------------------------------------ planted mistakes

X = np.arange(1, 65, dtype=np.float32)


def planted_library(variant: str) -> Path:
    return emulated.build(variant, [*PARTS, "tests/planted_bugs.cu"])


@functools.cache
def planted() -> emulated.Device:
    return emulated.Device(planted_library("plain"))


def outcome(name: str) -> Floats:
    out = planted().empty(64, np.float32)
    planted().call(f"planted_{name}", planted().array(X), out)
    result: Floats = out.get()
    return result


@pytest.mark.parametrize("order", ["in order", "reversed"])
def test_a_missing_barrier_gives_wrong_values(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setenv("QLLM_EMULATE_ORDER", order)
    assert np.isnan(outcome("no_barrier")).sum() == 32  # the half that came too early


def test_copies_that_are_not_waited_for_give_nan() -> None:
    assert np.isnan(outcome("no_wait")).all()
    half = outcome("waits_for_too_few")
    np.testing.assert_array_equal(half[:32], X[:32])
    assert np.isnan(half[32:]).all()


def test_shared_memory_that_is_not_set_gives_nan() -> None:
    assert np.isnan(outcome("not_set")).all()


@pytest.mark.parametrize(("name", "sentence"), [
    ("divergence", r"shuffle_under_a_branch, block \(0, 0, 0\), thread 0, planted_bugs.cu:\d+: "
                   r"waits with lanes 0xffffffff for thread 16, which waits in line \d+"),
    ("exit", r"shuffle_after_an_exit, block \(0, 0, 0\), thread 32, planted_bugs.cu:\d+: waits "
             r"with lanes 0xffffffff for thread 40, which has ended"),
    ("wrong_mask", r"shuffle_of_others, .* thread 16, .*: calls with lanes 0x0000ffff, of which it "
                   r"is none"),
    ("shuffle_beside_barrier", r"shuffle_beside_a_barrier, .* thread 16, .*: waits with lanes "
                               r"0xffffffff for thread 0, which waits in line \d+ for the block"),
    ("two_barriers", r"two_barriers, .* thread 0, planted_bugs.cu:\d+: waits for the block, and "
                     r"thread 32 waits for it in line \d+"),
    ("misaligned", r"load_across, .* thread 1, planted_bugs.cu:\d+: 16 bytes are not aligned"),
    ("never_waits", "copy_values: launched as dependent, but no thread .* gpu_wait_for_previous"),
    ("host_pointer", "copy_values: argument 0 points to no memory of the device"),
    ("long_copy", "of 260 bytes: not inside one allocation"),
])
def test_what_would_hang_or_fault_has_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(emulated.DeviceError, match=sentence) as caught:
        outcome(name)
    assert caught.value.status == "INTERNAL"
    # and the device goes on
    out = planted().empty(64, np.float32)
    planted().call("gpu_test_reverse", planted().array(X), out, 1, 1, 256, 64)
    np.testing.assert_array_equal(out.get(), X[::-1])


@pytest.mark.parametrize(("waits", "sentence"), [(True, "cannot be waited for"),
                                                 (False, "memory of gpu_alloc_host alone")])
def test_what_a_graph_cannot_record_is_refused(waits: bool, sentence: str) -> None:
    with pytest.raises(emulated.DeviceError, match=sentence):
        planted().call("planted_recording", planted().empty(1, np.float32), waits)


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import emulated
from pathlib import Path
device = emulated.Device(Path(sys.argv[1]))
out = device.empty(64, np.float32)
device.call("planted_" + sys.argv[2], device.array(np.arange(1, 65, dtype=np.float32)), out)
print(out.get()[-1])
"""


def run_alone(variant: str, name: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", program, str(planted_library(variant)), name],
                          env=emulated.environment(variant), capture_output=True, text=True,
                          timeout=120)


def test_the_host_cannot_read_memory_of_the_device() -> None:
    assert run_alone("plain", "host_reads").returncode == -11  # SIGSEGV


@pytest.mark.parametrize(("name", "complaint"), [
    ("behind_memory", "heap-buffer-overflow"), ("behind_shared", "heap-buffer-overflow"),
    ("behind_array", "index 2 out of bounds|stack-buffer-overflow")])
def test_sanitizers_see_what_is_out_of_bounds(name: str, complaint: str) -> None:
    run = run_alone("sanitized", name)
    assert run.returncode != 0
    assert any(words in run.stderr for words in complaint.split("|")), run.stderr
    assert "planted_bugs.cu" in run.stderr


def test_sanitizers_are_silent_where_nothing_is_wrong() -> None:
    """Also after a launch that was abandoned half way."""
    program = """
import test_cuda_emulator as t
device = t.emulated.Device(t.planted_library("sanitized"))
t.planted = lambda: device
t.check_shuffles(device)
t.check_mma_bf16(device)
for name in ("divergence", "two_barriers", "exit"):
    try:
        t.outcome(name)
    except t.emulated.DeviceError as error:
        assert "thread" in str(error)
    else:
        raise SystemExit(name + " passed")
t.check_shuffles(device)
print("well")
"""
    run = subprocess.run([sys.executable, "-c", program], env=emulated.environment("sanitized"),
                         cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "well\n"), run.stderr
