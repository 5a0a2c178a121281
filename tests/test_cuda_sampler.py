"""Draws and statistics of the kernels, on the emulator: the bits of the host's, whatever the
logits, the filters, the place of a row in a call, and the order in which lanes run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import emulated
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import F32, KINDS, rows_of

from qllm import _core
from qllm.sampling import round_logits

STATS = ("kl", "kl_reverse", "tv", "disagreement", "entropy_ref", "entropy_test", "max_ref",
         "delta_p", "cross", "log_z_ref")
SIZES = [1, 63, 64, 65, 1000, 4099]


class Sampling(ctypes.Structure):
    _fields_ = [("temperature", ctypes.c_double), ("top_k", ctypes.c_int64),
                ("keep_ties", ctypes.c_bool), ("top_p", ctypes.c_double),
                ("min_p", ctypes.c_double), ("repetition_penalty", ctypes.c_double),
                ("seed", ctypes.c_uint64), ("prompt", ctypes.c_uint64)]


class Draw(ctypes.Structure):
    _fields_ = [("row", ctypes.c_int64), ("sampling", Sampling), ("step", ctypes.c_uint32),
                ("history", ctypes.POINTER(ctypes.c_int64)), ("n_history", ctypes.c_int64),
                ("round_bf16", ctypes.c_bool)]


class Sampled(ctypes.Structure):
    _fields_ = [("token", ctypes.c_int64), ("logprob", ctypes.c_float),
                ("sampling_logprob", ctypes.c_float)]


def _draws(wanted: Sequence[dict[str, Any]], first: int) -> tuple[Any, list[np.ndarray]]:
    """qllm_draw of each, row `first` and plain sampling unless said; and the histories, which they
    point to."""
    asked, histories = (Draw * len(wanted))(), []
    for entry, given_ in zip(asked, wanted):
        fields = {"row": first, "step": 0, "history": [], "round_bf16": False} | given_
        history = np.array(fields.pop("history"), np.int64)
        histories.append(history)
        entry.history = history.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        entry.n_history = history.size
        for name in ("row", "step", "round_bf16"):
            setattr(entry, name, fields.pop(name))
        entry.sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0,
                                     "repetition_penalty": 1.0} | fields)
    return asked, histories


def device_call(name: str, *arguments: object) -> None:
    """Calls a hook; its error names the draw or row that failed."""
    failed = ctypes.c_int64(-1)
    try:
        emulated.device().call(name, *arguments, ctypes.byref(failed))
    except emulated.DeviceError as error:
        assert error.status == "VALUE"
        raise ValueError(f"{failed.value}: {error}") from None
    assert failed.value == -1


def device_draw(logits: np.ndarray, wanted: Sequence[dict[str, Any]], first: int = 0,
                most_bytes: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A draw from row wanted[i]["row"] - first for each i: tokens, logprobs, sampling logprobs."""
    asked, _histories = _draws(wanted, first)
    out = (Sampled * len(wanted))()
    device_call("gpu_test_draw", emulated.device().array(logits, F32), first, *logits.shape, asked,
                len(wanted), most_bytes, out)
    return (np.array([s.token for s in out]), np.array([s.logprob for s in out], F32),
            np.array([s.sampling_logprob for s in out], F32))


def device_stats(ref: np.ndarray, test: np.ndarray, temperatures: Sequence[float],
                 targets: Sequence[int] | None = None,
                 most_bytes: int = 0) -> dict[str, np.ndarray]:
    """As _core.logit_stats of (rows, vocab)."""
    ref, test = (np.ascontiguousarray(x, F32) for x in (ref, test))
    grid, n = np.array(temperatures, np.float64), len(ref)
    found = {name: np.full((n, grid.size), np.nan) for name in STATS}
    out = (ctypes.c_void_p * len(STATS))(*(found[name].ctypes.data for name in STATS))
    same_top = np.zeros(n, np.uint8)
    goals = None if targets is None else np.array(targets, np.int64)
    device_call("gpu_test_stats", ref, test, n, ref.shape[1], grid, grid.size, goals, most_bytes,
                out, same_top)
    return found | {"same_top": same_top}


@pytest.fixture(params=["forward", "reversed"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which lanes and blocks take turns."""
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "round_bf16": True},
    {"temperature": 1e-30},
    {"temperature": 1e35},
    {"top_k": 1},
    {"top_k": 5, "temperature": 0.6},
    {"top_k": 5, "keep_ties": True},
    {"top_k": 200, "top_p": 0.9},
    {"top_p": 0.9, "temperature": 1.5},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-15},
    {"min_p": 0.01, "round_bf16": True},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2},
    {"top_k": 1500, "min_p": 1e-5, "temperature": 0.9},
]


def host_draw(logits: np.ndarray, draws: Sequence[dict[str, Any]],
              first: int = 0) -> tuple[np.ndarray, ...]:
    """The same by _core.sample, one call a draw."""
    found = []
    for wanted in draws:
        wanted = {"row": first} | wanted
        row = logits[wanted.pop("row") - first]
        row = round_logits(row, "bfloat16" if wanted.pop("round_bf16", False) else "float32")
        found.append(_core.sample(row, **wanted))
    return tuple(np.array(column) for column in zip(*found))


def assert_draws_alike(logits: np.ndarray, draws: Sequence[dict[str, Any]],
                       first: int = 0) -> None:
    found = device_draw(logits, draws, first=first)
    for name, a, b in zip(("token", "logprob", "sampling_logprob"), found,
                          host_draw(logits, draws, first)):
        np.testing.assert_array_equal(a, b, f"{name} {logits.shape} {draws}")


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.usefixtures("order")
def test_draws_have_the_bits_of_the_host(vocab: int) -> None:
    """All settings in one call over rows of all kinds, with and without a penalized history."""
    rows = np.concatenate([rows_of(kind, 1, vocab) for kind in KINDS])
    history = [0, vocab - 1, vocab // 2, 0, *range(min(vocab, 70))]
    draws = []
    for i, setting in enumerate(SETTINGS):
        for row in range(len(rows)):
            draw = setting | {"row": row, "seed": 2**64 - 7, "prompt": 2**40 + 3, "step": i}
            if (i + row) % 3 == 0:
                draw |= {"repetition_penalty": 1.3 if i % 2 else 0.7, "history": history}
            draws.append(draw)
    assert_draws_alike(rows, draws)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False).filter(lambda x: x < np.inf), min_size=2,
                max_size=150), st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.data())
def test_any_logits_have_the_bits_of_the_host(values: list[float], seed: int, temperature: float,
                                              data: st.DataObject) -> None:
    row = np.array(values, F32)
    row[seed % len(row)] = 0.5
    rows = np.stack([row, np.random.default_rng(seed).permutation(row)])
    # a large float32 can round to infinity
    may_round = bool(np.isfinite(round_logits(rows, "bfloat16").max()))
    draws = [{"row": i % 2, "seed": seed, "step": i, "temperature": temperature,
              "top_k": data.draw(st.integers(0, len(row) + 1)),
              "keep_ties": data.draw(st.booleans()),
              "top_p": data.draw(st.sampled_from([1.0, 0.99, 0.8, 0.3])),
              "min_p": data.draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0])),
              "repetition_penalty": data.draw(st.sampled_from([1.0, 1.2, 0.5, 3e38])),
              "history": data.draw(st.lists(st.integers(0, len(row) - 1), max_size=5)),
              "round_bf16": may_round and data.draw(st.booleans())}
             for i in range(4)]
    assert_draws_alike(rows, draws)
    grid = [0.0, temperature]
    same_as_host(rows[0], rows[1], grid, [seed % len(row)])


def test_a_large_vocabulary_has_the_bits_of_the_host() -> None:
    rows = rows_of("normal", 2, 32_000)
    rows[1] = round_logits(rows[1], "bfloat16")
    history = list(range(0, 3000, 3))
    draws = [setting | {"row": i % 2, "seed": 3, "step": i, "history": history,
                        "repetition_penalty": 1.1 if i % 4 == 0 else 1.0}
             for i, setting in enumerate(SETTINGS)]
    assert_draws_alike(rows, draws)
    test = (rows[:1] + np.random.default_rng(1).normal(0, 0.1, 32_000)).astype(F32)
    same_as_host(rows[:1], test, [0.3, 1.0], None)


@pytest.mark.usefixtures("order")
def test_sums_run_in_the_order_of_the_host() -> None:
    """Weights of 2^-52 beside one of 1: in another order other ones are lost, and log(1 + sum)
    shows each of them."""
    rng = np.random.default_rng(8)
    for vocab in (40, 1000, 5000):
        rows = rng.choice(np.array([-35.5, -36, -36.5, -37, -37.5], F32), (3, vocab))
        rows[range(3), rng.integers(0, vocab, 3)] = 0
        settings_: list[dict[str, Any]] = [{}, {"top_k": vocab // 2}, {"top_p": 1 - 1e-14}, {"min_p": 1e-16},
                                           {"temperature": 1.01}, {"top_p": 1 - 1e-15}]
        draws = [s | {"row": row, "seed": 5} for s in settings_ for row in range(3)]
        assert_draws_alike(rows, draws)
        assert (np.abs(device_draw(rows, draws)[2]) < 1e-11).all()


@pytest.mark.usefixtures("order")
def test_of_equal_scores_the_lower_id_wins() -> None:
    """Two tokens with one noise word, which are found by chance, and equal logits; then with a
    token beside them whose logit is larger, but whose noise is small."""
    vocab = 120_000
    words = np.array([_core.philox([i, 0, 0, 0], [1, 0]) for i in range(vocab // 4)]).ravel()
    order = np.argsort(words, kind="stable")
    (at,) = np.nonzero(words[order][1:] == words[order][:-1])
    assert at.size > 0
    for low, high in zip(order[at], order[at + 1]):
        row = np.full((2, vocab), -np.inf, F32)
        row[:, [low, high]] = 1.25
        row[1, order[0]] = 1.3
        draws = [{"row": i, "seed": 1, "temperature": 0.8} for i in (0, 1)]
        assert (device_draw(row, draws)[0] == low).all() and low < high
        assert_draws_alike(row, draws)


@pytest.mark.usefixtures("order")
def test_many_draws_from_few_rows_of_a_chunk() -> None:
    """More draws than blocks with memory, whose rows are numbered from 512 on."""
    rows = rows_of("normal", 3, 70)
    draws = [{"row": 512 + i * 3 // 200, "seed": i, "temperature": 0.2 + i % 9 / 4,
              "round_bf16": i % 3 == 0} for i in range(200)]
    assert_draws_alike(rows, draws, first=512)
    filtered = [draw | {"top_p": 0.95} for draw in draws]
    assert_draws_alike(rows, filtered, first=512)
    one_block = device_draw(rows, filtered, first=512, most_bytes=1)
    for a, b in zip(one_block, device_draw(rows, filtered, first=512)):
        np.testing.assert_array_equal(a, b)
    assert device_draw(rows, [])[0].size == 0


# --------------------------------------------------------------------------------------- statistics


def same_as_host(ref: np.ndarray, test: np.ndarray, grid: Sequence[float],
                 targets: Sequence[int] | None) -> None:
    ref, test = np.atleast_2d(ref), np.atleast_2d(test)
    found = device_stats(ref, test, grid, targets)
    expected = _core.logit_stats(ref, test, grid, targets)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, f"{name} {ref.shape}")


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.usefixtures("order")
def test_stats_have_the_bits_of_the_host(vocab: int) -> None:
    grid = [0.0, 1e-300, 1e-3, 0.7, 1.0, 3.0, 1e30, 1e300]
    ref = np.concatenate([rows_of(kind, 1, vocab) for kind in [*KINDS, "normal"]])
    test = np.concatenate([rows_of(kind, 2, vocab)[1:] for kind in [*KINDS, "normal"]])
    test[5] = ref[5]
    for targets in (None, [0, -1, vocab - 1, vocab // 2, 0, 0]):
        same_as_host(ref, test, grid[: 8 if vocab < 1000 else 4], targets)


@pytest.mark.usefixtures("order")
def test_close_differences_are_sorted_exactly() -> None:
    """Keys that differ in their last bits alone, in runs of equals."""
    rng = np.random.default_rng(4)
    for spacing in (1.0, 1e-6, 1e-12):
        ref = (-np.abs(rng.normal(0, 1, 700)) * spacing).astype(F32)
        ref[::3] = ref[0]
        same_as_host(ref, np.ones(700, F32), [1.0], None)


@pytest.mark.usefixtures("order")
def test_long_calls_are_cut_into_stretches() -> None:
    ref, test = rows_of("normal", 40, 33), rows_of("ties", 40, 33)
    targets = list(range(-1, 33)) + [0] * 6
    same_as_host(ref, test, [0.5, 1.0], targets)
    whole = device_stats(ref, test, [0.5, 1.0], targets)
    for most_bytes in (1, 70_000):  # one row, and some, at a time
        cut = device_stats(ref, test, [0.5, 1.0], targets, most_bytes)
        for name in whole:
            np.testing.assert_array_equal(cut[name], whole[name], name)


# ------------------------------------------------------------------------------------------- errors


def host_error(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value).removeprefix("row 0: ")


BAD = [
    {"temperature": -1.0}, {"temperature": np.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
    {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"history": [1, 90]}, {"history": [-1]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_parameters_are_refused_with_the_words_of_the_host(bad: dict[str, Any]) -> None:
    row = rows_of("normal", 1, 65)
    words = host_error(_core.sample, row[0], **bad)
    assert host_error(device_draw, row, [{}, {}, bad, bad]) == f"2: {words}"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_logits_are_refused_with_the_words_of_the_host(value: float) -> None:
    for vocab, at in [(1, 0), (65, 64), (65, 3), (1000, 777)]:
        rows = rows_of("normal", 3, vocab)
        rows[1, at:] = value
        words = host_error(_core.sample, rows[1])
        draws = [{"row": 0}, {"row": 2}, {"row": 1, "top_k": 2, "history": [vocab]}]
        assert host_error(device_draw, rows, draws) == f"2: {words}"
        for pair in [(rows, rows_of("ties", 3, vocab)), (rows_of("ties", 3, vocab), rows)]:
            words = host_error(_core.logit_stats, pair[0][1], pair[1][1], 1.0)
            assert host_error(device_stats, *pair, [1.0]) == f"1: {words}"


def test_rows_without_a_token_are_refused_with_the_words_of_the_host() -> None:
    rows = rows_of("normal", 2, 100)
    rows[1] = -np.inf
    words = host_error(_core.sample, rows[1])
    for setting in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        assert host_error(device_draw, rows, [{}, setting | {"row": 1}]) == f"1: {words}"
    words = host_error(_core.logit_stats, rows[1], rows[0], 1.0)
    assert host_error(device_stats, rows[::-1], rows, [1.0]) == f"0: {words}"
    words = host_error(_core.logit_stats, rows[0], rows[1], 1.0)
    assert host_error(device_stats, rows, rows[::-1], [1.0]) == f"0: {words}"


def test_arguments_of_stats_are_refused_with_the_words_of_the_host() -> None:
    rows = rows_of("normal", 2, 20)
    for grid, targets in [([1.0, -1.0], None), ([np.inf], None), ([1.0], [3, 20]),
                          ([1.0], [3, -2])]:
        words = host_error(_core.logit_stats, rows[1], rows[1], grid,
                           None if targets is None else targets[1])
        assert host_error(device_stats, rows, rows, grid, targets).split(": ", 1)[1] == words
