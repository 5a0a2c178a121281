"""Studies on the built-in models: what a run leaves, how it resumes, what its report says."""

import gzip
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from small_studies import SMALL, TINY

from qllm.errors import QllmFileError, QllmValueError
from qllm.study import Arm, Design, Study, Text, load, run
from qllm.study.prompts import PASSAGES
from qllm.study.statistics import Intervals
from qllm.study.tables import TABLES


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run(SMALL, out=tmp_path_factory.mktemp("study") / "out")


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of tables alone."""
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The files of an uninterrupted tiny study."""
    folder = tmp_path_factory.mktemp("tiny") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qllm.study.report.write_plots", lambda study, folder: {})
        run(TINY, out=folder)
    return folder


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    """Bytes of the files that must be the same in every run, or of some of the folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for part in parts or ("tables", "cells")
        for path in sorted((folder / part).iterdir())
        if not path.name.startswith("speed") and "speed" not in path.name
    }


# --------------------------------------------------------------------------------- what it finds


def test_null_arm_is_exactly_zero_in_every_measure(study):
    checks = study.tables["checks"]
    assert len(checks) == 2 * 14
    assert (checks["largest_difference"] == 0).all() and checks["exactly_zero"].all()
    texts = study.tables["texts"].query("arm == 'null'")
    for name in (
        "kl",
        "kl_reverse",
        "tv",
        "disagreement",
        "delta_p",
        "delta_p_squared",
        "entropy_shift",
        "ln_ppl_ratio",
    ):
        assert (texts[name] == 0).all(), name
    assert (texts["same_top"] == 1).all()
    samples = study.tables["samples"].query("arm == 'null'")
    assert samples["equal"].all() and (
        study.tables["survival"].query("arm == 'null'")[["estimate", "low", "high"]] == 1
    ).all(axis=None)
    assert "exactly 0 in all 14 measures" in study.report.read_text()


def test_order_of_arms_by_mean_kl(study):
    summary = study.tables["summary"].query("source == 'all' and measure == 'kl_mean'")
    for model in study.design.models:
        kl = summary[summary["model"] == model].set_index("arm")["estimate"]
        assert 0 < kl["int8"] < kl["nf4"] <= kl["fp4"], model
        assert kl["int8"] < kl["nf4-dq"] and kl["int8"] < kl["fp4-dq"]


def test_measures_are_those_of_numpy(study):
    """A text of one arm, compared again here in float64: KL, TV, entropies, delta-p."""
    import qllm

    text, grid = SMALL.texts[0], np.asarray(SMALL.logit_temperatures)
    plain = qllm.Model.from_pretrained("demo:falcon", compute="exact")
    arm = qllm.Model.from_pretrained("demo:falcon", compute="exact")
    plain.quantize_("bf16")
    arm.quantize_("nf4")
    ids = plain.encode(text.text)
    targets = np.asarray(ids[1:])
    sides = [np.asarray(model.logits(ids[:-1]), np.float64) for model in (plain, arm)]
    found = (
        study.tables["texts"]
        .query(
            f"model == 'demo:falcon' and arm == 'nf4' and source == 'held' and text == '{text.id}'"
        )
        .set_index("temperature")
    )
    rows = np.arange(len(targets))
    for temperature in grid:
        logs = [
            side / temperature - np.logaddexp.reduce(side / temperature, axis=1)[:, None]
            for side in sides
        ]
        p, q = np.exp(logs[0]), np.exp(logs[1])
        row = found.loc[temperature]
        gap = logs[0] - logs[1]
        assert row["kl"] == pytest.approx((p * gap).sum(axis=1).mean(), rel=1e-6)
        assert row["kl_reverse"] == pytest.approx(-(q * gap).sum(axis=1).mean(), rel=1e-6)
        assert row["tv"] == pytest.approx(np.abs(p - q).sum(axis=1).mean() / 2, rel=1e-6)
        entropy = [-(side * log).sum(axis=1).mean() for side, log in zip((p, q), logs)]
        assert row["entropy_shift"] == pytest.approx(entropy[1] - entropy[0], rel=1e-6)
        change = q[rows, targets] - p[rows, targets]
        assert row["delta_p"] == pytest.approx(change.mean(), rel=1e-6)
        assert row["delta_p_squared"] == pytest.approx((change**2).mean(), rel=1e-6)
        if temperature == 1:
            gain = (logs[0] - logs[1])[rows, targets].mean()
            assert row["ln_ppl_ratio"] == pytest.approx(gain, abs=1e-6)
    same = (sides[0].argmax(axis=1) == sides[1].argmax(axis=1)).mean()
    assert found["same_top"].iloc[0] == same and found["tokens"].iloc[0] == len(targets)


def test_texts_share_their_noise(study):
    """At any temperature and in any arm, the first token is the argmax of logit + T * noise with
    noise that qllm.sample gives for the prompt's key."""
    import qllm

    model = qllm.Model.from_pretrained("demo:llama", "fp4", compute="exact")
    prompt = SMALL.prompts[1]
    wanted = model.generate(
        [prompt.text] * 3, temperature=[0.0, 0.5, 1.0], top_k=0, seed=2, max_new_tokens=8
    )
    for temperature, sample in zip((0.0, 0.5, 1.0), wanted):
        row = (
            study.tables["samples"]
            .query(
                f"model == 'demo:llama' and arm == 'fp4' and prompt == '{prompt.id}' and seed == 2"
                f" and temperature == {temperature}"
            )
            .iloc[0]
        )
        assert row["ids"] == " ".join(map(str, sample.ids)) and row["text"] == sample.text


def test_surprise_is_the_reference_score(study):
    import qllm

    model = qllm.Model.from_pretrained("demo:llama", compute="exact")
    row = study.tables["samples"].query("model == 'demo:llama' and arm == 'fp4'").iloc[-1]
    prompt = next(text for text in SMALL.prompts if text.id == row["prompt"])
    ids = [int(token) for token in row["ids"].split()]
    logprobs = model.score(model.encode(prompt.text) + ids).logprobs
    assert row["nll_reference"] == pytest.approx(-np.mean(logprobs[-len(ids) :]), rel=1e-12)


def test_weights_are_counted(study):
    bits = study.tables["weights"].query("model == 'demo:llama'").set_index("arm")
    assert bits.loc["bf16", "bits_per_weight"] == 16 and bits.loc["nf4", "bits_per_weight"] == 4.5
    assert bits.loc["fp4", "bytes"] == bits.loc["nf4", "bytes"]
    assert 4.1 < bits.loc["nf4-dq", "bits_per_weight"] < 4.3
    assert 8 < bits.loc["int8", "bits_per_weight"] < 8.5
    assert bits["weights"].nunique() == 1 and bits["layers"].nunique() == 1
    assert bits.loc["bf16", "sqnr_db"] == np.inf
    assert (
        bits.loc["int8", "sqnr_db"] > bits.loc["nf4", "sqnr_db"] > bits.loc["fp4", "sqnr_db"] > 10
    )


def test_claims_say_what_they_can(study):
    claims = study.claims
    assert set(claims["verdict"]) <= {"confirmed", "refuted", "inconclusive", "not testable"}
    memory = claims.query("claim == 'C1b'")
    assert (memory["verdict"] == "confirmed").all() and (memory["estimate"] == 1).all()
    for claim in ("C2", "C3"):
        rows = claims.query(f"claim == '{claim}'")
        assert (rows["verdict"] == "not testable").all()
        assert rows["reason"].str.contains("demo model").all()
    assert {"C1a", "C1c", "C4", "C5", "C6"} <= set(claims.query("verdict != 'not testable'")["claim"])
    ratios = claims.query("claim == 'C5' and endpoint == 'tokens/s, decode'")
    assert (ratios["estimate"] > 0).all()


def test_own_samples_and_passages_are_both_read(study):
    texts = study.tables["texts"].query("model == 'demo:llama' and arm == 'nf4'")
    own = texts.query("source == 'own'")
    assert set(own["text"]) == {prompt.id for prompt in SMALL.prompts}
    assert set(own["seed"]) == {1, 2} and (own["tokens"] <= 8).all()
    assert set(texts.query("source == 'held'")["text"]) == {text.id for text in SMALL.texts}


def test_a_positive_control_is_seen(tmp_path, no_pictures):
    """Blocks of 4096 are deliberately bad: the study must find so, text by text."""
    arms = ("bf16", "fp4", Arm("coarse", "fp4", blocksize=4096))
    design = replace(TINY, arms=arms, texts=tuple(Text(*passage) for passage in PASSAGES))
    found = run(design, out=tmp_path / "out").tables["texts"].query("temperature == 1")
    for measure in ("kl", "tv", "disagreement"):
        sides = found.pivot_table(index=["source", "text"], columns="arm", values=measure)
        _, low, _ = Intervals().mean((sides["coarse"] - sides["fp4"]).to_numpy())
        assert low > 0


def test_top_k_reaches_the_sampler(tmp_path, no_pictures):
    """Among the single most probable token all temperatures are greedy."""
    found = run(replace(TINY, arms=("bf16", "null"), top_k=(1,)), out=tmp_path / "out").tables[
        "samples"
    ]
    for _, rows in found.groupby("prompt"):
        assert rows["ids"].nunique() == 1


# --------------------------------------------------------------------------------------- files


def test_a_run_leaves_everything(study):
    folder = study.folder
    for name in TABLES:
        assert (folder / "tables" / f"{name}.csv").stat().st_size > 50
        assert (folder / "tables" / f"{name}.parquet").is_file()
    for name in study.plots:
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / "plots" / f"{name}.svg").read_bytes()[:600]
    assert Design.from_json((folder / "design.json").read_text()) == SMALL
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["numpy"] == np.__version__ and manifest["seeds"] == [1, 2]
    digests = manifest["models"]["demo:llama"]["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(digests)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())
    kernels = manifest["environments"]["demo:llama nf4"]
    assert kernels["cpu"] and kernels["isa"] and kernels["kernels"]["nf4"]
    assert not list(folder.rglob("*.partial"))


def test_load_gives_the_same(study):
    import pandas as pd

    again = load(study.folder)
    assert isinstance(again, Study) and again.design == study.design
    assert list(again.tables) == list(study.tables)
    for name, frame in study.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], frame)
        if name not in ("samples",):
            written = pd.read_csv(study.folder / "tables" / f"{name}.csv")
            assert list(written.columns) == list(frame.columns) and len(written) == len(frame)
    assert "C1a" in again._repr_html_() and "small" in repr(again)


@pytest.mark.parametrize("arms", [("bf16", "null"), ("bf16", "int8")])
def test_few_arms_are_a_study_too(tmp_path, arms):
    study = run(replace(TINY, arms=arms, temperatures=(1.0,)), out=tmp_path / "out")
    assert load(study.folder).report.stat().st_size > 10_000
    assert len(study.tables["checks"]) == (14 if "null" in arms else 0)
    said = "exactly 0 in all 14 measures" if "null" in arms else "This study has no null arm"
    assert said in study.report.read_text("utf-8")
    assert list(study.tables["speed_claims"]["verdict"]) == ["not testable"] * 3


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_tables(tmp_path, tiny, no_pictures, after):
    seen = []

    def stop(event):
        seen.extend([] if event.notice else [event.text])
        if len(seen) == after:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(TINY, out=folder, progress=stop)
    assert len(list((folder / "cells").iterdir())) == after
    (folder / "cells" / "left.1234.partial").write_bytes(b"half")
    with pytest.raises(QllmFileError, match="not finished|only begun"):
        load(folder)
    seen.clear()
    run(TINY, out=folder, progress=lambda event: seen.append(event.text))
    assert sum(text.endswith("was there") for text in seen) == after
    assert contents(folder) == contents(tiny)


def test_a_killed_run_leaves_whole_files(tmp_path, tiny, no_pictures):
    """The process is ended by the system in the middle of a write."""
    script = (
        "import os, signal, sys\n"
        "from qllm.study import Design, files, run\n"
        "def replace(one, two, real=os.replace):\n"
        "    if 'nf4' in str(two): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(one, two)\n"
        "files.os.replace = replace\n"
        "run(Design.from_json(open(sys.argv[1]).read()), out=sys.argv[2])\n"
    )
    folder = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tiny / "design.json"), str(folder)], timeout=120
    )
    assert ended.returncode == -9
    assert [path.suffix for path in sorted((folder / "cells").iterdir())] == [".gz", ".partial"]
    run(TINY, out=folder)
    assert contents(folder) == contents(tiny)


class Shuffled(Executor):
    """Carries functions, arguments and results as bytes, and works the last one first."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, *arguments, **named):
        future = Future()
        self.waiting.append((future, pickle.dumps((function, arguments, named))))
        return future

    def work(self):
        while self.waiting:
            future, call = self.waiting.pop()
            function, arguments, named = pickle.loads(call)
            future.set_result(pickle.loads(pickle.dumps(function(*arguments, **named))))


def test_an_executor_gives_the_same_bytes(tmp_path, tiny, no_pictures):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        run(TINY, out=tmp_path / "out", executor=executor)
    assert contents(tmp_path / "out") == contents(tiny)


def test_cells_may_come_in_any_order(tmp_path, tiny, no_pictures, monkeypatch):
    from qllm.study import runner

    executor = Shuffled()

    def wait(futures, timeout, return_when):
        executor.work()
        return set(futures), set()

    monkeypatch.setattr(runner, "wait", wait)
    run(TINY, out=tmp_path / "out", executor=executor)
    assert contents(tmp_path / "out") == contents(tiny)


def test_a_failed_cell_keeps_the_others(tmp_path, tiny, no_pictures, monkeypatch):
    from qllm.study import cells, runner

    def fails(task):
        if task.arm == "null":
            raise QllmValueError("no luck")
        return cells.compute(task)

    monkeypatch.setattr(runner, "compute", fails)
    with pytest.raises(QllmValueError, match="no luck"):
        run(TINY, out=tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})
    seen = []
    run(TINY, out=tmp_path / "out", progress=lambda event: seen.append(event.text))
    assert sum(text.endswith("was there") for text in seen) == 2
    assert contents(tmp_path / "out") == contents(tiny)


def damage_cut(data):
    return data[: len(data) // 2]


def damage_flip(data):
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def damage_number(data):
    text = gzip.decompress(data).decode()
    assert '"tokens":8' in text
    return gzip.compress(text.replace('"tokens":8', '"tokens":7', 1).encode())


def damage_else(data):
    return b"\x1f\x8b not a cell"


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_number, damage_else])
def test_a_damaged_cell_is_named_and_computed_again(tmp_path, tiny, no_pictures, damage):
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(tiny, folder)
    cell = next((folder / "cells").glob("*nf4*"))
    cell.write_bytes(damage(cell.read_bytes()))
    seen = []
    run(TINY, out=folder, progress=seen.append)
    first, memory = [event.text for event in seen if event.notice]
    assert str(cell) in first and "it is computed again" in first
    assert memory.startswith("memory: ")
    assert contents(folder) == contents(tiny)


def test_another_design_in_the_folder_is_refused(tiny, no_pictures, tmp_path):
    before = contents(tiny, "cells", "tables")
    other = replace(TINY, lengths=(9,), seeds=(3,))
    with pytest.raises(
        QllmFileError,
        match=r"another design: seeds \(\[1\] there, \[3\] here\); lengths \(\[4, 8\] there,"
        r" \[9\] here\);"
        " name another folder, or begin anew with fresh=True",
    ):
        run(other, out=tiny)
    assert contents(tiny, "cells", "tables") == before


def test_another_model_file_is_refused(tiny, tmp_path):
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(tiny, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["models"]["demo:llama"]["files"]["model.safetensors"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(QllmFileError, match="another demo:llama: the SHA-256 of model.safetensors"):
        run(TINY, out=folder)
    manifest["qllm"] = "0.0.1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(QllmFileError, match="study of qllm 0.0.1, and this is"):
        run(TINY, out=folder)


def test_fresh_begins_anew_and_touches_nothing_else(tiny, tmp_path, no_pictures):
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(tiny, folder)
    (folder / "notes.txt").write_text("mine")
    other = replace(TINY, arms=("bf16", "int8"), temperatures=(1.0,))
    found = run(other, out=folder, fresh=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list((folder / "cells").iterdir())) == 2 and len(found.tables["samples"]) == 4


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    from qllm.study import files

    def full(one, two):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(
        QllmFileError, match=r"design.json cannot be written: No space left"
    ) as info:
        run(TINY, out=tmp_path / "out")
    assert "\n" not in str(info.value) and not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------------- progress


def test_progress_as_lines_bar_and_callback(tiny, capsys, no_pictures, monkeypatch):
    seen = []
    run(TINY, out=tiny, progress=seen.append)
    assert [event.done for event in seen] == [1, 2, 3, 4, 5]
    assert {event.total for event in seen} == {5}
    assert capsys.readouterr() == ("", "")
    run(TINY, out=tiny, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 5 and "1/5: demo:llama bf16: was there" in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(TINY, out=tiny, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "5/5" in err and "\r" in err
