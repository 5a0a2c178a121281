"""Whole models with compute="exact" on a GPU, run on the processor, against those on the CPU: every
logit of prompts, decode steps, forks and truncated sequences has the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.quantize import FORMATS
from reference_decoder import CONFIGS, Weights, falcon, llama, tokens


@pytest.fixture
def device() -> str:
    return emulated.name()


@pytest.fixture(params=["", "reversed"])
def any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in either order."""
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)


def story(decoder: _core.Decoder, vocab: int) -> np.ndarray:
    """The logits of steps of every kind: a prompt beside another one, a prompt in two parts, a few
    tokens one by one, forks that go on side by side beyond a page of 64 positions, what is cut off
    and said anew, and a step that wants some rows alone."""
    ids = tokens(200, seed=5, vocab=vocab).tolist()
    a, b = decoder.sequence(), decoder.sequence()
    out = [decoder.step([a] * 9 + [b] * 5, ids[:14]), decoder.step([a] * 53, ids[14:67])]
    for token in ids[67:70]:
        out.append(decoder.step([b, a], [token, token + 1 if token + 1 < vocab else 0]))
    fork, cut = a.fork(), b.fork()
    cut.truncate(3)
    out.append(decoder.step([a, fork, cut, cut, b], ids[70:75]))
    fork.truncate(60)
    again = fork.fork()
    out.append(decoder.step([fork] * 7 + [again] * 6 + [a], ids[75:89]))
    want = np.array([False, True, False, False, True, False])
    out.append(decoder.step([a, a, a, again, fork, b], ids[89:95], want))
    return np.concatenate(out)


def assert_same(device: str, weights: Weights, **options: Any) -> np.ndarray:
    vocab = weights.config["vocab"]
    expected = story(weights.decoder(compute="exact", threads=1, **options), vocab)
    found = story(weights.decoder(compute="exact", device=device, **options), vocab)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    return found


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_block(device: str, name: str) -> None:
    logits = assert_same(device, Weights(CONFIGS[name], "bf16", seed=1))
    assert np.isfinite(logits).all() and logits.std() > 0.1


# rows of 48 and 80 values end inside blocks of 64, those of 35 and 57 inside bytes
@pytest.mark.parametrize("name", ["llama", "odd sizes", "even blocks"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(device: str, format: str, name: str) -> None:
    config = llama(hidden=64, intermediate=128) if name == "even blocks" else CONFIGS[name]
    decoder = Weights(config, format, seed=2).decoder(compute="exact", device=device)
    assert decoder.info()["kernels"][format] == [f"{format} {device}, exact"]
    assert_same(device, Weights(config, format, seed=2))


def test_vectors_and_biases_that_are_not_set(device: str) -> None:
    weights = Weights(falcon(), "f16", seed=3, biased=False)
    for slot in [slot for slot in weights.arrays if slot.endswith("norm.bias")]:
        del weights.arrays[slot]
    assert_same(device, weights)


@pytest.mark.usefixtures("any_order")
def test_copies_and_kernels_that_run_late(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_EMULATE_STREAMS", "late")
    assert_same(device, Weights(CONFIGS["mistral"], "nf4", seed=9))


@pytest.mark.parametrize(("outliers", "threshold"), [("row", 2.0), ("batch", 2.0), ("batch", 0.0)])
def test_outliers_of_int8(device: str, outliers: str, threshold: float) -> None:
    """Over more rows than the CPU works on together, which is what "batch" looks at."""
    weights = Weights(llama(), "int8", seed=4)
    options = {"int8_threshold": threshold, "int8_outliers": outliers, "compute": "exact"}
    weights.arrays["embedding"][:, 7] *= 9
    ids = tokens(330, seed=6).tolist()
    logits = []
    for decoder in (weights.decoder(threads=1, **options), weights.decoder(device=device, **options)):
        rows = [row for row in (decoder.sequence() for _ in range(5)) for _ in range(66)]
        want = np.arange(330) % 7 == 3
        logits.append(decoder.step(rows, ids, want))
    np.testing.assert_array_equal(*logits)


def test_a_model_in_parts(device: str) -> None:
    weights = Weights(CONFIGS["falcon 40b"], "nf4", seed=7)
    there = weights.decoder(compute="exact", device=device)
    here = weights.decoder(compute="exact", threads=1)
    ids = tokens(21, seed=8).tolist()
    hidden = [decoder.embed(ids) for decoder in (here, there)]
    np.testing.assert_array_equal(*hidden)
    hidden = [decoder.blocks([decoder.sequence()] * 21, hidden[0]) for decoder in (here, there)]
    np.testing.assert_array_equal(*hidden)
    np.testing.assert_array_equal(here.head(hidden[0]), there.head(hidden[0]))


# --------------------------------------------------------------------------------- model families


def families() -> list[Any]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import architecture_models

    return list(architecture_models.VARIANTS)


@pytest.mark.parametrize("name", families())
def test_every_family(device: str, name: str, tmp_path: Path) -> None:
    import architecture_models as models

    variant = models.VARIANTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.build(variant, tmp_path)
    ids = np.random.default_rng(variant.length).integers(0, models.VOCAB, variant.length).tolist()
    here = qllm.Model.from_pretrained(tmp_path, compute="exact", threads=1)
    there = qllm.Model.from_pretrained(tmp_path, compute="exact", device=device)
    assert there.info().device == device
    np.testing.assert_array_equal(there.logits(ids), here.logits(ids))
    for format in ("nf4-dq", "int8"):
        here.quantize_(format)
        there.quantize_(format)
        np.testing.assert_array_equal(there.logits(ids[:9]), here.logits(ids[:9]))
    options = {"do_sample": False, "max_new_tokens": 4, "ignore_eos": True}
    assert there.generate(ids[:5], **options).ids == here.generate(ids[:5], **options).ids
