"""What a decoder holds and shares, and that a step happens wholly or not at all."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from qllm import _core
from reference_decoder import SIZES, Weights, falcon_rw, llama, prefill, tokens

VOCAB = SIZES["vocab"]


@pytest.fixture(scope="module")
def small() -> Weights:
    return Weights(llama(), "f32", seed=5)


# ------------------------------------------------------------------------------- bytes and memory


def test_a_prefix_shared_by_eight_forks_is_stored_once(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    position = SIZES["layers"] * SIZES["kv_heads"] * SIZES["head_dim"] * 2 * 4
    assert decoder.nbytes()["kv_cache"] == 0
    parent = decoder.sequence()
    prefill(decoder, tokens(40), parent)
    assert decoder.nbytes()["kv_cache"] == 48 * position  # whole panels of 16
    forks = [parent.fork() for _ in range(8)]
    assert decoder.nbytes()["kv_cache"] == 48 * position
    decoder.step(forks, tokens(8))
    assert decoder.nbytes()["kv_cache"] == (48 + 8 * 16) * position
    for _ in range(15):
        decoder.step(forks, tokens(8))
    assert decoder.nbytes()["kv_cache"] == (48 + 8 * 16) * position
    decoder.step(forks[:1], tokens(1))  # the next block of a sequence is twice as large
    assert decoder.nbytes()["kv_cache"] == (48 + 8 * 16 + 32) * position
    del parent
    assert decoder.nbytes()["kv_cache"] == (48 + 8 * 16 + 32) * position  # still read by the forks
    del forks[0]
    assert decoder.nbytes()["kv_cache"] == (48 + 7 * 16) * position
    forks[0].truncate(40)
    assert decoder.nbytes()["kv_cache"] == (48 + 6 * 16) * position
    del forks
    assert decoder.nbytes()["kv_cache"] == 0


def test_a_sequence_that_is_alone_again_goes_on_in_place(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    a = decoder.sequence()
    prefill(decoder, tokens(20), a)
    before = decoder.nbytes()["kv_cache"]
    b = a.fork()
    del b
    prefill(decoder, tokens(12), a)
    assert decoder.nbytes()["kv_cache"] == before


def test_sequences_are_freed_by_the_collector(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    cycle = [decoder.sequence()]
    cycle.append(cycle)
    prefill(decoder, tokens(20), cycle[0])
    cycle.append(cycle[0].fork())
    assert decoder.nbytes()["kv_cache"] > 0
    del cycle
    gc.collect()
    assert decoder.nbytes()["kv_cache"] == 0


def test_a_sequence_keeps_its_decoder_alive(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    sequence = decoder.sequence()
    prefill(decoder, tokens(4), sequence)
    del decoder
    gc.collect()
    fork = sequence.fork()
    fork.truncate(2)
    assert (sequence.length, fork.length) == (4, 2)


def test_types_and_instances_are_collected() -> None:
    class Holder:
        pass

    holder = Holder()
    holder.decoder = _core.Decoder(llama(), threads=1)
    holder.sequence = holder.decoder.sequence()
    holder.self = holder
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
    assert gc.is_tracked(_core.Decoder(llama(), threads=1).sequence())
    with pytest.raises(TypeError):
        _core.Sequence()
    with pytest.raises(TypeError):
        _core.Decoder.step = None


def test_counters_of_bytes(small: Weights) -> None:
    decoder = _core.Decoder(llama(), threads=1)
    assert decoder.nbytes() == {"weights": 0, "embedding": 0, "kv_cache": 0, "scratch": 0}
    decoder.set_vector("final_norm.weight", small.arrays["final_norm.weight"])
    assert decoder.nbytes()["weights"] == 4 * SIZES["hidden"]
    decoder.set_embedding(_core.quantize(small.arrays["embedding"], "bf16"))
    padded = (VOCAB + 15) // 16 * 16  # whole tiles, and a line behind them
    assert decoder.nbytes()["embedding"] == 2 * padded * SIZES["hidden"] + 64
    before = decoder.nbytes()["weights"]
    head = small.arrays["head"]
    decoder.set_linear("head", _core.quantize(head, "f32"))
    large = decoder.nbytes()["weights"] - before
    assert 4 * head.size <= large < 8 * head.size
    decoder.set_linear("head", _core.quantize(head, "f32"), np.zeros(VOCAB, np.float32))
    assert decoder.nbytes()["weights"] - before == large + 4 * VOCAB
    decoder.set_linear("head", _core.quantize(head, "nf4"))
    assert decoder.nbytes()["weights"] - before < large / 3


# --------------------------------------------------------------------------------- all or nothing


def state_of(decoder, sequences) -> tuple:
    return [s.length for s in sequences], decoder.nbytes()["kv_cache"]


@pytest.mark.parametrize("bad, words", [
    (-1, r"tokens\[6\]: token id -1, expected 0 to 36"),
    (VOCAB, r"tokens\[6\]: token id 37, expected 0 to 36"),
    (2**62, r"tokens\[6\]: token id 4611686018427387904"),
])
def test_a_bad_token_changes_nothing(small: Weights, bad: int, words: str) -> None:
    decoder = small.decoder(threads=1)
    ids = tokens(20)
    expected = prefill(decoder, ids)
    a, b, c = (decoder.sequence() for _ in range(3))
    prefill(decoder, ids[:16], a)
    before = state_of(decoder, [a, b, c])
    wrong = ids[:9].copy()
    wrong[6] = bad
    with pytest.raises(ValueError, match=words):
        decoder.step([b, b, b, c, a, a, a, a, a], wrong)
    assert state_of(decoder, [a, b, c]) == before
    found = decoder.step([a] * 4 + [b] * 2, np.concatenate([ids[16:], ids[:2]]))
    assert np.array_equal(found, np.concatenate([expected[16:], expected[:2]]))


def test_positions_end_where_the_model_ends(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    a, b = decoder.sequence(), decoder.sequence()
    prefill(decoder, tokens(95), a)
    before = state_of(decoder, [a, b])
    with pytest.raises(ValueError, match=r"sequences\[2\]: position 96 .* max_positions is 96"):
        decoder.step([b, a, a], tokens(3))
    assert state_of(decoder, [a, b]) == before
    decoder.step([b, a], tokens(2))
    assert (a.length, b.length) == (96, 1)
    with pytest.raises(ValueError, match="max_positions"):
        decoder.step([a], tokens(1))


def test_rows_of_a_sequence_are_consecutive(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    a, b = decoder.sequence(), decoder.sequence()
    with pytest.raises(ValueError, match=r"sequences\[2\]: the rows of a sequence must be consec"):
        decoder.step([a, b, a], tokens(3))
    assert state_of(decoder, [a, b]) == ([0, 0], 0)
    decoder.step([a, a, b], tokens(3))
    assert (a.length, b.length) == (2, 1)


def test_sequences_of_another_decoder_are_refused(small: Weights) -> None:
    decoder, other = small.decoder(threads=1), small.decoder(threads=1)
    a, b = decoder.sequence(), other.sequence()
    with pytest.raises(ValueError, match=r"sequences\[1\]: made by another decoder"):
        decoder.step([a, b], tokens(2))
    assert (a.length, b.length) == (0, 0)


def test_arguments_of_step(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    s = decoder.sequence()
    with pytest.raises(TypeError, match="sequences: expected a list of Sequence, found .*Sequence"):
        decoder.step(s, tokens(1))
    with pytest.raises(TypeError, match=r"sequences\[1\]: expected a Sequence, found int"):
        decoder.step([s, 3], tokens(2))
    with pytest.raises(ValueError, match="tokens: 3 values for 2 sequences"):
        decoder.step([s, s], tokens(3))
    with pytest.raises(ValueError, match="tokens: expected dtype an integer type"):
        decoder.step([s], np.array([1.5]))
    with pytest.raises(ValueError, match="tokens: expected 1 dimension"):
        decoder.step([s], np.array([[1]]))
    with pytest.raises(ValueError, match="want: 1 values for 2 sequences"):
        decoder.step([s, s], tokens(2), np.ones(1, bool))
    with pytest.raises(ValueError, match="want: expected dtype bool"):
        decoder.step([s, s], tokens(2), np.ones(2, np.int64))
    for length in (-1, 1):
        with pytest.raises(ValueError, match=rf"length: {length} positions, .* stored 0"):
            s.truncate(length)
    with pytest.raises(ValueError, match="length"):
        s.truncate(1.0)
    assert s.length == 0


def test_every_failing_allocation_of_a_step_leaves_it_undone(small: Weights) -> None:
    ids = np.concatenate([tokens(20), tokens(40, seed=1), tokens(1, seed=2)])

    def world():
        decoder = small.decoder(threads=1)
        trunk = decoder.sequence()
        decoder.step([trunk] * 3, tokens(3))
        fork, fresh = trunk.fork(), decoder.sequence()
        return decoder, [trunk, fork, fresh], [trunk] * 20 + [fork] * 40 + [fresh]

    decoder, sequences, owner = world()
    expected = decoder.step(owner, ids)
    failures = 0
    for n in range(1, 200):
        decoder, sequences, owner = world()
        before = state_of(decoder, sequences)
        _core._alloc_fail_at(n)
        try:
            found = decoder.step(owner, ids)
        except MemoryError as error:
            assert str(error) and before == state_of(decoder, sequences)
            failures += 1
        else:
            break
        finally:
            _core._alloc_fail_at(0)
        assert np.array_equal(decoder.step(owner, ids), expected)
    assert np.array_equal(found, expected)
    assert failures >= 15  # arguments, blocks of keys, buffers, tables: each was seen to fail


def test_failing_allocations_elsewhere(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    ids = tokens(5)
    sequence = decoder.sequence()
    expected = prefill(decoder, ids, sequence)
    head = _core.quantize(small.arrays["head"], "nf4")
    actions = {
        "set_linear": lambda: decoder.set_linear("head", head, np.ones(VOCAB, np.float32)),
        "set_vector": lambda: decoder.set_vector("final_norm.weight", np.ones(48, np.float32)),
        "set_embedding": lambda: decoder.set_embedding(_core.quantize(
            np.zeros((VOCAB, 48), np.float32), "f32")),
        "load_linear": lambda: decoder.load_linear("head", small.arrays["head"], "nf4-dq", 32,
                                                   np.ones(VOCAB, np.float32)),
        "load_embedding": lambda: decoder.load_embedding(small.arrays["head"], "bf16"),
        "linear": lambda: decoder.linear("head"),
        "linear_error": lambda: decoder.linear_error("head", small.arrays["head"]),
        "sequence": decoder.sequence,
        "fork": sequence.fork,
        "Decoder": lambda: _core.Decoder(llama(sliding_window=np.zeros(2, np.int64)), threads=2),
        "alibi": lambda: _core.Decoder(falcon_rw(), threads=1),
    }
    for name, action in actions.items():
        failures = 0
        for n in range(1, 100):
            _core._alloc_fail_at(n)
            try:
                action()
            except MemoryError:
                failures += 1
                _core._alloc_fail_at(0)
                assert np.array_equal(prefill(decoder, ids), expected), name
            else:
                break
            finally:
                _core._alloc_fail_at(0)
        assert 1 <= failures < 50, name
        for slot in ("head", "final_norm.weight"):  # undo what the last action did
            if slot == "head":
                decoder.set_linear(slot, _core.quantize(small.arrays[slot], "f32"),
                                   small.biases[slot])
            else:
                decoder.set_vector(slot, small.arrays[slot])
        decoder.set_embedding(_core.quantize(small.arrays["embedding"], "f32"))


# ---------------------------------------------------------------------------------------- threads


def test_two_python_threads_take_turns(small: Weights) -> None:
    """Both step, fork and free on one decoder; each sees the bits it would see alone."""
    decoder = small.decoder(threads=2)
    rows = [tokens(40, seed=i) for i in range(2)]
    expected = [prefill(decoder, ids) for ids in rows]
    wrong: list = []

    def work(i: int) -> None:
        for _ in range(5):
            sequence = decoder.sequence()
            found = []
            for token in rows[i]:
                found.append(decoder.step([sequence], np.array([token]))[0])
                sequence = sequence.fork()
                decoder.nbytes()
            if not np.array_equal(np.array(found), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert decoder.nbytes()["kv_cache"] == 0


def test_weights_may_change_beside_a_step(small: Weights) -> None:
    """Every step sees the old head or the new one, never half of each."""
    decoder = small.decoder(threads=1)
    heads = [_core.quantize(small.arrays["head"] * scale, "f32") for scale in (1, -1)]
    expected = []
    for head in heads:
        decoder.set_linear("head", head)
        expected.append(prefill(decoder, tokens(30)))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for head in heads:
                decoder.set_linear("head", head)

    worker = threading.Thread(target=swap)
    worker.start()
    try:
        for _ in range(30):
            found = prefill(decoder, tokens(30))
            assert any(np.array_equal(found, logits) for logits in expected)
    finally:
        stop.set()
        worker.join()
