"""From a design to a folder of results: cells, each written as soon as it is done, then tables,
pictures and the report, made anew from the cells every time.

A cell is a model in an arm. The reference of a model comes first, since its samples are read by the
other arms; speed comes last, when nothing else runs. Everything after the cells is a function of
their files, so a run that was interrupted and resumed ends in the same tables.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import QllmError, QllmFileError, QllmUnsupportedError, QllmValueError
from ..saving import folder_path
from ..strict_json import read_object
from .arms import ForeignArm, load_own
from .cells import SPEED, OwnText, Task, cell_body, compute, own_texts
from .design import MAX_DESIGN_BYTES, Design, differences, resolve
from .files import (
    DamagedCell,
    clear,
    read_cell,
    remove_partials,
    write_cell,
    write_text,
)
from .foreign import Live
from .plan import Need, fitted, outline, sizes_of
from .progress import Event, Listener, Pace, listening

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from .result import Study

INTERRUPT_SECONDS = 1.0
"""How often a run that waits for an executor looks for a Ctrl-C that was lost."""

PACKAGES = ("pandas", "pyarrow", "scipy", "matplotlib", "tqdm")
"""What a study needs beside NumPy."""


def run(
    design_or_profile: Design | str | Mapping[str, Any] | os.PathLike[str] = "smoke",
    models: str | os.PathLike[str] | Iterable[str] | None = None,
    out: str | os.PathLike[str] = "qllm-study",
    *,
    executor: Executor | None = None,
    progress: bool | Listener | None = None,
    fresh: bool = False,
    live: Mapping[str, Any] | None = None,
) -> Study:
    """Runs a study, or what is left of it, and returns its results.

    `design_or_profile`: a `Design`, the name of a profile, a mapping of design entries or the path
    of a TOML or JSON file. `models` replaces the design's models (names, folders, `demo:llama`).
    `out`: the folder for the results; when it holds a part of the same study, only the rest is
    computed, a damaged cell being named and computed again; when it holds another study that is
    refused, unless `fresh` says to begin anew. `executor`: cells go through its `submit` (any
    concurrent.futures.Executor, or that of `cluster`); without one they run here one after the
    other, with the same results, byte for byte. `progress`: True for a bar or lines on stderr, or a
    callable which takes an `Event`. `live`: for every arm whose source is "live", by name, an
    object with `logits(ids)`, which takes a list of token ids and gives the logits after each,
    (n, vocab) float32, of the one model of the design. Such arms are computed in this process, and
    their cells are known by the arm's name alone: begin anew when the object changes.

    A cell whose models and batch do not fit into the free memory of where it runs is computed in
    smaller batches, which changes nothing in what comes out, or refused with its sizes.

    Raises `QllmValueError` for a design that cannot be and `QllmFileError` for models or folders
    that cannot be used, both before any work; `QllmFileError` when the disk is full and
    `QllmMemoryError` when a cell does not fit, with what is finished left as it is.
    """
    design = resolve(design_or_profile, models)
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise QllmValueError(
            f"executor must have the method submit of concurrent.futures.Executor; a"
            f" {type(executor).__name__} has not"
        )
    live = _checked_live(design, {} if live is None else live)
    require_packages()
    folder = folder_path(out)
    with listening(progress) as tell:
        manifest = _manifest(design)
        _prepare(folder, design, manifest, fresh)
        work = _Work(folder, design, manifest, tell, live)
        work.do(executor)
        return _finish(work)


def _checked_live(design: Design, live: Mapping[str, Any]) -> Mapping[str, Any]:
    """The objects of live arms, one for each."""
    names = [arm.name for arm in design.arms if arm.source == "live"]
    for name in names:
        if not callable(getattr(live.get(name), "logits", None)):
            raise QllmValueError(
                f"arm {name!r} is live, so run(..., live={{{name!r}: ...}}) must give an object"
                " with the method logits(ids) for it"
            )
    for name in live:
        if name not in names:
            raise QllmValueError(
                f"live has {name!r}, but no arm of that name has the source live"
            )
    if names and len(design.models) > 1:
        raise QllmValueError(
            f"arm {names[0]!r} is one live model, but the design has {len(design.models)} models;"
            " study them one by one"
        )
    return live


def require_packages() -> None:
    """Raises `QllmUnsupportedError` with the command that installs what is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise QllmUnsupportedError(
            f"a study needs {', '.join(missing)}, which this Python has not:"
            " pip install 'qllm[study]'"
        )


def version() -> str:
    """The version of qllm, as the package says it."""
    import qllm

    if isinstance(found := getattr(qllm, "__version__", None), str):
        return found
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("qllm")
    except PackageNotFoundError:
        return "unknown"


def _manifest(design: Design) -> dict[str, Any]:
    """Under what a study stands: versions, hashes, seeds. Opens every model, so that one which is
    missing is refused before any work."""
    models = {}
    for name in design.models:
        with Checkpoint.open(name) as checkpoint:
            models[name] = {
                "files": {**_other_files(checkpoint), **checkpoint.sha256()},
                "architecture": checkpoint.config.get("model_type"),
            }
    return {
        "qllm": version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "design_sha256": hashlib.sha256(design.to_json().encode()).hexdigest(),
        "prompts_sha256": design.prompt_hash(),
        "seeds": list(design.seeds),
        "models": models,
        "arms": {
            arm.name: {"files": _arm_files(Path(arm.path))}
            for arm in design.arms
            if arm.path is not None
        },
    }


def _arm_files(path: Path) -> dict[str, str]:
    """SHA-256 of what an arm of its own path is made of: a file, or the configuration, weights and
    tokenizer in a folder; nothing for a name on the hub."""
    files = [path] if path.is_file() else []
    if path.is_dir():
        kinds = (".json", ".safetensors")
        files = [file for file in sorted(path.iterdir()) if file.suffix in kinds]
    digests = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                digest = hashlib.sha256()
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        except OSError as error:
            raise QllmFileError(f"{file} cannot be read: {error.strerror}") from None
        digests[file.name] = digest.hexdigest()
    return digests


def _other_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of the configuration and the tokenizer."""
    digests = {}
    for path in (checkpoint.folder / "config.json", checkpoint.tokenizer_file):
        if path is not None:
            try:
                digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise QllmFileError(f"{path} cannot be read: {error.strerror}") from None
    return digests


def _prepare(folder: Path, design: Design, manifest: Mapping[str, Any], fresh: bool) -> None:
    """Makes the folder ready for this study, or says why it cannot be."""
    try:
        if folder.exists() and not folder.is_dir():
            raise QllmFileError(f"{folder} is a file; a study needs a folder for its results")
        folder.mkdir(parents=True, exist_ok=True)
        strange = any(folder.iterdir())
    except QllmError:
        raise
    except OSError as error:
        raise QllmFileError(f"{folder} cannot be used: {error.strerror or error}") from None
    remove_partials(folder)
    known = (folder / "design.json").is_file()
    if strange and not known and any(folder.iterdir()):
        raise QllmFileError(
            f"{folder} is not empty and holds no study; name another folder, or a new one"
        )
    if fresh:
        clear(folder)
    elif known:
        _require_same(folder, design, manifest)
    write_text(folder / "design.json", design.to_json())


def _require_same(folder: Path, design: Design, manifest: Mapping[str, Any]) -> None:
    """Raises when the folder's study is not this one, naming what differs."""
    way_out = "name another folder, or begin anew with fresh=True (--fresh)"
    changed = differences(read_object(folder / "design.json", MAX_DESIGN_BYTES), design.to_dict())
    if changed:
        raise QllmFileError(
            f"{folder} holds a study of another design: {'; '.join(changed)}; {way_out}"
        )
    path = folder / "manifest.json"
    if not path.is_file():
        return
    old = read_object(path, MAX_DESIGN_BYTES)
    if old.get("qllm") != manifest["qllm"]:
        raise QllmFileError(
            f"{folder} holds a study of qllm {old.get('qllm')}, and this is {manifest['qllm']};"
            f" {way_out}"
        )
    for kind in ("models", "arms"):
        found = old.get(kind)
        for name, entry in manifest[kind].items():
            before = found.get(name, {}).get("files", {}) if isinstance(found, dict) else {}
            _require_same_files(folder, name, before, entry["files"], way_out)


def _require_same_files(
    folder: Path, name: str, before: Mapping[str, Any], now: Mapping[str, str], way_out: str
) -> None:
    for file, digest in now.items():
        if before.get(file) != digest:
            raise QllmFileError(
                f"{folder} holds a study of another {name}: the SHA-256 of {file} was"
                f" {str(before.get(file))[:16]}... and is {digest[:16]}...; {way_out}"
            )


class _Work:
    """The cells of a study: which are there, which are to be computed, in which order."""

    def __init__(
        self,
        folder: Path,
        design: Design,
        manifest: dict[str, Any],
        tell: Listener,
        live: Mapping[str, Any],
    ) -> None:
        self.folder, self.design, self.manifest, self.tell = folder, design, manifest, tell
        self.live = live
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        self.keys = cell_keys(design)
        self.total = len(self.keys) + 2  # tables; pictures and report
        self.steps = 0
        self.plan = outline(design, sizes_of(design))
        self.costs = {(cell.model, cell.arm): cell for cell in self.plan.cells}
        self.pace = Pace(self.plan.tokens)

    def do(self, executor: Executor | None) -> None:
        """Reads the cells that are there, and computes and writes the others."""
        _write_manifest(self.folder, self.manifest)
        for key in self.keys:
            try:
                body = read_cell(self._path(key), self._fingerprint(key))
            except DamagedCell as error:
                self.notice(f"{error}; it is computed again")
                continue
            if body is not None:
                self.done[key] = body
                self.pace.skip(self.costs[key].tokens)
                self.step(f"{_label(key)}: was there")
        if len(self.done) < len(self.keys):
            self.notice(self.plan.memory)
        references = [key for key in self.keys if key[1] == self.design.reference.name]
        for stage in (
            references,
            [key for key in self.keys if key not in references and key[1] != SPEED],
            *([key] for key in self.keys if key[1] == SPEED),
        ):
            missing = [key for key in stage if key not in self.done]
            tasks = [(self._task(key), self.costs[key].need) for key in missing]
            here = [task for task, _ in tasks if task.arm in self.live]
            elsewhere = [item for item in tasks if item[0].arm not in self.live]
            for found in (_computed(elsewhere, executor), self._computed_live(here)):
                for task, body, seconds in found:
                    self._keep(task, body, seconds)

    def _keep(self, task: Task, body: dict[str, Any], seconds: float) -> None:
        """Writes a cell that was computed."""
        key = (task.model, task.arm)
        write_cell(self._path(key), self._fingerprint(key), body)
        self.done[key] = body
        self.pace.work(self.costs[key].tokens)
        self.step(f"{_label(key)}: {seconds:.1f} s")

    def _computed_live(
        self, tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, dict[str, Any], float]]:
        """The cells of arms that are objects of this process."""
        for task in tasks:
            start = time.monotonic()
            design, arm = task.design, task.design.arm(task.arm)
            reference = load_own(task.model, design.reference, design)
            source = Live(arm, self.live[arm.name], reference.vocab)
            body = cell_body(task, ForeignArm(source, design, arm, reference), reference)
            yield task, body, time.monotonic() - start

    def _task(self, key: tuple[str, str]) -> Task:
        model, arm = key
        own: tuple[OwnText, ...] = ()
        if arm not in (SPEED, self.design.reference.name):
            own = own_texts(self.design, self.done[model, self.design.reference.name])
        return Task(self.design, model, arm, own)

    def _path(self, key: tuple[str, str]) -> Path:
        return self.folder / "cells" / cell_name(self.design, *key)

    def _fingerprint(self, key: tuple[str, str]) -> str:
        return fingerprint(self.manifest, *key)

    def step(self, text: str) -> None:
        """Tells that one more step is done."""
        self.steps += 1
        self._tell(text, notice=False)

    def notice(self, text: str) -> None:
        """Tells something that is no step."""
        self._tell(text, notice=True)

    def _tell(self, text: str, notice: bool) -> None:
        pace = self.pace
        self.tell(
            Event(
                self.steps,
                self.total,
                text,
                notice,
                pace.tokens,
                pace.total,
                pace.seconds_left(),
            )
        )


def cell_keys(design: Design) -> list[tuple[str, str]]:
    """(model, arm) of every cell, the last of a model being `SPEED` when speed is measured."""
    last = [] if design.speed is None else [SPEED]
    return [
        (model, arm)
        for model in design.models
        for arm in [*(arm.name for arm in design.arms), *last]
    ]


def cell_name(design: Design, model: str, arm: str) -> str:
    """The name of a cell's file: places in the design keep names apart that are alike."""
    place = [item.name for item in design.arms].index(arm) if arm != SPEED else "t"
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{os.path.basename(model.rstrip('/'))}--{arm}")
    return f"{design.models.index(model)}-{place}-{words[:80]}.json.gz"


def fingerprint(manifest: Mapping[str, Any], model: str, arm: str) -> str:
    """What a cell depends on, as one SHA-256: design, model files, version."""
    parts = [
        manifest["design_sha256"],
        manifest["models"][model]["files"],
        manifest["arms"].get(arm, {}).get("files", {}),
        manifest["qllm"],
        model,
        arm,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _label(key: tuple[str, str]) -> str:
    return f"{key[0]} {key[1]}"


def _computed(
    tasks: list[tuple[Task, Need]], executor: Executor | None
) -> Iterator[tuple[Task, dict[str, Any], float]]:
    """Each task with its body and its seconds, as they are done: here one by one, or by the
    executor in any order. When one fails, those that are done come first and then its error."""
    if executor is None:
        for task, need in tasks:
            body, seconds = _timed_compute(task, need)
            yield task, body, seconds
        return
    futures = {_submitted(executor, task, need): task for task, need in tasks}
    failure: BaseException | None = None
    waiting = set(futures)
    try:
        with _interrupts() as interrupted:
            while waiting and failure is None and not interrupted():
                ready, waiting = wait(waiting, INTERRUPT_SECONDS, FIRST_COMPLETED)
                for future in ready:
                    if (error := future.exception()) is not None:
                        failure = failure or _named(error, futures[future])
                    else:
                        yield futures[future], *future.result()
            if interrupted():
                raise KeyboardInterrupt
    finally:
        for future in waiting:
            future.cancel()
    if failure is not None:
        raise failure


def _submitted(executor: Executor, task: Task, need: Need) -> Future[Any]:
    """The future of a task. A pool that lost a process meanwhile takes no more tasks; that is the
    task's failure then, so that what was done before comes first."""
    try:
        return executor.submit(_timed_compute, task, need)
    except BrokenExecutor as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C. Python drops a KeyboardInterrupt that falls into a callback or a
    destructor, of which Dask's futures have many; so it is remembered, too."""
    seen = False

    def handler(number: int, frame: object) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False  # whoever handles it otherwise knows what to do
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _named(error: BaseException, task: Task) -> BaseException:
    """The error of a cell; for a worker that has ended, one sentence which says so."""
    if type(error).__name__ not in ("KilledWorker", "BrokenProcessPool", "BrokenThreadPool"):
        return error
    lost = QllmError(
        f"the process that computed {task.model} {task.arm} has ended, and again where that was"
        " tried: often memory is too small for as many cells at a time; what is finished stays, and"
        " the same call goes on from there"
    )
    lost.__cause__ = error
    return lost


def _timed_compute(task: Task, need: Need) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    if task.design.lockstep:
        from .lockstep import compute_lockstep

        body = compute_lockstep(fitted(task, need))
    else:
        body = compute(fitted(task, need))
    return body, time.monotonic() - start


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _finish(work: _Work) -> Study:
    """Tables, pictures and report from the cells."""
    from .play_file import play_data, write_play
    from .report import write_report
    from .result import Study
    from .tables import make_tables, write_tables

    environments = {
        f"{model} {arm}": body["environment"] for (model, arm), body in work.done.items()
    }
    work.manifest["environments"] = {key: environments[key] for key in sorted(environments)}
    _write_manifest(work.folder, work.manifest)
    tables = make_tables(work.design, work.done)
    write_tables(work.folder / "tables", tables)
    write_play(work.folder, play_data(work.design, work.done))
    work.step("tables")
    study = Study(work.folder, work.design, work.manifest, tables)
    write_report(study)
    work.step("pictures and report")
    return study


__all__ = ["cell_keys", "cell_name", "fingerprint", "run", "version"]
