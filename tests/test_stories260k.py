"""A real trained model: reference logits, greedy text and perplexities by format.

The data is no part of the repository: it is looked up in the folder that QLLM_DATA names, else in
../shared/data beside the checkout. Its README files say how it was measured.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("QLLM_DATA", ROOT.parent / "shared" / "data"))
STORIES = DATA / "stories260K"
TEXTS = DATA / "tinystories-valid" / "tinystories_val.txt"
SCRIPT = ROOT / "scripts" / "convert_llama2c.py"
OPENINGS = ("Once upon a time", "One day,", "Once there was", "There was once", "Once,")

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="runs from a checkout with scripts/"),
    pytest.mark.skipif(
        not (STORIES / "stories260K.bin").exists() or not TEXTS.exists(),
        reason=f"needs stories260K and tinystories-valid, found neither in QLLM_DATA nor in {DATA}",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("tokenizers", "safetensors"):
        pytest.importorskip(package, reason="the script needs it")
    spec = importlib.util.spec_from_file_location("convert_llama2c", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path_factory.mktemp("stories260K")
    script.convert(STORIES / "stories260K.bin", STORIES / "tok512.bin", path)
    return path


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((STORIES / "reference.json").read_text())


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """The first 50 stories, cut as the README of tinystories-valid says."""
    found: list[list[str]] = []
    for paragraph in TEXTS.read_text(encoding="utf-8").split("\n\n"):
        if paragraph and (paragraph.startswith(OPENINGS) or not found):
            found.append([])
        if paragraph:
            found[-1].append(paragraph)
    chosen = [story for story in found if story[0].startswith("Once upon a time")]
    assert len(chosen) == 713
    return ["\n".join(story) for story in chosen[:50]]


def test_the_model_is_read_completely(folder: Path) -> None:
    info = qllm.Model.from_pretrained(folder).info()
    assert (info.parameters, info.vocab, info.max_positions) == (260_032, 512, 512)
    assert info.tied and info.formats == {"f32": 36}


def test_logits_are_those_of_the_reference(folder: Path, reference: dict[str, Any]) -> None:
    for isa in qllm._core.cpu_info()["isas"]:
        model = qllm.Model.from_pretrained(folder, isa=isa)
        assert model.encode(reference["prompt"]) == reference["prompt_ids"]
        logits = model.logits(reference["prompt_ids"])[-1]
        assert np.abs(logits - np.array(reference["last_logits"])).max() < 1e-4


def test_greedy_text_is_that_of_the_reference(folder: Path, reference: dict[str, Any]) -> None:
    model = qllm.Model.from_pretrained(folder)
    for prompt, name in ((reference["prompt"], "greedy_prompt_64"), ([1], "greedy_from_bos")):
        expected = reference[name]
        count = len(expected["ids"])
        result = model.generate(prompt, do_sample=False, max_new_tokens=count, ignore_eos=True)
        assert result.ids == expected["ids"]
        whole = model.decode(result.prompt_ids + result.ids)
        assert whole == expected["text"]
        assert whole.endswith(result.text)


@pytest.mark.parametrize(
    ("format", "perplexity"),
    [(None, 3.3490), ("int8", 3.3511), ("nf4", 3.7268), ("fp4", 4.1546)],
)
def test_perplexities_are_reproduced(
    folder: Path,
    stories: list[str],
    reference: dict[str, Any],
    format: str | None,
    perplexity: float,
) -> None:
    """w2 has 172 inputs, no multiple of the block of 64: blocks run across the ends of rows. The
    README's int8 rounds weights only; LLM.int8() rounds the activations too."""
    model = qllm.Model.from_pretrained(folder, format)
    scores = [model.score(model.encode(story)[:512]) for story in stories]
    tokens = sum(len(score.logprobs) for score in scores)
    assert tokens == reference["perplexity"]["tokens"] == 12_862
    ours = math.exp(sum(score.nll for score in scores) / tokens)
    assert abs(ours / perplexity - 1) < 0.005, ours
    if format is None:
        first = reference["perplexity"]["first_5_stories_nll_and_tokens"]
        for score, (nll, count) in zip(scores, first):
            assert len(score.logprobs) == count and abs(score.nll - nll) < 1e-3
