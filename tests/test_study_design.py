"""Designs of studies: what they hold, and everything that is refused before any work."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_studies import SMALL, TINY

from qllm.errors import QllmError, QllmFileError, QllmUnsupportedError, QllmValueError
from qllm.study import ARMS, Arm, Design, Text, load, resolve, run

# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": ("bf16", "nf5")}, "there is no arm 'nf5'; there are bf16, int8"),
        ({"arms": (Arm("a", "q4"), "bf16")}, "arm 'a' has the unknown format 'q4'"),
        ({"arms": ("bf16",)}, "arms has only the reference, bf16; a study needs another arm"),
        ({"arms": ("nf4",)}, "exactly one arm must be the reference, but 0 of nf4 are"),
        ({"arms": ("bf16", Arm("b", "f16", role="reference"))}, "but 2 of bf16, b are"),
        ({"arms": ("bf16", Arm("n", "nf4", role="null"))}, "must have the format of the reference"),
        ({"arms": ("bf16", "bf16")}, "arms has 'bf16' twice"),
        ({"arms": ("bf16", Arm("x", "nf4", blocksize=48))}, "blocksize of arm 'x' must be a power"),
        ({"arms": ("bf16", Arm("x", "nf4", threads=0))}, "threads of arm 'x' must be from 1"),
        ({"arms": "bf16"}, "arms must be a list, not 'bf16'"),
        ({"arms": ({"name": "x", "form": "nf4"},)}, "an arm has no entry 'form'"),
        ({"arms": ({"name": "x"},)}, "an arm is incomplete"),
        ({"temperatures": (-0.5, 1.0)}, "temperatures must be 0 or more, but one is -0.5"),
        ({"temperatures": (float("nan"),)}, "temperatures must be finite"),
        ({"temperatures": (1.0, 0.5)}, "temperatures must be in rising order"),
        ({"temperatures": (1.0, 1.0)}, "temperatures has '1.0' twice"),
        ({"temperatures": ()}, "temperatures is empty"),
        ({"temperatures": ("hot",)}, "temperatures must be numbers, but 'hot' is none"),
        ({"temperatures": (True,)}, "temperatures must be numbers, but 'True' is none"),
        ({"temperatures": (0.5,)}, "own_temperature is 1.0, which is not one of temperatures"),
        ({"logit_temperatures": ()}, "logit_temperatures is empty"),
        ({"logit_temperatures": (0, 1)}, "logit_temperatures must be above 0"),
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("",)}, "prompts has an entry whose text is ''"),
        ({"prompts": (3,)}, "prompts must be texts, but '3' is none"),
        ({"prompts": (Text("a", "k", "x"), Text("a", "k", "y"))}, "prompts has 'a' twice"),
        ({"texts": (), "own_temperature": None}, "nothing to compare logits on"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (-1,)}, "seeds must be from 0"),
        ({"seeds": (1.5,)}, "seeds must be whole numbers"),
        ({"models": ()}, "models is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1"),
        ({"top_k": -1}, "top_k must be from 0"),
        ({"band": (0.8, 0.5)}, "band must be two rising temperatures"),
        ({"band": (0.5, 1.5)}, "must lie inside its surroundings"),
        ({"compute": "fast"}, "compute must be exact, auto or int8, not 'fast'"),
        ({"confidence": 1.0}, "confidence must be from 0.5 to below 1"),
        ({"margins": {"speed": 1}}, "there is no margin 'speed'"),
        ({"margins": {"bytes": 0}}, "the margin bytes must be above 0"),
        ({"speed": {"rounds": 1}}, "speed.rounds must be from 2"),
        ({"bootstrap_draws": 1}, "bootstrap_draws must be from 100"),
        ({"quantize_head": 1}, "quantize_head must be true or false"),
        ({"int8_threshold": -1}, "int8_threshold must be 0 or more"),
    ],
)
def test_bad_designs(change, words):
    with pytest.raises(QllmValueError, match=re.escape(words)) as info:
        replace(SMALL, **change)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("design", "words"),
    [
        ("huge", "there is no profile 'huge'; there are smoke"),
        ("gone.json", "there is no design file gone.json"),
        ({"modles": []}, "a design has no entry 'modles'; it has name, models"),
        (7, "a design is a Design, the name of a profile, a mapping or a path, not a int"),
    ],
)
def test_bad_names_of_designs(design, words, tmp_path):
    with pytest.raises(QllmError, match=re.escape(words)):
        run(design, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(QllmFileError, match="there is no folder"):
        run(TINY, models=[str(tmp_path / "no model")], out=out)
    with pytest.raises(QllmFileError, match="no built-in model 'demo:gpt'"):
        run(TINY, models="demo:gpt", out=out)
    with pytest.raises(QllmValueError, match="executor must have the method submit"):
        run(TINY, out=out, executor=3)
    with pytest.raises(QllmValueError, match="progress must be None, True, False or a callable"):
        run(TINY, out=out, progress="yes")
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(QllmFileError, match="is a file; a study needs a folder"):
        run(TINY, out=out)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(QllmFileError, match="is not empty and holds no study"):
            run(TINY, out=used, fresh=fresh)
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]
    with pytest.raises(QllmFileError, match="holds no study: it has no design.json"):
        load(used)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pyarrow" else real(name, *rest),
    )
    with pytest.raises(QllmUnsupportedError, match=r"needs pyarrow.*pip install 'qllm\[study\]'"):
        run(TINY, out=tmp_path / "out")


def test_import_loads_numpy_alone():
    code = (
        "import sys, qllm.study\n"
        "names = {'pandas', 'pyarrow', 'scipy', 'matplotlib', 'tqdm', 'torch', 'tokenizers'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -------------------------------------------------------------------------------------- designs


def test_designs_survive_json_and_pickle(tmp_path):
    for design in (SMALL, TINY, resolve("smoke")):
        assert Design.from_json(design.to_json()) == design
        assert pickle.loads(pickle.dumps(design)) == design
    path = tmp_path / "design.json"
    path.write_text(json.dumps({"name": "mine", "arms": ["bf16", "int8"], "prompts": ["Once"]}))
    design = resolve(path, models="demo:falcon")
    assert design.arms == (ARMS["bf16"], ARMS["int8"]) and design.models == ("demo:falcon",)
    assert design.prompts == (Text("prompt-1", "text", "Once"),)


def test_smoke_is_what_it_says():
    smoke = resolve("smoke")
    assert smoke.models == ("demo:llama", "demo:falcon")
    assert [arm.name for arm in smoke.arms] == [
        "bf16",
        "int8",
        "nf4",
        "nf4-dq",
        "fp4",
        "fp4-dq",
        "null",
    ]
    assert len(smoke.prompts) == 8 and len({text.kind for text in smoke.prompts}) == 8
    assert len(smoke.seeds) == 2 and smoke.max_new_tokens == 32 and smoke.top_k == 0
    assert smoke.temperatures[0] == 0 and smoke.temperatures[-1] == 1.5
    assert sum(0.5 <= value <= 0.8 for value in smoke.temperatures) == 3
    grid = smoke.logit_temperatures
    assert len(grid) == 40 and grid[0] == 0.05 and grid[-1] == 2.0
    null = smoke.arm("null")
    assert null.batch_size != smoke.batch_size and null.threads != smoke.threads


# ------------------------------------------------------------------------------- names and folders


def test_a_model_may_be_named_by_a_path(tmp_path: Path) -> None:
    """A single path was taken for a list."""
    assert resolve("smoke", tmp_path).models == (str(tmp_path),)
    assert resolve("smoke", [tmp_path, "demo:llama"]).models == (str(tmp_path), "demo:llama")


@pytest.mark.parametrize("models", [3, b"demo:llama", [3], [b"demo:llama"], [None], [""]])
def test_models_that_are_no_names(models: Any) -> None:
    with pytest.raises(QllmValueError, match="models (must be|has an entry of a wrong kind)"):
        resolve("smoke", models)


@pytest.mark.parametrize("folder", [None, 3, b"x", "", "a\0b", "\ud800"])
def test_folders_that_cannot_be(folder: Any) -> None:
    for call in (lambda: load(folder), lambda: run("smoke", out=folder, progress=False)):
        with pytest.raises(QllmValueError, match="the folder is .*; the path of a folder was exp"):
            call()
