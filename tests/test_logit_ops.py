"""The functions over rows of logits: every instruction set gives the bits of the plain reference in
the core, and the sums run in the order that core/logit_ops.h writes down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import F32, KINDS, rows_of

import qllm
from qllm import _core
from qllm.errors import QllmValueError

SETS = _core.cpu_info()["isas"]
SIZES = [1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 300, 1000, 5003]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7},
    {"temperature": 1e-30},
    {"temperature": 1e35},
    {"top_k": 1},
    {"top_k": 5, "temperature": 0.6},
    {"top_k": 5, "keep_ties": True},
    {"top_k": 200, "top_p": 0.9},
    {"top_p": 0.9, "temperature": 1.5},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-15},
    {"min_p": 0.01},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2},
]


def assert_same(a: Any, b: Any, what: str) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, what
    assert a.tobytes() == b.tobytes(), what


def compare_sampling(isa: str, rows: np.ndarray, setting: dict[str, Any]) -> None:
    draw = dict(setting, seed=2**64 - 7, prompt=2**40 + 3, step=range(len(rows)))
    for field, a, b in zip(qllm.Sampled._fields, _core.sample(rows, isa=isa, **draw),
                           _core.sample(rows, isa="core", **draw)):
        assert_same(a, b, f"{field} {setting}")
    assert_same(_core.distribution(rows, isa=isa, **setting),
                _core.distribution(rows, isa="core", **setting), f"distribution {setting}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_sampling_has_the_bits_of_the_core(isa: str, kind: str) -> None:
    for vocab in SIZES:
        rows = rows_of(kind, 3, vocab)
        history = [None, [0, vocab - 1, vocab // 2, 0], list(range(min(vocab, 90)))]
        for setting in SETTINGS:
            compare_sampling(isa, rows, setting)
            if vocab > 60:
                compare_sampling(isa, rows, dict(setting, repetition_penalty=1.3, history=history))
        tokens = np.arange(3) % vocab
        assert_same(_core.logprobs(rows, tokens, isa=isa), _core.logprobs(rows, tokens, isa="core"),
                    "logprobs")


@pytest.mark.parametrize("isa", SETS)
def test_a_large_vocabulary_has_the_bits_of_the_core(isa: str) -> None:
    rows = rows_of("normal", 2, 40_001)
    for setting in SETTINGS:
        compare_sampling(isa, rows, setting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", SETS)
def test_stats_have_the_bits_of_the_core(isa: str, kind: str) -> None:
    temperatures = [0.0, 1e-300, 1e-3, 0.05, 0.7, 1.0, 3.0, 1e30, 1e300]
    for vocab in SIZES:
        ref = rows_of(kind, 3, vocab)
        test = ref[:, ::-1] if kind == "excluded" else rows_of("normal", 3, vocab)
        test = np.ascontiguousarray(test)
        test[2] = ref[2]
        for targets in (None, [0, -1, vocab - 1]):
            a = _core.logit_stats(ref, test, temperatures, targets, isa=isa)
            b = _core.logit_stats(ref, test, temperatures, targets, isa="core")
            for name in b:
                assert_same(a[name], b[name], f"{name} {vocab}")
                if name not in ("kl", "kl_reverse", "tv", "disagreement", "delta_p"):
                    continue
                assert not np.isnan(a[name]).any() and (a[name][2] == 0).all()


@pytest.mark.parametrize("isa", [isa for isa in SETS if isa != "scalar"])
@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False).filter(lambda x: x < np.inf), min_size=2,
                max_size=150), st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4))
def test_any_logits_have_the_bits_of_the_core(
    isa: str, values: list[float], seed: int, temperature: float
) -> None:
    row = np.array(values, F32)
    row[seed % len(row)] = 0.5
    other = np.random.default_rng(seed).permutation(row)
    for setting in ({}, {"top_p": 0.8}, {"top_k": 3, "min_p": 0.1}):
        compare_sampling(isa, np.stack([row, other]), dict(setting, temperature=temperature))
    a, b = (_core.logit_stats(row, other, [temperature], isa=name) for name in (isa, "core"))
    for name in b:
        assert_same(a[name], b[name], name)


# ----------------------------------------------------------------------------------- the arithmetic


def lane_sum(weights: np.ndarray) -> float:
    """The sum of core/logit_ops.h, literally; (groups, 16)."""
    partial = np.zeros(16)
    for group in weights:
        partial += group
    for step in (8, 4, 2, 1):
        partial[:step] += partial[step : 2 * step]
    return float(partial[0])


@pytest.mark.parametrize("isa", [*SETS, "core"])
def test_sums_run_in_the_documented_order(isa: str) -> None:
    """Weights that are powers of two show the order of their sum in its last bits."""
    rng = np.random.default_rng(3)
    temperature = float.fromhex("0x1.71547652b82fep+0")  # log2(e): a weight is 2^(logit - max)
    for vocab in (1, 16, 17, 200, 1003):
        ref = rng.choice(np.array([0, -1, -52, -53, -54], F32), vocab)
        ref[rng.integers(vocab)] = 0
        test = rng.normal(0, 1, vocab).astype(F32)
        groups = -(-vocab // 16)
        order = np.argsort(-(test.astype(float) - ref), kind="stable")
        weights = np.zeros(16 * groups)
        weights[:vocab] = np.exp2(ref[order].astype(float))
        found = _core.logit_stats(ref, test, temperature, isa=isa)["max_ref"][0]
        assert found == 1 / lane_sum(weights.reshape(16, groups).T)


@pytest.mark.parametrize("isa", [*SETS, "core"])
def test_weights_are_within_an_ulp_or_two_of_the_exponential(isa: str) -> None:
    """Of two logits the smaller has the probability w / (1 + w), and max_ref is 1 / (1 + w)."""
    x = np.concatenate([-np.geomspace(1e-6, 100, 3000), -np.linspace(0.1, 1.5, 2000)]).astype(F32)
    rows = np.stack([np.zeros_like(x), x], 1)
    found = _core.logit_stats(rows, rows, [1.0], isa=isa)["max_ref"][:, 0]
    exact = 1 / (1 + np.exp(x.astype(np.longdouble)))
    assert np.abs(found / exact - 1).max() < 2.5e-16
    small = np.array([[0, -600], [0, -692], [0, -694], [0, -3e38]], F32)
    entropy = _core.logit_stats(small, small, [1.0], isa=isa)["entropy_ref"][:, 0]
    weights = np.exp(-np.array([600.0, 692.0]))
    np.testing.assert_allclose(entropy[:2], weights * [600, 692], rtol=1e-13)
    assert entropy[2] == entropy[3] == 0.0  # below 2^-1000 a weight is 0


def test_the_logarithm_is_within_an_ulp() -> None:
    """Of sums that are exact, by log_z_ref of weights that are powers of two; and twice in a row in
    the noise, whose second logarithm has arguments from 1e-10 to 22."""
    log2e = float.fromhex("0x1.71547652b82fep+0")
    rng = np.random.default_rng(6)
    rows = -rng.integers(0, 30, (400, 50)).astype(F32)
    rows[:, 0] = 0
    totals = np.exp2(rows.astype(float)).sum(1)
    found = _core.logit_stats(rows, rows, log2e)["log_z_ref"][:, 0]
    exact = np.log(totals.astype(np.longdouble))
    assert (np.abs(found - exact) < np.spacing(found)).all()
    ones = _core.logit_stats(np.zeros((1, 1), F32), np.zeros((1, 1), F32), 1.0)
    assert ones["log_z_ref"][0, 0] == 0
    words = np.array([_core.philox([i, 0, 0, 0], [3, 0]) for i in range(5000)]).ravel()
    inner = -np.log((words + np.longdouble(0.5)) / np.longdouble(2**32))
    noise = _core.gumbel(3, 0, 0, np.arange(20_000))
    # the ulp of the inner logarithm, passed on, and that of the outer one
    assert (np.abs(noise + np.log(inner)) < 2.0**-52 + np.spacing(np.abs(noise))).all()


@pytest.mark.parametrize("spacing", [1.0, 1e-6, 1e-12])
def test_close_differences_are_sorted_exactly(spacing: float) -> None:
    """Ratios q / p that differ in the last bits of float64 only, in runs long and short."""
    rng = np.random.default_rng(4)
    for vocab in (40, 3000):
        ref = (-np.abs(rng.normal(0, 1, vocab)) * spacing).astype(F32)
        test = np.ones(vocab, F32)
        ref[::3] = ref[0]
        p, q = (np.exp(row.astype(np.longdouble)) for row in (ref, test))
        p, q = p / p.sum(), q / q.sum()
        order = np.argsort(ref, kind="stable")
        above_p, above_q = (np.cumsum(row[order]) - row[order] for row in (p, q))
        f = above_q * p[order] - above_p * q[order]
        expected = float((p[order] * f / (q[order] + f)).sum())
        found = _core.logit_stats(ref, test, [1.0])["disagreement"][0]
        assert found == pytest.approx(expected, rel=1e-9, abs=3e-15)
        assert expected > 0


# ------------------------------------------------------------------------------------------ threads


def test_the_number_of_threads_changes_nothing() -> None:
    rows = rows_of("normal", 40, 9001)
    other = rows[::-1].copy()
    setting = {"top_p": 0.9, "temperature": 0.8, "seed": 5, "step": range(40)}
    calls = [
        lambda threads: _core.sample(rows, threads=threads, **setting),
        lambda threads: [_core.distribution(rows, top_k=30, threads=threads)],
        lambda threads: [_core.logprobs(rows, np.arange(40), threads=threads)],
        lambda threads: _core.logit_stats(rows, other, [0.5, 1.0], threads=threads).values(),
    ]
    for call in calls:
        alone = list(call(1))
        for threads in (2, 3, None):
            for a, b in zip(call(threads), alone):
                assert_same(a, b, f"{threads} threads")


def test_of_several_bad_rows_the_first_is_named_on_any_number_of_threads() -> None:
    rows = rows_of("normal", 60, 9001)
    rows[[23, 41, 59], 7] = np.nan
    for threads in (1, 2, 3):
        with pytest.raises(QllmValueError, match="row 23: logits: token 7 of 9001 is NaN"):
            _core.sample(rows, threads=threads)
        with pytest.raises(QllmValueError, match="row 23: ref: token 7 of 9001 is NaN"):
            _core.logit_stats(rows, rows, 1.0, threads=threads)


def test_no_thread_is_refused() -> None:
    for threads in (0, -1, 1.5, "2"):
        with pytest.raises((QllmValueError, TypeError), match="threads: "):
            qllm.sample(np.zeros(4, F32), threads=threads)
        with pytest.raises((QllmValueError, TypeError), match="threads: "):
            qllm.logit_stats(np.zeros(4, F32), np.zeros(4, F32), 1.0, threads=threads)


def test_an_unknown_set_is_refused() -> None:
    row = np.zeros(4, F32)
    for call in (_core.sample, _core.distribution, lambda x, isa: _core.logprobs(x, 0, isa=isa),
                 lambda x, isa: _core.logit_stats(x, x, 1.0, isa=isa)):
        with pytest.raises(QllmValueError, match="isa: instruction set 'sse9' is not known"):
            call(row, isa="sse9")
