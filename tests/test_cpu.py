"""The CPU kernels: every instruction set, every format, every shape gives the bits of the plain
reference (core/linear_ref.c, itself tested in test_linear_ref.py), on any number of threads.

Sets are forced by name.  A set that this machine can run and that did not run is a failure, never a
skipped test.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm
from qllm import _core
from qllm.errors import QllmUnsupportedError, QllmValueError
from qllm.quantize import BLOCKSIZES, FORMATS

INFO = _core.cpu_info()
SETS = INFO["isas"]
FOUR_BIT = ("nf4", "fp4", "nf4-dq", "fp4-dq")
F32 = np.float32


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def weight(rows: int, cols: int, format: str, blocksize: int = 64, seed: int = 0) -> qllm.QuantizedTensor:
    """Rows of different size, so that scales differ."""
    r = rng(seed, rows, cols)
    values = r.standard_normal((rows, cols)) * np.exp(r.uniform(-2, 2, (rows, 1)))
    return qllm.quantize(values.astype(F32), format, blocksize)


def inputs(m: int, cols: int, seed: int = 0) -> np.ndarray:
    """About one value in fifty is an outlier of LLM.int8()."""
    r = rng(seed, m, cols, 7)
    x = r.standard_normal((m, cols)).astype(F32)
    return np.where(r.random(x.shape) < 0.02, x * F32(30), x)


def assert_same_bits(y: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert y.shape == expected.shape and y.dtype == F32
    different = y.view(np.uint32) != expected.view(np.uint32)
    assert not different.any(), f"{what}: {different.sum()} of {y.size} outputs differ, first at " \
                                f"{np.argwhere(different)[0].tolist()}"


# ------------------------------------------------------------------------------ instruction sets


def test_cpu_info() -> None:
    assert set(INFO) == {"model", "features", "isas", "compiled", "default", "threads_available",
                         "threads_default", "cores", "logical", "quota"}
    assert "scalar" in SETS and set(SETS) <= set(INFO["compiled"])
    assert 1 <= INFO["threads_available"] <= (os.cpu_count() or 1)


def x86_sets() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = next(line for line in cpuinfo.splitlines() if line.startswith("flags"))
    has = set(flags.split()).issuperset
    avx2 = has({"avx2", "fma", "f16c"})
    avx512 = avx2 and has({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})
    vbmi, bf16 = avx512 and has({"avx512vbmi"}), avx512 and has({"avx512vbmi", "avx512_bf16"})
    amx = bf16 and has({"amx_tile", "amx_int8", "amx_bf16"})
    return (["scalar"] + ["avx2"] * avx2 + ["avx512"] * avx512 + ["avx512vbmi"] * vbmi
            + ["avx512bf16"] * bf16 + ["avx512amx"] * amx)


def arm_sets() -> list[str]:
    """By the vector that every program is given; /proc/cpuinfo is not that of an emulated machine."""
    auxv = np.frombuffer(Path("/proc/self/auxv").read_bytes(), np.uint64).reshape(-1, 2)
    hwcap = dict(auxv.tolist())[16]
    return ["scalar", "neon"] + ["neondot"] * bool(hwcap & 1 << 20)


def test_the_sets_are_those_that_the_kernel_reports() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        assert set(INFO["compiled"]) <= {"scalar", "neon", "neondot"}
    elif machine == "x86_64":
        assert INFO["compiled"] == ["scalar", "avx2", "avx512", "avx512vbmi", "avx512bf16",
                                    "avx512amx"]
        assert SETS == x86_sets()
    else:
        assert INFO["compiled"] == ["scalar", "neon", "neondot"]
        assert SETS == arm_sets()


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
def test_where_the_system_refuses_amx_it_is_absent_and_said_so() -> None:
    """Linux refuses its state to a process with a signal stack that cannot hold it."""
    source = """if True:
        import ctypes

        class Stack(ctypes.Structure):
            _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

        memory = ctypes.create_string_buffer(4096)
        small = Stack(ctypes.addressof(memory), 0, 4096)
        libc = ctypes.CDLL(None)
        assert libc.sigaltstack(ctypes.byref(small), None) == 0, "no signal stack of 4 KiB"
        from qllm import _core
        info = _core.cpu_info()
        assert info["isas"] == info["compiled"][:-1], info
        assert "amxint8 (the system refuses it)" in info["features"], info
    """
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          env={**os.environ, "QLLM_CPU": ""})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_forced_set_is_the_one_that_runs(isa: str, format: str) -> None:
    for cols in (64, 65):
        for m in (1, 4, 5):
            name = _core.linear_name(weight(3, cols, format), m, isa=isa)
            assert name.startswith(f"{format} {isa}, "), name


@pytest.mark.skipif("avx512amx" not in SETS, reason="this machine has no AMX")
def test_int8_weights_go_to_the_matrix_units() -> None:
    w = weight(37, 6000, "int8")  # two strips of columns, an odd number of tiles
    names = {_core.linear_name(w, m, isa="avx512amx") for m in (1, 2, 300)}
    assert names == {"int8 avx512amx, panels of rows"}
    x = inputs(300, 6000)  # two passes; panels of 1 to 16 rows, the last one full or not
    expected = w.matmul(x, isa="avx512")
    for m in (1, 2, 17, 33, 48, 300):
        y = w.matmul(x[:m], isa="avx512amx", threads=2)
        assert_same_bits(y, expected[:m], m)


@pytest.mark.parametrize("isa", SETS)
def test_qllm_cpu_forces_a_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_CPU", isa)
    assert _core.cpu_info()["default"] == isa
    assert isa in _core.linear_name(weight(3, 64, "nf4"), 1)


def test_the_best_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "auto"):
        if value is None:
            monkeypatch.delenv("QLLM_CPU", raising=False)
        else:
            monkeypatch.setenv("QLLM_CPU", value)
        assert _core.cpu_info()["default"] == SETS[-1]


def test_an_unknown_set_is_refused_with_those_that_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(3, 64, "nf4"), inputs(1, 64)
    with pytest.raises(QllmValueError, match=r"isa: instruction set 'sse9' is not known.*scalar"):
        w.matmul(x, isa="sse9")
    monkeypatch.setenv("QLLM_CPU", "AVX2")
    for call in (lambda: w.matmul(x), _core.cpu_info, lambda: _core.linear_name(w, 1)):
        with pytest.raises(QllmValueError, match=r"QLLM_CPU: instruction set 'AVX2' is not known"):
            call()
    for isa in {"avx2", "avx512", "neon", "neondot"} - set(SETS):
        with pytest.raises(QllmUnsupportedError, match=f"'{isa}' is not"):
            w.matmul(x, isa=isa)


# ------------------------------------------------------------------------- equal to the reference

# (rows, cols, blocksize): whole tiles and not, whole groups and not, blocks that end with rows and
# blocks that run across them, one and many units of nested absmax, changes of the second level
SHAPES = [
    (1, 1, 64), (1, 31, 64), (2, 32, 32), (3, 33, 64), (15, 64, 64), (16, 64, 32), (17, 95, 64),
    (16, 96, 32), (31, 128, 64), (33, 160, 32), (48, 192, 64), (65, 200, 64), (64, 256, 256),
    (70, 320, 64), (20, 352, 32), (5, 1000, 128), (130, 448, 64), (7, 1024, 1024), (3, 8192, 4096),
    (40, 2048, 64), (90, 4096, 32), (1, 16416, 32), (200, 7, 64), (129, 1, 32),
]
ROWS = [1, 2, 3, 4, 5, 6, 7, 9, 13, 40]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_matmul_has_the_bits_of_the_reference(isa: str, format: str) -> None:
    for i, (rows, cols, blocksize) in enumerate(SHAPES):
        w = weight(rows, cols, format, blocksize)
        m = ROWS[i % len(ROWS)] if rows * cols > 3000 else 13
        x, bias = inputs(m, cols), rng(1, rows).standard_normal(rows).astype(F32)
        plain, biased = w.matmul_reference(x), w.matmul_reference(x, bias)
        for threads in (1, 2):
            what = (rows, cols, blocksize, m, threads)
            assert_same_bits(w.matmul(x, isa=isa, threads=threads), plain, what)
            assert_same_bits(_core.linear(w, x, bias, isa=isa, threads=threads), biased, what)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_every_number_of_rows(isa: str, format: str) -> None:
    for rows, cols in ((37, 160), (70, 67)):
        w, x = weight(rows, cols, format, 32), inputs(40, cols)
        bias = rng(2, rows).standard_normal(rows).astype(F32)
        expected = w.matmul_reference(x, bias)
        for m in range(1, 41):
            assert_same_bits(w.matmul(x[:m], bias, isa=isa, threads=1 + m % 2), expected[:m], m)
            assert_same_bits(w.matmul(x[40 - m :], bias, isa=isa), expected[40 - m :], m)
        assert_same_bits(w.matmul(x[5], bias, isa=isa), expected[5])


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_product(format: str) -> None:
    w, x = weight(333, 1088, format), inputs(131, 1088)
    expected = w.matmul_reference(x)
    for isa in SETS:
        for threads in (1, 2):
            assert_same_bits(w.matmul(x, isa=isa, threads=threads), expected, (isa, threads))


@given(data=st.data(), rows=st.integers(1, 100), cols=st.integers(1, 300), m=st.integers(1, 12),
       format=st.sampled_from(FORMATS), isa=st.sampled_from(SETS), threads=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_any_shape(data, rows: int, cols: int, m: int, format: str, isa: str, threads: int) -> None:
    blocksize = data.draw(st.sampled_from([b for b in BLOCKSIZES if b <= max(32, cols)]))
    if data.draw(st.booleans()):
        cols = max(1, cols // blocksize) * blocksize
    w, x = weight(rows, cols, format, blocksize), inputs(m, cols)
    assert_same_bits(w.matmul(x, isa=isa, threads=threads), w.matmul_reference(x))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", FORMATS)
def test_signed_zeros_and_tiny_and_huge_values(isa: str, format: str) -> None:
    values = np.array([0.0, -0.0, 1e-30, -1e-30, 1e-38, -1e-44, 1.0, -60000.0], F32)
    w = qllm.quantize(rng(3).choice(values, (40, 101)), format)
    x = rng(4).choice(np.array([0.0, -0.0, 1e-20, -1e-20, 1e-44, 1.0, -1.0, 1e30], F32), (9, 101))
    assert_same_bits(w.matmul(x, isa=isa), w.matmul_reference(x))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_infinity_reach_the_outputs_that_the_reference_says(isa: str, format: str) -> None:
    w, x = weight(40, 128, format), inputs(7, 128)
    x[[1, 2, 3], [5, 60, 127]] = np.nan, np.inf, -np.inf
    for threshold in (6.0, 0.0):
        y = w.matmul(x, isa=isa, int8_threshold=threshold)
        expected = w.matmul_reference(x, threshold=threshold)
        np.testing.assert_array_equal(y, expected)  # NaN equals NaN here
        assert np.isfinite(y[[0, 4, 5, 6]]).all() and np.isnan(y[1]).all()


@pytest.mark.parametrize("isa", SETS)
def test_int8_outliers_by_row_and_by_batch(isa: str) -> None:
    for rows, cols, m in ((40, 130, 9), (64, 256, 3), (5, 64, 1), (33, 500, 40)):
        w, x = weight(rows, cols, "int8"), inputs(m, cols)
        bias = rng(5, rows).standard_normal(rows).astype(F32)
        for threshold in (6.0, 0.0, 0.5, 1e9):
            by_row = w.matmul_reference(x, bias, threshold)
            by_batch = w.matmul_reference(x, bias, threshold, batch_outliers=True)
            for threads in (1, 2):
                options = dict(isa=isa, threads=threads, int8_threshold=threshold)
                assert_same_bits(w.matmul(x, bias, **options), by_row)
                assert_same_bits(w.matmul(x, bias, int8_outliers="batch", **options), by_batch)
            if m > 1 and threshold == 6.0:
                assert (by_row != by_batch).any()


@pytest.mark.parametrize("isa", SETS)
def test_int8_sums_at_their_limit(isa: str) -> None:
    cols = 133143  # floor((2^31 - 1) / 127^2)
    w = qllm.quantize(np.ones((2, cols), F32) * F32([[1], [-1]]), "int8")
    x = np.ones((1, cols), F32)
    x[0, ::2] = -1
    assert_same_bits(w.matmul(x, isa=isa), w.matmul_reference(x))
    assert_same_bits(w.matmul(np.ones_like(x), isa=isa), w.matmul_reference(np.ones_like(x)))
    wide = qllm.quantize(np.ones((1, cols + 1), F32), "int8")
    with pytest.raises(QllmUnsupportedError, match=r"133144 columns.*at most 133143"):
        wide.matmul(np.ones((1, cols + 1), F32), isa=isa)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_products(format: str) -> None:
    bias = np.array([1.5, -2.0], F32)
    for isa in SETS:
        assert weight(3, 64, format).matmul(np.zeros((0, 64), F32), isa=isa).shape == (0, 3)
        no_rows = qllm.quantize(np.zeros((0, 64), F32), format)
        assert no_rows.matmul(np.zeros((2, 64), F32), isa=isa).shape == (2, 0)
        no_cols = qllm.quantize(np.zeros((2, 0), F32), format)
        np.testing.assert_array_equal(no_cols.matmul(np.zeros((6, 0), F32), bias, isa=isa),
                                      np.tile(bias, (6, 1)))
        assert not no_cols.matmul(np.zeros((1, 0), F32), isa=isa).any()


# ------------------------------------------------------------------------------- batch invariance


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_batch(format: str) -> None:
    w, x = weight(83, 224, format, 32), inputs(60, 224)
    alone = w.matmul(x[17], isa=SETS[0], threads=1)
    r = rng(6)
    for isa in SETS:
        for threads in (1, 2):
            for m in (1, 4, 13, 60):
                order = r.permutation(60)[:m]
                order[r.integers(m)] = 17
                y = w.matmul(x[order], isa=isa, threads=threads)
                for place in np.flatnonzero(order == 17):
                    assert_same_bits(y[place], alone, (isa, threads, m, place))


# ------------------------------------------------------------------------------------- the packing


@pytest.mark.parametrize("format", FORMATS)
def test_packing_is_reversible_bit_for_bit(format: str) -> None:
    parts = ("packed", "absmax", "absmax_codes", "nested_absmax", "nested_quant_map", "quant_map",
             "scb")
    for rows, cols, blocksize in SHAPES + [(0, 5, 64), (5, 0, 64), (300, 96, 32)]:
        w = weight(rows, cols, format, blocksize)
        back = _core.pack_roundtrip(w)
        assert (back.format, back.shape, back.blocksize, back.offset, back.nbytes) == (
            w.format, w.shape, w.blocksize, w.offset, w.nbytes)
        for part in parts:
            a, b = getattr(w, part), getattr(back, part)
            assert (a is None) == (b is None), part
            if a is not None:
                assert a.tobytes() == b.tobytes(), (rows, cols, blocksize, part)


@pytest.mark.parametrize("format", FOUR_BIT)
def test_foreign_tables_are_kept(format: str) -> None:
    w = weight(20, 128, format)
    other = _core.quantized_from_parts(
        format, w.shape, w.packed, blocksize=64, absmax=w.absmax, absmax_codes=w.absmax_codes,
        nested_absmax=w.nested_absmax, nested_quant_map=w.nested_quant_map, offset=w.offset,
        quant_map=np.linspace(-1, 1, 16).astype(F32))
    x = inputs(3, 128)
    assert _core.pack_roundtrip(other).quant_map.tobytes() == other.quant_map.tobytes()
    for isa in SETS:
        assert_same_bits(other.matmul(x, isa=isa), other.matmul_reference(x))


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_allocation_is_an_error_and_nothing_else(format: str) -> None:
    w, x = weight(20, 100, format), inputs(3, 100)
    failures = 0
    for n in range(1, 30):
        _core._alloc_fail_at(n)
        try:
            fresh = _core.pack_roundtrip(w)
        except MemoryError:
            failures += 1
            continue
        finally:
            _core._alloc_fail_at(0)
        assert_same_bits(fresh.matmul(x), w.matmul_reference(x))
        break
    assert 3 <= failures < 29
    for n in range(1, 30):
        fresh = weight(20, 100, format)
        _core._alloc_fail_at(n)
        try:
            y = fresh.matmul(x)
        except MemoryError as error:
            assert "could not allocate" in str(error)
            continue
        finally:
            _core._alloc_fail_at(0)
        assert_same_bits(y, w.matmul_reference(x))
        return
    pytest.fail("no call succeeded")


# ------------------------------------------------------------------------------------ bad arguments


def test_inputs_that_do_not_fit_are_refused() -> None:
    w, x = weight(5, 64, "nf4"), inputs(2, 64)
    with pytest.raises(QllmValueError, match=r"x: 63 columns, but the weight of shape \(5, 64\)"):
        w.matmul(x[:, :63])
    with pytest.raises(QllmValueError, match="bias: 4 values, but the weight has 5 rows"):
        w.matmul(x, np.zeros(4, F32))
    with pytest.raises(QllmValueError, match="x: expected dtype float32, found dtype"):
        w.matmul(x.astype(np.float64))
    with pytest.raises(QllmValueError, match="x: expected 1 to 2 dimensions, found 3"):
        w.matmul(x[None])
    with pytest.raises(QllmValueError, match="int8_outliers: 'column' is unknown"):
        w.matmul(x, int8_outliers="column")
    with pytest.raises(QllmValueError, match="int8_threshold: NaN"):
        w.matmul(x, int8_threshold=float("nan"))
    with pytest.raises(QllmValueError, match="threads: 0 was given; expected 1 or more"):
        w.matmul(x, threads=0)
    with pytest.raises(QllmValueError, match="threads: .* does not fit"):
        w.matmul(x, threads=2**70)
    with pytest.raises(TypeError, match="threads: expected an integer"):
        w.matmul(x, threads="two")
    with pytest.raises(TypeError, match="expected a QuantizedTensor, found"):
        _core.linear(x, x)
    with pytest.raises(TypeError, match="expected a QuantizedTensor, found"):
        _core.pack_roundtrip(x)


def test_inputs_of_any_layout_are_read() -> None:
    w, x = weight(20, 64, "nf4"), inputs(10, 64)
    expected = w.matmul_reference(x)
    wide = np.zeros((10, 128), F32)
    wide[:, ::2] = x
    assert_same_bits(w.matmul(wide[:, ::2]), expected)
    assert_same_bits(w.matmul(np.asfortranarray(x)), expected)


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("text", ["abc", "0", "-1", "2x", "1.5", " 2", "0x2", "99999999999"])
def test_qllm_threads_is_read_strictly(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(3, 64, "nf4"), inputs(1, 64)
    monkeypatch.setenv("QLLM_THREADS", text)
    with pytest.raises(QllmValueError, match=f"QLLM_THREADS is '{text}'; expected a whole number"):
        w.matmul(x)
    assert_same_bits(w.matmul(x, threads=1), w.matmul_reference(x))


@pytest.mark.parametrize("text", ["", "1", "2", "64"])
def test_qllm_threads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(200, 512, "nf4"), inputs(8, 512)
    monkeypatch.setenv("QLLM_THREADS", text)
    assert_same_bits(w.matmul(x), w.matmul_reference(x))


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


SETUP = """
import os, threading
import numpy as np, qllm
w = qllm.quantize(np.random.default_rng(0).standard_normal((400, 512)).astype(np.float32), "nf4")
x = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
expected = w.matmul_reference(x)
def right():
    return all((w.matmul(x, threads=2) == expected).all() for _ in range(30))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_makes_its_own_threads() -> None:
    code = SETUP + """
assert right()
pid = os.fork()
if pid == 0:
    grandchild = os.fork()
    ok = right()
    if grandchild:
        ok = ok and os.waitpid(grandchild, 0)[1] == 0
    os._exit(0 if ok else 3)
assert right()
print(os.waitpid(pid, 0)[1])
"""
    assert run_python(code) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_multiplies() -> None:
    code = SETUP + """
stop = threading.Event()
def busy():
    while not stop.is_set():
        w.matmul(x, threads=2)
thread = threading.Thread(target=busy)
thread.start()
codes = []
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if right() else 3)
    codes.append(os.waitpid(pid, 0)[1])
stop.set()
thread.join()
print(codes)
"""
    assert run_python(code) == "[0, 0, 0, 0, 0]"


def test_python_threads_take_turns() -> None:
    w, x = weight(300, 512, "bf16"), inputs(6, 512)
    expected, wrong = w.matmul_reference(x), []

    def work() -> None:
        for i in range(40):
            if not np.array_equal(w.matmul(x, threads=1 + i % 2), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_the_first_use_by_many_threads_packs_once_for_all() -> None:
    for _ in range(10):
        w, x = weight(64, 256, "nf4-dq"), inputs(1, 256)
        expected, results = w.matmul_reference(x), []
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait(timeout=30)
            results.append(w.matmul(x))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(results) == 4
        for y in results:
            assert_same_bits(y, expected)


def test_the_program_ends_while_its_threads_sleep() -> None:
    assert run_python(SETUP + "print(right())") == "True"


def test_threads_follow_the_affinity_mask() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity mask")
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}})\n" + SETUP + """
from qllm import _core
print(_core.cpu_info()["threads_available"], right())
"""
    assert run_python(code) == "1 True"
