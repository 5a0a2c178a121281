"""The pages of docs/: their Python runs, their commands are commands, their links lead somewhere,
every page is in the index, and Sphinx makes a site of them without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qllm.cli.grammar import parse

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMES = [page.stem for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


RUN = [page for page in PAGES if blocks(page, "python")]
NEEDS = {"torch": "torch", "lm-eval": "lm_eval", "from-bitsandbytes": "safetensors",
         "transformers": "transformers",
         "study": "pandas"}


def test_there_is_python_to_run() -> None:
    assert {"quickstart", "from-bitsandbytes", "from-llama-cpp", "reproducibility"} <= {
        page.stem for page in RUN
    }


@pytest.mark.parametrize("page", RUN, ids=[page.stem for page in RUN])
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, in one namespace."""
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason="the page is about it")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("qllm ")]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_commands(page: Path) -> None:
    for command in commands(page):
        assert parse(shlex.split(command, comments=True)[1:]).run  # type: ignore[union-attr]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (DOCS / target).is_file()] == []


def test_every_page_is_in_the_index() -> None:
    index = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(),
                                 re.MULTILINE | re.DOTALL))
    listed = [line for line in index.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(set(NAMES) - {"index"})


def test_sphinx_makes_a_site(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="it makes the site")
    pytest.importorskip("myst_parser", reason="Sphinx reads Markdown with it")
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stderr) == (0, "")
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("from_pretrained", "generate_batch", "QuantizedTensor", "logit_stats"):
        assert name in api
