"""Models, generation and studies on a GPU, its kernels emulated: what the processor gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emulated
import qllm
from qllm import GenerationConfig, Request, _core
from qllm.cli import main

pytest.importorskip("safetensors", reason="writes the checkpoints")
pytest.importorskip("tokenizers", reason="text goes through it")

import tiny_models  # noqa: E402

CONFIG = tiny_models.LLAMA | {"vocab_size": 259, "num_hidden_layers": 1, "eos_token_id": 2,
                              "tie_word_embeddings": True}
EXACT: dict[str, Any] = {"device": "emulated", "compute": "exact"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert _core._load_device(emulated.library()) == "emulated"
    path = tmp_path_factory.mktemp("tiny")
    tiny_models.write(path, CONFIG, tiny_models.tensors(CONFIG, "bfloat16"))
    tiny_models.write_tokenizer(path, CONFIG["vocab_size"])
    return path


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_a_model_on_the_device_is_that_of_the_processor(folder: Path, format: str | None) -> None:
    here = qllm.Model.from_pretrained(folder, format, compute="exact")
    there = qllm.Model.from_pretrained(folder, format, **EXACT)
    assert there.device == "emulated" and there.formats == here.formats
    ids = there.encode("hello world")
    assert np.array_equal(there.logits(ids), here.logits(ids))
    assert np.array_equal(there.score("hello").logprobs, here.score("hello").logprobs)
    assert str(there.report()) == str(here.report())
    swaps = [model.quantize_("fp4-dq", skip="*.v_proj") for model in (here, there)]
    assert swaps[0].to_frame().equals(swaps[1].to_frame())
    assert np.array_equal(there.logits(ids), here.logits(ids))
    shown = str(there.info())
    assert "emulated GPU" in shown and "threads" not in shown


@pytest.mark.parametrize("batch_size", [3, 64])
def test_texts_are_those_of_the_processor(folder: Path, batch_size: int) -> None:
    """Rows of several options which share prompts, more than a batch has places for."""
    requests = [
        Request(["ab", "ab", "hello"][i % 3], GenerationConfig(
            temperature=[0.0, 0.7, 1.5][i // 3], top_k=[0, 5][i % 2], top_p=[1.0, 0.9][i // 2 % 2],
            repetition_penalty=[1.0, 1.3][i // 4 % 2], max_new_tokens=4 + i % 3, seed=i,
            logits_dtype=["float32", "bfloat16"][i // 5 % 2], ignore_eos=True))
        for i in range(9)
    ]
    results = [
        qllm.Model.from_pretrained(folder, compute="exact", **device).generate_batch(
            requests, batch_size=batch_size)
        for device in ({}, {"device": "emulated"})
    ]
    assert results[0] == results[1]
    assert len({tuple(result.ids) for result in results[0]}) > 4


def test_a_stream_is_that_of_the_processor(folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 4, "ignore_eos": True}
    there = qllm.Model.from_pretrained(folder, **EXACT)
    here = qllm.Model.from_pretrained(folder, compute="exact")
    assert list(there.stream("ab", **options)) == list(here.stream("ab", **options))
    assert there.decoder.nbytes()["kv_cache"] == 0


def test_a_saved_model_is_that_of_the_processor(folder: Path, tmp_path: Path) -> None:
    for name, options in (("here", {"compute": "exact"}), ("there", EXACT)):
        qllm.Model.from_pretrained(folder, "nf4", **options).save(tmp_path / name)
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(qllm.QllmUnsupportedError, match="device 'emulated' does not offer; use"):
        qllm.Model.from_pretrained(folder, device="emulated", compute="int8")
    with pytest.raises(qllm.QllmUnsupportedError, match="has no choice of instruction sets"):
        qllm.Model.from_pretrained(folder, device="emulated", isa="scalar")
    with pytest.raises(qllm.QllmUnsupportedError, match="device 'gpu' is not offered"):
        qllm.Model.from_pretrained(folder, device="gpu")


def test_info_of_the_build_says_what_cuda_is(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _core.device_info("emulated")
    monkeypatch.setattr(_core, "device_info", lambda name: found)
    assert main(["info"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cuda yes: emulated GPU (emulated), 8.00 GiB of memory," in shown


def test_bench_times_the_device(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qllm.cli.grammar.DEVICES", ("cpu", "emulated"))
    monkeypatch.setattr("qllm.cli.bench.DEVICE_READ_BYTES", 1 << 20)
    words = ["bench", "--shape", "tiny", "--formats", "nf4", "--rounds", "1", "--prompt-tokens",
             "3", "--new-tokens", "2", "--batch", "2", "--device", "emulated", "--compute", "exact"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "emulated GPU" in shown and "nf4" in shown and "reads" in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "emulated" and found["limits"]["read_bytes_per_second"]["median"] > 0
    assert found["formats"][0]["decode_tokens_per_second"]["median"] > 0
    assert found["formats"][0]["share_of_read"]["median"] > 0


def test_cells_of_a_study_are_those_of_the_processor(folder: Path) -> None:
    """And a null arm differs by nothing: in other batches, and where it computes on the processor
    what the reference computes on the device; lockstep too."""
    from qllm.study import ARMS, Arm, Design, Text
    from qllm.study.cells import Task, compute, own_texts
    from qllm.study.lockstep import compute_lockstep

    design = Design(
        name="device", models=(str(folder),), temperatures=(0.7, 1.0), seeds=(1,), lengths=(3,),
        arms=(ARMS["bf16"], ARMS["nf4"], Arm("null", "bf16", role="null", batch_size=1)),
        prompts=(Text("a", "text", "ab"), Text("b", "text", "hello")),
        texts=(Text("c", "text", "hello world"),), logit_temperatures=(0.5, 1.0), speed=None, play=1,
    )
    crossed = replace(design, device="emulated", arms=(
        *design.arms, Arm("null-cpu", "bf16", role="null", device="cpu")))
    reference = compute(Task(design, str(folder), "bf16"))
    own = own_texts(design, reference)
    assert len(own) == 2

    def body(which: Design, arm: str, function: Any = compute) -> dict[str, Any]:
        found = function(Task(which, str(folder), arm, own))
        environment = found.pop("environment")
        on = which.arm(arm).device or which.device
        assert (environment["device"], environment["compute"]) == (on, "exact")
        return {key: found[key] for key in found if key != "memory"}

    for arm in ("bf16", "nf4", "null"):
        assert body(crossed, arm) == body(design, arm)
    for arm in ("null", "null-cpu"):
        texts = body(crossed, arm)["texts"]
        assert len(texts) == 3
        for text in texts:
            assert text["same_top"] == 1 and text["ln_ppl_ratio"] == 0
            assert not any(text["curves"]["kl"] + text["curves"]["disagreement"])
        assert body(crossed, arm)["generations"] == body(crossed, "bf16")["generations"]
    assert all(min(text["curves"]["kl"]) > 0 for text in body(crossed, "nf4")["texts"])
    assert body(crossed, "nf4", compute_lockstep) == body(design, "nf4", compute_lockstep)


def test_the_device_of_a_design() -> None:
    from qllm.study import Arm, Design, resolve

    assert resolve("smoke").device == "cpu"
    design = Design.from_dict({"device": "cuda", "arms": ["bf16", {
        "name": "x", "format": "nf4", "device": "cpu"}]})
    assert (design.device, design.arm("x").device) == ("cuda", "cpu")
    assert Design.from_json(design.to_json()) == design
    for wrong in ("", 3, None, "a\nb"):
        with pytest.raises(qllm.QllmValueError, match="device must be cpu or cuda, not"):
            replace(design, device=wrong)
    with pytest.raises(qllm.QllmValueError, match="the device of arm 'x' must be cpu or cuda"):
        replace(design, arms=("bf16", Arm("x", "nf4", device="")))
