"""How a study was made and what it cannot say: sentences generated from its design, and the
versions and hashes it stands on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .claims import CLAIMS
from .lookup import label
from .markup import bullets, escape, folded, html_table
from .tables import TABLES
from .tables_html import machine
from .wording import listed

if TYPE_CHECKING:
    from .design import Arm, Design
    from .result import Study


def methods(study: Study) -> str:
    """The section: arms, logits, generation, statistics, speed, and the claims as they were
    fixed."""
    design = study.design
    items = [
        _arms(design),
        _logits(design),
        _generation(design),
        _statistics(design),
        "Verdicts: an equality is confirmed when the whole interval lies inside the margin and"
        " refuted when it lies outside; \u201cmore\u201d is confirmed when the interval lies beyond"
        " 0 (for speed, beyond the margin) and refuted when it excludes even the smallest effect"
        " that counts, the margin. Everything else is inconclusive, and what these models or this"
        " design cannot decide is not testable.",
    ]
    if design.speed is not None:
        speed = design.speed
        sizes = listed(["1", *map(str, speed.batches)])
        items.append(
            f"Speed: {speed.rounds} rounds in one process, in each every arm in turn on the same"
            f" model, another one first each time: reading {speed.prompt_tokens} tokens (prefill)"
            f" and writing {speed.decode_tokens} one by one from a single token (decode) in batches"
            f" of {sizes}, after {speed.warmups} untimed run(s)."
        )
    return f"<h2>Methods</h2>{bullets(items)}{_claims(design)}"


def _arms(design: Design) -> str:
    head = "quantized too" if design.quantize_head else "not quantized"
    return (
        "Arms: "
        + "; ".join(_arm(arm) for arm in design.arms)
        + f". The output embedding is {head} where no arm says otherwise. Compute mode"
        f" {design.compute} on device {design.device}, logits in {design.logits_dtype}."
    )


def _arm(arm: Arm) -> str:
    words = [f"format {arm.format}"]
    if arm.source != "qllm":
        words.append(f"computed by {arm.source}")
    elif arm.format.startswith(("nf4", "fp4")):
        words.append(f"blocks of {arm.blocksize}")
    if arm.codes != "own":
        words.append(f"{arm.codes} levels")
    if arm.quantize_head is not None:
        words.append(f"output embedding {'' if arm.quantize_head else 'not '}quantized")
    if arm.compute is not None:
        words.append(f"compute {arm.compute}")
    if arm.device is not None:
        words.append(f"on device {arm.device}")
    roles = {
        "reference": "the reference",
        "null": "null arm: the reference again",
        "control": "positive control: bad on purpose",
        "ceiling": "ceiling",
    }
    words += [roles[arm.role]] if arm.role in roles else []
    return f"{arm.name} ({', '.join(words)})"


def _logits(design: Design) -> str:
    sources = []
    if design.own_temperature is not None:
        sources.append(
            f"the {design.reference.name} model's own samples at temperature"
            f" {design.own_temperature:g} (after each of {len(design.prompts)} prompts,"
            f" {len(design.seeds)} seed(s); only the generated part is compared)"
        )
    if design.texts:
        sources.append(f"{len(design.texts)} passages written for this purpose")
    grid = design.logit_temperatures
    return (
        f"Logits: reference and arm read the same tokens, {' and '.join(sources)}. At"
        f" {len(grid)} temperatures from {grid[0]:g} to {grid[-1]:g}, and without sampling, the"
        " core computes KL divergence (both ways), total variation, and 1 \u2212 agreement: the"
        " probability that both, drawing with the same Gumbel noise, take different tokens, exactly"
        " 1 minus the sum over i of 1 / sum over j of max(p_j/p_i, q_j/q_i). \u0394p is the change"
        " of the probability of the token that follows in the text; ln PPL ratio is the mean change"
        " of its negative log-probability at temperature 1. The effective temperature \u03c4(T) is"
        " the temperature at which the reference is nearest (in mean KL) to the arm at T."
    )


def _generation(design: Design) -> str:
    knobs = listed(["off" if k == 0 else str(k) for k in design.top_k])
    ties = ", ties of the last place kept" if design.keep_ties else ""
    return (
        f"Generation: {len(design.prompts)} prompts, seeds {listed([*map(str, design.seeds)])},"
        f" temperatures {listed([f'{value:g}' for value in design.temperatures])},"
        f" {listed([*map(str, design.lengths)])} tokens, top_k {knobs}{ties}; the figures are of"
        " the first top_k and the longest texts, shorter ones being their beginnings. A token is"
        " drawn as the largest of logit + T \u00d7 noise, where the noise depends on seed, prompt,"
        " step and token id alone, so arms and temperatures share it; temperature 0 is greedy."
        " rep-n is 1 \u2212 different / all runs of n tokens of a text; distinct-n is different /"
        " all over the seeds of a prompt; surprise is the mean negative log-probability of a text"
        f" under {design.reference.name} at temperature 1."
    )


def _statistics(design: Design) -> str:
    return (
        "Statistics: everything is paired (same prompt, noise and temperature in all arms) and"
        " clustered by prompt: a prompt or passage counts once, and all its seeds, temperatures"
        f" and tokens move together. {100 * design.confidence:g} % intervals are BCa intervals of"
        f" {design.bootstrap_draws} bootstrap draws over prompts, widened for few prompts as"
        " Student's t is, and below ten prompts Student's. Comparisons that decide a primary claim"
        " are corrected together after Holm (timings apart), those that decide another after"
        " Benjamini and Hochberg. Differences of single cells in tables and heat map are not"
        " corrected: they are for looking, not for deciding."
    )


def _claims(design: Design) -> str:
    lines = []
    for claim, rule in design.claims.items():
        margins = ", ".join(f"{name} {margin:g}" for name, margin in rule.endpoints.items())
        primary = "yes" if rule.primary else "no"
        lines.append([claim, CLAIMS.get(claim, ""), rule.test, margins or "\u2013", primary])
    table = html_table(
        "The claims as they were fixed before anything was measured",
        ["claim", "in our words", "test", "endpoints and margins", "primary"],
        lines,
    )
    return folded("Claims, tests and margins", table)


def demonstration(design: Design) -> bool:
    """Whether a model of the study is one that comes with the package."""
    return any(model.startswith("demo:") for model in design.models)


def limits(study: Study) -> str:
    """The section of what the study cannot say."""
    design = study.design
    items = [
        "Only the abstract of the paper was available: what it calls quality, sensitivity and speed"
        " is defined here, and may be measured differently there.",
        f"{len(design.prompts)} prompts"
        + (" are few" if len(design.prompts) < 40 else "")
        + ": an effect that is small against the intervals would not be seen."
        " \u201cInconclusive\u201d means just that.",
        "No task with right and wrong answers is part of this study.",
        "Speeds hold for the kernels and the machine named here and for no others.",
    ]
    if design.max_new_tokens < 128:
        items.insert(
            2,
            f"Texts of {design.max_new_tokens} tokens are too short for long loops to show; rep-n"
            " is read with that in mind.",
        )
    if demonstration(design):
        items.insert(
            0,
            "The demo models have one to two million weights and were trained on simple"
            " stories; nothing here carries over to models of another size, and claims"
            " about Llama 2 and Falcon cannot be tested with them.",
        )
    return f"<h2>Limits</h2>{bullets(items)}"


def provenance(study: Study) -> str:
    """The section of files, versions and hashes."""
    manifest = study.manifest
    tables = "".join(
        f"<li><code>tables/{name}.csv</code>, <code>.parquet</code>: {escape(about)}</li>"
        for name, about in TABLES.items()
        if name in study.tables
    )
    hashes = html_table(
        "SHA-256 of the model files",
        ["model", "file", "SHA-256"],
        [
            [label(model), file, digest]
            for model, entry in manifest["models"].items()
            for file, digest in entry["files"].items()
        ],
    )
    return (
        "<h2>Files, versions, hashes</h2><p>Beside this page stand <code>design.json</code>"
        " (everything that was asked for, every default written out), <code>manifest.json</code>"
        " (versions, machine, hashes), <code>cells/</code> (what was computed),"
        " <code>play.json</code> (the data of the interactive figure) and <code>plots/</code> (PNG"
        f" and SVG).</p>{folded(f'{len(study.tables)} tables', f'<ul>{tables}</ul>')}"
        f"{folded('Hashes of the model files', hashes)}"
        f'<p class="soft">qllm {escape(str(manifest["qllm"]))}, Python'
        f" {escape(str(manifest['python']))}, NumPy {escape(str(manifest['numpy']))},"
        f" {escape(str(manifest['system']))}; {escape(machine(study))}."
        f" Design <code>{escape(str(manifest['design_sha256']))}</code>,"
        f" prompts <code>{escape(str(manifest['prompts_sha256']))}</code>.</p>"
    )
