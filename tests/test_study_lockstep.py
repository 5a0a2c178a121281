"""Models that are read layer by layer: the same bits as held whole, and never more than a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from small_studies import SMALL, TINY

import qllm
from qllm.errors import QllmValueError
from qllm.study import ARMS, Arm, cells, plan, run
from qllm.study.cells import Task
from qllm.study.lockstep import Half, compute_lockstep, logits

ARMS_TRIED = (
    ARMS["nf4"],
    ARMS["int8"],
    ARMS["control"],
    Arm("fp4-dq+head", "fp4-dq", quantize_head=True),
    Arm("ceiling", "bf16", role="ceiling", compute="exact"),
    Arm("null", "bf16", role="null", threads=2),
)


@pytest.fixture(scope="module", params=["llama", "mistral", "falcon", "falcon rw"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of several families, tied and not, with a window and with biases."""
    changes: dict[str, Mapping[str, Any]] = {
        "llama": tiny_models.LLAMA,
        "mistral": {**tiny_models.LLAMA, "model_type": "mistral", "sliding_window": 8,
                    "architectures": ["MistralForCausalLM"], "num_hidden_layers": 3},
        "falcon": tiny_models.FALCON,
        "falcon rw": {**tiny_models.FALCON, "alibi": True, "parallel_attn": False,
                      "multi_query": False},
    }
    config = {**changes[request.param], "vocab_size": 320, "max_position_embeddings": 512}
    place = tmp_path_factory.mktemp("model") / request.param.replace(" ", "-")
    tiny_models.write(place, config, tiny_models.tensors(config, "bfloat16"))
    tiny_models.write_tokenizer(place, 320)
    return place


def design_of(folder: Path | str, *arms: Arm, **changes: Any) -> Any:
    given = {"texts": SMALL.texts, "lockstep": True, "compute": "auto", **changes}
    return replace(TINY, models=(str(folder),), arms=("bf16", *arms), **given)


@pytest.mark.parametrize("arm", ARMS_TRIED, ids=lambda arm: arm.name)
def test_the_logits_are_those_of_the_whole_model(folder: Path, arm: Arm) -> None:
    design = design_of(folder, arm)
    texts = [[1, *range(70, 120), 4], [7], list(range(3, 40))]
    halves = [Half(str(folder), one, design) for one in design.arms]
    wholes = [qllm.study.arms.load_own(str(folder), one, design) for one in design.arms]
    for text, sides in zip(texts, logits(halves, texts), strict=True):
        for side, whole in zip(sides, wholes, strict=True):
            assert np.array_equal(side, whole.model.logits(text))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cell_has_the_numbers_of_an_ordinary_one(folder: Path, dtype: str) -> None:
    design = design_of(folder, *ARMS_TRIED, logits_dtype=dtype)
    plain = replace(design, lockstep=False, own_temperature=None, play=0, lengths=(2,))
    for arm in design.arms:
        found = compute_lockstep(Task(design, str(folder), arm.name))
        wanted = cells.compute(Task(plain, str(folder), arm.name))
        assert found["texts"] == wanted["texts"], arm.name
        assert len(found["texts"]) == (0 if arm.role == "reference" else len(SMALL.texts))
        assert sorted(map(str, found["weights"])) == sorted(map(str, wanted["weights"]))
        assert found["environment"]["isa"] == wanted["environment"]["isa"]
        assert found["memory"]["weights"] >= wanted["memory"]["weights"]
        assert found["generations"] == found["play"] == []
        assert set(found) == set(wanted)


def test_a_part_at_a_time_is_held(tmp_path: Path) -> None:
    """Of a deep model the parts that are held together are a small share; by the counters of the
    decoders, and by the plan."""
    config = {**tiny_models.LLAMA, "vocab_size": 320, "num_hidden_layers": 40,
              "max_position_embeddings": 512}
    folder = tiny_models.write(tmp_path / "deep", config, tiny_models.tensors(config, "bfloat16"))
    tiny_models.write_tokenizer(folder, 320)
    design = design_of(folder, ARMS["nf4"], texts=SMALL.texts[:1])
    whole = qllm.Model.from_pretrained(folder)
    held = whole.decoder.nbytes()["weights"] + whole.decoder.nbytes()["embedding"]
    halves = [Half(str(folder), arm, design) for arm in design.arms]
    ids = whole.encode(design.texts[0].text)[:16]
    list(logits(halves, [ids]))
    for half in halves:
        assert 0 < half.largest < held / 8
    body = compute_lockstep(Task(design, str(folder), "nf4"))
    states = 2 * 4 * 64 * (len(whole.encode(design.texts[0].text)) - 1)
    # most of it is the room of a step of 256 rows, which does not grow with the layers
    assert body["memory"]["peak_running"] < held / 2 + states
    lock, plain = plan(design), plan(replace(design, lockstep=False))
    weights = lock.cells[1].need.weights
    assert weights < plain.cells[1].need.weights / 15
    assert lock.cells[1].tokens == 2 * len(whole.encode(design.texts[0].text))


def test_what_cannot_be_in_lockstep() -> None:
    with pytest.raises(QllmValueError, match="speed must be off"):
        replace(SMALL, lockstep=True)
    with pytest.raises(QllmValueError, match="texts is empty, and in lockstep"):
        replace(TINY, lockstep=True, texts=())
    with pytest.raises(QllmValueError, match="arm 'gguf' comes from gguf, which cannot be read"):
        replace(TINY, lockstep=True, arms=("bf16", Arm("gguf", "q4", source="gguf", path="x")))


def test_a_study_in_lockstep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of what was read are those of a study that reads the same texts alone; claims about
    generated text are not testable."""
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})
    design = replace(TINY, lockstep=True, texts=SMALL.texts)
    study = run(design, out=tmp_path / "out")
    plain = run(replace(design, lockstep=False, own_temperature=None, play=0),
                out=tmp_path / "plain")
    import pandas as pd

    for name in ("curves", "texts", "summary"):
        pd.testing.assert_frame_equal(study.tables[name], plain.tables[name])
    assert len(study.tables["samples"]) == len(study.tables["survival"]) == 0
    verdicts = study.tables["verdicts"].set_index("claim")
    for claim in ("C1c", "C4", "C7", "C8", "C9"):
        assert verdicts.loc[claim, "verdict"] == "not testable"
        assert "in lockstep nothing is generated" in verdicts.loc[claim, "reason"]
    assert (study.tables["checks"]["largest_difference"].fillna(0) == 0).all()
    assert study.report.is_file()
