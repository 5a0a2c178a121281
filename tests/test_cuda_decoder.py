"""A decoder on a GPU, its kernels emulated: weights, sequences, steps, memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import emulated
import qllm
import test_decoder
import test_decoder_arguments
import test_decoder_memory
from qllm import _core
from reference_decoder import SIZES, Weights, falcon_rw, llama, prefill, tokens

VOCAB = SIZES["vocab"]
SMALL = llama(layers=1, hidden=32, intermediate=48, max_positions=300)
PAGE = 64  # positions
PAGE_BYTES = SMALL["layers"] * SMALL["kv_heads"] * SMALL["head_dim"] * 2 * 4 * PAGE


class OnDevice:
    """Weights whose decoders are on the device, whatever a test of the processor asks for."""

    def __init__(self, weights: Weights, compute: str = "exact") -> None:
        self.weights = weights
        self.compute = compute

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weights, name)

    def decoder(self, **options: Any) -> _core.Decoder:
        options.pop("isa", None)
        return self.weights.decoder(**{"compute": self.compute} | options, device=emulated.name())


@pytest.fixture(scope="module")
def small() -> OnDevice:
    return OnDevice(Weights(SMALL, "f32", seed=5))


@pytest.fixture(scope="module")
def usual() -> OnDevice:
    return OnDevice(Weights(llama(layers=1), "f32", seed=5))


# ----------------------------------------------------------------- what holds for every device


@pytest.mark.parametrize("test", [
    test_decoder.test_forks_of_forks_and_truncation,
    test_decoder.test_a_shared_part_is_never_changed,
    test_decoder.test_unwanted_rows_are_computed_but_not_returned,
    test_decoder_arguments.test_the_embedding_can_be_the_heads_weight,
    test_decoder_arguments.test_load_linear_takes_a_bias,
    test_decoder_memory.test_sequences_are_freed_by_the_collector,
    test_decoder_memory.test_a_sequence_keeps_its_decoder_alive,
    test_decoder_memory.test_positions_end_where_the_model_ends,
    test_decoder_memory.test_rows_of_a_sequence_are_consecutive,
    test_decoder_memory.test_sequences_of_another_decoder_are_refused,
    test_decoder_memory.test_arguments_of_step,
], ids=lambda test: test.__name__.removeprefix("test_"))
def test_as_on_the_processor(usual: OnDevice, test: Callable[[Any], None]) -> None:
    test(usual)


@pytest.mark.parametrize("test", [
    test_decoder.test_forks_of_forks_and_truncation,
    test_decoder.test_a_shared_part_is_never_changed,
    test_decoder.test_unwanted_rows_are_computed_but_not_returned,
], ids=lambda test: test.__name__.removeprefix("test_"))
def test_as_on_the_processor_with_auto(test: Callable[[Any], None]) -> None:
    """The bits of a row do not hang on how it came about, on the tensor cores neither."""
    config = llama(layers=1, hidden=64, head_dim=32, rotary_dim=32, intermediate=64)
    test(OnDevice(Weights(config, "nf4", seed=5), "auto"))


def test_the_embedding_can_be_the_heads_weight_in_tiles() -> None:
    """Both kernels that no other test here runs: heads with a norm of their own, and this."""
    weights = Weights(llama(layers=1, hidden=64, qk_norm=True), "bf16", seed=5)
    decoders = [OnDevice(weights, "auto").decoder() for _ in range(2)]
    for decoder in decoders:
        decoder.set_linear("head", _core.quantize(weights.arrays["embedding"], "bf16"))
    decoders[0].tie_embedding()
    decoders[1].set_embedding(_core.quantize(weights.arrays["embedding"], "bf16"))
    assert decoders[0].nbytes()["embedding"] == 0 < decoders[1].nbytes()["embedding"]
    tied, apart = (prefill(decoder, tokens(5)) for decoder in decoders)
    assert np.array_equal(tied, apart) and tied.std() > 0.1


def test_bad_weights_are_refused_as_on_the_processor() -> None:
    weights = OnDevice(Weights(llama(), "f32", seed=5))
    test_decoder_arguments.test_bad_weights_are_refused_and_the_old_ones_stay(weights)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**62])
def test_a_bad_token_changes_nothing(usual: OnDevice, bad: int) -> None:
    test_decoder_memory.test_a_bad_token_changes_nothing(usual, bad, rf"tokens\[6\]: token id {bad}")


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_load_linear_is_quantize_and_set_linear(fmt: str) -> None:
    """Bytes, size, bias and error, exact and in tiles, where the sizes allow them."""
    rng = np.random.default_rng(1)
    for config, compute in ((llama(), "exact"), (llama(hidden=128), "auto")):
        decoder = _core.Decoder(config, device=emulated.name(), compute=compute)
        for slot in ("layers.1.up", "head"):
            values = rng.normal(size=decoder.slots()[slot]).astype(np.float32)
            weight = _core.quantize(values, fmt, 128, isa="reference")
            assert decoder.load_linear(slot, values, fmt, 128, None) == weight.nbytes
            for again in range(2):
                back = decoder.linear(slot)
                assert (back.format, back.blocksize) == (fmt, weight.blocksize)
                assert back.packed.tobytes() == weight.packed.tobytes()
                assert back.dequantize().tobytes() == weight.dequantize().tobytes()
                assert decoder.linear_error(slot, values) == weight.error(values)
                decoder.set_linear(slot, weight)


@pytest.mark.parametrize("fmt", ["f32", "nf4-dq", "int8"])
@pytest.mark.parametrize("make", [llama, falcon_rw])
def test_exact_logits_have_the_bits_of_the_processor(make: Callable[..., dict], fmt: str) -> None:
    """Across a border of pages, in several steps, and in parts."""
    weights = Weights(make(layers=1, hidden=64, max_positions=100), fmt, seed=3)
    ids = tokens(75)
    here, there = weights.decoder(), weights.decoder(device=emulated.name())
    expected = prefill(here, ids)
    assert np.array_equal(prefill(there, ids, chunk=30), expected)
    hidden = there.embed(ids)
    assert np.array_equal(hidden, here.embed(ids))
    sequence = there.sequence()
    hidden = np.concatenate([there.blocks([sequence] * 40, hidden[:40]),
                             there.blocks([sequence] * 35, hidden[40:])])
    assert np.array_equal(there.head(hidden), expected)
    assert there.embed([]).shape == (0, 64) and there.head(hidden[:0]).shape == (0, VOCAB)


def test_more_rows_than_a_chunk() -> None:
    """700 rows are cut into chunks of 512; runs lie across the border."""
    weights = Weights(llama(layers=1, hidden=16, heads=1, kv_heads=1, intermediate=16, vocab=5,
                            max_positions=400), "f32", seed=2)
    here, there = weights.decoder(), weights.decoder(device=emulated.name())
    ids = tokens(700, vocab=5)
    owner = [100, 380, 1, 219]
    want = np.random.default_rng(0).random(700) < 0.3
    expected, found = (
        decoder.step([s for n in owner for s in [decoder.sequence()] * n], ids, want)
        for decoder in (here, there)
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("order", ["reversed", "late"])
def test_nothing_hangs_on_when_the_device_works(
    small: OnDevice, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Threads of a kernel in another order; copies and kernels only when somebody waits for them."""
    ids = tokens(70, seed=3)
    expected = prefill(small.weights.decoder(), ids)
    variable = "QLLM_EMULATE_ORDER" if order == "reversed" else "QLLM_EMULATE_STREAMS"
    monkeypatch.setenv(variable, order)
    decoder = small.decoder()
    sequence = decoder.sequence()
    assert np.array_equal(prefill(decoder, ids[:66], sequence), expected[:66])
    forks = [sequence.fork() for _ in range(2)]
    found = decoder.step([*forks, sequence], [ids[66]] * 3)
    assert np.array_equal(found, np.repeat(expected[66:67], 3, axis=0))


# ------------------------------------------------------------------------------ pages and bytes


def test_pages_are_shared_and_copied_when_written(small: OnDevice) -> None:
    decoder = small.decoder()
    prefill(decoder, tokens(200))  # buffers and pages are there from now on

    def pages() -> float:
        return decoder.nbytes()["kv_cache"] / PAGE_BYTES

    parent = decoder.sequence()
    prefill(decoder, tokens(70), parent)
    assert pages() == 2
    forks = [parent.fork() for _ in range(4)]
    assert pages() == 2
    decoder.step(forks, tokens(4))  # each gets the page that it writes into; the parent keeps its
    assert pages() == 6
    del parent
    assert pages() == 5
    for _ in range(3):
        decoder.step(forks, tokens(4))
    assert pages() == 5
    forks[0].truncate(64)
    assert pages() == 4
    branch = forks[0].fork()
    decoder.step([branch, forks[0]], tokens(2))  # a whole page is not copied
    assert pages() == 6
    alone = forks[1].fork()
    forks[1] = alone  # alone again: it goes on in place
    decoder.step([alone], tokens(1))
    assert pages() == 6
    spare = decoder.nbytes()["scratch"]
    del forks, branch, alone
    assert pages() == 0
    assert decoder.nbytes()["scratch"] == spare + 6 * PAGE_BYTES  # they wait for the next ones
    again = decoder.sequence()
    prefill(decoder, tokens(200), again)
    assert pages() == 4 and decoder.nbytes()["scratch"] == spare + 2 * PAGE_BYTES


def test_counters_of_bytes() -> None:
    config = llama(layers=1, hidden=64)
    weights = Weights(config, "f32", seed=5)
    decoder = _core.Decoder(config, device=emulated.name())
    assert decoder.nbytes() == {"weights": 0, "embedding": 0, "kv_cache": 0, "scratch": 0}
    decoder.set_vector("final_norm.weight", weights.arrays["final_norm.weight"])
    assert decoder.nbytes()["weights"] == 4 * 64
    decoder.set_embedding(_core.quantize(weights.arrays["embedding"], "bf16"))
    assert decoder.nbytes()["embedding"] == 2 * VOCAB * 64
    before = decoder.nbytes()["weights"]
    head = weights.arrays["head"]
    decoder.set_linear("head", _core.quantize(head, "f32"), np.zeros(VOCAB, np.float32))
    assert decoder.nbytes()["weights"] - before == 4 * head.size + 4 * VOCAB
    decoder.set_linear("head", _core.quantize(head, "nf4"))
    assert decoder.nbytes()["weights"] - before < 4 * head.size / 3


# ----------------------------------------------------------------------------- all or nothing


@contextlib.contextmanager
def memory_of(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    """The device with so many bytes that can be used, beside those held now and the twentieth that
    stays free."""
    facts = _core.device_info(emulated.name())
    assert facts is not None
    held = facts["memory"] - facts["free"]
    monkeypatch.setenv("QLLM_EMULATE_MEMORY", str(held + free + facts["memory"] // 20))
    yield
    monkeypatch.delenv("QLLM_EMULATE_MEMORY")


@emulated.without_a_gpu
def test_without_memory_a_model_stays_usable(
    small: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = small.decoder()
    kept = decoder.sequence()
    expected = prefill(decoder, tokens(40), kept)
    head = _core.quantize(small.arrays["head"], "f32")
    with memory_of(monkeypatch, 1000):
        words = r"needs \d+ bytes of memory on emulated GPU, where \d{1,4} of \d+ can be used"
        with pytest.raises(qllm.QllmMemoryError, match=words):
            decoder.set_linear("head", head)
        sequences = [decoder.sequence() for _ in range(80)]
        with pytest.raises(qllm.QllmMemoryError, match="keys and values.*" + words):
            decoder.step(sequences, np.zeros(80, np.int64))
        assert [s.length for s in sequences] == [0] * 80
        assert decoder.nbytes()["kv_cache"] == PAGE_BYTES
        assert np.array_equal(prefill(decoder, tokens(40)), expected)
    assert decoder.step(sequences, np.zeros(80, np.int64)).shape == (80, VOCAB)
    assert np.array_equal(prefill(decoder, tokens(40)), expected)


@emulated.without_a_gpu
def test_spare_pages_make_room_for_weights(
    small: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = small.decoder()
    prefill(decoder, tokens(3))
    spare = decoder.nbytes()["scratch"]
    head = _core.quantize(small.arrays["head"], "f32")
    with memory_of(monkeypatch, 1000):
        decoder.set_linear("head", head)  # the last sequence is gone, so its slab goes
    assert decoder.nbytes()["scratch"] < spare - PAGE_BYTES
    prefill(decoder, tokens(3))


def failing(action: Callable[[], Any], after: Callable[[], None], most: int = 100) -> int:
    """Lets one allocation of the device after the other fail; `after` looks at what is left."""
    library = emulated.device().library
    for n in range(1, most):
        library.gpu_emulated_fail_at(ctypes.c_int64(n))
        try:
            action()
        except qllm.QllmMemoryError:
            library.gpu_emulated_fail_at(ctypes.c_int64(0))
            after()
        else:
            return n - 1
        finally:
            library.gpu_emulated_fail_at(ctypes.c_int64(0))
    raise AssertionError("it never succeeds")


@emulated.without_a_gpu
def test_every_failing_allocation_of_a_step_leaves_it_undone(small: OnDevice) -> None:
    ids = tokens(12)
    expected = prefill(small.decoder(), ids)
    state: dict[str, Any] = {}

    def world() -> None:
        decoder = small.decoder()
        trunk = decoder.sequence()
        decoder.step([trunk] * 3, ids[:3])
        state.update(decoder=decoder, sequences=[trunk, trunk.fork(), decoder.sequence()])

    def step() -> np.ndarray:
        a, b, c = state["sequences"]
        rows = [a] * 9 + [b] * 9 + [c] * 12
        return state["decoder"].step(rows, np.concatenate([ids[3:], ids[3:], ids]))

    def look() -> None:
        assert [s.length for s in state["sequences"]] == [3, 3, 0]
        assert state["decoder"].nbytes()["kv_cache"] == PAGE_BYTES
        assert np.array_equal(step(), np.concatenate([expected[3:], expected[3:], expected]))
        world()

    world()
    assert failing(step, look) >= 3  # the rows, their buffers, logits


@emulated.without_a_gpu
def test_failing_allocations_of_weights(small: OnDevice) -> None:
    decoder, ids = small.decoder(), tokens(5)
    kept = decoder.sequence()  # so that there are no spare pages to give back instead
    expected = prefill(decoder, ids, kept)
    head = _core.quantize(small.arrays["head"], "nf4")

    def look() -> None:
        assert np.array_equal(prefill(decoder, ids), expected)

    for action in (
        lambda: decoder.set_linear("head", head, np.ones(VOCAB, np.float32)),
        lambda: decoder.load_linear("head", small.arrays["head"], "nf4-dq", 32),
        lambda: decoder.set_vector("final_norm.weight", np.ones(32, np.float32)),
        lambda: decoder.load_embedding(small.arrays["head"], "bf16"),
    ):
        assert failing(action, look) >= 1
        decoder.set_linear("head", _core.quantize(small.arrays["head"], "f32"),
                           small.biases["head"])
        decoder.set_vector("final_norm.weight", small.arrays["final_norm.weight"])
        decoder.set_embedding(_core.quantize(small.arrays["embedding"], "f32"))
        look()


def test_two_python_threads_take_turns(small: OnDevice) -> None:
    test_decoder_memory.test_two_python_threads_take_turns(small)


# --------------------------------------------------------------------------- options and reports


def test_options_and_info(usual: OnDevice) -> None:
    device, facts = emulated.name(), _core.device_info(emulated.name())
    assert facts is not None
    for options, words in (
        ({"compute": "int8"}, f"compute is 'int8', which device '{device}' does not offer"),
        ({"isa": "avx2"}, f"isa is 'avx2', but device '{device}' has no choice of instruction sets"),
    ):
        with pytest.raises(qllm.QllmUnsupportedError, match=words):
            _core.Decoder(llama(), device=emulated.name(), **options)
    with pytest.raises(qllm.QllmValueError, match="config: vocab is 0"):
        _core.Decoder(llama(vocab=0), device=emulated.name())
    decoder = usual.decoder(int8_threshold=3.0, int8_outliers="batch")
    info = decoder.info()
    assert (info["device"], info["isa"]) == (device, facts["variant"])
    assert info["cpu_model"] == facts["name"]
    assert (info["compute"], info["threads"]) == ("exact", 1)
    assert (info["int8_threshold"], info["int8_outliers"]) == (3.0, "batch")
    assert list(info["kernels"]) == ["f32"] and "exact" in info["kernels"]["f32"][0]
    fast = _core.Decoder(llama(hidden=64), device=emulated.name(), compute="auto")
    fast.load_linear("head", np.zeros((VOCAB, 64), np.float32), "nf4")
    kernels = fast.info()["kernels"]["nf4"]
    assert kernels and all("exact" not in name for name in kernels)
    odd = _core.Decoder(llama(head_dim=12, rotary_dim=12), device=device, compute="auto")
    for made, words in ((decoder, "float32 keys and values"),
                        (fast, "bf16 keys and values; tensor cores, in splits"),
                        (odd, "bf16 keys and values; without tensor cores")):
        assert made.info()["attention"].startswith(words)
