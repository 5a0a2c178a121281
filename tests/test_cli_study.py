"""qllm study: runs, names what is wrong, stops at Ctrl-C with what is finished, and goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_studies import TINY

from qllm.cli import main
from qllm.study import runner

MODEL = "demo:llama"


@pytest.fixture
def design(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(TINY.to_json())
    return str(path)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})


def failure(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["study", *words])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (1, "", 1), captured.err
    assert captured.err.startswith("qllm: error: ")
    return captured.err


@pytest.mark.usefixtures("no_pictures")
def test_study(design: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["study", MODEL, "--profile", design, "--out", str(out), "--threads", "1"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == f"report: {out / 'report.html'}\n"
    assert (out / "report.html").is_file()
    stored = json.loads((out / "design.json").read_text())
    assert (stored["threads"], stored["models"]) == (1, [MODEL])
    lines = captured.err.splitlines()  # a log has plain lines
    assert lines and all(re.match(r"\[ *\d+\.\d s\] (\d+/\d+|note): ", line) for line in lines)

    assert "was there" not in captured.err
    words = ["study", "--models", MODEL, *words[2:]]  # the same, said otherwise
    assert main(words) == 0  # again: everything is there
    cells = len(list((out / "cells").iterdir()))
    assert capsys.readouterr().err.count("was there") == cells > 2
    assert main([*words, "--fresh"]) == 0
    assert capsys.readouterr().err.count("was there") == 0


def test_what_a_study_cannot_be(design: str, tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "no profile 'smok'" in failure("--profile", "smok", "--out", out, capsys=capsys)
    assert "missing.json" in failure("--profile", str(tmp_path / "missing.json"), "--out", out,
                                     capsys=capsys)
    assert "is a file" in failure("--profile", design, "--out", design, capsys=capsys)
    assert "no-model" in failure(str(tmp_path / "no-model"), "--profile", design, "--out", out,
                                 capsys=capsys)
    (tmp_path / "tiny.json").write_text("{")
    assert "tiny.json" in failure("--profile", design, "--out", out, capsys=capsys)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    assert "not empty" in failure("--out", str(full), capsys=capsys)
    assert not Path(out).exists()


def test_interrupted_and_resumed(design: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "qllm", "study", MODEL, "--profile", design, "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # how much memory it takes
    first = process.stderr.readline()  # the first cell is done
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert "1/" in first
    last = err.splitlines()[-1]
    assert (process.returncode, printed) == (130, ""), err
    assert last == (f"qllm: interrupted; what is finished lies in {out}, and the same command goes"
                    " on from there")
    assert "Traceback" not in err
    finished = sorted(path.name for path in (out / "cells").iterdir())
    assert finished and not (out / "report.html").exists()

    again = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("was there") == len(finished)
    assert (out / "report.html").is_file()


def test_the_bar_leaves_its_line_when_interrupted(
        design: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    compute = runner.compute

    def compute_once(task: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(task)
        return compute(task)

    monkeypatch.setattr(runner, "compute", compute_once)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["study", MODEL, "--profile", design, "--out", str(tmp_path / "out")]) == 130
    bar, message, rest = capsys.readouterr().err.rpartition("\nqllm: interrupted; ")
    assert bar.startswith("\r") and "1/5" in bar and message and rest.count("\n") == 1
