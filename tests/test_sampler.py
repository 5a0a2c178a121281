"""The sampler against the logits processors of transformers, published formulas, and chance.

Where probability decides, seeds are fixed, so that a test that passes once passes always."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

import qllm
from qllm import _core

# -------------------------------------------------------------------------------------------- noise

# Random123, tests/kat_vectors, the lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000 00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("given_words", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(given_words: str, expected: str) -> None:
    numbers = words(given_words)
    assert list(_core.philox(numbers[:4], numbers[4:])) == words(expected)


def gumbel_by_formula(seed: int, prompt: int, step: int, tokens: np.ndarray) -> np.ndarray:
    low, high = 0xFFFFFFFF, 32
    noise = []
    for token in tokens.tolist():
        counter = [token // 4, step, prompt & low, prompt >> high]
        word = _core.philox(counter, [seed & low, seed >> high])[token % 4]
        noise.append(-np.log(-np.log((word + 0.5) / 2**32)))
    return np.array(noise)


@pytest.mark.parametrize(
    ("seed", "prompt", "step"), [(0, 0, 0), (2**64 - 1, 2**63 + 5, 2**32 - 1), (1 << 32, 7, 3)]
)
def test_gumbel_noise_is_keyed_as_documented(seed: int, prompt: int, step: int) -> None:
    tokens = np.array([0, 1, 2, 3, 4, 149_999, 2**32 - 1])
    expected = gumbel_by_formula(seed, prompt, step, tokens)
    found = _core.gumbel(seed, prompt, step, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert _core.gumbel(seed, prompt, step, 149_999) == found[5]


def test_gumbel_noise_is_standard_gumbel() -> None:
    noise = _core.gumbel(5, 1, 2, np.arange(100_000))
    assert stats.kstest(noise, "gumbel_r").pvalue > 0.01


def test_each_of_seed_prompt_and_step_gives_other_independent_noise() -> None:
    tokens = np.arange(10_000)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1 << 32, 0)]
    rows = np.array([_core.gumbel(*key, tokens) for key in keys])
    correlation = np.corrcoef(rows) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.05


# -------------------------------------------------------------- distributions, against transformers


def by_transformers(logits: np.ndarray, history: list[int], s: dict[str, Any]) -> np.ndarray:
    """Probabilities after transformers' processors, in the order in which its generate applies
    them."""
    import torch
    from transformers.generation import logits_process as hf

    processors: list[Any] = []
    if s["repetition_penalty"] != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    processors.append(hf.TemperatureLogitsWarper(s["temperature"]))
    if s["top_k"]:
        processors.append(hf.TopKLogitsWarper(s["top_k"]))
    if s["top_p"] < 1.0:
        processors.append(hf.TopPLogitsWarper(s["top_p"]))
    if s["min_p"] > 0.0:
        processors.append(hf.MinPLogitsWarper(s["min_p"]))
    scores = torch.from_numpy(logits)[None]
    ids = torch.tensor([history], dtype=torch.long)
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


def random_setting(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    def on(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.6 else off

    return {
        "temperature": float(rng.choice([0.1, 0.3, 0.7, 1.0, 1.3, 2.0, rng.uniform(0.2, 3.0)])),
        "top_k": on(int(rng.integers(1, 2 * vocab)), 0) if rng.random() < 0.5 else int(on(50, 1)),
        "top_p": on(float(rng.uniform(0.01, 0.999)), 1.0),
        "min_p": on(float(10 ** rng.uniform(-4, 0)), 0.0),
        "repetition_penalty": on(float(rng.uniform(0.5, 2.0)), 1.0),
    }


def test_distributions_equal_those_of_transformers_in_1000_settings() -> None:
    pytest.importorskip("transformers", reason="its logits processors are the oracle")
    rng = np.random.default_rng(20)
    kept_sizes = []
    for _ in range(1000):
        vocab = int(rng.choice([2, 7, 100, 1500]))
        logits = (rng.normal(0, rng.uniform(0.5, 6.0), vocab)).astype(np.float32)
        history = rng.integers(0, vocab, 20).tolist()
        setting = random_setting(rng, vocab)
        expected = by_transformers(logits, history, setting)
        found = _core.distribution(logits, history=history, **setting)
        # what transformers drops is exactly 0; so is what underflows float32
        np.testing.assert_array_equal(found > 0, expected.astype(np.float32) > 0, str(setting))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=str(setting))
        kept_sizes.append(int((found > 0).sum()))
    assert min(kept_sizes) == 1 and max(kept_sizes) > 1000


def test_ties_go_to_the_lower_ids() -> None:
    logits = np.array([1, 3, 2, 3, 3, -0.0, 0.0], np.float32)
    kept = lambda **s: np.flatnonzero(_core.distribution(logits, **s)).tolist()  # noqa: E731
    assert kept(top_k=1) == [1] and kept(top_k=2) == [1, 3] and kept(top_k=4) == [1, 2, 3, 4]
    assert kept(top_k=6) == [0, 1, 2, 3, 4, 5]
    assert kept(top_p=0.01) == [1] and kept(top_p=0.5) == [1, 3]
    assert kept(min_p=1.0) == [1, 3, 4]


def test_top_k_keeps_all_that_equal_the_kth_where_asked() -> None:
    """As Lit-GPT and transformers do: everything below the k-th largest logit is dropped."""
    rng = np.random.default_rng(8)
    for vocab in (1, 2, 9, 100, 1000):
        logits = (rng.integers(-12, 12, (4, vocab)) / 4).astype(np.float32)
        logits[1] = 0
        logits[2, : vocab // 2] = -np.inf
        logits[3, ::3] = -0.0
        for k in (1, 2, 5, vocab // 2, vocab - 1, vocab, vocab + 3):
            if k < 1:
                continue
            kept = _core.distribution(logits, top_k=k, keep_ties=True) > 0
            kth = np.sort(logits, axis=1)[:, max(0, vocab - k), None]
            np.testing.assert_array_equal(kept, (logits >= kth) & np.isfinite(logits))
            if vocab > 1:
                both = _core.distribution(logits[:2], top_k=[k, k], keep_ties=[True, False]) > 0
                np.testing.assert_array_equal(both[0], kept[0])
                assert both[1].sum() == min(k, vocab)
    draws = qllm.sample(np.zeros((300, 8), np.float32), top_k=2, keep_ties=True, step=range(300))
    assert set(draws.tokens.tolist()) == set(range(8))
    flags = np.array([True, False])
    assert (_core.distribution(np.zeros((2, 3), np.float32), top_k=1, keep_ties=flags) > 0).sum() == 4


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    uniform = np.zeros(8, np.float32)
    for keep in range(1, 9):
        assert np.count_nonzero(_core.distribution(uniform, top_p=keep / 8)) == keep
        above = np.nextafter(keep / 8, 2) if keep < 8 else 1.0
        assert np.count_nonzero(_core.distribution(uniform, top_p=above)) == min(keep + 1, 8)


def test_min_p_is_relative_to_the_largest_probability() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32)
    assert np.count_nonzero(_core.distribution(logits, min_p=0.49)) == 2
    assert np.count_nonzero(_core.distribution(logits, min_p=0.24)) == 4
    assert np.count_nonzero(_core.distribution(logits, min_p=0.24, temperature=0.5)) == 2


def test_a_token_of_the_history_is_penalized_once() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    found = _core.distribution(logits, repetition_penalty=2.0, history=[0, 1, 0, 0, 1])
    weights = np.exp([1.0, -4.0, 1.0, 0.0])
    np.testing.assert_allclose(found, weights / weights.sum(), atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.booleans())
def test_permuting_the_vocabulary_permutes_the_distribution(seed: int, n: int, k: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.permutation(np.linspace(-5, 5, n)).astype(np.float32)
    order = rng.permutation(n)
    setting = {"top_k": int(rng.integers(1, n + 1)) if k else 0, "top_p": 0.9, "min_p": 0.01}
    found = _core.distribution(logits[order], temperature=0.8, **setting)
    expected = _core.distribution(logits, temperature=0.8, **setting)[order]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# -------------------------------------------------------------------------------------------- draws


def draws(logits: np.ndarray, n: int, **setting: Any) -> np.ndarray:
    """n draws from one row, at steps 0 .. n - 1."""
    found = []
    for start in range(0, n, 10_000):
        count = min(10_000, n - start)
        rows = np.broadcast_to(logits, (count, logits.size))
        found.append(qllm.sample(rows, step=np.arange(start, start + count), **setting).tokens)
    return np.concatenate(found)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 50, None])
def test_draws_pass_a_chi_square_test(temperature: float, top_k: int | None) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1.5, 120).astype(np.float32)
    n = 100_000
    counts = np.bincount(
        draws(logits, n, temperature=temperature, top_k=top_k, seed=11), minlength=120
    )
    expected = n * _core.distribution(logits, temperature=temperature, top_k=top_k).astype(float)
    assert not counts[expected == 0].any()
    often = expected >= 10
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    if wanted[-1] < 10:  # too few to test: add them to the rarest that can be tested
        rarest = int(np.argmin(wanted[:-1]))
        observed[rarest] += observed[-1]
        wanted[rarest] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    if wanted.size == 1:
        assert top_k == 1 and observed[0] == n
    else:
        assert stats.chisquare(observed, wanted * (n / wanted.sum())).pvalue > 0.001


def test_a_draw_is_the_argmax_of_logits_and_noise() -> None:
    rng = np.random.default_rng(6)
    for vocab, scale in [(1, 1.0), (9, 1.0), (5000, 0.01), (5000, 1.0), (5000, 8.0)]:
        logits = rng.normal(0, scale, (20, vocab)).astype(np.float32)
        found = qllm.sample(logits, temperature=0.8, seed=2**64 - 1, prompt=5, step=range(20))
        for row in range(20):
            noise = _core.gumbel(2**64 - 1, 5, row, np.arange(vocab))
            assert found.tokens[row] == np.argmax(logits[row].astype(np.float64) / 0.8 + noise)


@pytest.mark.parametrize(
    "setting", [{"top_k": 40}, {"top_k": 3000}, {"top_p": 0.7}, {"min_p": 0.2}]
)
def test_a_filtered_draw_is_the_argmax_over_the_kept_tokens(setting: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 1.5, (20, 20_003)).astype(np.float32)
    found = qllm.sample(logits, temperature=1.3, seed=9, step=range(20), **setting)
    kept = _core.distribution(logits, temperature=1.3, **setting) > 0
    assert 1 < kept.sum(1).min() and kept.sum(1).max() < 20_003
    for row in range(20):
        scores = logits[row].astype(np.float64) / 1.3 + _core.gumbel(9, 0, row, np.arange(20_003))
        assert found.tokens[row] == np.argmax(np.where(kept[row], scores, -np.inf))


def test_a_draw_does_not_depend_on_its_place_in_a_batch() -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, (13, 300)).astype(np.float32)
    each = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.7], 13),
        "top_k": [None, 1, 5, 50, 300, 1000, 0, 7, 9, 2, 3, 4, 5],
        "top_p": rng.uniform(0.2, 1.0, 13).astype(np.float32),
        "min_p": np.linspace(0, 0.2, 13).tolist(),
        "repetition_penalty": np.linspace(0.8, 1.5, 13),
        "seed": [2**64 - 1 - i for i in range(13)],
        "prompt": np.arange(13, dtype=np.uint64),
        "step": np.arange(13, dtype=np.int32),
        "history": [None if i % 3 == 0 else rng.integers(0, 300, i) for i in range(13)],
    }
    together = qllm.sample(logits, **each)
    assert together.tokens.dtype == np.int64 and together.logprobs.dtype == np.float32
    order = rng.permutation(13)
    shuffled = qllm.sample(logits[order], **{k: [v[i] for i in order] for k, v in each.items()})
    for position, row in enumerate(order):
        alone = qllm.sample(logits[row], **{k: v[row] for k, v in each.items()})
        assert isinstance(alone.tokens, int)
        for field in ("tokens", "logprobs", "sampling_logprobs"):
            value = getattr(together, field)[row]
            assert getattr(alone, field) == value == getattr(shuffled, field)[position]


def test_a_shared_history_is_that_of_every_row() -> None:
    logits = np.random.default_rng(9).normal(0, 2, (4, 30)).astype(np.float32)
    shared = qllm.sample(logits, repetition_penalty=1.5, history=[3, 4, 5])
    each = qllm.sample(logits, repetition_penalty=1.5, history=[[3, 4, 5]] * 4)
    table = qllm.sample(logits, repetition_penalty=1.5, history=np.array([[3, 4, 5]] * 4))
    assert shared.logprobs.tolist() == each.logprobs.tolist() == table.logprobs.tolist()
    assert shared.tokens.tolist() == each.tokens.tolist() == table.tokens.tolist()


def test_log_probabilities_are_those_of_the_raw_and_the_processed_distribution() -> None:
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 3, (50, 400)).astype(np.float32)
    setting = {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3}
    history = rng.integers(0, 400, 50).tolist()
    found = qllm.sample(logits, seed=3, step=range(50), history=history, **setting)
    wide = logits.astype(np.float64)
    raw = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    processed = _core.distribution(logits, history=history, **setting)
    rows = np.arange(50)
    np.testing.assert_allclose(found.logprobs, raw[rows, found.tokens], rtol=1e-6)
    np.testing.assert_allclose(
        found.sampling_logprobs, np.log(processed[rows, found.tokens]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        _core.logprobs(logits, found.tokens), raw[rows, found.tokens], rtol=1e-13
    )


def test_temperature_0_is_the_first_argmax_whatever_the_other_filters() -> None:
    logits = np.array([[0, 5, 5, 1], [7, 7, 7, 7]], np.float32)
    found = qllm.sample(logits, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, seed=[1, 2])
    assert found.tokens.tolist() == [1, 0] and found.sampling_logprobs.tolist() == [0, 0]
    np.testing.assert_allclose(found.logprobs[1], -np.log(4), rtol=1e-6)
    assert _core.distribution(logits, temperature=0.0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    penalized = qllm.sample(logits[0], temperature=0.0, repetition_penalty=2.0, history=[1])
    assert penalized.tokens == 2


def test_a_tiny_temperature_is_nearly_always_greedy_and_a_huge_one_uniform() -> None:
    logits = np.random.default_rng(12).normal(0, 3, 50).astype(np.float32)
    for temperature in (5e-324, 1e-300, 1e-30, 1e-6):
        assert (draws(logits, 200, temperature=temperature) == logits.argmax()).all()
    np.testing.assert_allclose(_core.distribution(logits, temperature=1e300), 0.02, rtol=1e-6)


def test_common_noise_couples_temperatures_monotonically() -> None:
    """At one step, as the temperature rises, the logit of the winner can only fall: the winner at
    the lower temperature beats any token of smaller logit and smaller noise at both."""
    rng = np.random.default_rng(13)
    logits = rng.normal(0, 2, 200).astype(np.float32)
    ladder = np.linspace(0.05, 3.0, 60)
    for step in range(50):
        rows = np.broadcast_to(logits, (60, 200))
        tokens = qllm.sample(rows, temperature=ladder, step=step, seed=1).tokens
        assert (np.diff(logits[tokens]) <= 0).all()
        assert (np.diff(_core.gumbel(1, 0, step, tokens)) >= 0).all()


# -------------------------------------------------------------------------------------- logit_stats

FIELDS = [
    "kl", "kl_reverse", "tv", "disagreement", "entropy_ref", "entropy_test", "max_ref", "delta_p",
    "cross", "log_z_ref",
]  # fmt: skip
DIFFERENCES = ["kl", "kl_reverse", "tv", "disagreement", "delta_p"]


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    w = np.exp(z - z.max())
    return w / w.sum()


def naive_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """The double sum, term by term as published."""
    i = (p > 0) & (q > 0)
    inner = np.maximum(p[None, :] / p[i, None], q[None, :] / q[i, None]).sum(1)
    return float((1 / inner).sum())


def pairs(n: int, vocab: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ref = rng.normal(0, 3, (n, vocab)).astype(np.float32)
    return ref, (ref + rng.normal(0, noise, (n, vocab))).astype(np.float32)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_logit_stats_equal_numpy_and_scipy(noise: float) -> None:
    ref, test = pairs(5, 300, noise)
    temperatures = [0.1, 0.5, 0.8, 1.0, 1.5, 4.0]
    targets = np.argsort(ref, axis=1)[:, -2]
    found = qllm.logit_stats(ref, test, temperatures, targets)
    assert found.kl.shape == (5, 6) and found.same_top.dtype == bool
    assert found.same_top.tolist() == (ref.argmax(1) == test.argmax(1)).tolist()
    for row in range(5):
        for t, temperature in enumerate(temperatures):
            p, q = softmax(ref[row], temperature), softmax(test[row], temperature)
            expected = {
                "kl": stats.entropy(p, q),
                "kl_reverse": stats.entropy(q, p),
                "tv": 0.5 * np.abs(p - q).sum(),
                "disagreement": 1 - naive_agreement(p, q),
                "entropy_ref": stats.entropy(p),
                "entropy_test": stats.entropy(q),
                "max_ref": p.max(),
                "delta_p": q[targets[row]] - p[targets[row]],
                "cross": q @ ref[row].astype(np.float64),
                "log_z_ref": special.logsumexp(ref[row].astype(np.float64) / temperature),
            }
            for name in FIELDS:
                value = getattr(found, name)[row, t]
                assert value == pytest.approx(expected[name], rel=1e-10, abs=1e-13), name
            assert found.agreement[row, t] == pytest.approx(naive_agreement(p, q), abs=1e-13)


def test_divergences_between_any_two_temperatures_follow_from_one_pass() -> None:
    """The identity behind the effective temperature, against a direct double loop."""
    ref, test = pairs(4, 200, 0.5, seed=11)
    grid = np.array([0.2, 0.5, 0.9, 1.0, 1.7])
    found = qllm.logit_stats(ref, test, grid)
    for row in range(4):
        for t, one in enumerate(grid):
            for u, other in enumerate(grid):
                direct = stats.entropy(softmax(test[row], one), softmax(ref[row], other))
                whole = (
                    -found.entropy_test[row, t]
                    - found.cross[row, t] / other
                    + found.log_z_ref[row, u]
                )
                assert whole == pytest.approx(direct, rel=1e-9, abs=1e-12)


def test_cross_and_log_z_where_tokens_are_excluded_and_at_temperature_0() -> None:
    none = -np.inf
    ref = np.array([[2, none, 1, 0], [2, 3, none, 0], [-1, -2, none, none], [0, 0, none, -5]])
    test = np.array([[1, 3, 1, none], [1, 0, none, 4], [0, 2, none, none], [1, none, none, 2]])
    ref, test = ref.astype(np.float32), test.astype(np.float32)
    found = qllm.logit_stats(ref, test, [0.0, 0.5, 1.0])
    assert found.cross[0].tolist() == [none] * 3  # the other can draw token 1, the reference cannot
    assert found.cross[:, 0].tolist() == [none, 0, -2, -5]
    assert found.log_z_ref[:, 0].tolist() == [np.inf, np.inf, none, 0]
    for row in (1, 2, 3):
        for t, temperature in ((1, 0.5), (2, 1.0)):
            q, both = softmax(test[row], temperature), np.isfinite(ref[row])
            expected = float((q[both] * ref[row][both].astype(np.float64)).sum())
            assert found.cross[row, t] == pytest.approx(expected, rel=1e-12)
    exact = special.logsumexp(ref.astype(np.float64)[:, :, None] / [0.5, 1.0], axis=1)
    np.testing.assert_allclose(found.log_z_ref[:, 1:], exact, rtol=1e-13)


def test_equal_rows_differ_by_exactly_0_at_40_temperatures() -> None:
    ref, _ = pairs(6, 500, 0.0, seed=1)
    ref[3, 100:400] = -np.inf
    ref[4] = 1.0
    ref[5] *= 1e30
    temperatures = np.append(0.0, np.geomspace(1e-5, 100.0, 39))
    found = qllm.logit_stats(ref, ref.copy(), temperatures, np.arange(6))
    for name in DIFFERENCES:
        assert (getattr(found, name) == 0.0).all(), name
    assert (found.entropy_ref == found.entropy_test).all() and found.same_top.all()
    assert (found.agreement == 1.0).all()
    assert found.entropy_ref[4, 1:] == pytest.approx(np.log(500)) and found.max_ref[0, 0] == 1.0


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    ref = (rng.integers(-4000, 4000, (3, 400)) / 512).astype(np.float32)
    found = qllm.logit_stats(ref, ref + np.float32(16), [0.2, 1.0, 3.0])
    for name in DIFFERENCES:
        assert (getattr(found, name) == 0.0).all(), name


def test_coupled_draws_agree_as_often_as_the_formula_says() -> None:
    ref, test = (rows / 3 for rows in pairs(1, 60, 2.0, seed=3))
    n = 40_000
    for temperature in (0.5, 1.0, 2.0):
        same = draws(ref[0], n, temperature=temperature) == draws(
            test[0], n, temperature=temperature
        )
        agreement = float(qllm.logit_stats(ref[0], test[0], temperature).agreement[0])
        sigma = np.sqrt(agreement * (1 - agreement) / n)
        assert 0.2 < agreement < 0.99 and abs(same.mean() - agreement) < 3 * sigma


def test_agreement_lies_between_its_bounds() -> None:
    """(1 - TV) / (1 + TV) <= A <= 1 - TV (arXiv 2408.07978)."""
    ref, test = pairs(30, 200, 0.5, seed=4)
    found = qllm.logit_stats(ref, test, np.linspace(0.1, 3, 20))
    assert (found.agreement <= 1 - found.tv + 1e-12).all()
    assert (found.agreement >= (1 - found.tv) / (1 + found.tv) - 1e-12).all()


def test_kl_of_a_small_change_is_its_variance_over_two_temperatures_squared() -> None:
    ref, test = pairs(4, 1000, 1e-3, seed=5)
    temperatures = np.array([0.5, 1.0, 2.0, 5.0])
    found = qllm.logit_stats(ref, test, temperatures)
    delta = test.astype(np.float64) - ref
    for row in range(4):
        for t, temperature in enumerate(temperatures):
            p = softmax(ref[row], temperature)
            mean = (p * delta[row]).sum()
            variance = (p * (delta[row] - mean) ** 2).sum()
            assert found.kl[row, t] == pytest.approx(variance / (2 * temperature**2), rel=0.01)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.floats(1e-6, 5.0))
def test_permuting_the_vocabulary_leaves_the_stats(seed: int, vocab: int, noise: float) -> None:
    ref, test = pairs(1, vocab, noise, seed=seed)
    order = np.random.default_rng(seed).permutation(vocab)
    a = qllm.logit_stats(ref[0], test[0], [0.0, 0.3, 1.0, 10.0], 0)
    b = qllm.logit_stats(
        ref[0, order], test[0, order], [0.0, 0.3, 1.0, 10.0], int(np.argmin(order))
    )
    for name in FIELDS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-14)
    assert a.same_top == b.same_top


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_exchanging_the_rows_exchanges_the_stats(seed: int, vocab: int) -> None:
    """Also with ties and excluded tokens, where ratios are 0, infinite or equal."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-3, 4, (2, vocab)).astype(np.float32)
    rows[rng.random((2, vocab)) < 0.3] = -np.inf
    rows[:, 0] = 0.0
    temperatures = [0.01, 0.7, 1.0, 3.0]
    a = qllm.logit_stats(rows[0], rows[1], temperatures)
    b = qllm.logit_stats(rows[1], rows[0], temperatures)
    for mine, other in [
        ("kl", "kl_reverse"), ("tv", "tv"), ("disagreement", "disagreement"),
        ("entropy_ref", "entropy_test"),
    ]:  # fmt: skip
        np.testing.assert_allclose(getattr(a, mine), getattr(b, other), rtol=1e-9, atol=1e-13)
    for t, temperature in enumerate(temperatures):
        p, q = softmax(rows[0], temperature), softmax(rows[1], temperature)
        with np.errstate(over="ignore"):
            assert a.agreement[t] == pytest.approx(naive_agreement(p, q), abs=1e-12)
        assert np.isinf(a.kl[t]) == bool((np.isinf(rows[1]) & (p > 0)).any())


def test_temperature_0_compares_the_two_argmaxes() -> None:
    ref = np.array([[1, 3, 3], [0, 1, 2]], np.float32)
    test = np.array([[1, 2, 3], [0, 1, 2]], np.float32)
    found = qllm.logit_stats(ref, test, 0.0, [1, 2])
    assert found.kl.tolist() == [[np.inf], [0]] and found.kl_reverse.tolist() == [[np.inf], [0]]
    assert found.tv.tolist() == [[1], [0]] and found.disagreement.tolist() == [[1], [0]]
    assert found.delta_p.tolist() == [[-1], [0]] and found.same_top.tolist() == [False, True]
    assert not found.entropy_ref.any() and (found.max_ref == 1).all()


def test_extreme_temperatures_and_logits_stay_finite() -> None:
    ref, test = pairs(2, 300, 1.0, seed=6)
    test[0, ref[0].argmax()] = 40.0
    found = qllm.logit_stats(ref, test, [5e-324, 1e-300, 1e-30, 1e-3, 1e6, 1e300])
    for name in FIELDS:
        assert not np.isnan(getattr(found, name)).any(), name
    assert (found.tv <= 1).all() and (found.disagreement <= 1).all()
    assert found.tv[:, -1] == pytest.approx(0, abs=1e-12)
    far = np.array([3e38, -3e38, 0], np.float32)
    assert qllm.logit_stats(far, -far, 1.0).disagreement.tolist() == [1.0]


def test_one_row_gives_one_dimension_less() -> None:
    ref, test = pairs(2, 20, 0.5, seed=7)
    both = qllm.logit_stats(ref, test, (0.5, 1), targets=[3, -1])
    one = qllm.logit_stats(ref[0], test[0], (0.5, 1), targets=3)
    assert one.temperatures.tolist() == [0.5, 1.0] and one.kl.shape == (2,)
    for name in FIELDS:
        assert getattr(one, name).tolist() == getattr(both, name)[0].tolist()
    assert not both.delta_p[1].any() and bool(one.same_top) == bool(both.same_top[0])
