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
from qllm.study import ARMS, PROFILES, Arm, Claim, Design, Text, load, resolve, run

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
        ({"lengths": (0,)}, "lengths must be from 1"),
        ({"lengths": (8, 4)}, "lengths must be in rising order"),
        ({"lengths": ()}, "lengths is empty"),
        ({"top_k": -1}, "top_k must be from 0"),
        ({"top_k": (5, 5)}, "top_k has '5' twice"),
        ({"band": (0.8, 0.5)}, "band must be two rising temperatures"),
        ({"band": (0.5, 1.5)}, "must lie inside its surroundings"),
        ({"compute": "fast"}, "compute must be exact, auto or int8, not 'fast'"),
        ({"confidence": 1.0}, "confidence must be from 0.5 to below 1"),
        ({"claims": {"C0": {}}}, "there is no claim 'C0'; there are C1a"),
        ({"claims": {"C1b": {"endpoints": {"speed": 1}}}}, "claims.C1b has no endpoint 'speed'"),
        ({"claims": {"C1b": {"endpoints": {"bytes": -1}}}}, "the margin bytes of claims.C1b must"),
        ({"claims": {"C1b": {"test": "guess"}}}, "this claim is tested by equivalence"),
        ({"claims": {"C1b": {"margin": 1}}}, "claims.C1b has no entry 'margin'"),
        ({"claims": {"C1b": {"primary": 1}}}, "claims.C1b.primary must be true or false"),
        ({"claims": {"C1b": 1}}, "claims.C1b must be a Claim or a mapping"),
        ({"claims": ["C1b"]}, "claims must be a mapping"),
        ({"prompts": "poems"}, "prompts has no set 'poems'; there are openings"),
        ({"logits_dtype": "half"}, "logits_dtype must be float32 or bfloat16"),
        ({"keep_ties": 1}, "keep_ties must be true or false"),
        ({"play": -1}, "play must be from 0"),
        ({"arms": ("bf16", Arm("x", "nf4", source="onnx"))}, "has the unknown source 'onnx'"),
        ({"arms": ("bf16", Arm("x", "nf4", codes="odd"))}, "has the unknown codes 'odd'"),
        ({"arms": ("bf16", Arm("x", "int8", codes="uniform"))}, "must be nf4 or fp4"),
        ({"arms": ("bf16", Arm("x", "nf4", compute="fast"))}, "has the unknown compute 'fast'"),
        ({"arms": ("bf16", Arm("x", "nf4", options={"a": 1}))}, "only sources other than qllm"),
        ({"arms": ("bf16", Arm("x", "nf4", options=3))}, "options of arm 'x' must be a mapping"),
        ({"arms": ("bf16", Arm("x", "", source="gguf"))}, "the format of arm 'x' must be a word"),
        ({"arms": ("bf16", Arm("x", "nf4", path=""))}, "path of arm 'x' must be the name"),
        ({"arms": ("bf16", Arm("x", "nf4", quantize_head=1))}, "quantize_head of arm 'x' must be"),
        ({"arms": ("int8", Arm("b", "f16", "reference", source="gguf"))}, "must have the source"),
        ({"arms": ("bf16", Arm("n", "bf16", "null", compute="int8"))}, "the compute of the refer"),
        ({"speed": {"batches": [1]}}, "speed.batches must be from 2"),
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
        ("huge", "there is no profile 'huge'; there are smoke, lite, full, paper"),
        ("gone.json", "there is no design file gone.json"),
        ("gone.toml", "there is no design file gone.toml"),
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
    for design in (SMALL, TINY, *map(resolve, PROFILES)):
        assert Design.from_json(design.to_json()) == design
        assert pickle.loads(pickle.dumps(design)) == design
    path = tmp_path / "design.json"
    path.write_text(json.dumps({"name": "mine", "arms": ["bf16", "int8"], "prompts": ["Once"]}))
    design = resolve(path, models="demo:falcon")
    assert design.arms == (ARMS["bf16"], ARMS["int8"]) and design.models == ("demo:falcon",)
    assert design.prompts == (Text("prompt-1", "text", "Once"),)


def test_designs_in_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
name = "mine"
models = ["demo:llama"]
temperatures = [0, 0.5]
own_temperature = false
speed = false
threads = false
lengths = 16
top_k = [50, 0]
prompts = [{id = "one", kind = "story", text = "Once upon a time"}, "It was"]

[[arms]]
name = "plain"
format = "bf16"
role = "reference"

[[arms]]
name = "other"
format = "Q4_K_M"
source = "gguf"
path = "other.gguf"
options = {n_ctx = 512}

[claims.C1c]
primary = false
endpoints = {ln_ppl = 0.02}
"""
    )
    found = resolve(path)
    assert found.own_temperature is None and found.speed is None and found.threads is None
    assert found.lengths == (16,) and found.max_new_tokens == 16 and found.top_k == (50, 0)
    assert found.prompts == (
        Text("one", "story", "Once upon a time"), Text("prompt-2", "text", "It was")
    )
    assert found.arms[1].options == {"n_ctx": 512} and found.reference.name == "plain"
    default = resolve("smoke").claims["C1c"]
    changed = Claim(default.test, {**default.endpoints, "ln_ppl": 0.02}, False)
    assert found.claims["C1c"] == changed and found.claims["C1a"] == resolve("smoke").claims["C1a"]
    for text, words in (
        ("a = ", "is not TOML"),
        ("name = 1979-05-27", "the name of a design must be a word"),
        ("temperatures = [nan]", "temperatures must be finite"),
        ("lengths = 1.5", "lengths must be a list"),
        ("x = " + "[" * 5000, "is not TOML|nested too deeply"),
    ):
        path.write_text(text)
        with pytest.raises(QllmError, match=words):
            resolve(path)
    path.write_bytes(b"\xff")
    with pytest.raises(QllmFileError, match="is not UTF-8"):
        resolve(path)


def test_the_design_of_the_documentation(tmp_path):
    page = Path(__file__).resolve().parents[1] / "docs" / "designs.md"
    if not page.is_file():
        pytest.skip("runs from a checkout with docs/")
    text = page.read_text().split("```toml\n")[1].split("```")[0]
    design = Design.from_toml(text)
    assert design.arm("fp4-32").blocksize == 32 and design.threads is None
    assert design.claims["C1c"].endpoints["ln_ppl"] == 0.02
    for name in (*ARMS, *PROFILES):
        assert f"`{name}`" in page.read_text() or name.endswith("+head"), name


def test_profiles_are_what_they_say():
    lite, full, paper = map(resolve, ("lite", "full", "paper"))
    assert len(lite.temperatures) == 7 and len(lite.seeds) == 4
    assert {arm.role for arm in lite.arms} == {"reference", "arm", "null", "control"}
    assert len(full.temperatures) == 14 and len(full.top_k) == 3
    assert {arm.name for arm in full.arms} > {"nf4+head", "null", "null-batch", "ceiling"}
    assert full.compute == "auto" and full.arm("ceiling").compute == "exact"
    assert len(lite.prompts) == 48 and len(full.prompts) == 96
    assert {text.kind for text in lite.prompts} == {text.kind for text in full.prompts}
    assert len({text.kind for text in full.prompts}) == 8
    null = lite.arm("null-batch")
    assert null.threads != lite.threads and null.batch_size != lite.batch_size
    assert paper.quantize_head and paper.keep_ties and paper.ignore_eos
    assert paper.logits_dtype == "bfloat16"
    assert paper.seeds == (1234,) and paper.top_k == (200,) and paper.lengths == (50,)
    assert paper.temperatures[0] > 0  # the harness divides by it


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
        "null-batch",
        "control",
    ]
    assert len(smoke.prompts) == 8 and len({text.kind for text in smoke.prompts}) == 8
    assert len(smoke.seeds) == 2 and smoke.max_new_tokens == 32 and smoke.top_k[0] == 0
    assert len(smoke.lengths) == 2 and len(smoke.top_k) == 2  # what claim C9 needs
    assert smoke.temperatures[0] == 0 and smoke.temperatures[-1] == 1.5
    assert sum(0.5 <= value <= 0.8 for value in smoke.temperatures) == 3
    grid = smoke.logit_temperatures
    assert len(grid) == 40 and grid[0] == 0.05 and grid[-1] == 2.0
    null = smoke.arm("null-batch")
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
