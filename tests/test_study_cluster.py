"""Cells on Dask workers: the same bytes, workers that are lost, threads that are not used twice."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_studies import TINY
from test_study_run import Dying, contents, no_pictures, tiny  # noqa: F401 (fixtures)

from qllm.errors import QllmError, QllmUnsupportedError, QllmValueError
from qllm.study import cluster, run
from qllm.study.cells import Task
from qllm.study.cluster import _Turns, _in_turn

pytest.importorskip("distributed")


def test_a_lost_worker_changes_nothing(tmp_path: Path, tiny: Path) -> None:
    """Two worker processes, one of which is killed while it has a cell; then, on the same two, a
    study undisturbed."""
    with cluster(workers=2) as executor:
        run(TINY, out=tmp_path / "killed", executor=Dying(executor, tmp_path / "marker"))
        assert (tmp_path / "marker").exists()
        run(TINY, out=tmp_path / "calm", executor=executor)
    for name in ("killed", "calm"):
        assert contents(tmp_path / name) == contents(tiny)


def test_a_scheduler_by_its_address(tmp_path: Path, tiny: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=3, processes=False, host="127.0.0.1",
                      protocol="tcp://", dashboard_address="127.0.0.1:0") as local:
        with cluster(local.scheduler_address) as executor:
            run(TINY, out=tmp_path / "out", executor=executor)
    assert contents(tmp_path / "out") == contents(tiny)


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["qllm.study.cluster"]
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    with pytest.raises(QllmError, match="no Dask scheduler answers at 'tcp://127.0.0.1:1'"):
        with cluster("tcp://127.0.0.1:1"):
            pass
    with pytest.raises(QllmError, match="no Dask scheduler answers at 'nowhere'"):
        with cluster("nowhere"):
            pass


@pytest.mark.parametrize("options", [{}, {"address": "tcp://x:1", "workers": 2}])
def test_an_address_or_workers(options: dict[str, Any]) -> None:
    with pytest.raises(QllmValueError, match="an address or by a number of workers"):
        with cluster(**options):
            pass
    with pytest.raises(QllmValueError, match="workers is '0'"):
        with cluster(workers=0):
            pass


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(QllmUnsupportedError, match=r"pip install 'qllm\[dask\]'"):
        with cluster(workers=1):
            pass


def test_another_version_on_a_worker_is_named() -> None:
    from qllm.study.cluster import _on_worker

    with pytest.raises(QllmError, match="a worker has qllm .* and the study is run by qllm 0.0.1"):
        _on_worker("0.0.1", len, ())


def test_threads_of_a_worker_are_not_used_twice() -> None:
    turns, used, most = _Turns(), 0, 0
    lock = threading.Lock()

    def work(count: int) -> None:
        nonlocal used, most
        with turns.take(count, 4):
            with lock:
                used += count
                most = max(most, used)
            time.sleep(0.01)
            with lock:
                used -= count

    threads = [threading.Thread(target=work, args=(1 + i % 4,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert used == 0 and 0 < most <= 4


@pytest.mark.parametrize(("threads", "limit", "cut"), [(1, 4, 1), (8, 4, 4), (None, 4, 4)])
def test_a_cell_takes_no_more_threads_than_its_worker(
    threads: int | None, limit: int, cut: int
) -> None:
    task = Task(replace(TINY, threads=threads), "demo:llama", "bf16")
    assert _in_turn(limit, lambda task: task.design.threads, task) == cut
    null = Task(replace(TINY, threads=threads), "demo:llama", "null")
    assert _in_turn(limit, lambda task: task.design.arm("null").threads, null) == 2


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    """One line, no traceback, and the cells that were finished."""
    path, out = tmp_path / "design.json", tmp_path / "out"
    long = replace(TINY, lengths=(200,), seeds=tuple(range(40)), ignore_eos=True)
    path.write_text(long.to_json())
    words = [sys.executable, "-m", "qllm", "study", "--profile", str(path), "--out", str(out),
             "--workers", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stderr is not None
    try:
        while "1/" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.3)  # the other two cells have begun
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
        printed, err = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (process.returncode, printed) == (130, ""), err
    assert err.splitlines()[-1].startswith("qllm: interrupted; what is finished lies in")
    assert "Traceback" not in err
    assert [file.name for file in (out / "cells").iterdir()] == ["0-0-demo-llama-bf16.json.gz"]


def test_a_worker_that_loses_its_scheduler_does_not_print(capfd: pytest.CaptureFixture[str]) -> None:
    """A heartbeat under way while Ctrl-C ended the scheduler was logged, with a traceback."""
    with cluster(workers=1) as executor:
        lost = logging.getLogger("distributed.worker").error
        executor.submit(lost, "Failed to communicate with scheduler during heartbeat.").result()
    assert capfd.readouterr().err == ""


def test_a_ctrl_c_that_falls_into_a_destructor_is_not_lost(tmp_path: Path) -> None:
    """Python prints such a KeyboardInterrupt and goes on."""

    class Loud:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    class Slow(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            if submitted:
                return Future()  # which never ends
            submitted.append(Loud())
            return super().submit(fn, *args, **kwargs)

    submitted: list[Loud] = []
    hooked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", hooked.append)
        events: list[str] = []

        def listen(event: Any) -> None:
            events.append(event.text)
            if event.ended and submitted:
                submitted[0] = None  # type: ignore[call-overload]

        with pytest.raises(KeyboardInterrupt), Slow(1) as executor:
            run(TINY, out=tmp_path / "out", executor=executor, progress=listen)
    assert len(hooked) == 1 and hooked[0].exc_type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
