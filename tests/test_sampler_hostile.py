"""Every argument of the sampler that makes no sense ends in a QllmValueError whose words say which
argument, what was found and what is expected; every odd one with a sense has a defined result."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.errors import QllmError, QllmMemoryError, QllmValueError

LOGITS = np.array([0.5, 2.0, -1.0, 2.0], np.float32)
NAN, INF = float("nan"), float("inf")


def refused(words: str, call: Any, *args: Any, **kwargs: Any) -> None:
    """The call raises QllmValueError, and its text has all of the words."""
    with pytest.raises(QllmValueError) as caught:
        call(*args, **kwargs)
    for word in words.split(" | "):
        assert word in str(caught.value)


# ----------------------------------------------------------------------------- numbers out of range

BAD_NUMBERS = [
    ("temperature", -0.1, "temperature: | at least 0 | found -0.1"),
    ("temperature", NAN, "temperature: | finite | found nan"),
    ("temperature", INF, "temperature: | finite | found inf"),
    ("temperature", 10**400, "temperature: | finite | found inf"),
    ("temperature", None, "temperature: expected a number, found NoneType"),
    ("temperature", "1", "temperature: expected a number, found str"),
    ("temperature", True, "temperature: expected a number, found bool"),
    ("temperature", np.True_, "temperature: expected a number, found numpy.bool"),
    ("temperature", 1j, "temperature: expected a number, found complex"),
    ("top_k", -1, "top_k: | 0 (off) | found -1"),
    ("top_k", 2**64, "top_k: | 64 bits | found 18446744073709551616"),
    ("top_k", 10**5000, "top_k: | 64 bits | thousands of digits"),
    ("top_k", 5.0, "top_k: expected an integer, found float"),
    ("top_k", True, "top_k: expected an integer, found bool"),
    ("top_k", "5", "top_k: expected an integer, found str"),
    ("keep_ties", 1, "keep_ties: expected True or False, found a int"),
    ("keep_ties", None, "keep_ties: expected True or False, found a NoneType"),
    ("top_p", 0.0, "top_p: | above 0 and at most 1 | found 0"),
    ("top_p", 1.5, "top_p: | above 0 and at most 1 | found 1.5"),
    ("top_p", -0.5, "top_p: | above 0 and at most 1 | found -0.5"),
    ("top_p", NAN, "top_p: | above 0 and at most 1 | found nan"),
    ("top_p", None, "top_p: expected a number, found NoneType"),
    ("min_p", -0.1, "min_p: | from 0 (off) to 1 | found -0.1"),
    ("min_p", 1.01, "min_p: | from 0 (off) to 1 | found 1.01"),
    ("min_p", NAN, "min_p: | from 0 (off) to 1 | found nan"),
    ("min_p", INF, "min_p: | from 0 (off) to 1 | found inf"),
    ("repetition_penalty", 0.0, "repetition_penalty: | above 0 | found 0"),
    ("repetition_penalty", -1.2, "repetition_penalty: | above 0 | found -1.2"),
    ("repetition_penalty", NAN, "repetition_penalty: | finite | found nan"),
    ("repetition_penalty", INF, "repetition_penalty: | finite | found inf"),
]
NOISE_ONLY = [
    ("seed", -1, "seed: | from 0 to 2^64 - 1 | found -1"),
    ("seed", 2**64, "seed: | from 0 to 2^64 - 1 | found 18446744073709551616"),
    ("seed", 10**5000, "seed: | from 0 to 2^64 - 1 | thousands of digits"),
    ("seed", None, "seed: expected an integer, found NoneType"),
    ("seed", 1.0, "seed: expected an integer, found float"),
    ("seed", np.float64(1), "seed: expected an integer, found numpy.float64"),
    ("seed", "1", "seed: expected an integer, found str"),
    ("seed", False, "seed: expected an integer, found bool"),
    ("seed", np.int8(-1), "seed: | from 0 to 2^64 - 1 | found -1"),
    ("prompt", -1, "prompt: | from 0 to 2^64 - 1 | found -1"),
    ("prompt", 2**64, "prompt: | from 0 to 2^64 - 1 | found 18446744073709551616"),
    ("prompt", None, "prompt: expected an integer, found NoneType"),
    ("step", -1, "step: | from 0 to 2^32 - 1 | found -1"),
    ("step", 2**32, "step: | from 0 to 2^32 - 1 | found 4294967296"),
    ("step", 0.0, "step: expected an integer, found float"),
]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    BAD_NUMBERS + NOISE_ONLY,
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_a_parameter_outside_its_range_is_refused(name: str, value: Any, words: str) -> None:
    refused(words, qllm.sample, LOGITS, **{name: value})
    rows = np.stack([LOGITS, LOGITS])
    good = {"seed": 1, "prompt": 1, "step": 1, "top_k": 1, "keep_ties": False}.get(name, 1.0)
    refused(words, qllm.sample, rows, **{name: [good, value]})
    if name in {bad[0] for bad in BAD_NUMBERS}:
        refused(words, _core.distribution, LOGITS, **{name: value})


def test_an_error_in_a_batch_names_its_row() -> None:
    rows = np.stack([LOGITS] * 3)
    refused("row 2: top_p:", qllm.sample, rows, top_p=[1, 0.5, 0])
    rows[1, 3] = NAN
    refused("row 1: logits: token 3 of 4 is NaN", qllm.sample, rows)


def test_a_sequence_of_another_length_is_refused() -> None:
    rows = np.stack([LOGITS] * 3)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "step"):
        refused(f"{name}: | 3 rows | found 2 values", qllm.sample, rows, **{name: [1, 1]})
    refused("seed: | 1 rows | found 0 values", qllm.sample, LOGITS, seed=[])
    refused("temperature: expected a number, found list", qllm.sample, LOGITS, temperature=[[1.0]])
    refused("temperature: expected a number, found dict", qllm.sample, LOGITS, temperature={})


# ---------------------------------------------------------------------------------- odd but defined


def test_extreme_but_valid_parameters_have_their_meaning() -> None:
    draw = lambda **s: qllm.sample(LOGITS, **s).tokens  # noqa: E731
    assert draw(temperature=0) == draw(temperature=0.0, top_k=10**18) == 1
    assert draw(temperature=-0.0) == 1
    # two equal largest logits: a tiny temperature leaves the choice to the noise
    assert {draw(temperature=5e-324, step=step) for step in range(40)} == {1, 3}
    assert {draw(top_k=1, step=step) for step in range(40)} == {1}
    assert {draw(min_p=1, step=step) for step in range(40)} == {1, 3}
    assert {draw(top_p=5e-324, step=step) for step in range(40)} == {1}
    for off in ({"top_k": 0}, {"top_k": None}, {"top_k": 4}, {"top_k": 2**63 - 1}, {"top_p": 1},
                {"min_p": 0}, {"repetition_penalty": 1, "history": [0, 1]}):  # fmt: skip
        assert [draw(step=s, **off) for s in range(30)] == [draw(step=s) for s in range(30)]


def test_seeds_may_be_any_integer_type_up_to_2_to_the_64() -> None:
    for seed in (0, 7, 2**63, 2**64 - 1):
        expected = qllm.sample(LOGITS, seed=seed, prompt=seed)
        assert qllm.sample(LOGITS, seed=np.uint64(seed), prompt=[seed]) == expected
    assert qllm.sample(LOGITS, seed=np.int8(7), step=np.array(9)) == qllm.sample(
        LOGITS, seed=7, step=9
    )
    assert qllm.sample(LOGITS, step=2**32 - 1).tokens in range(4)
    assert qllm.sample(LOGITS, temperature=np.float16(0.5), top_p=np.float32(0.5)).tokens in (1, 3)


def test_logits_all_equal_are_drawn_evenly() -> None:
    rows = np.full((4000, 5), 3.5, np.float32)
    counts = np.bincount(qllm.sample(rows, step=range(4000)).tokens, minlength=5)
    assert (abs(counts - 800) < 120).all()
    assert qllm.sample(rows[0], temperature=0).tokens == 0


def test_a_vocabulary_of_one_token_draws_it() -> None:
    for temperature in (0, 0.5, 1e6):
        found = qllm.sample(np.array([-7.0], np.float32), temperature=temperature, top_p=0.3)
        assert found == (0, 0.0, 0.0)
    stats = qllm.logit_stats(np.array([1], np.float32), np.array([5], np.float32), [0, 1])
    assert not stats.kl.any() and not stats.tv.any() and not stats.disagreement.any()


def test_minus_inf_is_never_drawn() -> None:
    logits = np.array([-INF, 1, -INF, 0, -INF], np.float32)
    for setting in ({}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 1e-9}, {"temperature": 1e30}):
        rows = np.broadcast_to(logits, (300, 5))
        found = qllm.sample(rows, step=range(300), **setting)
        assert set(found.tokens) == {1, 3}
        assert (_core.distribution(logits, **setting) > 0).tolist() == [
            False, True, False, True, False]  # fmt: skip
    penalized = qllm.sample(logits, repetition_penalty=2.0, history=[0, 2, 4], temperature=0)
    assert penalized.tokens == 1


def test_a_penalty_beyond_float32_saturates() -> None:
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    found = _core.distribution(logits, repetition_penalty=0.1, history=[0, 1], temperature=1.0)
    assert found.tolist() == [1, 0, 0]
    found = _core.distribution(-logits, repetition_penalty=1e10, history=[0, 1])
    assert np.isfinite(found).all() and found.sum() == 1


# ---------------------------------------------------------------------------------- logits, history


def test_logits_that_cannot_be_drawn_from_are_refused() -> None:
    bad = LOGITS.copy()
    bad[2] = NAN
    refused("logits: token 2 of 4 is NaN", qllm.sample, bad)
    refused("logits: token 2 of 4 is NaN", qllm.sample, bad, temperature=0)
    bad[1] = INF
    refused("logits: token 1 of 4 is +inf", _core.distribution, bad)
    nothing = np.full(4, -INF, np.float32)
    refused("logits: all 4 tokens are -inf", qllm.sample, nothing)
    refused("logits: all 4 tokens are -inf", qllm.sample, nothing, temperature=0)
    refused("logits: all 4 tokens are -inf", _core.logprobs, nothing, 0)
    refused("1 to 2147483647 | found 0", qllm.sample, np.zeros(0, np.float32))
    refused("1 to 2147483647 | found 0", qllm.sample, np.zeros((3, 0), np.float32))


def test_no_rows_give_no_draws() -> None:
    found = qllm.sample(np.zeros((0, 5), np.float32), seed=[])
    assert found.tokens.shape == found.logprobs.shape == (0,)


def test_logits_of_another_kind_are_refused() -> None:
    refused("logits: | float32 | float64", qllm.sample, LOGITS.astype(np.float64))
    refused("logits: | float32 | int64", qllm.sample, np.arange(4))
    refused("logits: | byte order", qllm.sample, LOGITS.astype(">f4"))
    refused("logits: | 1 to 2 dimensions, found 0", qllm.sample, np.float32(1).reshape(()))
    refused("logits: | 1 to 2 dimensions, found 3", qllm.sample, LOGITS.reshape(1, 2, 2))
    refused("logits: | NumPy array, found list", qllm.sample, [1.0, 2.0])
    refused("logits: | found NoneType", qllm.sample, None)
    refused("logits: | dtype('O')", qllm.sample, np.array([1.0, None], object))


def test_strided_logits_are_read_as_they_are() -> None:
    wide = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    for view in (wide[::2], wide[:, ::-1], np.asfortranarray(wide), wide.T):
        view.flags.writeable = False
        assert (qllm.sample(view).tokens == qllm.sample(view.copy()).tokens).all()


def test_tokens_of_the_history_must_be_in_the_vocabulary() -> None:
    refused("history: token 4 at position 2 | 4 tokens", qllm.sample, LOGITS, history=[0, 1, 4])
    refused("history: token -1 at position 0", qllm.sample, LOGITS, history=[-1])
    refused("history: token -1", qllm.sample, LOGITS, history=np.array([2**64 - 1], np.uint64))
    rows = np.stack([LOGITS, LOGITS])
    refused("row 1: history: token 9 at position 0", qllm.sample, rows, history=[None, [9]])
    refused("history: | 2 rows | found 3", qllm.sample, rows, history=[[1], [2], [3]])
    refused("history: | dtype", qllm.sample, LOGITS, history=[0.5])
    refused("history: | dtype", qllm.sample, LOGITS, history=["a"])
    refused("history: | found int", qllm.sample, LOGITS, history=3)
    refused("history: | found str", qllm.sample, LOGITS, history="ab")
    refused("history:", qllm.sample, LOGITS, history=[2**70])
    refused("history: | 1 dimension", qllm.sample, LOGITS, history=[[1, 2]])


def test_an_empty_history_is_no_history() -> None:
    expected = qllm.sample(LOGITS, repetition_penalty=2.0)
    for history in ([], None, (), np.zeros(0, np.int32)):
        assert qllm.sample(LOGITS, repetition_penalty=2.0, history=history) == expected


def test_tokens_of_logprobs_must_fit() -> None:
    rows = np.stack([LOGITS, LOGITS])
    refused("row 1: token: 4 is outside the vocabulary of 4", _core.logprobs, rows, [0, 4])
    refused("token: -1 is outside", _core.logprobs, LOGITS, -1)
    refused("tokens: | 2 rows, found 1", _core.logprobs, rows, [0])
    refused("tokens: | found int", _core.logprobs, rows, 0)
    refused("tokens: expected an integer, found float", _core.logprobs, LOGITS, 1.0)
    refused("tokens: expected an integer, found bool", _core.logprobs, LOGITS, True)


# -------------------------------------------------------------------------------------- logit_stats


def test_logit_stats_refuse_what_they_cannot_compare() -> None:
    other = LOGITS[:3]
    refused("test: | shape of ref | 4 tokens | 3 tokens", qllm.logit_stats, LOGITS, other, 1.0)
    refused("test: | shape of ref", qllm.logit_stats, LOGITS, LOGITS[None], 1.0)
    bad = LOGITS.copy()
    bad[1] = NAN
    refused("ref: token 1 of 4 is NaN", qllm.logit_stats, bad, LOGITS, 1.0)
    refused("test: token 1 of 4 is NaN", qllm.logit_stats, LOGITS, bad, 1.0)
    bad[1] = INF
    refused("row 0: test: token 1 of 4 is +inf", qllm.logit_stats, LOGITS[None], bad[None], 1.0)
    nothing = np.full(4, -INF, np.float32)
    refused("ref: all 4 tokens are -inf", qllm.logit_stats, nothing, LOGITS, 1.0)
    refused("test: all 4 tokens are -inf", qllm.logit_stats, LOGITS, nothing, 1.0)
    refused("ref: | float32", qllm.logit_stats, LOGITS.astype(float), LOGITS, 1.0)
    empty = np.zeros(0, np.float32)
    refused("ref: | found 0", qllm.logit_stats, empty, empty, 1.0)


@pytest.mark.parametrize(
    ("temperatures", "words"),
    [
        (-1.0, "temperatures: | at least 0 | found -1 at position 0"),
        ([1.0, NAN], "temperatures: | found nan at position 1"),
        ([1.0, INF], "temperatures: | found inf at position 1"),
        ([], "temperatures: expected at least one"),
        (None, "temperatures: expected a number, found NoneType"),
        (["1"], "temperatures: expected a number, found str"),
        ([[1.0]], "temperatures: expected a number, found list"),
        (True, "temperatures: expected a number, found bool"),
    ],
)
def test_bad_temperatures_are_refused(temperatures: Any, words: str) -> None:
    refused(words, qllm.logit_stats, LOGITS, LOGITS, temperatures)


def test_bad_targets_are_refused() -> None:
    rows = np.stack([LOGITS, LOGITS])
    refused("targets: token 4 is outside | 4 tokens", qllm.logit_stats, LOGITS, LOGITS, 1.0, 4)
    refused("row 1: targets: token -2", qllm.logit_stats, rows, rows, 1.0, [0, -2])
    refused("targets: | 2 rows, found 3", qllm.logit_stats, rows, rows, 1.0, [0, 1, 2])
    refused("targets: | found float", qllm.logit_stats, LOGITS, LOGITS, 1.0, 0.5)


def test_bad_noise_arguments_are_refused() -> None:
    refused("tokens: | 2^32 - 1 | -1", _core.gumbel, 0, 0, 0, [-1])
    refused("tokens: | 2^32 - 1 | 4294967296", _core.gumbel, 0, 0, 0, 2**32)
    refused("seed: | -1", _core.gumbel, -1, 0, 0, 0)
    refused("counter: expected a sequence of 4", _core.philox, [0] * 3, [0] * 2)
    refused("key: | 2^32 - 1", _core.philox, [0] * 4, [0, 2**32])


# ------------------------------------------------------------------------------------------ process


class Interrupting:
    """A number that fails in its own way when it is read."""

    def __float__(self) -> float:
        raise KeyboardInterrupt

    def __index__(self) -> int:
        raise ZeroDivisionError


def test_exceptions_of_foreign_objects_pass_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        qllm.sample(LOGITS, temperature=Interrupting())
    with pytest.raises(ZeroDivisionError):
        qllm.sample(LOGITS, seed=Interrupting())


def test_ctrl_c_ends_a_long_call() -> None:
    rows = np.random.default_rng(4).normal(0, 2, (400, 20_000)).astype(np.float32)
    timer = threading.Timer(0.05, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        qllm.logit_stats(rows, rows[::-1], np.linspace(0.1, 2, 100))
        timer.join()  # not reached: the call would take many times as long


def test_a_failed_allocation_is_reported_and_the_next_call_works() -> None:
    calls = [
        lambda: qllm.sample(np.stack([LOGITS] * 2), history=[[1], [2]], top_p=0.5),
        lambda: _core.distribution(LOGITS, top_k=2),
        lambda: qllm.logit_stats(LOGITS, LOGITS, [0.5, 1.0], 1),
    ]
    for call in calls:
        failures = 0
        for n in range(1, 20):
            _core._alloc_fail_at(n)
            try:
                call()
            except QllmMemoryError as error:
                assert isinstance(error, QllmError) and "allocate" in str(error)
                failures += 1
            else:
                break
            finally:
                _core._alloc_fail_at(0)
        assert failures >= 1
        call()


def test_threads_may_share_arrays() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (50, 500)).astype(np.float32)
    expected = qllm.sample(logits, top_k=20, step=range(50)).tokens.tolist()
    results: list[list[int]] = []

    def work() -> None:
        for _ in range(5):
            results.append(qllm.sample(logits, top_k=20, step=range(50)).tokens.tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 and all(result == expected for result in results)


def test_logits_changed_by_another_thread_cannot_crash() -> None:
    logits = np.random.default_rng(2).normal(0, 2, (40, 2000)).astype(np.float32)
    history = np.random.default_rng(3).integers(0, 2000, (40, 50))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            logits[:, ::7] = NAN
            history[:, ::3] = 10**12
            logits[:, ::7] = 1.0
            history[:, ::3] = 5

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for step in range(30):
            try:
                found = qllm.sample(logits, history=list(history), top_k=30, top_p=0.9,
                                    repetition_penalty=1.2, step=step).tokens  # fmt: skip
                assert ((found >= 0) & (found < 2000)).all()
                qllm.logit_stats(logits, logits[::-1], [0.5, 1.0])
            except QllmValueError:
                pass
    finally:
        stop.set()
        thread.join()
