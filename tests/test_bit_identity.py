"""A row's logits are the same bits whatever else is computed with it.

Alone, in a batch of 13, on one thread and on two, by prefill and by decode, in chunks, in a fork,
under every instruction set, in every format and compute mode: one array of logits. (bf16 weights
take bf16 activations only under the sets that multiply them: there are two arrays then.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import _core

pytest.importorskip("safetensors", reason="writes the checkpoints")
pytest.importorskip("ml_dtypes", reason="writes bfloat16")

import tiny_models  # noqa: E402

ISAS = _core.cpu_info()["isas"]
FORMATS = ("f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8")
# widths that are no multiple of a block or a vector
LLAMA = tiny_models.LLAMA | {"intermediate_size": 75}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "architectures": None, "sliding_window": 9},
    "dynamic": LLAMA
    | {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "falcon": tiny_models.FALCON,
    "falcon-rw": tiny_models.FALCON
    | {"multi_query": False, "parallel_attn": False, "alibi": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.write(root / name, config, tiny_models.tensors(config, "bfloat16"))
        for name, config in MODELS.items()
    }


def by_decode(decoder: Any, ids: list[int]) -> np.ndarray:
    sequence = decoder.sequence()
    return np.concatenate([decoder.step([sequence], np.array([token])) for token in ids])


def by_chunks(decoder: Any, ids: list[int], sizes: list[int]) -> np.ndarray:
    """Prefill in pieces, every second one in a fork of what was there."""
    sequence, parts, start = decoder.sequence(), [], 0
    for number, size in enumerate(sizes):
        piece = np.array(ids[start : start + size])
        if number % 2:
            sequence = sequence.fork()
        parts.append(decoder.step([sequence] * len(piece), piece))
        start += size
    return np.concatenate(parts)


def in_a_batch(decoder: Any, ids: list[int], place: int, of: int) -> np.ndarray:
    """Decode at `place` of a batch of `of` rows, whose other rows have other lengths and tokens."""
    rng = np.random.default_rng(place)
    sequences = [decoder.sequence() for _ in range(of)]
    for other in (i for i in range(of) if i != place):
        length = int(rng.integers(1, 9))
        decoder.step([sequences[other]] * length, rng.integers(0, 131, length))
    rows = []
    for token in ids:
        tokens = rng.integers(0, 131, of)
        tokens[place] = token
        want = np.arange(of) == place
        rows.append(decoder.step(sequences, tokens, want))
    return np.concatenate(rows)


def rounding(format: str, compute: str, isa: str) -> str:
    """What x is rounded to, where sets differ."""
    if compute == "exact" or compute == "int8" and format != "bf16":
        return compute
    if isa == "avx512amx":
        return "bf16x2"
    return isa if (format, isa) == ("bf16", "avx512bf16") else "int16 or exact"


CASES = [(format, "exact") for format in FORMATS]
CASES += [("bf16", "auto"), ("nf4", "auto"), ("fp4-dq", "auto"), ("nf4-dq", "int8")]


@pytest.mark.parametrize("format,compute", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_bits_everywhere(
    folders: dict[str, Path], name: str, format: str, compute: str
) -> None:
    ids = np.random.default_rng(2).integers(0, 131, 37).tolist()
    known: dict[str, np.ndarray] = {}
    for isa in ISAS:
        rounds = rounding(format, compute, isa)
        for threads in (1, 2):
            model = qllm.Model.from_pretrained(
                folders[name], format, quantize_head=True, isa=isa, threads=threads, compute=compute
            )
            info = model.info()
            assert (info.isa, info.threads, info.compute) == (isa, threads, compute)
            assert set(info.formats) == {format}
            decoder = model.decoder
            if rounds not in known:
                known[rounds] = by_decode(decoder, ids)
            expected = known[rounds]
            assert np.isfinite(expected).all() and expected.std() > 0.1
            ways = {
                "prefill": model.logits(ids),
                "chunks": by_chunks(decoder, ids, [1, 2, 13, 16, 5]),
                "last of a batch of 13": in_a_batch(decoder, ids[:9], 12, 13),
                "first of a batch of 13": in_a_batch(decoder, ids[:9], 0, 13),
                "a batch of 5": in_a_batch(decoder, ids[:6], 3, 5),
            }
            for way, logits in ways.items():
                assert np.array_equal(logits, expected[: len(logits)]), (way, isa, threads)


@pytest.mark.parametrize("name", ["demo:llama", "demo:falcon"])
def test_the_built_in_models_too(name: str) -> None:
    """Trained weights, whose activations have the outliers that random ones have not."""
    text = "Once upon a time, there was a little girl named Lily. She loved to play."
    for format, compute in CASES:
        known: dict[str, np.ndarray] = {}
        for isa in reversed(ISAS):
            rounds = rounding("bf16", compute, isa)  # the head is bf16
            model = qllm.Model.from_pretrained(name, format, isa=isa, threads=1, compute=compute)
            ids = model.encode(text)
            if rounds not in known:
                known[rounds] = by_decode(model.decoder, ids)
            expected = known[rounds]
            count = 3 if isa == "scalar" else 6  # the slow one
            ids = ids[:count] if isa == "scalar" else ids
            assert np.array_equal(model.logits(ids), expected[: len(ids)]), (format, isa)
            batched = in_a_batch(model.decoder, ids[:count], 4, 13)
            assert np.array_equal(batched, expected[:count]), (format, isa)


def test_outliers_of_int8_are_those_of_a_row(folders: dict[str, Path]) -> None:
    """With a threshold that activations pass: by row the bits hold, by batch they need not, and
    that is what the option is for."""
    ids = np.random.default_rng(2).integers(0, 131, 12).tolist()
    kept = []
    for outliers in ("row", "batch"):
        model = qllm.Model.from_pretrained(
            folders["llama"], "int8", int8_threshold=1.5, int8_outliers=outliers
        )
        alone = by_decode(model.decoder, ids)
        kept.append(np.array_equal(model.logits(ids), alone))
        assert np.abs(model.logits(ids) - alone).max() < 0.1 * np.abs(alone).max()
    assert kept == [True, False]
    plain = qllm.Model.from_pretrained(folders["llama"], "int8", int8_threshold=0.0)
    split = qllm.Model.from_pretrained(folders["llama"], "int8", int8_threshold=1.5)
    assert not np.array_equal(plain.logits(ids), split.logits(ids))
