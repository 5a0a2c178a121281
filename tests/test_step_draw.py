"""Decoder.step_draw: the bits of step and sample, in one call; all or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import emulated
import qllm
from qllm import _core
from qllm.sampling import round_logits
from reference_decoder import SIZES, Weights, llama, tokens

VOCAB = SIZES["vocab"]
ROWS = [0, 0, 0, 0, 1, 3, 3]  # of the wanted rows of STEP; nothing is drawn from row 2
OPTIONS: dict[str, Any] = {
    "temperature": [0.0, 0.7, 1.0, 1.0, 2.0, 0.5, 1.0],
    "top_k": [0, 5, 0, 0, 3, None, 0],
    "top_p": [1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 0.9],
    "min_p": [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0],
    "repetition_penalty": [1.0, 1.0, 1.5, 1.0, 1.2, 1.0, 1.0],
    "seed": [1, 2, 3, 2**64 - 1, 5, 6, 7],
    "prompt": [7, 7, 7, 7, 8, 9, 9],
    "step": [0, 0, 0, 0, 4, 2**32 - 1, 3],
    "keep_ties": [False, True, False, False, True, False, False],
    "round_bf16": [False, False, True, True, False, True, False],
    "history": [None, None, [1, 2, 3, 3], None, list(range(20)), None, None],
}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def decoder(request: pytest.FixtureRequest) -> _core.Decoder:
    device = emulated.name() if request.param == "gpu" else "cpu"
    return Weights(llama(layers=1), "f32", seed=5).decoder(device=device)


def a_step(decoder: _core.Decoder) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Three sequences, five rows, the second of which nobody wants."""
    a, b, c = (decoder.sequence() for _ in range(3))
    decoder.step([a, a], tokens(2, seed=9))
    return [a, b, b, b, c], tokens(5), np.array([True, False, True, True, True])


def lengths(rows: list[Any]) -> list[int]:
    return [row.length for row in rows]


def test_the_bits_are_those_of_a_step_and_of_sample(decoder: _core.Decoder) -> None:
    expected = decoder.step(*a_step(decoder))
    drawn_from = np.array([
        round_logits(expected[row][None], "bfloat16")[0] if rounded else expected[row]
        for row, rounded in zip(ROWS, OPTIONS["round_bf16"])
    ])
    options = {name: values for name, values in OPTIONS.items() if name != "round_bf16"}
    sampled = _core.sample(drawn_from, **options, isa="core")
    for logits in (False, True):
        rows, ids, want = a_step(decoder)
        *drawn, found = decoder.step_draw(rows, ids, want, ROWS, **OPTIONS, logits=logits)
        for mine, plain in zip(drawn, sampled):
            assert mine.dtype == plain.dtype and mine.tobytes() == plain.tobytes()
        assert lengths(rows) == [3, 3, 3, 3, 1]
        if logits:
            assert np.array_equal(found, expected)
        else:
            assert found is None
    same = _core.sample(expected[ROWS], **OPTIONS)  # which rounds by itself
    assert all(np.array_equal(one, other) for one, other in zip(same, sampled))


def test_one_value_stands_for_all_draws(decoder: _core.Decoder) -> None:
    rows, ids, want = a_step(decoder)
    expected = decoder.step(rows, ids, want)
    rows, ids, want = a_step(decoder)
    drawn, *_ = decoder.step_draw(rows, ids, want, np.arange(4), seed=3, history=[1, 2],
                                  repetition_penalty=1.3)
    plain, *_ = _core.sample(expected, seed=3, history=[1, 2], repetition_penalty=1.3)
    assert np.array_equal(drawn, plain)


def test_a_step_without_draws_and_draws_without_rows(decoder: _core.Decoder) -> None:
    rows, ids, want = a_step(decoder)
    tokens_, logprobs, _, logits = decoder.step_draw(rows, ids, want, [])
    assert len(tokens_) == len(logprobs) == 0 and logits is None
    assert lengths(rows) == [3, 3, 3, 3, 1]
    assert len(decoder.step_draw([], [], np.zeros(0, bool), [])[0]) == 0


def test_a_draw_that_fails_takes_the_step_back(decoder: _core.Decoder) -> None:
    weights = Weights(llama(layers=1), "f32", seed=5)
    bias = np.zeros(VOCAB, np.float32)
    bias[3] = np.inf
    decoder.set_linear("head", _core.quantize(weights.arrays["head"], "f32"), bias)
    rows, ids, want = a_step(decoder)
    with pytest.raises(qllm.QllmValueError, match=r"^row 0: .*inf"):
        decoder.step_draw(rows, ids, want, [1, 1])
    assert lengths(rows) == [2, 0, 0, 0, 0]
    bias[3] = 0
    decoder.set_linear("head", _core.quantize(weights.arrays["head"], "f32"), bias)
    with pytest.raises(qllm.QllmValueError, match="^row 2: .*history.*37"):
        decoder.step_draw(rows, ids, want, [0, 1, 3], repetition_penalty=2.0,
                          history=[None, [1], [5, 37]])
    assert lengths(rows) == [2, 0, 0, 0, 0]
    expected = decoder.step(rows, ids, want)
    assert np.array_equal(expected, decoder.step(*a_step(decoder)))
    decoder.set_linear("head", _core.quantize(weights.arrays["head"], "f32"),
                       weights.biases["head"])


@pytest.mark.parametrize("rows, options, words", [
    ([1, 0], {}, r"rows\[1\]: 0, expected wanted rows in ascending order, 1 to 3"),
    ([4], {}, r"rows\[0\]: 4, expected wanted rows in ascending order, 0 to 3"),
    ([-1], {}, r"rows\[0\]: -1"),
    ([0.5], {}, "rows: expected dtype"),
    ([0, 1], {"temperature": [1.0]}, "temperature: expected one value or one for each of 2"),
    ([0], {"temperature": -1.0}, "temperature"),
    ([0], {"round_bf16": 1}, "round_bf16: expected True or False"),
    ([0], {"threads": 0}, "threads"),
])
def test_bad_draws_are_refused(
    decoder: _core.Decoder, rows: list, options: dict, words: str
) -> None:
    sequences, ids, want = a_step(decoder)
    with pytest.raises(qllm.QllmValueError, match=words):
        decoder.step_draw(sequences, ids, want, rows, **options)
    assert lengths(sequences) == [2, 0, 0, 0, 0]
