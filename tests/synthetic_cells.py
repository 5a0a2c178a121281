"""Cells that were never computed, with effects of known size planted in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from qllm.study import ARMS, Arm, Design, Speed, Text
from qllm.study.cells import SPEED

DESIGN = Design(
    name="planted",
    models=("demo:llama",),
    arms=tuple(ARMS[name] for name in ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq",
                                       "null-batch", "control")),
    temperatures=(0.0, 0.25, 0.5, 0.65, 0.8, 1.0),
    top_k=(0, 50),
    seeds=(1, 2),
    prompts=tuple(Text(f"p{i}", "story", f"prompt {i}") for i in range(16)),
    lengths=(8, 24),
    texts=tuple(Text(f"t{i}", "story", f"text {i}") for i in range(6)),
    logit_temperatures=(0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.3),
    speed=Speed(rounds=12, batches=(4,)),
    bootstrap_draws=500,
)  # fmt: skip

Effect = Callable[[Arm, float], float]


def nothing(arm: Arm, temperature: float) -> float:
    """The effect of an arm that is like the reference."""
    return 0.0


@dataclass(frozen=True)
class Planted:
    """What arms that are neither reference nor null have more than the reference, by arm and
    temperature: disagreement (before it is scattered), NLL, share of looping texts, ln perplexity;
    the factor of their logits; and their speed (tokens per second, alone)."""

    disagreement: Effect = lambda arm, temperature: 0.05
    nll: Effect = nothing
    loops: Effect = nothing
    ppl: Effect = nothing
    scale: float = 1.0
    speed: Effect = lambda arm, temperature: 100.0
    scatter: float = 0.02
    architecture: str = "llama"


def cells(design: Design = DESIGN, planted: Planted | None = None, seed: int = 0):
    """Bodies of all cells."""
    planted = planted or Planted()
    found = {}
    for number, model in enumerate(design.models):
        plain = _generations(design, planted, design.reference, None, seed + number)
        for arm in design.arms:
            rows = plain
            if arm.role not in ("reference", "null"):
                rows = _generations(design, planted, arm, plain, seed + number)
            found[model, arm.name] = {
                "generations": rows,
                "texts": [] if arm.role == "reference" else _texts(design, planted, arm, plain,
                                                                   seed),
                "weights": [_layer(arm)],
                "memory": {"weights": 1000, "kv": 10, "peak_loading": 2000, "peak_running": None},
                "environment": {"architecture": planted.architecture,
                                "kernels": {arm.format: [f"{arm.format} fast", "plain"]}},
            }  # fmt: skip
        if design.speed is not None:
            found[model, SPEED] = _speed(design, planted, seed)
    return found


def _rng(*parts):
    return np.random.default_rng([sum(map(ord, part)) if isinstance(part, str) else part
                                  for part in parts])  # fmt: skip


def _generations(design, planted, arm, plain, seed):
    rows, length = [], design.max_new_tokens
    for temperature in design.temperatures:
        for top_k in design.top_k:
            for number in design.seeds:
                for place, prompt in enumerate(design.prompts):
                    same = () if temperature == 0 else (number, top_k)
                    own = _rng(seed, int(1000 * temperature), place, *same)
                    ids = own.integers(2, 400, length)
                    level = own.normal(0, 0.3) + own.normal(0, planted.scatter)
                    mine = _rng(seed, arm.name, int(1000 * temperature), place, *same)
                    extra = loops = 0.0
                    if plain is not None:
                        step = min(length, int(mine.geometric(0.05)) - 1)
                        ids[step:] = mine.integers(2, 400, length - step)
                        extra = planted.nll(arm, temperature) + mine.normal(0, planted.scatter)
                        loops = planted.loops(arm, temperature)
                    if mine.random() < loops:
                        ids[-9:] = [5, 6, 7] * 3
                    nll = np.full(length, 1 + temperature + level + extra)
                    ended = place % 5 == 4
                    cut = length - 6 if ended else length
                    rows.append({
                        "temperature": temperature, "top_k": top_k, "seed": number,
                        "prompt": prompt.id, "prompt_ids": [1], "ids": ids[:cut].tolist(),
                        "text": "It ran. It ran. " + "x" * place,
                        "finish": "eos" if ended else "length",
                        "token_nll": nll[:cut].tolist(),
                        "nll_reference": float(nll[:cut].mean()),
                    })  # fmt: skip
    return rows


def _texts(design, planted, arm, plain, seed):
    grid = np.asarray(design.logit_temperatures)
    texts = [
        ("own", row["prompt"], row["seed"])
        for row in plain
        if row["temperature"] == design.own_temperature and row["top_k"] == design.top_k[0]
    ] + [("held", text.id, None) for text in design.texts]
    return [_text(design, planted, arm, grid, *text, seed) for text in texts]


def _text(design, planted, arm, grid, source, name, number, seed):
    rng = _rng(seed, source, name, number or 0)
    tokens = int(rng.integers(10, 30))
    reference = rng.normal(0, 3, (4, 30))
    level, ppl, scale = 0.0, 0.0, 1.0
    values = np.zeros(len(grid))
    if arm.role != "null":
        own = _rng(seed, arm.name, source, name, number or 0)
        level = 4.0 if arm.role == "control" else 1.0
        values = np.array([planted.disagreement(arm, value) for value in grid])
        values = level * (values + own.normal(0, 0.002) + own.normal(0, 0.0005, len(grid)))
        ppl = planted.ppl(arm, 1.0) + level * own.normal(0.0, 0.003) + 0.1 * (level > 1)
        scale = planted.scale
    curves = _logits(reference, scale * reference, grid)
    for measure, factor in (("kl", 0.5), ("kl_reverse", 0.5), ("tv", 0.8), ("disagreement", 1.0),
                            ("delta_p", 0.1), ("delta_p_squared", 0.01)):
        curves[measure] = (factor * values).tolist()
    counts = rng.multinomial(tokens, np.arange(10) / 45).tolist()
    return {
        "source": source, "id": name, "kind": "story", "seed": number, "tokens": tokens,
        "same_top": 1 - abs(float(values[0])), "nll_reference": 1.0, "nll": 1.0 + ppl,
        "ln_ppl_ratio": ppl, "curves": curves,
        "tenths": {"count": counts, **{
            measure: [(count * values).tolist() if count else [] for count in counts]
            for measure in ("kl", "tv", "disagreement")}},
        "top_k": {str(k): {"tv": values.tolist(), "disagreement": values.tolist()}
                  for k in design.top_k if k},
    }  # fmt: skip


def _logits(reference, arm, grid):
    ref, test = (side / grid[:, None, None] for side in (reference, arm))
    p, q = special.softmax(ref, axis=-1), special.softmax(test, axis=-1)
    log_z = special.logsumexp(ref, axis=-1)
    found = {
        "cross": (q * reference).sum(axis=-1),
        "log_z": log_z,
        "entropy_ref": log_z - (p * ref).sum(axis=-1),
        "entropy_test": special.logsumexp(test, axis=-1) - (q * test).sum(axis=-1),
        "max_ref": p.max(axis=-1),
    }
    return {name: values.mean(axis=1).tolist() for name, values in found.items()}


def _layer(arm):
    bits = {"bf16": 16, "int8": 8}.get(arm.format, 4)
    return {"module": "layer", "format": arm.format, "shape": [8, 8], "bytes": 8 * bits,
            "bits_per_weight": float(bits), "rmse": 0.1 * (bits < 16),
            "sqnr_db": 20.0 if bits < 16 else None}  # fmt: skip


def _speed(design, planted, seed):
    rng, rows = _rng(seed, "speed"), []
    for turn in range(design.speed.rounds):
        noise = rng.normal(1, 0.1)
        for arm in design.timed:
            second = design.speed.decode_tokens / planted.speed(arm, 0.0)
            second *= noise * rng.normal(1, 0.01)
            rows.append({"arm": arm.name, "round": turn, "prefill_seconds": second / 4,
                         "decode_seconds": second,
                         "batch_seconds": {str(size): 2 * second for size in
                                           design.speed.batches}})  # fmt: skip
    return {
        "rounds": rows,
        "bytes_per_token": {arm.name: _layer(arm)["bytes"] for arm in design.timed},
        "read_bandwidth": 1e6,
        "environment": {"cpu": "a processor", "isa": "avx2", "threads": 1},
    }  # fmt: skip
