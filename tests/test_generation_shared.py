"""Generation as other programs draw: ties kept in top_k, logits rounded to bfloat16; and what rows
that draw alike share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qllm
from qllm.generation import Request
from qllm.sampling import round_logits


def test_rounded_logits_are_those_of_torch() -> None:
    import torch

    bits = np.random.default_rng(4).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, np.nan])])
    found = round_logits(values, "bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    nan = np.isnan(values)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.isnan(found[nan]).all() and round_logits(values, "float32") is values


def test_ties_and_rounded_logits_in_generation() -> None:
    """Each row is drawn as `sample` draws from its rounded logits, beside one that is not."""
    model = qllm.Model.from_pretrained("demo:llama", compute="exact")
    options = [
        {"keep_ties": True, "logits_dtype": "bfloat16"}, {"logits_dtype": "bfloat16"}, {}
    ]
    results = model.generate(
        ["Once upon a time"] * 3, top_k=5, temperature=1.2, seed=7, max_new_tokens=12,
        keep_ties=[one.get("keep_ties", False) for one in options],
        logits_dtype=[one.get("logits_dtype", "float32") for one in options],
    )  # fmt: skip
    for result, one in zip(results, options):
        ids = result.prompt_ids + result.ids
        logits = model.logits(ids[:-1])[len(result.prompt_ids) - 1 :]
        drawn = qllm.sample(
            round_logits(logits, one.get("logits_dtype", "float32")),
            top_k=5, temperature=1.2, seed=7, prompt=result.prompt_key, step=range(len(logits)),
            keep_ties=one.get("keep_ties", False),
        )  # fmt: skip
        assert drawn.tokens.tolist() == result.ids
        assert drawn.logprobs.tolist() == result.logprobs


# ------------------------------------------------------------------------------- rows that agree


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[qllm.Model, list[int]]:
    """A model, and the tokens of each of its steps."""
    model = qllm.Model.from_pretrained("demo:falcon", compute="exact")
    decoder, steps = model.decoder, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def step_draw(self, sequences: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
            steps.append(len(tokens))
            return decoder.step_draw(sequences, tokens, *rest, **options)

    monkeypatch.setattr(model, "decoder", Watched())
    return model, steps


def test_rows_that_draw_alike_are_computed_once(watched: tuple[qllm.Model, list[int]]) -> None:
    model, steps = watched
    prompt = "Once upon a time"
    results = model.generate([prompt] * 9, temperature=0.0, max_new_tokens=7, ignore_eos=True)
    assert len({tuple(result.ids) for result in results}) == 1
    assert steps[1:] == [1] * 6


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_shared_rows_are_those_of_single_ones(
    watched: tuple[qllm.Model, list[int]], batch_size: int
) -> None:
    """Many rows of one prompt, which part at different steps, end at different lengths, and have
    filters and penalties of their own."""
    model, steps = watched
    prompt = "The little dog"
    options = [
        {"temperature": t, "seed": seed, "top_k": top_k, "max_new_tokens": 6 + 5 * (seed % 3),
         "repetition_penalty": 1.0 + 0.2 * (seed == 2), "stop": ("the",) if seed == 3 else ()}
        for t in (0.1, 0.4, 1.0) for seed in (1, 2, 3) for top_k in (0, 2)
    ]  # fmt: skip
    base = qllm.GenerationConfig()
    requests = [Request(prompt, base.replace(**one)) for one in options]
    alone = [model.generate(prompt, **one) for one in options]
    assert len({result.text for result in alone}) > 5
    steps.clear()
    assert model.generate_batch(requests, batch_size=batch_size) == alone
    if batch_size == 64:
        assert sum(steps[1:]) < 0.8 * sum(len(result.ids) - 1 for result in alone)
    assert model.decoder.nbytes()["kv_cache"] == 0
