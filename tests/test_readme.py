"""The README does what it says: its Python runs, its commands are commands, its links lead
somewhere, and the test command is the one that CI runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qllm import config
from qllm.cli.grammar import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [part.strip().removeprefix(".venv/bin/") for line in lines for part in line.split("&&")]


def test_the_readme_has_blocks() -> None:
    assert len(blocks("python")) == 1
    assert len(blocks("sh")) == 3
    assert sum(command.startswith("qllm ") for command in commands()) == 7


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "nf4" in out and "no: skip has '*.down_proj'" in out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("qllm ")])
def test_commands_are_commands(command: str) -> None:
    assert parse(shlex.split(command)[1:]).run  # type: ignore[union-attr]


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).is_file()] == []


def test_every_format_is_in_the_table() -> None:
    table = README[README.index("| format |"):README.index("The packed bytes")]
    named = set(re.findall(r"`([a-z0-9-]+)`", table))
    assert named == set(config.FORMATS) - {config.ORIGINAL}


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ")
    words = re.sub(r"\s+", " ", script)
    test_command = blocks("sh")[1].strip().replace("pip install", "pip install -q")
    places = [words.find(step) for step in test_command.split(" && ")]
    assert -1 not in places and places == sorted(places)
