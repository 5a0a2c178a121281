"""Cells in several processes or on several machines, by dask.distributed.

Dask moves tasks and survives workers that are lost; this module sees to it that a worker's threads
are not used twice, and that every worker runs the same qllm. Files are written by the process that
runs the study alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from .. import __version__, _core
from ..errors import QllmError, QllmUnsupportedError, QllmValueError
from ..strict_json import quoted

CONNECT_SECONDS = 20
"""How long a scheduler may take to answer."""


class DaskExecutor(Executor):
    """An executor over a `dask.distributed.Client`, which stays the caller's."""

    def __init__(self, client: Any) -> None:
        self._executor = client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of fn(*args, **kwargs) on some worker."""
        future: Future[Any] = self._executor.submit(_on_worker, __version__, fn, *args, **kwargs)
        return future


@contextmanager
def cluster(
    address: str | None = None, *, workers: int | None = None, threads: int | None = 1
) -> Iterator[DaskExecutor]:
    """An executor for `run`: over the Dask cluster whose scheduler is at `address`, as in
    "tcp://10.0.0.1:8786", or over `workers` new processes on this machine, each for cells of
    `threads` threads (None: its share of the machine). What was started is ended with the block.

    On a worker of n threads, the threads of the cells that run at a time add up to at most n, and a
    cell that asks for more, or for all, gets n.

    Raises `QllmUnsupportedError` without dask.distributed, `QllmError` when no scheduler answers,
    `QllmValueError` for arguments.
    """
    if (address is None) == (workers is None):
        raise QllmValueError("a cluster is given by an address or by a number of workers")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise QllmValueError(f"workers is {quoted(workers)}; a whole number from 1 was expected")
    if importlib.util.find_spec("distributed") is None:
        raise QllmUnsupportedError(
            "several workers need dask.distributed, which this Python has not:"
            " pip install 'qllm[dask]'"
        )
    distributed: Any = importlib.import_module("distributed")
    if address is not None:
        try:
            client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            reason = str(error).split("\n", 1)[0]
            raise QllmError(f"no Dask scheduler answers at {quoted(address)}: {reason}") from None
        with client:
            yield DaskExecutor(client)
        return
    share = threads or max(1, int(_core.cpu_info()["threads_available"]) // (workers or 1))
    with _without_interrupts():
        local = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=share,
            processes=True,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # mapped files of models would count; plan.py bounds what cells take
            # Errors of cells come back as exceptions; what else workers log as an error is that
            # they lost the scheduler, as when Ctrl-C ends both.
            silence_logs=logging.CRITICAL,
        )
    with local, distributed.Client(local, set_as_default=False) as client:
        yield DaskExecutor(client)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Lets processes that are started meanwhile ignore the terminal's Ctrl-C: it is for the process
    that runs the study, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Turns:
    """Hands out the threads of this worker process, in the order of asking."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._used = 0

    @contextmanager
    def take(self, count: int, limit: int) -> Iterator[None]:
        """Waits until `count` of `limit` threads are free, and holds them."""
        with self._changed:
            self._changed.wait_for(lambda: self._used + count <= limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


_TURNS = _Turns()


def _on_worker(version: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), with cells among the arguments cut to the threads of this worker."""
    distributed: Any = importlib.import_module("distributed")
    if version != __version__:
        raise QllmError(
            f"a worker has qllm {__version__} and the study is run by qllm {version};"
            " install the same version on both"
        )
    limit = max(1, int(distributed.get_worker().state.nthreads))
    return _in_turn(limit, fn, *args, **kwargs)


def _in_turn(limit: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    from .cells import SPEED, Task
    from .plan import limited

    count, cut = 1, []
    for argument in args:
        if isinstance(argument, Task):
            argument = limited(argument, threads=limit)
            own = argument.design.arm(argument.arm).threads if argument.arm != SPEED else None
            count = min(own or argument.design.threads or 1, limit)
        cut.append(argument)
    with _TURNS.take(count, limit):
        return fn(*cut, **kwargs)
