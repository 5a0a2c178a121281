"""What is computed in a cell: each number against a direct computation, and the checks of the
instrument on itself."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from small_studies import SMALL, TINY

import qllm
from qllm.errors import QllmValueError
from qllm.study import ARMS, Arm, Design, Text
from qllm.study.arms import MEMORY, OwnArm, load_own, uniform_4bit
from qllm.study.cells import SPEED, Task, compare_logits, compute, keep_top_k, own_texts

MODEL = "demo:llama"
GRID = (0.25, 0.5, 1.0, 1.5)
DESIGN = replace(
    TINY,
    arms=(ARMS["bf16"], ARMS["nf4"], ARMS["control"], ARMS["null-batch"]),
    temperatures=(0.0, 0.5, 1.0),
    seeds=(1, 2),
    lengths=(4, 8),
    top_k=(0, 20),
    logit_temperatures=GRID,
    play=2,
    play_positions=3,
)


@pytest.fixture(scope="module")
def cells() -> dict[str, dict[str, Any]]:
    """The bodies of the cells of `DESIGN`."""
    plain = compute(Task(DESIGN, MODEL, "bf16"))
    own = own_texts(DESIGN, plain)
    others = {arm.name: compute(Task(DESIGN, MODEL, arm.name, own)) for arm in DESIGN.others}
    return {"bf16": plain, **others}


@pytest.fixture(scope="module")
def reference() -> OwnArm:
    return load_own(MODEL, DESIGN.reference, DESIGN)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    return special.softmax(logits.astype(np.float64) / temperature, axis=-1)


def noisy(n: int, vocab: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ref = rng.normal(0, 2, (n, vocab)).astype(np.float32)
    return ref, (ref + rng.normal(0, noise, (n, vocab))).astype(np.float32)


def stats_of(ref: np.ndarray, test: np.ndarray, design: Design = DESIGN) -> dict[str, Any]:
    targets = np.arange(len(ref)) % ref.shape[1]
    return compare_logits(design, ref, test, targets.tolist(), "noise", 1)


# ------------------------------------------------------------------------- checks of the instrument


def test_a_model_against_itself_is_exactly_0(cells: dict[str, Any]) -> None:
    for text in cells["null-batch"]["texts"]:
        for name in ("kl", "kl_reverse", "tv", "disagreement", "delta_p", "delta_p_squared"):
            assert not np.any(text["curves"][name]), name
        assert text["same_top"] == 1 and text["ln_ppl_ratio"] == 0
        assert text["curves"]["entropy_ref"] == text["curves"]["entropy_test"]
        for name in ("kl", "tv", "disagreement"):
            assert not any(any(sums) for sums in text["tenths"][name])
        assert not np.any(text["top_k"]["20"]["tv"] + text["top_k"]["20"]["disagreement"])
    assert cells["null-batch"]["generations"] == cells["bf16"]["generations"]


def test_drawn_agreement_lies_within_three_sigma_of_the_formula() -> None:
    """Two models at one place draw with the same noise, again and again."""
    n = 50_000
    ref, test = (rows / 3 for rows in noisy(2, 50, 1.5, seed=3))
    for row in range(len(ref)):
        found = stats_of(ref[row : row + 1], test[row : row + 1])["curves"]["disagreement"]
        for t, temperature in enumerate(GRID):
            sides = [
                qllm.sample(
                    np.repeat(side[row][None], n, axis=0),
                    temperature=temperature,
                    seed=5,
                    prompt=row,
                    step=range(n),
                ).tokens
                for side in (ref, test)
            ]
            sigma = math.sqrt(found[t] * (1 - found[t]) / n)
            assert abs((sides[0] != sides[1]).mean() - found[t]) < 3 * sigma
            assert 0.01 < found[t] < 0.6


def test_kl_of_small_noise_is_its_variance_over_two_temperatures_squared() -> None:
    ref, test = noisy(40, 400, 0.02, seed=5)
    found = stats_of(ref, test)["curves"]["kl"]
    delta = test.astype(np.float64) - ref
    for t, temperature in enumerate(GRID):
        p = softmax(ref, temperature)
        mean = (p * delta).sum(axis=1)
        variance = (p * (delta - mean[:, None]) ** 2).sum(axis=1)
        expected = variance.mean() / (2 * temperature**2)
        assert found[t] == pytest.approx(expected, rel=0.05)


def test_the_effective_temperature_follows_from_the_curves() -> None:
    """mean KL(q at T || p at T') for every pair, against a double loop over tokens."""
    ref, test = noisy(12, 60, 0.5, seed=6)
    curves = stats_of(ref, (test * np.float32(1.25)).astype(np.float32))["curves"]
    test = (test * np.float32(1.25)).astype(np.float32)
    whole = np.empty((len(GRID), len(GRID)))
    for t, one in enumerate(GRID):
        for u, other in enumerate(GRID):
            direct = stats.entropy(softmax(test, one), softmax(ref, other), axis=1).mean()
            found = -curves["entropy_test"][t] - curves["cross"][t] / other + curves["log_z"][u]
            assert found == pytest.approx(direct, rel=1e-9)
            whole[t, u] = found
    assert (whole.argmin(axis=1) <= np.arange(len(GRID))).all()  # sharper logits act as if colder


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_perplexity(model: str, folder: Path, text: str) -> None:
    """NLL and KL of a cell's text are those of a plain loop over torch's float32 logits."""
    design = replace(
        DESIGN,
        models=(model,),
        arms=(ARMS["bf16"], Arm("f32", "f32", role="ceiling")),
        texts=(Text("one", "story", text),),
        prompts=("Once",),
        own_temperature=None,
        play=0,
    )
    found = compute(Task(design, model, "f32"))["texts"][0]
    loaded = load_own(model, design.arm("f32"), design)
    ids = loaded.model.encode(text)
    logits = torch_logits(folder, ids[:-1]).astype(np.float64)
    total = 0.0
    for row, token in zip(logits, ids[1:]):
        total -= row[token] - special.logsumexp(row)
    expected = math.exp(total / (len(ids) - 1))
    assert math.exp(found["nll"]) == pytest.approx(expected, rel=1e-6)
    plain = load_own(model, design.reference, design).logits(ids[:-1])
    own = loaded.logits(ids[:-1])
    for t, temperature in enumerate(GRID):
        kl = stats.entropy(softmax(plain, temperature), softmax(own, temperature), axis=1).mean()
        assert found["curves"]["kl"][t] == pytest.approx(kl, rel=1e-6, abs=1e-15)


def test_perplexity_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="its model is the oracle")
    folder = Path(qllm.__file__).parent / "demo" / "llama"
    assert_perplexity(MODEL, folder, SMALL.texts[0].text)


def test_perplexity_of_stories260k(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    data = Path(os.environ.get("QLLM_DATA", root.parent / "shared" / "data")) / "stories260K"
    if not (data / "stories260K.bin").exists() or not (root / "scripts").is_dir():
        pytest.skip(f"needs stories260K, which is neither in QLLM_DATA nor in {data}")
    pytest.importorskip("transformers", reason="its model is the oracle")
    sys.path.insert(0, str(root / "scripts"))
    try:
        from convert_llama2c import convert
    finally:
        sys.path.pop(0)
    folder = tmp_path / "stories260K"
    convert(data / "stories260K.bin", data / "tok512.bin", folder)
    assert_perplexity(str(folder), folder, SMALL.texts[1].text)


# --------------------------------------------------------------------------------------- texts


def test_curves_are_means_over_the_tokens() -> None:
    ref, test = noisy(9, 40, 0.7, seed=8)
    found = stats_of(ref, test)
    targets = np.arange(9)
    for t, temperature in enumerate(GRID):
        p, q = softmax(ref, temperature), softmax(test, temperature)
        expected = {
            "kl": stats.entropy(p, q, axis=1),
            "kl_reverse": stats.entropy(q, p, axis=1),
            "tv": np.abs(p - q).sum(axis=1) / 2,
            "entropy_ref": stats.entropy(p, axis=1),
            "entropy_test": stats.entropy(q, axis=1),
            "max_ref": p.max(axis=1),
            "delta_p": (q - p)[np.arange(9), targets],
            "delta_p_squared": (q - p)[np.arange(9), targets] ** 2,
            "cross": (q * ref).sum(axis=1),
            "log_z": special.logsumexp(ref.astype(np.float64) / temperature, axis=1),
        }
        for name, values in expected.items():
            assert found["curves"][name][t] == pytest.approx(values.mean(), rel=1e-9), name
    assert set(found["curves"]) == {*expected, "disagreement"}
    rows = np.arange(9)
    for name, side in (("nll_reference", ref), ("nll", test)):
        logs = special.log_softmax(side.astype(np.float64), axis=1)
        assert found[name] == pytest.approx(-logs[rows, targets].mean(), rel=1e-12)
    assert found["ln_ppl_ratio"] == found["nll"] - found["nll_reference"]
    assert found["same_top"] == (ref.argmax(axis=1) == test.argmax(axis=1)).mean()


@pytest.mark.parametrize("grid", [GRID, (0.5, 2.0)])
def test_tenths_are_sums_by_confidence(grid: tuple[float, ...]) -> None:
    """The reference's confidence is that at temperature 1, whether or not the grid has it."""
    ref, test = noisy(60, 30, 0.5, seed=9)
    ref[:3] *= np.float32(30)  # certain
    test[:3] = ref[:3]
    found = stats_of(ref, test, replace(DESIGN, logit_temperatures=grid))["tenths"]
    confidence = softmax(ref, 1.0).max(axis=1)
    group = np.minimum((confidence * 10).astype(int), 9)
    assert found["count"] == np.bincount(group, minlength=10).tolist()
    assert sum(found["count"]) == 60 and found["count"][9] >= 3 and 0 in found["count"]
    for t, temperature in enumerate(grid):
        p, q = softmax(ref, temperature), softmax(test, temperature)
        values = {"kl": stats.entropy(p, q, axis=1), "tv": np.abs(p - q).sum(axis=1) / 2}
        for name, each in values.items():
            for tenth in range(10):
                sums = found[name][tenth]
                if not found["count"][tenth]:
                    assert sums == []
                    continue
                assert sums[t] == pytest.approx(each[group == tenth].sum(), rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 45), st.booleans())
def test_a_cut_keeps_what_the_sampler_keeps(seed: int, vocab: int, top_k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-6, 6, (3, vocab)) / 2).astype(np.float32)
    found = keep_top_k(logits, top_k, ties)
    wanted = qllm._core.distribution(logits, top_k=top_k, keep_ties=ties) > 0
    np.testing.assert_array_equal(np.isfinite(found), wanted)
    np.testing.assert_array_equal(found[wanted], logits[wanted])


def test_statistics_after_top_k() -> None:
    ref, test = noisy(7, 50, 0.8, seed=10)
    found = stats_of(ref, test, replace(DESIGN, top_k=(0, 5, 20)))["top_k"]
    assert set(found) == {"5", "20"}
    for top_k, curves in found.items():
        assert set(curves) == {"tv", "disagreement"}
        for t, temperature in enumerate(GRID):
            sides = []
            for side in (ref, test):
                p = softmax(side, temperature)
                p[side < np.sort(side, axis=1)[:, -int(top_k), None]] = 0
                sides.append(p / p.sum(axis=1, keepdims=True))
            tv = np.abs(sides[0] - sides[1]).sum(axis=1) / 2
            assert curves["tv"][t] == pytest.approx(tv.mean(), rel=1e-9)
            assert tv.mean() <= curves["disagreement"][t] <= 1


def test_the_cell_reads_own_samples_and_passages(cells: dict[str, Any], reference: OwnArm) -> None:
    texts = cells["nf4"]["texts"]
    assert [text["source"] for text in texts] == ["own"] * 4 + ["held"]
    other = load_own(MODEL, DESIGN.arm("nf4"), DESIGN)
    ids = reference.model.encode(DESIGN.texts[0].text)
    sides = [side.logits(ids[:-1]) for side in (reference, other)]
    assert texts[-1]["curves"] == compare_logits(DESIGN, *sides, ids[1:], "x", 1)["curves"]
    assert texts[-1]["tokens"] == len(ids) - 1
    for text in texts:
        assert 0 < text["curves"]["tv"][2] < 1 and text["nll"] != text["nll_reference"]


# ---------------------------------------------------------------------------------- generations


def test_generations_are_those_of_single_calls(cells: dict[str, Any], reference: OwnArm) -> None:
    rows = cells["bf16"]["generations"]
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows[::5]:
        prompt = next(text for text in DESIGN.prompts if text.id == row["prompt"])
        alone = reference.model.generate(
            prompt.text,
            temperature=row["temperature"],
            top_k=row["top_k"],
            seed=row["seed"],
            max_new_tokens=8,
        )
        assert (row["ids"], row["text"]) == (alone.ids, alone.text)
        assert row["prompt_ids"] == alone.prompt_ids and row["finish"] == alone.finish_reason


def test_greedy_texts_stand_for_all_seeds_and_top_k(cells: dict[str, Any]) -> None:
    for cell in cells.values():
        for prompt in DESIGN.prompts:
            rows = [
                row for row in cell["generations"]
                if row["temperature"] == 0 and row["prompt"] == prompt.id
            ]  # fmt: skip
            assert len(rows) == 4 and len({(row["seed"], row["top_k"]) for row in rows}) == 4
            assert len({tuple(row["ids"]) for row in rows}) == 1


def test_surprise_of_every_token(cells: dict[str, Any], reference: OwnArm) -> None:
    for row in cells["nf4"]["generations"] + cells["control"]["generations"]:
        scores = reference.model.score(row["prompt_ids"] + row["ids"]).logprobs
        wanted = -scores[len(row["prompt_ids"]) - 1 :]
        assert row["token_nll"] == [round(float(value), 6) for value in wanted]
        assert row["nll_reference"] == pytest.approx(wanted.mean(), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(3, 6), min_size=0, max_size=7), min_size=1, max_size=12))
def test_texts_that_begin_alike_are_scored_as_each_alone(
    reference: OwnArm, ends: list[list[int]]
) -> None:
    texts = [([5, 6] if len(end) % 2 else [5], end) for end in ends]
    found = reference.score_all(texts)
    for (prompt, end), scores in zip(texts, found):
        whole = [*prompt, *end]
        alone = reference.logprobs(whole, len(prompt)).tolist() if end else []
        assert scores == alone


def test_rounded_logits_and_ties_reach_everything() -> None:
    """The settings of the profile `paper`."""
    design = replace(
        DESIGN, arms=("bf16", "fp4"), top_k=(3,), keep_ties=True, logits_dtype="bfloat16",
        quantize_head=True, temperatures=(1.0,), play=1,
    )  # fmt: skip
    body = compute(Task(design, MODEL, "fp4"))
    model = qllm.Model.from_pretrained(MODEL, compute="exact")
    model.quantize_("fp4", quantize_head=True)
    row = body["generations"][-1]
    prompt = next(text for text in design.prompts if text.id == row["prompt"])
    alone = model.generate(
        prompt.text, top_k=3, keep_ties=True, logits_dtype="bfloat16", temperature=1.0,
        seed=row["seed"], max_new_tokens=8,
    )  # fmt: skip
    assert row["ids"] == alone.ids
    logits = body["play"][0]["logits"]
    bits = np.float32(logits).view(np.uint32)
    assert len(logits) > 10 and sum(float(x) == round(float(x), 5) for x in logits) == len(logits)
    exact = [b for b, x in zip(bits, logits) if abs(x) >= 0.01]  # 5 decimals hold these
    whole = qllm.sampling.round_logits(np.float32(logits), "bfloat16")
    np.testing.assert_allclose(np.float32(logits), whole, atol=6e-6)
    assert exact
    head = next(row for row in body["weights"] if row["module"] == "lm_head")
    assert head["format"] == "fp4"


# ------------------------------------------------------------------------------------------ play


def test_play_shows_what_the_sampler_draws(cells: dict[str, Any], reference: OwnArm) -> None:
    other = load_own(MODEL, DESIGN.arm("nf4"), DESIGN)
    plain = {(row["prompt"], row["position"]): row for row in cells["bf16"]["play"]}
    assert len(cells["nf4"]["play"]) == len(plain) == 2 * 3
    for row in cells["nf4"]["play"]:
        prompt = next(text for text in DESIGN.prompts if text.id == row["prompt"])
        greedy = reference.model.generate(prompt.text, temperature=0.0, max_new_tokens=8)
        ids = greedy.prompt_ids + greedy.ids[: row["position"]]
        assert row["context"] == prompt.text + reference.model.tokenizer.continuation(
            greedy.prompt_ids, greedy.ids[: row["position"]]
        )
        logits = other.logits(ids)[-1]
        assert row["logits"] == [round(float(logits[token]), 5) for token in row["ids"]]
        assert row["ids"] == sorted(set(row["ids"])) and len(row["pieces"]) == len(row["ids"])
        top = np.argsort(-logits, kind="stable")[:24]
        assert set(top.tolist()) | set(row["pick"]) <= set(row["ids"])
        shared = plain[row["prompt"], row["position"]]["ids"]
        assert len(set(shared) & set(row["ids"])) >= 24
        for t, temperature in enumerate(GRID):
            drawn = qllm.sample(
                logits, temperature=temperature, seed=1, prompt=greedy.prompt_key,
                step=row["position"],
            )  # fmt: skip
            assert row["pick"][t] == drawn.tokens
            z = special.logsumexp(logits.astype(np.float64) / temperature)
            assert row["log_z"][t] == pytest.approx(z, abs=1e-6)


def test_play_can_be_left_out() -> None:
    assert compute(Task(replace(DESIGN, play=0), MODEL, "bf16"))["play"] == []


# ---------------------------------------------------------------------------------- arms, weights


@pytest.mark.parametrize("shape", [(3, 5), (8, 4096), (7, 1000), (2, 2)])
def test_uniform_codes_are_the_nearest_of_sixteen_levels(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.02, shape).astype(np.float32)
    weight[0, 0] = 0.5
    weight[-1] = 0
    tensor = uniform_4bit(weight, 4096)
    assert tensor.shape == shape and tensor.bits_per_weight < 4.1 or weight.size < 4096
    flat, levels = weight.reshape(-1), np.linspace(-1, 1, 16)
    for start in range(0, flat.size, 4096):
        block = flat[start : start + 4096].astype(np.float64)
        largest = np.abs(block).max() or 1.0
        choices = levels[None] * largest
        nearest = np.abs(block[:, None] - choices).min(axis=1)
        found = tensor.dequantize().reshape(-1)[start : start + 4096].astype(np.float64)
        if np.abs(block).max() > 0:
            np.testing.assert_allclose(np.abs(found - block), nearest, atol=1e-7 * largest)


def test_the_control_is_worse_than_any_format(cells: dict[str, Any]) -> None:
    weights = {name: cell["weights"] for name, cell in cells.items()}
    swapped = [row for row in weights["control"] if row["module"] != "lm_head"]
    assert {row["format"] for row in swapped} == {"uniform"}
    other = {row["module"]: row for row in weights["nf4"]}
    for row in swapped:
        assert row["sqnr_db"] < other[row["module"]]["sqnr_db"] - 3
        assert row["bits_per_weight"] < 4.1
    kl = {name: np.mean([text["curves"]["kl"] for text in cells[name]["texts"]])
          for name in ("nf4", "control")}  # fmt: skip
    assert kl["control"] > 1.25 * kl["nf4"]


def test_the_head_is_a_factor() -> None:
    arm = load_own(MODEL, ARMS["nf4+head"], DESIGN)
    head = next(row for row in arm.layers() if row["module"] == "lm_head")
    assert head["format"] == "nf4" and {row["format"] for row in arm.layers()} == {"nf4"}
    plain = load_own(MODEL, ARMS["nf4"], replace(DESIGN, quantize_head=True))
    assert plain.layers() == arm.layers()
    ids = arm.model.encode("Once upon a time")
    np.testing.assert_array_equal(arm.logits(ids), plain.logits(ids))


def test_an_arm_has_its_own_compute_and_path(tmp_path: Path) -> None:
    ceiling = load_own(MODEL, ARMS["ceiling"], replace(DESIGN, compute="auto"))
    assert ceiling.environment()["compute"] == "exact"
    folder = tmp_path / "other"
    qllm.Model.from_pretrained("demo:falcon").save(folder)
    arm = Arm("other", "bf16", path=str(folder))
    assert load_own(MODEL, arm, DESIGN).model.architecture.model_type == "falcon"


def test_memory_is_counted(cells: dict[str, Any]) -> None:
    for name, cell in cells.items():
        memory = cell["memory"]
        assert tuple(memory) == MEMORY and all(value > 0 for value in memory.values())
        assert memory["peak_running"] == memory["weights"] + memory["kv"]
        assert memory["peak_loading"] > memory["weights"] > sum(
            row["bytes"] for row in cell["weights"]
        ), name
    assert cells["nf4"]["memory"]["weights"] < 0.6 * cells["bf16"]["memory"]["weights"]
    longest = max(len(row["prompt_ids"]) for row in cells["bf16"]["generations"]) + 8
    info = qllm.Model.from_pretrained(MODEL)
    config = info.architecture.decoder
    each = config["layers"] * config["kv_heads"] * config["head_dim"] * 2 * 4
    rounded = -(-longest // 16) * 16
    assert cells["bf16"]["memory"]["kv"] == each * rounded


# ----------------------------------------------------------------------------- arms from elsewhere


class Elsewhere:
    """Another model with the members of `LogitsModel` alone."""

    name = "elsewhere"

    def __init__(self, scale: float = 1.0, cut: int = 0) -> None:
        self.inner = qllm.Model.from_pretrained(MODEL, "bf16", compute="exact")
        self.vocab = self.inner.architecture.decoder["vocab"] - cut
        self.scale = scale
        self.calls = 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.calls += 1
        return np.asarray(self.inner.logits(list(ids)) * np.float32(self.scale))[:, : self.vocab]


def foreign(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    """Makes the adapters give `made`."""
    module = types.ModuleType("qllm.study.foreign")
    module.load = lambda arm, name, design: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qllm.study.foreign", module)


FOREIGN = replace(
    DESIGN, arms=("bf16", Arm("there", "bf16", source="transformers")), lengths=(3, 6)
)


def test_the_same_model_from_elsewhere_is_a_null_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Elsewhere()
    foreign(monkeypatch, made)
    plain = compute(Task(FOREIGN, MODEL, "bf16"))
    found = compute(Task(FOREIGN, MODEL, "there", own_texts(FOREIGN, plain)))
    assert found["generations"] == plain["generations"] and found["play"] == plain["play"]
    for text in found["texts"]:
        assert not np.any(text["curves"]["kl"]) and text["ln_ppl_ratio"] == 0
    assert found["weights"] == [] and set(found["memory"].values()) == {None}
    assert found["environment"]["compute"] == "elsewhere"
    json.dumps(found, allow_nan=False)
    tokens = sum(len(row["ids"]) for row in found["generations"])
    assert made.calls < 0.7 * tokens  # texts that begin alike share their logits


def test_another_model_from_elsewhere_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(monkeypatch, Elsewhere(scale=0.5))
    plain = compute(Task(FOREIGN, MODEL, "bf16"))
    found = compute(Task(FOREIGN, MODEL, "there", own_texts(FOREIGN, plain)))
    assert all(text["curves"]["kl"][2] > 0 and text["same_top"] == 1 for text in found["texts"])
    greedy = [
        [row["ids"] for row in cell["generations"] if row["temperature"] == 0]
        for cell in (plain, found)
    ]
    assert greedy[0] == greedy[1]
    hot = [
        [row["ids"] for row in cell["generations"] if row["temperature"] == at]
        for cell, at in ((plain, 1.0), (found, 0.5))
    ]
    assert hot[0] == hot[1]  # half the logits at half the temperature, with the same noise


def test_what_a_model_from_elsewhere_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(monkeypatch, Elsewhere(cut=1))
    with pytest.raises(QllmValueError, match="elsewhere knows 1023 tokens and the reference 1024"):
        compute(Task(FOREIGN, MODEL, "there"))
    bad = Elsewhere()
    monkeypatch.setattr(bad, "logits", lambda ids: np.zeros((1, 4), np.float32))
    foreign(monkeypatch, bad)
    with pytest.raises(QllmValueError, match=r"gave logits of the shape \(1, 4\)"):
        compute(Task(FOREIGN, MODEL, "there"))


# ----------------------------------------------------------------------------------------- speed


def test_speed_times_every_arm_and_batch() -> None:
    arms = ("bf16", "nf4", "control", "null-batch", Arm("fast", "nf4", compute="auto"))
    design = replace(SMALL, arms=arms, speed={"rounds": 2, "warmups": 0, "prompt_tokens": 4,
                                              "decode_tokens": 2, "batches": [2, 3]})  # fmt: skip
    body = compute(Task(design, MODEL, SPEED))
    names = ["bf16", "nf4", "fast"]  # neither null arms nor the control
    assert [row["arm"] for row in body["rounds"]] == names * 2
    for row in body["rounds"]:
        assert set(row["batch_seconds"]) == {"2", "3"}
        seconds = [row["prefill_seconds"], row["decode_seconds"], *row["batch_seconds"].values()]
        assert all(value > 0 for value in seconds)
    sizes = body["bytes_per_token"]
    assert sizes["nf4"] == sizes["fast"] < sizes["bf16"] and body["read_bandwidth"] > 1e8
    assert body["environment"]["threads"] == 1
