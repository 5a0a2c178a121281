"""A study whose tables were never computed: every table and column that the report reads, filled by
formulas, so that pictures and pages can be tested alone and in seconds."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from small_studies import SMALL

from qllm.study import ARMS, Design, Study
from qllm.study.claims import CLAIMS

DESIGN = Design(
    name="synthetic",
    arms=tuple(
        ARMS[name]
        for name in ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq", "nf4+head", "null-batch",
                     "control")
    ),
    temperatures=(0.0, 0.5, 0.65, 0.8, 1.0, 1.5),
    seeds=(1, 2),
    prompts=SMALL.prompts,
    lengths=(8, 16),
    texts=SMALL.texts,
    play=2,
    play_positions=3,
    speed=SMALL.speed,
)
DAMAGE = {"int8": 0.1, "nf4": 0.9, "nf4-dq": 1.0, "fp4": 1.3, "fp4-dq": 1.4, "nf4+head": 1.1,
          "control": 6.0, "null-batch": 0.0, "bf16": 0.0}
NASTY = "</script><script>alert('&')</script>\u2028\x1b<!--"
"""What a model might write to harm a page."""


def synthetic_study(folder: Path, design: Design = DESIGN) -> Study:
    """The study; its play.json stands in `folder`."""
    tables = _logit_tables(design) | _text_tables(design) | _cost_tables(design)
    tables |= _claim_tables(design)
    manifest = {
        "qllm": "0", "python": "3", "numpy": "2", "system": "Linux x86_64",
        "design_sha256": "0" * 64, "prompts_sha256": "1" * 64, "environments": {},
        "models": {model: {"files": {"config.json": "2" * 64}} for model in design.models},
    }  # fmt: skip
    if design.play:
        (folder / "play.json").write_text(json.dumps(_play(design)), encoding="ascii")
    return Study(folder, design, manifest, tables)


def _interval(value: float, width: float, **keys):
    return {**keys, "estimate": value, "low": value - width, "high": value + width, "clusters": 6}


def _cells(design, arms=None):
    return product(enumerate(design.models), arms or [arm.name for arm in design.others])


def _logit_tables(design):
    curves, summary, sensitivity, tenths, heat = [], [], [], [], []
    for (m, model), arm in _cells(design):
        keys = {"model": model, "arm": arm, "source": "all"}
        damage = 0.01 * DAMAGE[arm] * (1 + 0.4 * m)
        for temperature in design.logit_temperatures:
            at = {**keys, "temperature": temperature}
            shape = np.exp(-((temperature - 0.7) ** 2))
            for measure, factor in (("kl", 1.0), ("tv", 3.0), ("disagreement", 4.0)):
                value = damage * factor * shape
                curves.append(_interval(value, 0.2 * value, **at, measure=measure))
            heat.append(_interval(damage * (1 + temperature), 0.3 * damage, **at))
        for measure in ("kl_mean", "kl_at_1", "disagreement_at_1", "same_top", "ln_ppl_ratio",
                        "rms_delta_p_at_1"):
            value = 1 - damage if measure == "same_top" else damage
            summary.append(_interval(value, 0.1 * damage, **keys, measure=measure))
        for kind, value in (("contrast", damage), ("peak", 0.7)):
            row = _interval(value, 0.1 * damage, **keys, kind=kind, measure="disagreement")
            sensitivity.append(row)
        for tenth, temperature in product(range(10), (0.5, 0.8, 1.0)):
            value = 4 * damage * (1.05 - tenth / 10) * temperature
            row = _interval(value, 0.2 * value, model=model, arm=arm, tenth=tenth,
                            temperature=temperature, measure="disagreement")
            tenths.append({**row, "tokens": 20 + 5 * tenth**2})
    return {name: pd.DataFrame(rows) for name, rows in (
        ("curves", curves), ("summary", summary), ("sensitivity", sensitivity),
        ("tenths", tenths), ("effective_temperature", heat))}


def _text_tables(design):
    generation, survival, slopes, differences, samples, knobs = [], [], [], [], [], []
    for (m, model), arm in _cells(design, [arm.name for arm in design.arms]):
        damage = DAMAGE[arm] * (1 + 0.4 * m)
        for temperature in design.temperatures:
            keys = {"model": model, "arm": arm, "temperature": temperature}
            for measure, value in (
                ("rep_4", 0.3 / (1 + 3 * temperature) + 0.02 * damage),
                ("loop", 0.2 * np.exp(-3 * temperature)),
                ("nll_reference", 1 + temperature**2 + 0.1 * damage * temperature),
                ("distinct_2", 0.5 + 0.3 * temperature),
                ("edit_distance", min(1.0, 0.8 * temperature + 0.01 * damage)),
            ):
                generation.append(_interval(value, 0.05, **keys, measure=measure))
                if arm != design.reference.name:
                    row = _interval(0.05 * damage * (temperature - 0.4), 0.06, **keys)
                    differences.append({**row, "measure": measure})
            for prompt, seed in product(design.prompts, design.seeds):
                samples.append(_sample(design, keys, prompt, seed))
            if arm == design.reference.name:
                continue
            hazard = 0.01 * damage * (0.5 + temperature)
            for position in range(design.max_new_tokens + 1):
                value = (1 - hazard) ** position
                row = _interval(value, 0.1 * (1 - value), **keys, position=position)
                survival.append({**row, "at_risk": 6, "hazard": hazard,
                                 "expected_hazard": 0.9 * hazard if temperature else np.nan})
        for kind, measure in product(("B", "interaction", "distance"), ("nll_reference", "rep_4")):
            if kind != "interaction" or arm != design.reference.name:
                slopes.append(_interval(0.1 * damage, 0.2, model=model, arm=arm, measure=measure,
                                        kind=kind))
        knobs.append(_interval(0.1 * damage, 0.2, model=model, arm=arm, top_k=0, length=16,
                               measure="rep_4"))
    return {name: pd.DataFrame(rows) for name, rows in (
        ("generation", generation), ("survival", survival), ("slopes", slopes),
        ("differences", differences), ("samples", samples), ("knobs", knobs))}


def _sample(design, keys, prompt, seed):
    parted = DAMAGE[keys["arm"]] > 0.5 and keys["temperature"] > 0
    words = [" the", " cat", " sat", " down\n", " far"] if parted else [" the", " cat", " ran"]
    return {**keys, "prompt": prompt.id, "seed": seed, "top_k": design.top_k[0],
            "text": "".join(words), "equal": not parted, "first_divergence": 2 if parted else 3}


def _cost_tables(design):
    weights, memory, speed = [], [], []
    bits = {"bf16": 16.0, "int8": 8.01, "control": 4.01, "null-batch": 16.0}
    for (m, model), arm in _cells(design, [arm.name for arm in design.arms]):
        held, count = bits.get(arm, 4.13 if "dq" in arm else 4.5), 1_000_000 * (m + 1)
        total = int(count * held / 8)
        weights.append({"model": model, "arm": arm, "layers": 28, "weights": count,
                        "bytes": total, "bits_per_weight": held, "sqnr_db": 20.0})
        memory.append({"model": model, "arm": arm, "weights": total + 500_000, "kv": 100_000,
                       "peak_loading": 2 * total, "peak_running": total + 700_000})
        for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 8)):
            if arm in [timed.name for timed in design.timed]:
                rate = (1 + batch / 4) * 4e9 / (total + 500_000) ** 0.9
                speed.append({"model": model, "arm": arm, "phase": phase, "batch": batch,
                              "tokens_per_second": rate, "p10": 0.9 * rate, "p90": 1.1 * rate,
                              "ratio": 16 / held, "low": 15 / held, "high": 17 / held,
                              "bytes_per_token": total + 500_000,
                              "percent_of_read": 100 * rate * (total + 500_000) / 12e9})
    return {"weights": pd.DataFrame(weights), "memory": pd.DataFrame(memory),
            "speed": pd.DataFrame(speed)}


def _claim_tables(design):
    words = ("confirmed", "refuted", "inconclusive")
    claims, verdicts = [], []
    for number, (claim, model) in enumerate(product(CLAIMS, design.models)):
        value = np.nan if claim in ("C2", "C3") else 0.01 * number
        row = {"claim": claim, "model": model, "estimate": value, "low": value - 0.02,
               "high": value + 0.02, "prompts": 0 if np.isnan(value) else 6,
               "verdict": "not testable" if np.isnan(value) else words[number % 3],
               "reason": "it is so" if np.isnan(value) else f"reason {number}"}
        verdicts.append(row)
        claims.append({**row, "comparison": "nf4 / fp4", "endpoint": "ln_ppl", "margin": 0.01,
                       "p": 0.02, "p_holm": 0.04, "note": ""})
    frame = pd.DataFrame(claims)
    checks = pd.DataFrame(
        [{"model": model, "arm": "null-batch", "check": "null arm", "measure": measure,
          "largest_difference": 0.0, "exactly_zero": True, "passed": True}
         for model in design.models for measure in ("kl", "tv")]
        + [{"model": model, "arm": "control", "check": "positive control", "measure": "ln_ppl_ratio",
            "largest_difference": 0.5, "exactly_zero": False, "passed": True}
           for model in design.models])
    words = pd.DataFrame(verdicts)
    return {"claims": frame, "speed_claims": frame.iloc[:0], "verdicts": words,
            "speed_verdicts": words.iloc[:0], "checks": checks}


def _play(design):
    arms = [arm.name for arm in design.arms if arm.role != "null"]
    pieces = [" the", " a", " cat", "\n", NASTY, "$x^", "\u4e16"]
    places = []
    for position in range(design.play_positions):
        rows = {}
        for arm in arms:
            logits = np.arange(len(pieces))[::-1] * 0.7 + 0.2 * DAMAGE[arm] * np.cos(
                np.arange(len(pieces)) + position)
            logits = np.round(logits, 5)
            temperatures = np.asarray(design.logit_temperatures)
            scaled = logits[:, None] / temperatures
            log_z = np.logaddexp.reduce(np.vstack([scaled, 0 * temperatures - 1]), axis=0)
            noise = np.cos(7.0 * np.arange(len(pieces)) + position)[:, None]
            rows[arm] = {"at": list(range(len(pieces))), "logits": logits.tolist(),
                         "log_z": np.round(log_z, 5).tolist(),
                         "pick": [int(token) for token in (scaled + 3 * noise).argmax(axis=0)]}
        places.append({"position": position, "context": " and so"[: 2 * position],
                       "tokens": [[number, piece] for number, piece in enumerate(pieces)],
                       "arms": rows})
    texts = []
    for arm, prompt, temperature in product(arms, design.prompts[:2], design.temperatures):
        found = _sample(design, {"arm": arm, "temperature": temperature}, prompt, 1)
        words = found["text"].replace(" ", "| ").split("|")[1:]
        texts.append({"arm": arm, "prompt": prompt.id, "temperature": temperature, "seed": 1,
                      "ids": [len(word) + sum(map(ord, word)) for word in words],
                      "pieces": words, "nll": [0.4 * 2.0**place for place in range(len(words))]})
    prompts = [{"id": prompt.id, "text": prompt.text, "places": places}
               for prompt in design.prompts[: design.play]]
    return {"temperatures": list(design.logit_temperatures), "seed": 1, "arms": arms,
            "models": [{"name": model, "prompts": prompts, "texts": texts}
                       for model in design.models]}


