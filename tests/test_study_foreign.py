"""Arms from elsewhere: transformers and GGUF models of the same weights beside ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from small_studies import TINY

import qllm
from qllm.errors import QllmFileError, QllmUnsupportedError, QllmValueError
from qllm.integrations.prefix import PrefixReader
from qllm.study import Arm, run
from qllm.study.foreign import load

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

VOCAB = 320
CONFIG = {**tiny_models.LLAMA, "vocab_size": VOCAB, "max_position_embeddings": 512,
          "bos_token_id": 1, "eos_token_id": 2}
CLOSE = 2e-4
"""Greatest difference of logits, whose size is about 10, between float32 sums in other orders."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes, in bfloat16."""
    place = tmp_path_factory.mktemp("model") / "llama"
    tiny_models.write(place, CONFIG, tiny_models.tensors(CONFIG, "bfloat16"))
    tiny_models.write_tokenizer(place, VOCAB)
    return place


@pytest.fixture(scope="module")
def gguf_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as GGUF, its weights in float32; for tests of what needs both packages."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "llama.gguf")


def write_gguf(folder: Path, out: Path, swapped: tuple[int, int] | None = None,
               padding: int = 0) -> Path:
    """A GGUF file of a folder; `swapped` exchanges the names of two tokens, `padding` adds rows
    that no token has."""
    import gguf
    import to_gguf

    checkpoint = qllm.checkpoint.Checkpoint.open(folder)
    config = {**checkpoint.config, "vocab_size": VOCAB + padding}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    to_gguf.add_config(writer, config)
    copy = out.parent / "tokenizer"
    copy.mkdir(exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if swapped is not None:
        back = {token: piece for piece, token in vocabulary.items()}
        one, two = swapped
        vocabulary[back[one]], vocabulary[back[two]] = two, one
    (copy / "tokenizer.json").write_text(json.dumps(content))
    to_gguf.add_tokenizer(writer, copy, config["vocab_size"])
    for name in checkpoint.names():
        values = qllm.layers.to_float32(checkpoint.entry(name))
        for part, count in heads.items():
            if name.endswith(f"{part}.weight"):
                values = to_gguf.interleaved(values, count)
        if padding and values.shape[0] == VOCAB:
            values = np.concatenate([values, np.ones((padding, values.shape[1]), np.float32)])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint.close()
    return out


def ours(folder: Path, ids: Sequence[int]) -> np.ndarray:
    found = qllm.Model.from_pretrained(folder, compute="exact").logits(list(ids))
    assert isinstance(found, np.ndarray)
    return found


def design_of(folder: Path, *arms: Any, **changes: Any) -> Any:
    return replace(TINY, models=(str(folder),), arms=("bf16", *arms), **changes)


def transformers_arm(**changes: Any) -> Arm:
    return replace(Arm("theirs", "bf16", role="null", source="transformers",
                       options={"dtype": "float32"}), **changes)


def gguf_arm(file: Path, **changes: Any) -> Arm:
    return replace(Arm("gguf", "bf16", role="null", source="gguf", path=str(file)), **changes)


IDS = [1, *range(70, 110), 5, 6, 7]


# ------------------------------------------------------------------------------------- adapters


def test_logits_of_transformers(folder: Path) -> None:
    pytest.importorskip("transformers")
    arm = transformers_arm()
    model = load(arm, str(folder), design_of(folder, arm))
    assert model.vocab == VOCAB and "transformers" in model.name
    found = model.logits(IDS)
    assert found.dtype == np.float32 and found.shape == (len(IDS), VOCAB)
    assert np.abs(found - ours(folder, IDS)).max() < CLOSE
    weights = 4 * qllm.Model.from_pretrained(folder).info().parameters
    assert weights <= model.memory()["weights"] < 1.01 * weights  # and a few buffers


def test_logits_of_gguf(folder: Path, gguf_file: Path) -> None:
    arm = gguf_arm(gguf_file)
    model = load(arm, str(folder), design_of(folder, arm))
    found = model.logits(IDS)
    assert found.dtype == np.float32 and found.shape == (len(IDS), VOCAB)
    assert np.abs(found - ours(folder, IDS)).max() < CLOSE
    again = model.logits((IDS * 3)[:100])  # the same beginning
    assert np.abs(again - ours(folder, (IDS * 3)[:100])).max() < CLOSE


@pytest.mark.parametrize("source", ["transformers", "gguf"])
def test_texts_that_begin_alike(
    folder: Path, source: str, request: pytest.FixtureRequest
) -> None:
    """Whatever was read before, the logits are those of the text."""
    if source == "gguf":
        arm = gguf_arm(request.getfixturevalue("gguf_file"))
    else:
        pytest.importorskip("transformers")
        arm = transformers_arm()
    model = load(arm, str(folder), design_of(folder, arm))
    texts = [IDS[:5], IDS[:9], IDS[:9], IDS[:7], [*IDS[:7], 9, 9], [4, *IDS], IDS, IDS[:1]]
    for text in texts:
        assert np.abs(model.logits(text) - ours(folder, text)).max() < CLOSE
    assert model.logits([]).shape == (0, VOCAB)


class Counting(PrefixReader):
    """Logits that say what was read; a position cannot be forgotten when `stubborn`."""

    vocab = 2

    def __init__(self, stubborn: bool = False) -> None:
        super().__init__()
        self.held: list[int] = []
        self.read = 0
        self.stubborn = stubborn

    def _extend(self, ids: Sequence[int], start: int) -> np.ndarray:
        assert start == len(self.held)
        if 13 in ids:
            raise RuntimeError("an unlucky token")
        self.held += ids
        self.read += len(ids)
        return np.array([[token, start + i] for i, token in enumerate(ids)], np.float32)

    def _truncate(self, length: int) -> bool:
        if not self.stubborn:
            self.held = self.held[:length]
        return not self.stubborn

    def _clear(self) -> None:
        self.held = []


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_position_is_read_once(stubborn: bool) -> None:
    model = Counting(stubborn)
    rng = np.random.default_rng(5)
    for _ in range(200):
        text = rng.integers(0, 2, rng.integers(0, 6)).tolist()
        assert model.logits(text).tolist() == [[t, i] for i, t in enumerate(text)]
    model.forget()
    before = model.read
    for text in ([1, 2, 3], [1, 2, 3, 4], [1, 2], [1, 2, 5]):
        model.logits(text)
    assert model.read - before == (3 + 1 + 0 + (3 if stubborn else 1))
    with pytest.raises(RuntimeError):
        model.logits([1, 2, 13])
    assert model.logits([1, 2, 3]).tolist() == [[1, 0], [2, 1], [3, 2]]


# --------------------------------------------------------------------------------- what is refused


def test_another_vocabulary_is_refused(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    arm = gguf_arm(write_gguf(folder, tmp_path / "swapped.gguf", swapped=(70, 71)))
    with pytest.raises(QllmValueError, match="has another vocabulary: token 70 is 'D' there and"):
        load(arm, str(folder), design_of(folder, arm))
    with pytest.raises(QllmValueError, match="knows 320 tokens and demo:llama 1024|another vocab"):
        load(gguf_arm(gguf_file), "demo:llama", TINY)


def test_padding_is_cut_and_said(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    arm = gguf_arm(write_gguf(folder, tmp_path / "padded.gguf", padding=64))
    with pytest.warns(UserWarning, match="has 384 logits and .* has 320 tokens: the logits beyond"):
        model = load(arm, str(folder), design_of(folder, arm))
    found = model.logits(IDS)
    assert found.shape == (len(IDS), VOCAB)
    assert np.abs(found - ours(folder, IDS)).max() < CLOSE


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    arm = transformers_arm(path=str(other))
    with pytest.raises(QllmValueError, match="another vocabulary: token 68 is 'B' there and 'A'"):
        load(arm, str(folder), design_of(folder, arm))
    (other / "tokenizer.json").write_text(text)
    assert load(arm, str(folder), design_of(folder, arm)).vocab == VOCAB


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trust_remote_code": True}, "trust_remote_code is not passed on"),
        ({"use_safetensors": False}, "use_safetensors is not passed on"),
        ({"dtype": "float99"}, "transformers cannot load"),
    ],
)
def test_options_of_transformers(folder: Path, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("transformers")
    arm = transformers_arm(options=options)
    with pytest.raises((QllmValueError, QllmFileError), match=words):
        load(arm, str(folder), design_of(folder, arm))


def test_options_of_gguf(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    design = design_of(folder, gguf_arm(gguf_file))
    load(gguf_arm(gguf_file, options={"n_threads": 1, "n_gpu_layers": 0}), str(folder), design)
    with pytest.raises(QllmValueError, match="llama.cpp has no option 'speed'; there are"):
        load(gguf_arm(gguf_file, options={"speed": 9}), str(folder), design)
    with pytest.raises(QllmValueError, match="the option n_ubatch of llama.cpp cannot be 'many'"):
        load(gguf_arm(gguf_file, options={"n_ubatch": "many"}), str(folder), design)
    with pytest.raises(QllmFileError, match="there is no GGUF file"):
        load(gguf_arm(tmp_path / "none.gguf"), str(folder), design)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:1000])
    with pytest.raises(QllmFileError, match="llama.cpp cannot load"):
        load(gguf_arm(broken), str(folder), design)
    with pytest.raises(QllmValueError, match="without the path of a file"):
        load(gguf_arm(gguf_file, path=None), str(folder), design)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    for arm, words in ((transformers_arm(), "pip install torch transformers"),
                       (gguf_arm(Path("x")), "pip install llama-cpp-python")):
        with pytest.raises(QllmUnsupportedError, match=words):
            load(arm, str(folder), TINY)


# ---------------------------------------------------------------------------------------- studies

NULL = {"kl": 1e-7, "tv": 1e-4, "disagreement": 1e-4, "ln_ppl_ratio": 1e-4}
"""Bounds for logits that differ by at most CLOSE. At temperature T every probability is off by a
factor within exp(+-2 d / T), d = 2e-4, so tv <= d / T and kl <= (2 d / T)^2 / 2, at the lowest T of
the design, 0.1, 2e-3 and 8e-6; differences are independent roundings, and sums over tokens stay far
below these."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qllm.study.report.write_plots", lambda study, folder: {})


class Plain:
    """Logits from our own decoder, as somebody's object would give them."""

    def __init__(self, folder: Path) -> None:
        self.model = qllm.Model.from_pretrained(folder, compute="exact")

    def logits(self, ids: list[int]) -> Any:
        return self.model.logits(ids)


def found(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in packages)


@pytest.mark.usefixtures("no_pictures")
def test_the_same_weights_elsewhere_are_a_null_arm(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One study with ours, transformers, GGUF and an object, as far as the packages are there: all
    of the same weights but nf4."""
    arms, live = [Arm("live", "bf16", role="null", source="live")], {"live": Plain(folder)}
    if found("torch", "transformers"):
        arms.append(transformers_arm())
    if found("gguf", "llama_cpp"):
        arms.append(gguf_arm(request.getfixturevalue("gguf_file")))
    design = design_of(folder, "nf4", *arms, lengths=(4, 8))
    study = run(design, out=tmp_path / "out", live=live)
    texts = study.tables["texts"]
    for arm in arms:
        rows = texts[texts["arm"] == arm.name]
        assert len(rows)
        for measure, bound in NULL.items():
            worst = rows[measure].abs().max()
            assert worst <= (0 if arm.name == "live" else bound), (arm.name, measure, worst)
        quantized = texts[texts["arm"] == "nf4"]
        assert quantized["tv"].min() > 100 * NULL["tv"]
    samples = study.tables["samples"]
    for arm in arms:  # near-ties aside, which these weights do not have, the texts are the same
        assert samples[samples["arm"] == arm.name]["equal"].all(), arm.name
    # again: every cell is there, the live one too
    seen: list[str] = []
    run(design, out=tmp_path / "out", live=live, progress=lambda event: seen.append(event.text))
    assert sum(text.endswith("was there") for text in seen) == 2 + len(arms)


def test_what_a_live_arm_needs(folder: Path, tmp_path: Path) -> None:
    arm = Arm("mine", "bf16", source="live")
    design = design_of(folder, arm)
    for live in (None, {}, {"mine": 3}):
        with pytest.raises(QllmValueError, match="arm 'mine' is live, so run"):
            run(design, out=tmp_path / "out", live=live)
    with pytest.raises(QllmValueError, match="live has 'other', but no arm"):
        run(design, out=tmp_path / "out", live={"mine": Plain(folder), "other": 3})
    two = replace(design, models=(str(folder), "demo:llama"))
    with pytest.raises(QllmValueError, match="one live model, but the design has 2 models"):
        run(two, out=tmp_path / "out", live={"mine": Plain(folder)})
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_logits_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    class Short(Plain):
        def logits(self, ids: list[int]) -> Any:
            return super().logits(ids)[:, :-1]

    design = design_of(folder, Arm("mine", "bf16", source="live"))
    with pytest.raises(QllmValueError, match=r"mine gave logits of the shape .* was expected"):
        run(design, out=tmp_path / "out", live={"mine": Short(folder)})
