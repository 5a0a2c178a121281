"""Model: formats are swapped, mixed, taken back, saved and loaded, and really compute."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import layers, saving
from qllm.checkpoint import Checkpoint

pytest.importorskip("safetensors", reason="writes the checkpoints")
pytest.importorskip("ml_dtypes", reason="writes bfloat16")

import tiny_models  # noqa: E402

QUANTIZED = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8")
IDS = np.random.default_rng(7).integers(0, 131, 40).tolist()
UP0 = "model.layers.0.mlp.up_proj"
TIED = tiny_models.LLAMA | {"tie_word_embeddings": True}
BIASED = tiny_models.LLAMA | {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16."""
    return made(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)


def made(folder: Path, config: dict[str, Any], dtype: str = "bfloat16") -> Path:
    return tiny_models.write(folder, config, tiny_models.tensors(config, dtype))


def load(folder: Path, *arguments: Any, **options: Any) -> qllm.Model:
    options.setdefault("compute", "exact")
    return qllm.Model.from_pretrained(folder, *arguments, **options)


def with_weights(model: qllm.Model, source: Path, target: Path) -> qllm.Model:
    """The model of `source` in float32, its linear weights replaced by what `model` has,
    dequantized: what `model` should compute, by other kernels."""
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config | {"tie_word_embeddings": False}
        weights = {name: layers.to_float32(checkpoint.entry(name)) for name in checkpoint.names()}
    for linear in model.architecture.modules:
        weights[linear.module + ".weight"] = model.decoder.linear(linear.slot).dequantize()
    return load(tiny_models.write(target, config, weights))


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


# -------------------------------------------------------------------------------------- swapping


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_swapped_model_computes_with_the_quantized_weights(
    folder: Path, tmp_path: Path, format: str
) -> None:
    model = load(folder, int8_threshold=0.0)
    before = model.logits(IDS)
    weights_before = model.info().bytes["weights"]
    report = model.quantize_(format)
    after = model.logits(IDS)
    assert not np.array_equal(before, after)
    assert model.formats == {
        module: "bf16" if module == "lm_head" else format for module in model.formats
    }
    # int8 rounds the activations too, which no float weights show
    tolerance = 0.05 if format == "int8" else 1e-5
    assert close(after, with_weights(model, folder, tmp_path).logits(IDS), tolerance)
    held = model.info().bytes["weights"]
    assert held < (0.45 if format != "int8" else 0.75) * weights_before
    assert model.info().formats == {format: 14, "bf16": 1}
    assert set(model.info().kernels) == {format, "bf16"}
    assert report.changed == 14


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_decoder_holds_the_bytes_that_quantize_gives(folder: Path, format: str) -> None:
    model = load(folder, format, blocksize=128)
    with Checkpoint(folder) as checkpoint:
        for linear in model.architecture.linears:
            bits = checkpoint.entry(linear.module + ".weight").numpy()
            expected = qllm.quantize(bits, format, 128, dtype="bfloat16")
            held = model.decoder.linear(linear.slot)
            assert held.packed.tobytes() == expected.packed.tobytes()
            assert np.array_equal(held.dequantize(), expected.dequantize())


@pytest.mark.parametrize("format", [*QUANTIZED, "f16", "f32"])
def test_swapping_back_gives_bit_identical_logits(folder: Path, format: str) -> None:
    model = load(folder)
    before = model.logits(IDS)
    model.quantize_(format, quantize_head=True)
    assert set(model.formats.values()) == {format}
    report = model.quantize_("bf16")
    assert report.changed == 15 and set(model.formats.values()) == {"bf16"}
    assert np.array_equal(model.logits(IDS), before)
    model.quantize_(format)
    assert model.quantize_("original").changed == 14
    assert np.array_equal(model.logits(IDS), before)


def test_a_float_model_is_swapped_to_the_other_float_formats(tmp_path: Path) -> None:
    folder = made(tmp_path, tiny_models.LLAMA, "float32")
    model = load(folder)
    assert set(model.formats.values()) == {"f32"}
    before = model.logits(IDS)
    model.quantize_("bf16")
    assert not np.array_equal(model.logits(IDS), before)
    report = model.quantize_("original")
    assert {row.format for row in report} == {"f32"}
    assert np.array_equal(model.logits(IDS), before)


def test_swapping_at_load_is_swapping_afterwards(folder: Path) -> None:
    options = {"include": "*mlp*", "skip": ["*.1.mlp.up_proj"], "blocksize": 256}
    at_load = load(folder, "nf4-dq", **options)
    afterwards = load(folder)
    afterwards.quantize_("nf4-dq", **options)
    assert at_load.formats == afterwards.formats
    assert set(at_load.formats.values()) == {"nf4-dq", "bf16"}
    assert np.array_equal(at_load.logits(IDS), afterwards.logits(IDS))
    config = qllm.QuantConfig("nf4-dq", **options)
    assert load(folder, config).formats == at_load.formats
    assert at_load.report().rows == afterwards.report().rows


def test_formats_mix_by_several_calls(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.quantize_("nf4", include="*.mlp.*")
    model.quantize_("fp4-dq", include=["*.0.self_attn.q_proj", "*.1.self_attn.?_proj"])
    model.quantize_("f32", include="*.1.self_attn.o_proj")
    model.quantize_("fp4", include="*.down_proj", blocksize=32)
    formats = model.formats
    assert formats[UP0] == "nf4"
    assert formats["model.layers.0.mlp.down_proj"] == "fp4"
    assert formats["model.layers.0.self_attn.q_proj"] == "fp4-dq"
    assert formats["model.layers.0.self_attn.k_proj"] == "bf16"
    assert formats["model.layers.1.self_attn.k_proj"] == "fp4-dq"
    assert formats["model.layers.1.self_attn.o_proj"] == "f32"
    assert model.info().formats == {"fp4-dq": 4, "bf16": 4, "nf4": 4, "fp4": 2, "f32": 1}
    assert close(model.logits(IDS), with_weights(model, folder, tmp_path).logits(IDS))


def test_a_tied_output_embedding_is_quantized_on_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path / "tied", TIED)
    model = load(folder)
    before = model.logits(IDS)
    assert model.quantize_("nf4").changed == 14 and model.formats["lm_head"] == "bf16"
    model.quantize_("nf4", include="lm_head", quantize_head=True)
    assert model.formats["lm_head"] == "nf4"
    assert close(model.logits(IDS), with_weights(model, folder, tmp_path / "x").logits(IDS))
    model.quantize_("original")
    assert np.array_equal(model.logits(IDS), before)


def test_biases_stay_as_they_are(tmp_path: Path) -> None:
    folder = made(tmp_path / "biased", BIASED)
    model = load(folder, "nf4")
    assert close(model.logits(IDS), with_weights(model, folder, tmp_path / "x").logits(IDS))


# ---------------------------------------------------------------------------------- the selection


@pytest.mark.parametrize(
    ("include", "skip", "count"),
    [
        (None, None, 14),
        ("*", None, 14),
        ("model.layers.*.mlp.down_proj", None, 2),
        (["*.q_proj", "*.k_proj"], None, 4),
        (None, "*.mlp.*", 8),
        (None, ["*.mlp.*", "model.layers.1.*"], 4),
        ("*.layers.1.*", "*.?_proj", 3),
        (UP0, None, 1),
    ],
)
def test_include_and_skip_choose_layers(
    folder: Path, include: Any, skip: Any, count: int
) -> None:
    model = load(folder)
    report = model.quantize_("nf4", include, skip)
    assert report.changed == count
    assert sum(format == "nf4" for format in model.formats.values()) == count
    assert [row.module for row in report if row.changed] == [
        module for module, format in model.formats.items() if format == "nf4"
    ]
    assert all(row.reason for row in report if not row.changed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "*.up"}, ["'*.up'", "include", "no linear layer"]),
        ({"include": ["*.up_proj", "*.gate"]}, ["'*.gate'"]),
        ({"skip": "lm_heads"}, ["'lm_heads'", "skip"]),
        ({"include": "lm_head"}, ["no linear layer is selected", "quantize_head=True"]),
        ({"include": "*.q_proj", "skip": "*.self_attn.*"}, ["no linear layer is selected"]),
        ({"include": 3}, ["include", "3", "pattern"]),
        ({"skip": [""]}, ["skip", "pattern"]),
        ({"blocksize": 48}, ["blocksize", "48", "power of two"]),
        ({"blocksize": True}, ["blocksize", "True"]),
        ({"quantize_head": 1}, ["quantize_head", "True or False"]),
    ],
)
def test_a_selection_that_cannot_be_meant_is_an_error(
    folder: Path, options: dict, words: list[str]
) -> None:
    model = load(folder)
    with pytest.raises(qllm.QllmValueError) as caught:
        model.quantize_("nf4", **options)
    assert all(word in str(caught.value) for word in words)
    assert set(model.formats.values()) == {"bf16"}


@pytest.mark.parametrize("format", ["nf5", "", None, 4, "int4", "NF4"])
def test_an_unknown_format_is_an_error(folder: Path, format: Any) -> None:
    model = load(folder)
    if format is None:
        with pytest.raises(qllm.QllmValueError, match="no format"):
            load(folder, None, skip="lm_head")
        with pytest.raises(qllm.QllmValueError, match="format is None"):
            model.quantize_(None)
        return
    for call in (model.quantize_, lambda form: load(folder, form)):
        with pytest.raises(qllm.QllmValueError, match="there is no format .*nf4"):
            call(format)


def test_options_stand_in_one_place(folder: Path) -> None:
    with pytest.raises(qllm.QllmValueError, match="QuantConfig"):
        load(folder, qllm.QuantConfig("nf4"), skip="*.up_proj")


# ------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("format", "blocksize", "bits"),
    [
        ("nf4", 64, 4.5),
        ("fp4", 32, 5.0),
        ("nf4", 4096, 4 + 32 / 4096 * np.ceil(88 * 64 / 4096) / (88 * 64 / 4096)),
        ("nf4-dq", 64, 4 + 8 / 64 + (32 + 32) / (88 * 64)),  # one second-level absmax, one offset
        ("int8", 64, 8 + 32 / 64),
        ("f32", 64, 32.0),
        ("f16", 64, 16.0),
    ],
)
def test_bytes_are_those_of_the_format(
    folder: Path, format: str, blocksize: int, bits: float
) -> None:
    model = load(folder)
    report = model.quantize_(format, blocksize=blocksize)
    row = {row.module: row for row in report}[UP0]
    assert row.shape == (88, 64) and row.format == format and row.changed
    assert row.bits_per_weight == pytest.approx(bits)
    assert row.bytes == bits * 88 * 64 / 8
    assert report.bytes == sum(row.bytes for row in report)
    assert report.bits_per_weight == pytest.approx(
        8 * report.bytes / sum(row.shape[0] * row.shape[1] for row in report)
    )


@pytest.mark.parametrize("format", [*QUANTIZED, "bf16", "f32"])
def test_the_decoder_holds_as_many_bytes_as_the_report_says(tmp_path: Path, format: str) -> None:
    """Widths that need no padding: what is more are the tables of each layer."""
    config = tiny_models.LLAMA | {
        "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8
    }
    model = load(made(tmp_path, config), format, quantize_head=True)
    vectors = sum(4 * vector.size for vector in model.architecture.vectors)
    surplus = model.info().bytes["weights"] - model.report().bytes - vectors
    assert 0 <= surplus <= 0.035 * model.report().bytes


@pytest.mark.parametrize("format", [*QUANTIZED, "f16"])
def test_error_figures_are_those_of_numpy(folder: Path, format: str) -> None:
    model = load(folder)
    for row in model.quantize_(format):
        linear = {linear.module: linear for linear in model.architecture.modules}[row.module]
        with Checkpoint(folder) as checkpoint:
            exact = layers.to_float32(checkpoint.entry(row.module + ".weight")).astype(np.float64)
        error = model.decoder.linear(linear.slot).dequantize() - exact
        assert row.rmse == pytest.approx(np.sqrt(np.mean(error**2)))
        if row.module == "lm_head":
            assert row.rmse == 0 and row.sqnr_db == np.inf
        elif row.rmse:
            assert row.sqnr_db == pytest.approx(
                10 * np.log10(np.sum(exact**2) / np.sum(error**2))
            )


def test_nothing_is_skipped_silently(folder: Path) -> None:
    model = load(folder)
    rows = {row.module: row for row in model.quantize_("nf4", skip="*.o_proj")}
    assert set(rows) == set(model.formats)
    assert "output embedding" in rows["lm_head"].reason
    assert rows["model.layers.0.self_attn.o_proj"].reason == "skip has '*.o_proj'"
    again = {row.module: row for row in model.quantize_("nf4", include="*.mlp.*")}
    assert again[UP0].reason == "already nf4" and not again[UP0].changed
    assert again["model.layers.0.self_attn.q_proj"].reason == "not in include"


def test_the_report_prints_as_a_table(folder: Path) -> None:
    report = load(folder).quantize_("nf4")
    text = str(report)
    assert len(text.splitlines()) == 1 + 15 + 1
    assert UP0 in text and "88 x 64" in text and "4.500" in text
    assert "15 linear layers, 14 changed" in text
    page = report._repr_html_()
    assert page.count("<tr>") == 16 and UP0 in page
    frame = pytest.importorskip("pandas", reason="makes frames") and report.to_frame()
    assert len(frame) == 15 and list(frame.columns)[:3] == ["module", "format", "shape"]


def test_info_says_what_runs(folder: Path) -> None:
    model = load(folder, "nf4", compute="auto", threads=1, isa="scalar")
    info = model.info()
    assert (info.architecture, info.layers, info.hidden, info.vocab) == ("llama", 2, 64, 131)
    assert (info.device, info.compute, info.isa, info.threads) == ("cpu", "auto", "scalar", 1)
    assert info.parameters == sum(a.size for a in tiny_models.tensors(tiny_models.LLAMA).values())
    assert info.files == ("model.safetensors",)
    assert info.bytes["embedding"] == 144 * 64 * 2 + 64  # whole tiles, and a line behind them
    assert all("scalar" in name for names in info.kernels.values() for name in names)
    assert json.loads(json.dumps(info.to_dict()))["formats"] == {"nf4": 14, "bf16": 1}
    assert "nf4: 14 layers" in str(info) and "scalar" in info._repr_html_()
    assert "nf4" in repr(model)


def test_tied_parameters_count_once(tmp_path: Path) -> None:
    for config in (TIED, tiny_models.FALCON):
        model = load(made(tmp_path / config["model_type"], config))
        count = sum(array.size for array in tiny_models.tensors(config).values())
        assert model.info().parameters == count and model.info().tied


def test_a_tied_embedding_is_held_once(tmp_path: Path) -> None:
    """The embedding is the head's weight, keeps it when the head is swapped, and shares it again
    when it is swapped back."""
    folder = made(tmp_path / "tied", TIED)
    model = load(folder)
    before, held = model.logits(IDS), model.info().bytes
    bits = model.decoder.linear("embedding").packed.tobytes()
    assert held["embedding"] == 0
    assert bits == model.decoder.linear("head").packed.tobytes()
    model.quantize_("nf4", include="lm_head", quantize_head=True)
    own = model.info().bytes["embedding"]
    assert own > 0 and model.decoder.linear("embedding").packed.tobytes() == bits
    swapped = model.logits(IDS)
    assert not np.array_equal(swapped, before)
    model.quantize_("f32", include="lm_head")
    assert model.info().bytes["embedding"] == own
    assert close(model.logits(IDS), before)
    model.quantize_("original")
    assert model.info().bytes == held and np.array_equal(model.logits(IDS), before)
    again = load(folder, "nf4", include="lm_head", quantize_head=True)
    assert again.info().bytes["embedding"] == own and np.array_equal(again.logits(IDS), swapped)
    again.quantize_("bf16", include="lm_head")
    assert again.info().bytes == held and np.array_equal(again.logits(IDS), before)


# ------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, qllm.QllmMemoryError, RuntimeError])
def test_a_failing_swap_leaves_the_model_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    model = load(folder)
    model.quantize_("fp4", include="*.0.mlp.*", blocksize=128)
    before, formats, calls, real = model.logits(IDS), model.formats, [], layers.load_entry

    def failing(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        if len(calls) == 9:
            raise error("in the middle")
        return real(*arguments)

    monkeypatch.setattr(layers, "load_entry", failing)
    with pytest.raises(error, match="in the middle"):
        model.quantize_("nf4")
    assert len(calls) == 9 + 8 and model.formats == formats  # eight were put back
    assert np.array_equal(model.logits(IDS), before)
    monkeypatch.undo()
    assert model.quantize_("nf4").changed == 14


def test_when_putting_back_fails_too_the_error_names_the_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    real, calls = layers.load_entry, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        if len(calls) > 3:
            raise qllm.QllmMemoryError("no memory")
        return real(*arguments)

    monkeypatch.setattr(layers, "load_entry", failing)
    with pytest.raises(qllm.QllmMemoryError) as caught:
        model.quantize_("nf4")
    changed = [module for module, format in model.formats.items() if format == "nf4"]
    assert len(changed) == 3 and all(module in str(caught.value) for module in changed)
    monkeypatch.undo()
    model.quantize_("bf16")
    assert set(model.formats.values()) == {"bf16"}


def test_a_folder_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = made(tmp_path, tiny_models.LLAMA)
    model = load(folder)
    before = model.logits(IDS)
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(qllm.QllmFileError, match="changed"):
        model.quantize_("nf4")
    assert np.array_equal(model.logits(IDS), before)
    assert set(model.formats.values()) == {"bf16"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compute": "fast"}, qllm.QllmUnsupportedError, ["'fast'", "exact, auto and int8"]),
        ({"compute": None}, qllm.QllmUnsupportedError, ["exact, auto and int8"]),
        ({"device": "tpu"}, qllm.QllmUnsupportedError, ["tpu"]),
        ({"isa": "sse9"}, qllm.QllmError, ["sse9"]),
        ({"threads": 0}, qllm.QllmValueError, ["threads"]),
        ({"int8_outliers": "column"}, qllm.QllmValueError, ["int8_outliers", "row", "batch"]),
        ({"int8_threshold": float("nan")}, qllm.QllmValueError, ["int8_threshold"]),
        ({"revision": "main"}, qllm.QllmValueError, ["revision"]),
    ],
)
def test_options_of_loading_are_checked(
    folder: Path, options: dict, error: type, words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        load(folder, **options)
    assert all(word in str(caught.value) for word in words)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(qllm.QllmFileError, match="no folder './nowhere'"):
        load("./nowhere")


# ---------------------------------------------------------------------------------- save and load


CASES = {
    "bf16": (tiny_models.LLAMA, []),
    "nf4": (tiny_models.LLAMA, [("nf4", {})]),
    "fp4": (tiny_models.LLAMA, [("fp4", {"blocksize": 128})]),
    "nf4-dq": (tiny_models.LLAMA, [("nf4-dq", {"quantize_head": True})]),
    "fp4-dq": (BIASED, [("fp4-dq", {"skip": "*.0.*"})]),
    "int8": (BIASED, [("int8", {})]),
    "mixed": (
        tiny_models.LLAMA,
        [("nf4", {"include": "*.mlp.*"}), ("fp4-dq", {"include": "*.q_proj"})],
    ),
    "floats": (tiny_models.LLAMA, [("f32", {"include": "*.mlp.*"}), ("f16", {"include": "*.0.*"})]),
    "tied": (TIED, [("nf4", {})]),
    "tied-head": (TIED, [("nf4", {"quantize_head": True})]),
    "falcon": (tiny_models.FALCON, [("nf4", {})]),
    "falcon-head": (tiny_models.FALCON, [("int8", {"quantize_head": True})]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_loads_bit_for_bit(tmp_path: Path, case: str) -> None:
    config, swaps = CASES[case]
    model = load(made(tmp_path / "original", config), int8_threshold=5.0)
    for format, options in swaps:
        model.quantize_(format, **options)
    target = tmp_path / "saved"
    model.save(target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    again = load(target)
    assert again.formats == model.formats
    assert np.array_equal(again.logits(IDS), model.logits(IDS))
    for linear in model.architecture.modules:
        ours, theirs = (m.decoder.linear(linear.slot) for m in (model, again))
        assert ours.packed.tobytes() == theirs.packed.tobytes()
    stored = json.loads((target / "config.json").read_text())
    if case in ("bf16", "floats"):
        assert "quantization_config" not in stored
    else:
        quantization = stored["quantization_config"]
        assert quantization["quant_method"] == "bitsandbytes"
        assert quantization["load_in_8bit"] == (swaps[0][0] == "int8")
        assert set(quantization["llm_int8_skip_modules"]) == {
            module for module, format in model.formats.items() if format == "bf16"
        }
        if swaps[0][0] == "int8":
            assert again.info().int8_threshold == 5.0
    assert oct(target.stat().st_mode & 0o777) == oct(0o777 & ~saving._umask())


def test_a_large_model_is_saved_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    model = load(folder, "nf4")
    model.save(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert "model-00001-of-00004.safetensors" in names and len(names) == 6
    assert np.array_equal(load(tmp_path / "saved").logits(IDS), model.logits(IDS))


def test_other_files_come_along(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="writes tokenizer.json")
    folder = made(tmp_path / "original", tiny_models.LLAMA)
    tiny_models.write_tokenizer(folder, 131)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "modeling_evil.py").write_text("1/0")
    model = load(folder)
    model.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    }
    again = load(tmp_path / "saved")
    assert again.encode("abc") == model.encode("abc") and again.eos_token_id == (2,)


def test_saving_never_overwrites_and_leaves_nothing_half_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, "nf4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(qllm.QllmFileError, match="not empty"):
        model.save(tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(qllm.QllmFileError, match="no folder"):
        model.save(tmp_path / "file")
    with pytest.raises(qllm.QllmFileError):
        model.save(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert load(tmp_path / "empty").formats == model.formats

    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.serialize_file", full_disk)
    with pytest.raises(qllm.QllmFileError, match="No space left"):
        model.save(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}


def test_int8_and_4bit_do_not_go_into_one_folder(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "int8", include="*.mlp.*")
    model.quantize_("nf4", include="*.q_proj")
    with pytest.raises(qllm.QllmUnsupportedError, match="int8, nf4"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ------------------------------------------------------------------------------- already quantized


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The small Llama, nf4 but for the attention of layer 0."""
    target = tmp_path_factory.mktemp("quantized") / "nf4"
    load(folder, "nf4", skip="*.0.self_attn.*").save(target)
    return target


@pytest.mark.parametrize("format", ["bf16", "f32", "int8", "fp4"])
def test_stored_4bit_layers_cannot_become_anything_else(quantized: Path, format: str) -> None:
    model = load(quantized)
    before = model.logits(IDS)
    with pytest.raises(qllm.QllmUnsupportedError, match="only as nf4, with no full-precision"):
        model.quantize_(format)
    with pytest.raises(qllm.QllmUnsupportedError, match="only as nf4"):
        load(quantized, format)
    assert np.array_equal(model.logits(IDS), before)
    report = model.quantize_(format, include="*.0.self_attn.*")
    assert report.changed == (0 if format == "bf16" else 4)
    assert model.quantize_("original").changed == report.changed
    assert np.array_equal(model.logits(IDS), before)


def test_stored_layers_may_be_asked_for_as_they_are(quantized: Path) -> None:
    model = load(quantized, "nf4", skip="*.0.self_attn.*")
    assert np.array_equal(model.logits(IDS), load(quantized).logits(IDS))
    rows = {row.module: row for row in model.report()}
    assert rows[UP0].rmse is None and rows[UP0].sqnr_db is None
    with pytest.raises(qllm.QllmUnsupportedError, match="only as nf4"):
        model.quantize_("nf4", include=UP0, blocksize=128)
    full = model.quantize_("nf4")
    assert full.changed == 4
    assert {row.format for row in full} == {"nf4", "bf16"}


def test_a_quantized_layer_of_another_shape_is_named(quantized: Path, tmp_path: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((quantized / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(qllm.QllmFileError, match=r"\[88, 64\].*\[80, 64\]"):
        load(tmp_path)
