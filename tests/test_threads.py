"""Threads: how many there are, that every split of the work gives the same bits, and pools beside
forks, other pools, other processes' pools and PyTorch's.

Pools of more threads than this machine has processors are made with _core._pretend_cores.
QLLM_LONG=60 lets the two models of test_two_models_at_once run for that many seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.errors import QllmValueError
from reference_decoder import Weights, falcon, llama, prefill, tokens

LINUX = sys.platform.startswith("linux")
on_linux = pytest.mark.skipif(not LINUX, reason="reads /proc and /sys")
SECONDS = float(os.environ.get("QLLM_LONG", "2"))


@pytest.fixture
def eight_cores() -> Iterator[None]:
    _core._pretend_cores(8)
    yield
    _core._pretend_cores(0)


def run_python(code: str, folder: Path | None = None) -> str:
    """What a program prints; in a file of its own where `folder` is given, as "spawn" needs it."""
    command, env = [sys.executable, "-c", code], dict(os.environ)
    if folder is not None:
        (folder / "program.py").write_text(code)
        command = [sys.executable, str(folder / "program.py")]
        env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def at_once(*calls: Callable[[], None]) -> None:
    """Runs the calls in Python threads; the first exception of any of them is raised here."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120 + SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


# --------------------------------------------------------------------------------- how many threads


def machine(root: Path, files: dict[str, str]) -> dict[str, int]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _core._processors(str(root))


QUOTAS = {
    "no control groups": ({}, 0),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
    "the root of a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
    "no /proc": ({"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
    "rounded up": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    "its own group": (
        {"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/job/cpu.max": "100000 100000\n",
         "sys/fs/cgroup/user/cpu.max": "400000 100000\n"}, 1),
    "a group above": (
        {"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
         "sys/fs/cgroup/user/cpu.max": "200000 100000\n"}, 2),
    "a group that the container does not show": (
        {"proc/self/cgroup": "0::/host/slice\n", "sys/fs/cgroup/cpu.max": "500000 100000\n"}, 5),
    "both versions, mounted side by side": (
        {"proc/self/cgroup": "4:memory:/x\n1:cpu:/\n0::/a\n",
         "sys/fs/cgroup/unified/a/cpu.max": "200000 100000\n"}, 2),
    "version 1": (
        {"proc/self/cgroup": "3:cpuset:/\n2:cpuacct,cpu:/job\n1:name=systemd:/\n",
         "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n",
         "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"}, 3),
    "version 1, by both names": (
        {"proc/self/cgroup": "2:cpu,cpuacct:/job\n",
         "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
         "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 4),
    "another controller's quota": (
        {"proc/self/cgroup": "2:cpuset:/job\n",
         "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "100000\n",
         "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"}, 0),
    "nonsense": (
        {"proc/self/cgroup": "::\nx\n0:\n0::job\n\n:::/\n",
         "sys/fs/cgroup/cpu.max": "one 100000\n"}, 0),
    "a period of nothing": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 0),
}


@on_linux
@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_the_control_groups(name: str, tmp_path: Path) -> None:
    files, quota = QUOTAS[name]
    found = machine(tmp_path, files)
    logical = len(os.sched_getaffinity(0))
    assert (found["quota"], found["logical"]) == (quota, logical)
    assert found["threads_available"] == (min(quota, logical) if quota else logical)


@on_linux
@pytest.mark.parametrize(("cores", "packages", "expected"), [
    (lambda i: i, lambda i: 0, lambda n: n),
    (lambda i: 0, lambda i: 0, lambda n: 1),
    (lambda i: 0, lambda i: i, lambda n: n),
    (lambda i: i // 2, lambda i: 0, lambda n: (n + 1) // 2),
])
def test_one_thread_per_physical_core(cores, packages, expected, tmp_path: Path) -> None:
    mask = sorted(os.sched_getaffinity(0))
    files = {}
    for i, cpu in enumerate(mask):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{folder}/core_id"] = f"{cores(i)}\n"
        files[f"{folder}/physical_package_id"] = f"{packages(i)}\n"
    found = machine(tmp_path, files)
    assert (found["logical"], found["cores"]) == (len(mask), expected(len(mask)))
    assert found["threads_default"] == found["cores"]
    assert found["threads_available"] == found["logical"]


@on_linux
def test_processors_that_the_system_does_not_describe_are_cores(tmp_path: Path) -> None:
    found = machine(tmp_path, {})
    assert found["cores"] == found["logical"] == len(os.sched_getaffinity(0))


def test_the_default_is_one_thread_per_core() -> None:
    info = _core.cpu_info()
    assert 1 <= info["threads_default"] <= info["threads_available"] <= info["logical"]
    assert _core.Decoder(llama(layers=1)).info()["threads"] == info["threads_default"]
    most = _core.Decoder(llama(layers=1), threads=65536).info()["threads"]
    assert most == info["threads_available"]


@pytest.mark.usefixtures("eight_cores")
def test_threads_are_clamped_to_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(n: int | None) -> int:
        return _core.Decoder(llama(layers=1), threads=n).info()["threads"]

    assert [threads(n) for n in (None, 1, 5, 8, 9, 1000)] == [8, 1, 5, 8, 8, 8]
    monkeypatch.setenv("QLLM_THREADS", "3")
    assert [threads(n) for n in (None, 1, 5)] == [3, 1, 5]
    monkeypatch.setenv("QLLM_THREADS", "64")
    assert threads(None) == 8


@pytest.mark.parametrize("text", ["two", "0", "-3", "2.0", "1e3", " 2", "9999999999"])
def test_a_wrong_qllm_threads_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_THREADS", text)
    for make in (lambda: _core.Decoder(llama(layers=1)),
                 lambda: qllm.Model.from_pretrained("demo:llama")):
        with pytest.raises(QllmValueError, match=f"QLLM_THREADS is '{text}'; expected a whole"):
            make()
    assert _core.Decoder(llama(layers=1), threads=1).info()["threads"] == 1


def test_pretended_cores_are_checked() -> None:
    for n in (-1, 2**40):
        with pytest.raises(QllmValueError, match="expected 0 to 4096"):
            _core._pretend_cores(n)


# --------------------------------------------------------------------------------------- the work


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("threads", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33, 1000])
def test_every_item_is_done_once(threads: int, n: int) -> None:
    wrong, strays, calls = _core._threads_cover(threads, n, 100)
    assert (wrong, strays, len(calls)) == (0, 0, threads)
    assert sum(calls) >= 100


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("threads", [2, 8])
def test_workers_come(threads: int) -> None:
    """Every thread gets work sooner or later: the other tests here would pass without workers."""
    came = [0] * threads
    end = time.monotonic() + 60
    while not all(came) and time.monotonic() < end:
        calls = _core._threads_cover(threads, 100000, 50)[2]
        came = [a + b for a, b in zip(came, calls, strict=True)]
    assert all(came)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("make", [falcon, lambda **c: llama(**c, sliding_window=np.array([0, 900]))])
def test_a_long_context_shared_by_threads_gives_the_same_bits(make) -> None:
    weights = Weights(make(max_positions=1200, kv_heads=1), seed=3)
    ids = np.random.default_rng(4).integers(0, 37, 1100)

    def logits(threads: int) -> np.ndarray:
        decoder = weights.decoder(threads=threads)
        sequence = decoder.sequence()
        prefill(decoder, ids[:700], sequence)
        fork = sequence.fork()  # its keys begin a block in the middle
        prefill(decoder, ids[700:1090], fork)
        return np.concatenate([decoder.step([fork], [token]) for token in ids[1090:]])

    alone = logits(1)
    for threads in (2, 8):
        np.testing.assert_array_equal(logits(threads), alone)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("format", ["f32", "nf4", "int8"])
@pytest.mark.parametrize("make", [llama, falcon])
def test_one_to_eight_threads_give_the_same_bits(make, format: str) -> None:
    weights = Weights(make(hidden=256, intermediate=512), format, seed=3)
    ids = tokens(40)
    expected = prefill(weights.decoder(threads=1), ids)
    for threads in range(2, 9):
        decoder = weights.decoder(threads=threads)
        assert decoder.info()["threads"] == threads
        assert np.array_equal(prefill(decoder, ids), expected), threads
        assert np.array_equal(prefill(decoder, ids, chunk=1), expected), threads


@pytest.mark.usefixtures("eight_cores")
def test_many_pools_come_and_go() -> None:
    def running() -> int:
        return len(os.listdir("/proc/self/task")) if LINUX else 0

    before = running()
    for i in range(150):
        assert _core._threads_cover(1 + i % 8, 64, 2)[:2] == (0, 0)
    assert running() <= before
    pools = [_core.Decoder(llama(layers=1), threads=8) for _ in range(50)]
    del pools  # that never worked
    assert running() <= before


@pytest.mark.usefixtures("eight_cores")
def test_pools_of_many_python_threads_at_once() -> None:
    def work() -> None:
        for _ in range(20):
            assert _core._threads_cover(4, 500, 20)[:2] == (0, 0)

    at_once(*[work] * 4)


def test_two_models_at_once() -> None:
    """Each with a pool of its own; the same text, and the same logits, as alone."""
    models = [qllm.Model.from_pretrained("demo:llama", "nf4", threads=2),
              qllm.Model.from_pretrained("demo:falcon", "int8", threads=2)]
    options = dict(max_new_tokens=24, temperature=0.8, ignore_eos=True)
    prompt = [[5, 6, 7, 8], [9, 10, 11]]

    def texts(i: int, seed: int) -> list[list[int]]:
        outputs = models[i].generate(prompt, seed=seed, **options)
        return [list(output.ids) for output in outputs]

    alone = [[texts(i, seed) for seed in range(4)] for i in range(2)]
    logits = [model.logits(list(range(3, 60))) for model in models]
    end, rounds = time.monotonic() + SECONDS, [0, 0]

    def work(i: int) -> None:
        while time.monotonic() < end:
            seed = rounds[i] % 4
            assert texts(i, seed) == alone[i][seed], (i, rounds[i])
            assert np.array_equal(models[i].logits(list(range(3, 60))), logits[i]), (i, rounds[i])
            rounds[i] += 1

    at_once(lambda: work(0), lambda: work(1))
    print("rounds", rounds)
    assert min(rounds) > 0


# ---------------------------------------------------------------------------- beside other things

SETUP = """
import os, sys, threading, numpy as np, qllm
from qllm import _core
_core._pretend_cores(4)
w = qllm.quantize(np.random.default_rng(0).standard_normal((800, 512)).astype(np.float32), "nf4")
x = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
expected = w.matmul_reference(x)
def right(threads=4):
    return all((w.matmul(x, threads=threads) == expected).all() for _ in range(20))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_pool_of_processes(method: str, tmp_path: Path) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    code = SETUP + f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def task(i):
    return right(1 + i % 4)
if __name__ == "__main__":
    assert right()
    context = multiprocessing.get_context("{method}")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        print(all(executor.map(task, range(6))), right())
"""
    assert run_python(code, tmp_path) == "True True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forks_of_forks_beside_two_busy_pools() -> None:
    code = SETUP + """
stop = threading.Event()
def busy(threads):
    while not stop.is_set():
        w.matmul(x, threads=threads)
threads = [threading.Thread(target=busy, args=(n,)) for n in (3, 4)]
for thread in threads:
    thread.start()
codes = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        child = os.fork()
        ok = right(3) and right(4)
        if child:
            ok = ok and os.waitpid(child, 0)[1] == 0
        os._exit(0 if ok else 3)
    codes.append(os.waitpid(pid, 0)[1])
stop.set()
for thread in threads:
    thread.join()
print(codes, right())
"""
    assert run_python(code) == "[0, 0, 0, 0] True"


@on_linux
def test_the_affinity_mask_may_change_later() -> None:
    mask = sorted(os.sched_getaffinity(0))
    code = SETUP.replace("_core._pretend_cores(4)\n", "") + f"""
mask = {mask}
ok = right({len(mask)})
for cpu in mask:
    os.sched_setaffinity(0, {{cpu}})
    ok = ok and right({len(mask)}) and _core.cpu_info()["logical"] == 1
os.sched_setaffinity(0, mask)
print(ok and right({len(mask)}), _core.cpu_info()["logical"], sorted(os.sched_getaffinity(0)))
"""
    assert run_python(code) == f"True {len(mask)} {mask}"


@on_linux
def test_workers_keep_off_the_callers_core_and_leave_it_alone() -> None:
    mask = sorted(os.sched_getaffinity(0))
    if len(mask) < 2 or _core.cpu_info()["cores"] < 2:
        pytest.skip("one core")
    code = SETUP.replace("_core._pretend_cores(4)\n", "") + f"""
mask = {mask}
main = threading.get_native_id()
before = set(map(int, os.listdir("/proc/self/task")))
cpus = []
for cpu in mask[:2]:
    os.sched_setaffinity(0, mask)
    os.sched_setaffinity(0, {{cpu}})
    os.sched_setaffinity(0, mask)
    assert right(2)
    worker, = set(map(int, os.listdir("/proc/self/task"))) - before
    cpus.append(os.sched_getaffinity(worker))
print(all(cpus) and all(c < set(mask) for c in cpus), os.sched_getaffinity(main) == set(mask))
"""
    assert run_python(code) == "True True"


@on_linux
def test_workers_that_cannot_be_started_are_done_without() -> None:
    """No address space for their stacks; the first of 64 may still have found some."""
    code = SETUP.replace("_pretend_cores(4)", "_pretend_cores(64)") + """
import resource
_core._threads_cover(2, 1000, 10)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
wrong, strays, calls = _core._threads_cover(64, 5000, 200)
missing = calls.count(0)
ok = right(64)
print(wrong, strays, len(calls), calls[0] > 0, missing > 20, ok)
"""
    assert run_python(code) == "0 0 64 True True True"


def test_beside_the_pool_of_pytorch() -> None:
    pytest.importorskip("torch")
    code = SETUP + """
import torch
torch.set_num_threads(2)
a = torch.ones(300, 300)
ok = []
def multiply():
    for _ in range(40):
        ok.append(bool((a @ a == 300).all()) and (w.matmul(x, threads=2) == expected).all())
multiply()
other = threading.Thread(target=multiply)
other.start()
multiply()
other.join()
print(len(ok), all(ok))
"""
    assert run_python(code) == "120 True"
