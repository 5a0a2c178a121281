"""The decoder: right logits for every kind of block, the same bits whichever way they come."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm import _core
from reference_decoder import (CONFIGS, SIZES, Reference, Weights, alibi_bias, falcon, falcon_rw,
                               isas, llama, prefill, tokens)

VOCAB = SIZES["vocab"]
TOLERANCE = 1e-4  # relative to the largest logit; float32 sums reach about 1e-6


ISAS = isas()


@pytest.fixture(scope="module", params=["llama", "odd sizes", "falcon 40b", "falcon rw"])
def weights(request) -> Weights:
    return Weights(CONFIGS[request.param], "bf16", seed=3)


@pytest.fixture(scope="module")
def small() -> Weights:
    return Weights(llama(), "f32", seed=5)


# ----------------------------------------------------------------------------------- right logits


@pytest.mark.parametrize("fmt", ["f32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_definitions(name: str, fmt: str) -> None:
    config = CONFIGS[name]
    weights = Weights(config, fmt, seed=1)
    ids = tokens(40, vocab=config["vocab"])
    expected = Reference(weights).logits(ids)
    for isa in ISAS:
        decoder = weights.decoder(threads=2, isa=isa)
        assert decoder.info()["isa"] == isa
        found = prefill(decoder, ids)
        assert found.dtype == np.float32 and found.shape == (40, config["vocab"])
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("fmt", ["nf4", "fp4-dq", "f16"])
def test_quantized_weights_mean_their_dequantized_values(fmt: str) -> None:
    weights = Weights(llama(hidden=64, intermediate=128), fmt, seed=2)
    decoder = weights.decoder(threads=1)
    for slot, shape in decoder.slots().items():
        if len(shape) == 2 and slot != "embedding":
            original = Weights(llama(hidden=64, intermediate=128), "f32", seed=2).arrays[slot]
            quantized = _core.quantize(original, fmt)
            decoder.set_linear(slot, quantized, weights.biases[slot])
            weights.arrays[slot] = quantized.dequantize()
    ids = tokens(20)
    expected = Reference(weights).logits(ids)
    assert np.abs(prefill(decoder, ids) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_int8_layers_are_those_of_the_plain_linear_layer() -> None:
    """One layer whose attention and mlp add nothing, and an int8 head: logits by hand."""
    weights = Weights(llama(layers=1), "f32", seed=4, biased=False)
    for part in ("o", "down"):
        weights.arrays[f"layers.0.{part}"][:] = 0
    ids = tokens(13)
    x = weights.arrays["embedding"][ids]
    x[:, 7] *= 9  # an outlier column
    weights.arrays["embedding"][ids] = x
    normed = (weights.arrays["final_norm.weight"] * x
              / np.sqrt((x.astype(np.float64)**2).mean(1, keepdims=True) + 1e-5))
    head = _core.quantize(weights.arrays["head"], "int8")
    for outliers in ("row", "batch"):
        for threshold in (2.0, 0.0):
            decoder = weights.decoder(threads=2, int8_threshold=threshold, int8_outliers=outliers)
            decoder.set_linear("head", head)
            found = decoder.step([decoder.sequence() for _ in ids], ids)
            expected = head.matmul_reference(normed.astype(np.float32), threshold=threshold,
                                             batch_outliers=outliers == "batch")
            # An int8 rounding of x may fall the other way where the norm differs in the last bit.
            assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
            assert decoder.info()["int8_outliers"] == outliers
            assert decoder.info()["int8_threshold"] == threshold


def test_norm_biases_are_optional_and_zero_when_not_set() -> None:
    config = falcon(layers=1)
    decoder = _core.Decoder(config, threads=1)
    weights = Weights(config, seed=1)
    for slot, array in weights.arrays.items():
        if slot == "embedding":
            decoder.set_embedding(_core.quantize(array, "f32"))
        elif array.ndim == 2:
            decoder.set_linear(slot, _core.quantize(array, "f32"), weights.biases[slot])
        elif slot.endswith(".bias"):
            array[:] = 0
        else:
            decoder.set_vector(slot, array)
    assert decoder.missing() == []
    assert "final_norm.bias" in decoder.slots()
    expected = Reference(weights).logits(tokens(5))
    found = prefill(decoder, tokens(5))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_alibi_has_the_roundings_of_transformers() -> None:
    """The reference's table is bit-equal to theirs, and the core follows the reference over a long
    sequence (positions above 256 are not bfloat16 numbers)."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    heads, head_dim, n = 6, 24, 700
    mask = torch.ones((1, n), dtype=torch.long)
    alibi = theirs.build_alibi_tensor(mask, heads, torch.float32)[:, 0] / math.sqrt(head_dim)
    slopes = build_slopes(torch, heads)
    assert np.array_equal(alibi_bias(slopes, n, head_dim), alibi.numpy())
    config = falcon_rw(heads=heads, kv_heads=heads, head_dim=head_dim, alibi_slopes=slopes * 3,
                       max_positions=n, layers=1)
    weights = Weights(config, seed=1)
    ids = tokens(300)
    found = prefill(weights.decoder(threads=2), ids)[256:]
    expected = Reference(weights).logits(ids)[256:]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def build_slopes(torch, heads: int) -> np.ndarray:
    """The slopes of ALiBi for any number of heads, in float32."""
    power = 2 ** math.floor(math.log2(heads))
    base = torch.tensor(2 ** (-(2 ** -(math.log2(power) - 3))), dtype=torch.float32)
    slopes = torch.pow(base, torch.arange(1, 1 + power, dtype=torch.int32))
    if power != heads:
        extra = torch.tensor(2 ** (-(2 ** -(math.log2(2 * power) - 3))), dtype=torch.float32)
        rest = torch.arange(1, 1 + 2 * (heads - power), 2, dtype=torch.int32)
        slopes = torch.cat([slopes, torch.pow(extra, rest)])
    return slopes.numpy()


# -------------------------------------------------------------------------------------- same bits


def test_a_row_has_the_same_bits_whichever_way_it_comes(weights: Weights) -> None:
    ids = tokens(37, seed=1, vocab=weights.config["vocab"])
    expected = prefill(weights.decoder(threads=1, isa="scalar"), ids)
    for isa in ISAS:
        for threads in (1, 2):
            decoder = weights.decoder(threads=threads, isa=isa)
            for chunk in (37, 16, 7, 1):
                assert np.array_equal(prefill(decoder, ids, chunk=chunk), expected)


@pytest.mark.parametrize("make", [llama, falcon, falcon_rw])
def test_threads_that_share_the_rows_do_not_change_them(make) -> None:
    """Wide enough that every phase of a layer is split over the threads, not only linear layers."""
    sizes = {"hidden": 192, "head_dim": 64, "intermediate": 512, "max_positions": 200}
    weights = Weights(make(**sizes), "nf4", seed=8)
    ids = tokens(200, seed=8)
    expected = prefill(weights.decoder(threads=1), ids, chunk=1)
    for threads in (1, 2):
        assert np.array_equal(prefill(weights.decoder(threads=threads), ids), expected)


def test_a_row_has_the_same_bits_in_a_batch(weights: Weights) -> None:
    """Thirteen sequences of different lengths go on together, in every instruction set."""
    vocab = weights.config["vocab"]
    rows = [tokens(3 + 2 * i, seed=i, vocab=vocab) for i in range(13)]
    alone = [prefill(weights.decoder(threads=1, isa=ISAS[0]), ids) for ids in rows]
    for isa in ISAS:
        decoder = weights.decoder(threads=2, isa=isa)
        sequences = [decoder.sequence() for _ in rows]
        prompt = np.concatenate([ids[:-2] for ids in rows])
        owner = [s for s, ids in zip(sequences, rows) for _ in ids[:-2]]
        found = decoder.step(owner, prompt)
        assert np.array_equal(found, np.concatenate([a[:-2] for a in alone]))
        for place in (-2, -1):
            found = decoder.step(sequences, np.array([ids[place] for ids in rows]))
            assert np.array_equal(found, np.array([a[place] for a in alone]))


def test_a_fork_has_the_bits_of_a_sequence_of_its_own(weights: Weights) -> None:
    vocab = weights.config["vocab"]
    decoder = weights.decoder(threads=2)
    prompt = tokens(21, seed=2, vocab=vocab)
    ends = [tokens(30, seed=10 + i, vocab=vocab) for i in range(5)]
    expected = [prefill(decoder, np.concatenate([prompt, end]))[21:] for end in ends]
    parent = decoder.sequence()
    prefill(decoder, prompt, parent)
    branches = [parent.fork() for _ in ends[1:]] + [parent]  # the parent goes on as well
    order = [*ends[1:], ends[0]]
    for i in range(30):
        found = decoder.step(branches, np.array([end[i] for end in order]))
        assert np.array_equal(found, np.array([expected[(k + 1) % 5][i] for k in range(5)]))
    assert [b.length for b in branches] == [51] * 5


def test_forks_of_forks_and_truncation(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    ids = tokens(60, seed=3)
    expected = prefill(decoder, ids)
    trunk = decoder.sequence()
    prefill(decoder, ids[:40], trunk)
    for length in (40, 39, 33, 32, 31, 17, 16, 15, 1, 0):
        branch = trunk.fork()
        branch.truncate(length)
        assert branch.length == length
        twig = branch.fork()
        assert np.array_equal(prefill(decoder, ids[length:50], branch), expected[length:50])
        assert np.array_equal(prefill(decoder, ids[length:45], twig, chunk=3), expected[length:45])
        twig.truncate(max(0, length - 5))
        rest = ids[twig.length:]
        assert np.array_equal(prefill(decoder, rest, twig), expected[len(ids) - len(rest):])
    other = tokens(20, seed=4)
    trunk.truncate(20)  # redone with other tokens, in place: nobody else holds it
    prefill(decoder, other, trunk)
    again = prefill(decoder, np.concatenate([ids[:20], other]))
    trunk.truncate(39)
    assert np.array_equal(decoder.step([trunk], other[-1:]), again[-1:])


def test_a_shared_part_is_never_changed(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    ids = tokens(50, seed=6)
    expected = prefill(decoder, ids)
    a = decoder.sequence()
    prefill(decoder, ids[:20], a)
    b = a.fork()
    a.truncate(5)
    prefill(decoder, tokens(15, seed=7), a)  # writes where b still reads, were it in place
    assert np.array_equal(prefill(decoder, ids[20:], b), expected[20:])


def test_more_rows_than_a_chunk(small: Weights) -> None:
    """A step of 700 rows is cut into chunks inside; runs lie across their borders."""
    decoder = small.decoder(threads=2)
    lengths = [90, 1, 77, 90, 60, 2, 90, 90, 90, 50, 60]
    rows = [tokens(n, seed=n + i) for i, n in enumerate(lengths)]
    alone = np.concatenate([prefill(decoder, ids, chunk=13) for ids in rows])
    owner = [s for ids in rows for s in [decoder.sequence()] * len(ids)]
    want = np.random.default_rng(0).random(len(owner)) < 0.3
    want[256:512] = False  # a chunk without any wanted row
    found = decoder.step(owner, np.concatenate(rows), want)
    assert len(owner) == 700 and np.array_equal(found, alone[want])


def test_unwanted_rows_are_computed_but_not_returned(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    ids = tokens(9)
    expected = prefill(decoder, ids)
    sequence = decoder.sequence()
    assert decoder.step([sequence] * 8, ids[:8], np.zeros(8, bool)).shape == (0, VOCAB)
    assert np.array_equal(decoder.step([sequence], ids[8:], want=np.ones(1, bool)),
                          expected[8:])
    assert decoder.step([], np.zeros(0, np.int64)).shape == (0, VOCAB)


MOVE = st.tuples(
    st.permutations(range(3)),                                  # order in the batch
    st.lists(st.integers(0, 9), min_size=3, max_size=3),        # rows of each sequence
    st.sampled_from([None, ("fork", 0), ("fork", 2), ("cut", 1), ("cut", 2)]),
    st.integers(0, 24),                                         # where to cut
)


@settings(max_examples=30, deadline=None)
@given(moves=st.lists(MOVE, max_size=6))
def test_any_split_into_steps_gives_the_same_bits(split_case, moves) -> None:
    """Three sequences advance by some rows in some order, forked and cut on the way."""
    decoder, rows, expected = split_case
    sequences = [decoder.sequence() for _ in rows]
    kept = []  # what was forked from stays, and goes on at the end
    for order, counts, change, cut in [*moves, ((0, 1, 2), (24, 24, 24), None, 0)]:
        if change is not None:
            kept.append((change[1], sequences[change[1]]))
            sequences[change[1]] = sequences[change[1]].fork()
            if change[0] == "cut":
                s = sequences[change[1]]
                s.truncate(min(cut, s.length))
        parts = [(i, sequences[i].length, min(24, sequences[i].length + counts[i])) for i in order]
        found = decoder.step([sequences[i] for i, begin, end in parts for _ in range(begin, end)],
                             np.concatenate([rows[i][begin:end] for i, begin, end in parts]))
        assert np.array_equal(
            found, np.concatenate([expected[i][begin:end] for i, begin, end in parts]))
    assert [s.length for s in sequences] == [24] * 3
    for i, s in kept:
        at = s.length
        assert np.array_equal(decoder.step([s] * (24 - at), rows[i][at:]), expected[i][at:])


@pytest.fixture(scope="module")
def split_case(small: Weights) -> tuple:
    decoder = small.decoder(threads=1)
    rows = [tokens(24, seed=i) for i in range(3)]
    return decoder, rows, [prefill(decoder, ids) for ids in rows]
