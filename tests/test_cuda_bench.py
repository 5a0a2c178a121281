"""What is measured on a GPU, on the emulator: random weights are those of the formula wherever they
are made, limits are found, and every table of benchmarks/gpu.py comes to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest

from qllm import _core
from qllm.architectures import describe
from qllm.cli.bench_models import SHAPES, Random
from qllm.errors import QllmError, QllmValueError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import gpu  # noqa: E402
import torch_models  # noqa: E402

FORMATS = ["f32", "f16", "bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
ARRAYS = ["packed", "absmax", "absmax_codes", "nested_absmax", "scb"]


@pytest.fixture(scope="module")
def name() -> str:
    return emulated.name()


def decoder(device: str, compute: str, shape: str = "tiny") -> Any:
    return _core.Decoder(describe(SHAPES[shape]).decoder, device=device, compute=compute)


def words_by_formula(seed: int, array: int, n: int) -> np.ndarray:
    """SplitMix64, its upper half, in Python's integers."""
    low = 2**64 - 1
    found = []
    for i in range(n):
        z = seed + ((array << 60 | i) + 1) * 0x9E3779B97F4A7C15 & low
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & low
        z = (z ^ z >> 27) * 0x94D049BB133111EB & low
        found.append((z ^ z >> 31) >> 32)
    return np.array(found, np.uint64)


def test_a_random_weight_is_that_of_the_formula() -> None:
    made = decoder("cpu", "exact")
    slot, (rows, cols) = next((slot, size) for slot, size in made.slots().items()
                              if len(size) == 2 and slot not in ("embedding", "head"))
    nbytes = made.set_random(slot, "nf4", seed=7)
    weight = made.linear(slot)
    assert nbytes == weight.nbytes
    np.testing.assert_array_equal(weight.packed[:500], words_by_formula(7, 0, 500) & 255)
    deviation = np.float32(1) / np.sqrt(np.float32(cols))
    share = np.float32(0.75) + (words_by_formula(7, 1, 200) >> 8).astype(np.float32) / 2**25
    np.testing.assert_array_equal(weight.absmax[:200], np.float32(1.75) * deviation * share)
    made.set_random(slot, "int8", seed=2**64 - 1)
    codes = made.linear(slot).packed.ravel()[:500]
    expected = (words_by_formula(2**64 - 1, 0, 500) % 255).astype(np.int64) - 127
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_have_the_variance_of_a_model(format: str) -> None:
    made = decoder("cpu", "exact")
    for slot, size in made.slots().items():
        if len(size) == 2 and slot != "embedding":
            made.set_random(slot, format, seed=1)
            values = made.linear(slot).dequantize()
            assert 0.8 < values.std() * np.sqrt(size[1]) < 1.2
            assert abs(values.mean()) < 0.1 / np.sqrt(size[1])


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_device_makes_the_same_random_weights(name: str, format: str, compute: str) -> None:
    here, there = decoder("cpu", "exact"), decoder(name, compute)
    for seed, (slot, size) in enumerate(here.slots().items()):
        if len(size) == 1:
            continue
        kind = format if slot != "embedding" or format in ("f32", "f16", "bf16") else "bf16"
        sizes = {made.set_random(slot, kind, seed=seed) for made in (here, there)}
        a, b = here.linear(slot), there.linear(slot)
        assert sizes == {a.nbytes} and a.format == b.format == kind
        for array in ARRAYS:
            expected = getattr(a, array)
            if expected is None:
                assert getattr(b, array) is None
            else:
                np.testing.assert_array_equal(getattr(b, array), expected, f"{slot} {array}")
        assert a.offset == b.offset
        np.testing.assert_array_equal(b.dequantize(), a.dequantize())


def test_random_weights_are_refused_where_other_weights_are(name: str) -> None:
    for device in ("cpu", name):
        made = decoder(device, "exact")
        vector = next(slot for slot, size in made.slots().items() if len(size) == 1)
        for slot, words in ((vector, "no linear slot"), ("nothing", "no linear slot")):
            with pytest.raises(QllmValueError, match=words):
                made.set_random(slot, "nf4")
        with pytest.raises(QllmError, match="not offered for the embedding"):
            made.set_random("embedding", "nf4")
        with pytest.raises(QllmValueError, match="blocksize"):
            made.set_random("head", "nf4", blocksize=48)
        with pytest.raises(QllmValueError, match="seed"):
            made.set_random("head", "nf4", seed=-1)
        assert "embedding" in made.missing() and "head" in made.missing()


PUBLISHED = {"1.1b": 1.1, "7b": 6.74, "13b": 13.02, "70b": 68.98, "falcon-7b": 6.92,
             "falcon-40b": 41.3}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(shape: str) -> None:
    config = describe(SHAPES[shape])
    slots = _core.Decoder(config.decoder).slots()
    count = sum(int(np.prod(size)) for slot, size in slots.items()
                if not (slot == "embedding" and config.tied))
    assert count / 1e9 == pytest.approx(PUBLISHED[shape], rel=0.02)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_random_model_computes_the_same_here_and_there(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "falcon":
        small = SHAPES["falcon-7b"] | {"hidden_size": 128, "num_hidden_layers": 1,
                                       "num_attention_heads": 2, "vocab_size": 96}
        monkeypatch.setitem(SHAPES, "tiny", small)
    logits = []
    for device in ("cpu", name):
        made = Random("tiny", ["nf4"], device=device, compute="exact", threads=None, isa=None)
        ready = made.ready("nf4")
        assert made.decoders["nf4"].missing() == [] and ready.bits_per_weight == 4.5
        sequence = ready.decoder.sequence()
        logits.append(ready.decoder.step([sequence] * 5, np.arange(5)))
    np.testing.assert_array_equal(logits[1], logits[0])
    assert 0.3 < logits[0].std() < 3


def test_limits_are_measured(name: str) -> None:
    assert _core.device_limits("cpu", 1 << 20) is None
    found = _core.device_limits(name, 1 << 20)
    assert found is not None
    assert found.keys() == {"read_bytes_per_second", "copy_bytes_per_second", "edge_seconds",
                            "dependent_edge_seconds"}
    for value in found.values():
        assert isinstance(value, float) and 0 < value < np.inf
    with pytest.raises(QllmValueError, match="at least 16, found 15"):
        _core.device_limits(name, 15)
    with pytest.raises(QllmError, match="measuring: needs"):
        _core.device_limits(name, 1 << 60)


# ----------------------------------------------------------------------------------- the benchmark


def table(*words: str, out: Path) -> dict[str, Any]:
    """Measures a table, in this process, prints it, and returns its JSON."""
    options = gpu.parser().parse_args([*words, "--library", str(emulated.library()), "--bytes",
                                       "100000", "--json", str(out)])
    found = gpu.run(options)
    gpu.show(found)
    common.write_json(out, found)
    read: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return read


TINY = ("--shapes", "tiny", "--rounds", "1")
SHORT = ("--context", "3", "--new-tokens", "2", "--batch", "1", "3")


def test_the_table_of_limits_as_a_program(tmp_path: Path) -> None:
    out = tmp_path / "limits.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "limits", "--library",
         str(emulated.library()), "--bytes", "100000", "--json", str(out)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text(encoding="utf-8"))["limits"]["read_bytes_per_second"] > 0
    assert "| reading | " in done.stdout and "us |" in done.stdout


@pytest.mark.parametrize(("compute", "width"), [("exact", 4), ("auto", 2)])
def test_the_table_of_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compute: str, width: int
) -> None:
    found = table("decode", *TINY, *SHORT, "--compute", compute, out=tmp_path / "decode.json")
    assert [row["format"] for row in found["rows"]] == ["bf16", "int8", "nf4", "nf4-dq", "fp4",
                                                        "fp4-dq"]
    read = found["limits"]["read_bytes_per_second"]
    for row in found["rows"]:
        assert row.keys() == {"shape", "format", "bytes_per_token", "bits_per_weight", "kernels",
                              "decode"}
        for batch, entry in row["decode"].items():
            seconds = entry["step_seconds"]["median"]
            assert entry["tokens_per_second"] == pytest.approx(int(batch) / seconds)
            keys = int(batch) * 4.5 * 2 * width * 2 * 2 * 32  # layers, heads, head_dim
            least = (row["bytes_per_token"] + keys) / read
            assert entry["least_seconds"] == pytest.approx(least)
            assert entry["share"] == pytest.approx(least / seconds)
    assert "| tiny | qllm | nf4-dq | 0.00 GB | " in capsys.readouterr().out


def test_the_table_of_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = table("prefill", *TINY, "--formats", "nf4", "--tokens", "4", "9", "--compute", "exact",
                  out=tmp_path / "prefill.json")
    (row,) = found["rows"]
    assert row["prefill"].keys() == {"4", "9"}
    assert "| tiny | nf4 | " in capsys.readouterr().out


def test_peers_are_beside_or_left_out_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = table("peers", *TINY, *SHORT, "--formats", "nf4", "int8", "--compute", "exact",
                  "--torch-device", "cpu", out=tmp_path / "peers.json")
    printed = capsys.readouterr().out
    by = {(row["engine"], row["format"]): row for row in found["rows"]}
    assert len(by) == 4
    for (engine, _), row in by.items():
        assert "left_out" in row or len(row["decode"]) == 2
        assert engine == "torch" or "left_out" not in row
        assert f"left out: {row.get('left_out')}" in printed or "left_out" not in row


@pytest.mark.parametrize("format", ["bf16", "nf4-dq", "int8"])
def test_models_on_torch_have_the_layers_that_are_asked_for(format: str) -> None:
    pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    model = torch_models.make(SHAPES["tiny"], format, "cpu")
    kinds = {"bf16": torch.nn.Linear, "nf4-dq": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {torch.nn.Linear, kinds[format]}
    assert sum(type(layer) is kinds[format] for layer in layers) == (15 if format == "bf16" else 14)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    if format == "nf4-dq":
        assert all(layer.weight.quant_state.nested for layer in layers if type(layer) is not
                   torch.nn.Linear)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits.float()).all()


@emulated.without_a_gpu
def test_what_does_not_fit_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", "8000000")
    found = table("decode", *TINY, *SHORT, "--compute", "exact", "--formats", "nf4", "--shapes",
                  "small", "tiny", out=tmp_path / "decode.json")
    assert ["left_out" in row for row in found["rows"]] == [True, False]
    assert "bytes of memory" in found["rows"][0]["left_out"]
    assert "small qllm nf4 is left out: " in capsys.readouterr().out
    late = table("decode", *TINY, "--seconds", "0", "--compute", "exact",
                 out=tmp_path / "late.json")
    assert {row["left_out"] for row in late["rows"]} == {"not begun after 0 s"}
