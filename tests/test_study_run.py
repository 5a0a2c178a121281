"""How a study runs: what it tells, what it will cost, memory, disks that fill up, executors, and
kills at any moment."""

from __future__ import annotations

import errno
import importlib
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from small_studies import SMALL, TINY

import qllm
from qllm.cli import main
from qllm.errors import QllmError, QllmFileError, QllmMemoryError
from qllm.study import Arm, Event, plan, run
from qllm.study.cells import SPEED, Task
from qllm.study.files import read_cell
from qllm.study.progress import Pace, duration

planning = importlib.import_module("qllm.study.plan")  # `qllm.study.plan` is its function

FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed tiny study."""
    folder = tmp_path_factory.mktemp("tiny") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qllm.study.report.write_plots", lambda study, folder: {})
        run(TINY, out=folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of tables and cells, those of speed left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for part in ("tables", "cells")
        for path in sorted((folder / part).iterdir())
        if "speed" not in path.name
    }


# ------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (7230, "2 h"),
        (100_000, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pace_leaves_out_what_was_done_before() -> None:
    now = [0.0]
    pace = Pace(1000, clock=lambda: now[0])
    now[0] = 50.0  # reading cells that are there takes time, too
    pace.skip(400)
    assert pace.seconds_left() is None
    now[0] = 60.0
    pace.work(100)
    assert pace.tokens == 500 and pace.seconds_left() == 50.0  # 100 in 10 s, 500 to go
    assert pace.seconds_left(under_way=100) == 20.0
    now[0] = 70.0
    pace.work(500)
    assert pace.seconds_left() == 0.0


def test_events_count_tokens(tmp_path: Path, tiny: Path) -> None:
    seen: list[Event] = []
    run(TINY, out=tmp_path / "out", progress=seen.append)
    steps = [event for event in seen if event.ended and not event.notice]
    assert [event.done for event in steps] == [1, 2, 3, 4, 5]
    tokens = [event.tokens for event in steps]
    assert tokens == sorted(tokens) and tokens[0] > 0
    costs = [cell.tokens for cell in plan(TINY).cells]
    assert tokens[:3] == [sum(costs[: i + 1]) for i in range(3)]
    assert {event.total_tokens for event in steps} == {sum(costs)} == {tokens[-1]}
    assert all(event.seconds_left is not None for event in steps)
    notes = [event.text for event in seen if event.notice]
    assert len(notes) == 1 and notes[0].startswith("memory: ")


def test_lines_say_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TINY, out=tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert "note: memory: " in lines[0]
    assert re.search(
        r"1/5: demo:llama bf16: [\d.]+ s \(\d+ % of [\d,]+ tokens, about .* left\)$", lines[1]
    )
    assert "(100 % of" in lines[-1] and "left" not in lines[-1]


# ------------------------------------------------------------------------------------ the plan


def test_tokens_are_those_which_are_generated() -> None:
    """With ignore_eos every text has its full length, and the plan is exact."""
    from qllm.study import cells

    design = replace(
        TINY, ignore_eos=True, top_k=(0, 5), lengths=(3, 5), seeds=(1, 2)
    )
    drawn: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = qllm.Model.generate_batch

        def counting(model: Any, requests: Any, **options: Any) -> Any:
            found = real(model, requests, **options)
            drawn.append(sum(len(item.ids) for item in found))
            return found

        patch.setattr(qllm.Model, "generate_batch", counting)
        cells.compute(Task(design, "demo:llama", "bf16"))
    found = planning.outline(design, planning.sizes_of(design)).cells[0]
    # 2 prompts: one greedy text each, and at one temperature 2 top_k x 2 seeds; one to play with
    assert found.generated == sum(drawn) == 2 * 5 * (1 + 4 + 1)


@pytest.mark.parametrize("name", ["demo:llama", "demo:falcon"])
def test_weights_are_those_of_the_decoder(name: str) -> None:
    model = qllm.Model.from_pretrained(name)
    size = planning.ModelSize.of(name, TINY)
    assert size.vocab == model.info().vocab and size.parameters == model.info().parameters
    assert size.prompts == {text.id: len(model.encode(text.text)) for text in TINY.prompts}
    for head in (False, True):
        for format in FORMATS:
            model.quantize_("original")
            model.quantize_(format, quantize_head=head)
            held = model.decoder.nbytes()
            real = held["weights"] + held["embedding"]
            assert size.weight_bytes(format, 64, head) == pytest.approx(real, rel=0.02), format


def test_keys_and_values_are_bounded() -> None:
    design = replace(SMALL, batch_size=16, lengths=(40,), ignore_eos=True)
    size = planning.ModelSize.of("demo:llama", design)
    need = planning.cell_plan(design, size, "bf16").need
    model = qllm.Model.from_pretrained("demo:llama")
    most = 0

    def look(finished: int, total: int) -> None:
        nonlocal most
        most = max(most, model.decoder.nbytes()["kv_cache"])

    config = qllm.GenerationConfig(ignore_eos=True)
    requests = [
        qllm.generation.Request(
            text.text, config.replace(max_new_tokens=40 - seed % 3, seed=seed)
        )
        for text in design.prompts
        for seed in range(12)
    ]
    model.generate_batch(requests, batch_size=16, progress=look)
    assert 0 < most <= need.kv <= 6 * most


def test_a_plan_prints_and_computes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qllm.study import runner

    path = tmp_path / "tiny.json"
    path.write_text(replace(SMALL, models=("demo:llama",)).to_json())
    monkeypatch.setattr(runner, "compute", None)
    assert main(["study", "--profile", str(path), "--dry-run", "--workers", "2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    cells = len(SMALL.arms) + 1
    assert captured.err == "" and lines[0].split() == ["model", "arm", "tokens", "time", "memory"]
    assert [line.split()[1] for line in lines[1 : cells + 1]] == [
        *(arm.name for arm in SMALL.arms),
        SPEED,
    ]
    assert re.fullmatch(rf"{cells} cells, at most [\d,]+ tokens", lines[cells + 1])
    assert re.fullmatch(
        r"time: about .* on 2 workers \(demo:llama by a short run\)", lines[cells + 2]
    )
    assert lines[cells + 3].startswith("memory: ") and "for 2 cells at a time" in lines[cells + 3]
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.json"]


def test_large_models_are_reckoned_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBED_BYTES", 0)
    monkeypatch.setattr(planning, "probed", None)
    found = plan(TINY)
    assert found.seconds is not None and found.seconds > 0
    assert "demo:llama by its size" in str(found)
    frame = found.to_frame()
    assert list(frame["arm"]) == [arm.name for arm in TINY.arms]
    assert (frame["bytes"] == frame["weights"] + frame["kv"] + frame["logits"]).all()
    assert frame["weights"][1] > frame["weights"][0]  # nf4 and the reference
    assert "memory: " in found._repr_html_()


def test_study_needs_a_folder_unless_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 2
    assert "needs --out DIR" in capsys.readouterr().err
    assert main(["study", "--out", "x", "--workers", "2", "--dask", "tcp://x:1"]) == 2
    assert "--workers has no meaning" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- memory


def test_batches_shrink_to_the_memory_that_is_free(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that comes out changes."""
    from qllm.study import arms

    needs = [cell.need for cell in planning.outline(TINY, planning.sizes_of(TINY)).cells]
    need = max(needs, key=lambda need: need.bytes)
    room = replace(need, rows=1).bytes
    monkeypatch.setattr(planning, "available_memory", lambda: int(room / planning.SHARE) + 1)
    sizes = []
    real = arms.OwnArm.generate

    def generate(self: Any, requests: Any) -> Any:
        sizes.append(self.arm.batch_size or self.design.batch_size)
        return real(self, requests)

    monkeypatch.setattr(arms.OwnArm, "generate", generate)
    run(TINY, out=tmp_path / "out")
    assert min(sizes) == 1
    assert contents(tmp_path / "out") == contents(tiny)


def test_a_cell_that_does_not_fit_is_refused_with_its_sizes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = planning.outline(TINY, planning.sizes_of(TINY)).cells
    room = cells[0].need.bytes  # the reference alone fits
    monkeypatch.setattr(planning, "available_memory", lambda: int(room / planning.SHARE) + 1)
    with pytest.raises(
        QllmMemoryError,
        match=r"demo:llama nf4 needs [\d.]+ MiB of memory even in batches of one \(weights",
    ):
        run(TINY, out=tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    monkeypatch.setattr(planning, "available_memory", lambda: None)
    run(TINY, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny)


def test_available_memory_is_what_the_system_says() -> None:
    found = planning.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


def test_limits_of_a_task() -> None:
    arms = ("bf16", Arm("null", "bf16", role="null", batch_size=40, threads=4))
    task = Task(replace(TINY, arms=arms, threads=None, batch_size=32), "demo:llama", "null")
    cut = planning.limited(task, threads=2, batch_size=8).design
    assert (cut.threads, cut.batch_size) == (2, 8)
    assert [(arm.threads, arm.batch_size) for arm in cut.arms] == [(None, None), (4, 8)]
    assert planning.limited(task) == task
    assert planning.limited(task, threads=99, batch_size=99).design.batch_size == 32


# ------------------------------------------------------------------------------------- failures


def test_a_full_disk_is_named_at_every_write(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th write of a run fails, for rising n, all in one folder, until one run ends."""
    from qllm.study import files

    folder, real = tmp_path / "out", os.fsync
    left = [0]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    said = []
    for count in (1, 3, 5, 6, 7, 9, 11, 12, 13, 15, 20, 40):
        left[0] = count
        with pytest.raises(QllmFileError) as info:
            run(TINY, out=folder)
        said.append(str(info.value))
        assert "\n" not in said[-1] and not list(folder.rglob("*.partial"))
        assert said[-1].endswith(
            "cannot be written: No space left on device; what is finished stays, and the same call"
            " goes on once there is room"
        )
    named = {Path(text.split(" cannot be")[0]).name for text in said}
    assert {"design.json", "manifest.json"} <= named
    assert any(name.endswith(".json.gz") for name in named)
    assert any(name.endswith((".csv", ".parquet")) for name in named)
    left[0] = 0
    run(TINY, out=folder)
    assert contents(folder) == contents(tiny)


def test_other_files_of_an_arm_are_seen(tmp_path: Path) -> None:
    """An arm with a path of its own stands in the manifest by the digests of its files."""
    import shutil

    from qllm.study import runner

    other = tmp_path / "other"
    shutil.copytree(qllm.checkpoint.Checkpoint.open("demo:llama").folder, other)
    arms = ("bf16", Arm("other", "nf4", path=str(other)))
    design = replace(TINY, arms=arms)
    run(design, out=tmp_path / "out")
    files = runner._manifest(design)["arms"]["other"]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    config = other / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(QllmFileError, match="another other: the SHA-256 of config.json"):
        run(design, out=tmp_path / "out")


# ------------------------------------------------------------------------------------ executors


def test_threads_give_the_same_bytes(tmp_path: Path, tiny: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        run(TINY, out=tmp_path / "out", executor=executor)
    assert contents(tmp_path / "out") == contents(tiny)


class Dying(Executor):
    """Lets the process that works end itself, at the first task whose marker is not there."""

    def __init__(self, inner: Executor, marker: Path) -> None:
        self.inner, self.marker = inner, marker

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.inner.submit(die_once, str(self.marker), fn, *args, **kwargs)


def die_once(marker: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), but the first process that comes here with an arm's cell is killed."""
    if any(isinstance(item, Task) and item.arm == "nf4" for item in args):
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), 9)
    return fn(*args, **kwargs)


def test_a_process_that_ends_is_named_and_the_rest_stays(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "out"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        with pytest.raises(QllmError, match="the process that computed demo:llama .* has ended"):
            run(TINY, out=folder, executor=Dying(executor, tmp_path / "marker"))
    assert len(list((folder / "cells").iterdir())) == 1
    run(TINY, out=folder)
    assert contents(folder) == contents(tiny)


def test_a_process_may_end_before_all_cells_are_submitted(tmp_path: Path) -> None:
    """The pool then refused the rest, and its own error came out; what was done was lost."""

    class Broken(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            if done:
                wait(done)
                raise BrokenProcessPool
            done.append(super().submit(fn, *args, **kwargs))
            return done[0]

    done: list[Future[Any]] = []
    with Broken(1) as executor:
        with pytest.raises(QllmError, match="the process that computed demo:llama .* has ended"):
            run(TINY, out=tmp_path / "out", executor=executor)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


# ---------------------------------------------------------------------------------------- kills

RUN = (
    "import sys\n"
    "from qllm.study import report, run\n"
    "from qllm.study.design import resolve\n"
    "if sys.argv[3] == 'plain':\n"
    "    report.write_plots = lambda study, folder: {}\n"
    "run(resolve(sys.argv[1]), out=sys.argv[2], progress=True)\n"
)


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """QLLM_KILLS kills (4 unless set), QLLM_KILLS_DESIGN a profile or a file (unless set the tiny
    study, without pictures), QLLM_KILLS_SEED of the moments. A killed run is started again in its
    folder until one ends; then its tables are compared, and a new folder is begun."""
    kills = int(os.environ.get("QLLM_KILLS", "4"))
    design = os.environ.get("QLLM_KILLS_DESIGN")
    rng = random.Random(int(os.environ.get("QLLM_KILLS_SEED", "1")))
    if design is None:
        design = str(tmp_path / "tiny.json")
        Path(design).write_text(TINY.to_json())
    pictures = "plain" if "QLLM_KILLS_DESIGN" not in os.environ else "pictures"
    log = tmp_path / "log"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", RUN, design, str(folder), pictures]
        return subprocess.Popen(words, stderr=open(log, "wb"))

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait(600) == 0, log.read_text()
    took = time.monotonic() - begin
    whole = contents(tmp_path / "whole")
    folders, done, moments = 0, 0, []
    while done < kills or folders == 0:
        folder = tmp_path / f"out-{folders}"
        process = start(folder)
        try:
            # when all are killed, the last run goes to its end
            process.wait(rng.uniform(0.1, took) if done < kills else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -9
            done += 1
            moments.append(len(list((folder / "cells").glob("*.gz"))) if folder.exists() else -1)
            continue
        assert process.returncode == 0, log.read_text()
        assert "damaged" not in log.read_text()
        assert contents(folder) == whole
        folders += 1
        took *= 0.9  # the machine has become faster, and moments behind the end kill nothing
    print(f"{done} kills in {folders} studies of {took:.1f} s; cells there: {moments}")
    assert done == kills
