"""A step in parts: embedding, blocks and head of decoders that hold no more than that, with the bits
of one decoder that holds everything."""

from __future__ import annotations

import numpy as np
import pytest

from qllm import _core
from qllm.errors import QllmValueError
from reference_decoder import CONFIGS, Weights, llama, tokens


def parts_of(weights: Weights, **options: object) -> list[_core.Decoder]:
    """A decoder for each layer, and one more for the embedding and the head."""
    config = weights.config
    whole = weights.decoder(**options)
    made = []
    for layer in range(config["layers"] + 1):
        window = config.get("sliding_window")
        one = {**config, "layers": 1}
        if window is not None and layer < config["layers"]:
            one["sliding_window"] = window[layer : layer + 1]
        elif window is not None:
            del one["sliding_window"]
        decoder = _core.Decoder(one, **options)
        prefix = f"layers.{layer}."
        for slot, shape in whole.slots().items():
            inside = slot.startswith(prefix) if layer < config["layers"] else "layers." not in slot
            if not inside:
                continue
            name = slot.replace(prefix, "layers.0.")
            if slot == "embedding":
                decoder.set_embedding(whole.linear(slot))
            elif len(shape) == 2:
                decoder.set_linear(name, whole.linear(slot), weights.biases[slot])
            else:
                decoder.set_vector(name, weights.arrays[slot])
        made.append(decoder)
    return made


def through(parts: list[_core.Decoder], texts: list[list[int]]) -> np.ndarray:
    """The logits of texts, all in one batch, part by part."""
    *layers, ends = parts
    hidden = ends.embed([token for text in texts for token in text])
    for layer in layers:
        rows = [row for text in texts for row in [layer.sequence()] * len(text)]
        hidden = layer.blocks(rows, hidden)
    return ends.head(hidden)


@pytest.mark.parametrize("compute", ["exact", "auto"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_have_the_bits_of_a_step(name: str, compute: str) -> None:
    weights = Weights(CONFIGS[name], "bf16", seed=4)
    whole = weights.decoder(threads=2, compute=compute)
    texts = [tokens(n, vocab=weights.config["vocab"], seed=n) for n in (5, 1, 60)]
    texts = [[int(token) for token in text] for text in texts]
    rows = [row for text in texts for row in [whole.sequence()] * len(text)]
    expected = whole.step(rows, [token for text in texts for token in text])
    found = through(parts_of(weights, threads=1, compute=compute), texts)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_many_rows_go_in_chunks() -> None:
    """More rows than a step takes at a time, and a sequence that goes on."""
    weights = Weights(llama(max_positions=600), "f32", seed=4)
    whole = weights.decoder(threads=2)
    ids = [int(token) for token in tokens(600, vocab=weights.config["vocab"], seed=1)]
    expected = whole.step([whole.sequence()] * 600, ids)
    *layers, ends = parts_of(weights, threads=2)
    hidden = ends.embed(ids)
    for layer in layers:
        sequence = layer.sequence()
        before = layer.blocks([sequence] * 300, hidden[:300])
        after = layer.blocks([sequence] * 300, hidden[300:])
        assert sequence.length == 600
        hidden = np.concatenate([before, after])
    assert np.array_equal(ends.head(hidden), expected)


def test_the_input_is_left_as_it_is() -> None:
    weights = Weights(llama(), "f32", seed=4)
    layer, _, ends = parts_of(weights, threads=1)
    hidden = ends.embed([1, 2, 3])
    copy = hidden.copy()
    layer.blocks([layer.sequence()] * 3, hidden)
    ends.head(hidden)
    assert np.array_equal(hidden, copy)
    assert ends.embed([]).shape == (0, 48) and ends.head(hidden[:0]).shape == (0, 37)
    assert layer.blocks([], hidden[:0]).shape == (0, 48)


def test_each_part_needs_its_own_slots_alone() -> None:
    weights = Weights(llama(layers=1), "f32", seed=4)
    layer, ends = parts_of(weights, threads=1)
    hidden = ends.embed([1, 2])
    with pytest.raises(QllmValueError, match="slot 'layers.0.attention_norm.weight': no weight"):
        ends.blocks([ends.sequence()] * 2, hidden)
    with pytest.raises(QllmValueError, match="slot 'embedding': no weight"):
        layer.embed([1])
    with pytest.raises(QllmValueError, match="slot 'final_norm.weight': no weight"):
        layer.head(hidden)
    with pytest.raises(QllmValueError, match="no weight has been set yet"):
        ends.step([ends.sequence()], [1])


def test_what_is_refused() -> None:
    weights = Weights(llama(layers=1), "f32", seed=4)
    layer, ends = parts_of(weights, threads=1)
    hidden = ends.embed([1, 2])
    sequence = layer.sequence()
    with pytest.raises(QllmValueError, match=r"tokens\[1\]: token id 37, expected 0 to 36"):
        ends.embed([1, 37])
    with pytest.raises(QllmValueError, match="hidden: 2 rows for 1 sequences, expected one for"):
        layer.blocks([sequence], hidden)
    with pytest.raises(QllmValueError, match="hidden: rows of 3 values, expected 48"):
        layer.blocks([sequence], np.zeros((1, 3), np.float32))
    with pytest.raises(QllmValueError, match="hidden: rows of 37 values, expected 48"):
        ends.head(np.zeros((1, 37), np.float32))
    with pytest.raises(QllmValueError, match="made by another decoder"):
        layer.blocks([ends.sequence()] * 2, hidden)
    other = layer.sequence()
    with pytest.raises(QllmValueError, match="must be consecutive"):
        layer.blocks([sequence, other, sequence], ends.embed([1, 2, 3]))
    long = np.zeros((97, 48), np.float32)
    with pytest.raises(QllmValueError, match="beyond the model's last one"):
        layer.blocks([sequence] * 97, long)
    for call in (lambda: layer.blocks([sequence], hidden[0]), lambda: ends.head(hidden[0]),
                 lambda: ends.head(hidden.astype(np.float64)), lambda: ends.embed([[1]]),
                 lambda: ends.embed(["a"]), lambda: layer.blocks(None, hidden)):
        with pytest.raises((QllmValueError, TypeError)):
            call()
    assert sequence.length == 0 and layer.blocks([sequence] * 2, hidden).shape == (2, 48)
