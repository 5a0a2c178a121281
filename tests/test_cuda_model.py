"""Models, generation and studies on a GPU, or its kernels emulated: what the processor gives."""

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
from qllm.study import ARMS, Arm, Design, Text, resolve  # noqa: E402
from qllm.study.cells import Task, compute, own_texts  # noqa: E402
from qllm.study.lockstep import compute_lockstep  # noqa: E402

CONFIG = tiny_models.LLAMA | {"vocab_size": 259, "num_hidden_layers": 1, "eos_token_id": 2,
                              "tie_word_embeddings": True}


@pytest.fixture
def exact() -> dict[str, Any]:
    return {"device": emulated.name(), "compute": "exact"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_models.write(path, CONFIG, tiny_models.tensors(CONFIG, "bfloat16"))
    tiny_models.write_tokenizer(path, CONFIG["vocab_size"])
    return path


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_a_model_on_the_device_is_that_of_the_processor(
    folder: Path, format: str | None, exact: dict[str, Any]
) -> None:
    here = qllm.Model.from_pretrained(folder, format, compute="exact")
    there = qllm.Model.from_pretrained(folder, format, **exact)
    assert there.device == emulated.name() and there.formats == here.formats
    ids = there.encode("hello world")
    assert np.array_equal(there.logits(ids), here.logits(ids))
    assert np.array_equal(there.score("hello").logprobs, here.score("hello").logprobs)
    assert str(there.report()) == str(here.report())
    swaps = [model.quantize_("fp4-dq", skip="*.v_proj") for model in (here, there)]
    assert swaps[0].to_frame().equals(swaps[1].to_frame())
    assert np.array_equal(there.logits(ids), here.logits(ids))
    shown = str(there.info())
    assert there.info().cpu in shown and "threads" not in shown


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
        for device in ({}, {"device": emulated.name()})
    ]
    assert results[0] == results[1]
    assert len({tuple(result.ids) for result in results[0]}) > 4


def test_texts_of_auto_do_not_hang_on_their_company(folder: Path) -> None:
    """Sampled and greedy, in one batch, in many, and each by itself."""
    model = qllm.Model.from_pretrained(folder, "nf4", device=emulated.name(), compute="auto")
    requests = [Request(["ab", "hello"][i % 2], GenerationConfig(
        temperature=[0.0, 1.0, 1.5][i % 3], max_new_tokens=5, seed=i, ignore_eos=True))
        for i in range(6)]
    together = model.generate_batch(requests, batch_size=64)
    assert model.generate_batch(requests, batch_size=4) == together
    assert [model.generate_batch([request])[0] for request in requests] == together
    assert len({tuple(result.ids) for result in together}) > 3


def test_a_stream_is_that_of_the_processor(folder: Path, exact: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 4, "ignore_eos": True}
    there = qllm.Model.from_pretrained(folder, **exact)
    here = qllm.Model.from_pretrained(folder, compute="exact")
    assert list(there.stream("ab", **options)) == list(here.stream("ab", **options))
    assert there.decoder.nbytes()["kv_cache"] == 0


def test_a_saved_model_is_that_of_the_processor(
    folder: Path, tmp_path: Path, exact: dict[str, Any]
) -> None:
    for name, options in (("here", {"compute": "exact"}), ("there", exact)):
        qllm.Model.from_pretrained(folder, "nf4", **options).save(tmp_path / name)
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = emulated.name()
    with pytest.raises(qllm.QllmUnsupportedError, match=f"device '{device}' does not offer; use"):
        qllm.Model.from_pretrained(folder, device=device, compute="int8")
    with pytest.raises(qllm.QllmUnsupportedError, match="has no choice of instruction sets"):
        qllm.Model.from_pretrained(folder, device=device, isa="scalar")
    with pytest.raises(qllm.QllmUnsupportedError, match="device 'gpu' is not offered"):
        qllm.Model.from_pretrained(folder, device="gpu")


def test_info_of_the_build_says_what_cuda_is(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _core.device_info(emulated.name())
    assert found is not None
    monkeypatch.setattr(_core, "device_info", lambda name: found)
    assert main(["info"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    memory = f"{found['memory'] / 2**30:.2f} GiB of memory,"
    assert f"cuda yes: {found['name']} ({found['variant']}), {memory}" in shown


def test_bench_times_the_device(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = emulated.name()
    facts = _core.device_info(device)
    assert facts is not None
    monkeypatch.setattr("qllm.cli.grammar.DEVICES", ("cpu", device))
    monkeypatch.setattr("qllm.cli.bench.DEVICE_READ_BYTES", 1 << 16)
    words = ["bench", "--shape", "tiny", "--formats", "nf4", "--rounds", "1", "--prompt-tokens",
             "3", "--new-tokens", "2", "--batch", "2", "--device", device, "--compute", "exact"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert facts["name"] in shown and "nf4" in shown and "reads" in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == device and found["limits"]["read_bytes_per_second"]["median"] > 0
    assert found["formats"][0]["decode_tokens_per_second"]["median"] > 0
    assert found["formats"][0]["share_of_read"]["median"] > 0


def study_of(folder: Path, **options: Any) -> Design:
    return Design(
        name="device", models=(str(folder),), temperatures=(0.7, 1.0), seeds=(1,), lengths=(3,),
        arms=(ARMS["bf16"], ARMS["nf4"], Arm("null", "bf16", role="null", batch_size=1),
              Arm("null-cpu", "bf16", role="null", device="cpu")),
        prompts=(Text("a", "text", "ab"), Text("b", "text", "hello")),
        texts=(Text("c", "text", "hello world"),), logit_temperatures=(0.5, 1.0), speed=None,
        play=1, **options)


def cells_of(design: Design, arm: str, function: Any = compute) -> dict[str, Any]:
    """What an arm is found to be, with the own texts of the reference on the processor."""
    (folder,) = design.models
    where = replace(design, device="cpu")
    own = own_texts(where, compute(Task(where, folder, "bf16")))
    assert len(own) == 2
    found = function(Task(design, folder, arm, own))
    environment = found.pop("environment")
    on = design.arm(arm).device or design.device
    assert (environment["device"], environment["compute"]) == (on, design.compute)
    return {key: found[key] for key in found if key != "memory"}


def assert_differs_by_nothing(null: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(null["texts"]) == 3 and null["generations"] == reference["generations"]
    for text in null["texts"]:
        assert text["same_top"] == 1 and text["ln_ppl_ratio"] == 0
        assert not any(text["curves"]["kl"] + text["curves"]["disagreement"])


def test_cells_of_a_study_are_those_of_the_processor(folder: Path) -> None:
    """And a null arm differs by nothing: in other batches, and where it computes on the processor
    what the reference computes on the device; lockstep too."""
    here, there = study_of(folder), study_of(folder, device=emulated.name())
    found = {arm: cells_of(there, arm) for arm in ("bf16", "nf4", "null", "null-cpu")}
    for arm in ("bf16", "nf4", "null"):
        assert found[arm] == cells_of(here, arm)
    for arm in ("null", "null-cpu"):
        assert_differs_by_nothing(found[arm], found["bf16"])
    assert all(min(text["curves"]["kl"]) > 0 for text in found["nf4"]["texts"])
    assert cells_of(there, "nf4", compute_lockstep) == cells_of(here, "nf4", compute_lockstep)


def test_a_null_arm_of_auto_differs_by_nothing(folder: Path) -> None:
    """Row by row, what the reference computed in one batch."""
    design = study_of(folder, device=emulated.name(), compute="auto")
    found = {arm: cells_of(design, arm) for arm in ("bf16", "nf4", "null")}
    assert_differs_by_nothing(found["null"], found["bf16"])
    assert all(min(text["curves"]["kl"]) > 0 for text in found["nf4"]["texts"])


def test_the_device_of_a_design() -> None:
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
