"""The report: one HTML file that a reader understands without the paper, with nothing to load.

All numbers and captions are computed from the tables, the methods from the design; every text that
comes from a model, a prompt or a name is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_html
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from . import captions
from .captions import interval, number, one, rows
from .claims import CLAIMS, SPEED_CLAIMS, overall, verdicts
from .files import write_text
from .measures import divergent_word
from .plots import label, survival_temperatures, write_plots
from .tables import TABLES

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

_CONTROLS = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def escape(text: str, quote: bool = True) -> str:
    """`text` as HTML; control characters, which a model may write, become replacement marks."""
    return escape_html(text.translate(_CONTROLS), quote)


HEADINGS = {
    "divergence": "Where an arm departs from the original",
    "survival": "How soon texts part",
    "generation": "What becomes of the texts",
    "cost": "Memory and speed",
}
SHOWN_PROMPTS = 2
"""Prompts whose texts are shown side by side, for every model and temperature chosen."""


def write_report(study: Study) -> None:
    """Draws the pictures into `plots/` and writes `report.html`."""
    vectors = write_plots(study, study.folder / "plots")
    write_text(study.report, report_html(study, vectors))


def report_html(study: Study, vectors: Mapping[str, bytes]) -> str:
    """The whole page; `vectors` are the pictures as SVG by name."""
    style = files(__package__).joinpath("report.css").read_text("utf-8")
    title = f"Quantization and temperature: {', '.join(map(label, study.design.models))}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _question(study),
        "<h2>Short answer</h2>",
        *(f"<p>{escape(sentence)}</p>" for sentence in captions.short_answer(study)),
        _null_line(study),
        verdict_table(study),
        *(_figure(study, name, vectors[name]) for name in HEADINGS if name in vectors),
        _side_by_side(study),
        _tables(study),
        _methods(study),
        _limits(study),
        _files(study),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _question(study: Study) -> str:
    design = study.design
    arms = ", ".join(arm.name for arm in design.arms if arm.role == "arm")
    return (
        '<p class="lede">A language model gives, for every next token, a probability; temperature'
        " sharpens (below 1) or flattens (above 1) these before one is drawn. Quantization stores"
        f" the weights in fewer bits. This study asks what the formats {escape(arms)} change at"
        f" each temperature, compared with the weights in {escape(design.reference.name)}, and"
        " whether what the abstract of arXiv 2309.05210 says about it holds here.</p>"
        + (
            '<p class="soft">The demo models are tiny, so this is a demonstration of the method:'
            " what it finds holds for them and for no other model.</p>"
            if _demo(study)
            else ""
        )
    )


def _demo(study: Study) -> bool:
    return any(model.startswith("demo:") for model in study.design.models)


def verdict_table(study: Study) -> str:
    """Claims by models, as an HTML table: a verdict and the numbers it rests on."""
    claims, design = study.claims, study.design
    words = verdicts(design, claims)
    head = "".join(f"<th>{escape(label(model))}</th>" for model in design.models)
    lines = []
    for claim, sentence in CLAIMS.items():
        part, found = rows(claims, claim=claim), rows(words, claim=claim)
        if set(found["verdict"]) == {"not tested"} and part["note"].nunique() == 1:
            cells = (
                f'<td colspan="{len(design.models)}">{_badge("not tested")}'
                f'<span class="small">: {escape(part["note"].iloc[0])}</span></td>'
            )
        else:
            cells = "".join(
                f"<td>{_badge(one(found, model=model)['verdict'])}<br>"
                f'<span class="small">{escape(_evidence(rows(part, model=model)))}</span></td>'
                for model in design.models
            )
        lines.append(f"<tr><th>{claim}</th><td>{escape(sentence)}</td>{cells}</tr>")
    return (
        '<div class="scroll"><table class="claims"><caption>What this study says about the claims'
        f"</caption><thead><tr><th></th><th>claim</th>{head}</tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table></div>"
    )


def _badge(word: str) -> str:
    kind = "untested" if word == "not tested" else word
    return f'<span class="verdict {kind}">{escape(word)}</span>'


def _evidence(part: DataFrame) -> str:
    """The numbers behind a verdict in a few words: those of its first row, or words per arm."""
    first = part.iloc[0]
    if first["verdict"] == "not tested":
        return str(first["note"])
    if first["claim"] == "C4":
        notes = dict.fromkeys(part["note"])
        return "; ".join(note.removeprefix("for ").replace(" together", "") for note in notes)
    if first["claim"] in SPEED_CLAIMS:
        part = part[part["endpoint"].str.contains("decode")]
    endpoints = []
    for endpoint, group in part.groupby("endpoint", sort=False):
        numbers = "; ".join(
            f"{row['comparison']} {number(row['estimate'])} {interval(row)}".rstrip()
            for _, row in group.iterrows()
        )
        endpoints.append((endpoint, overall(list(group["verdict"])), numbers))
    if len(endpoints) == 1:
        return f"{endpoints[0][0]}: {endpoints[0][2]}"
    return ". ".join(f"{name} {verdict}: {numbers}" for name, verdict, numbers in endpoints)


def _null_line(study: Study) -> str:
    ok, sentence = captions.null_sentence(study)
    kind = "null" if ok else "null broken"
    return f'<p class="{kind}">{escape(sentence)}</p>'


def _figure(study: Study, name: str, vector: bytes) -> str:
    caption = escape(captions.CAPTIONS[name](study))
    data = base64.b64encode(vector).decode()
    return (
        f'<h2>{escape(HEADINGS[name])}</h2><figure><div class="scroll">'
        f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _side_by_side(study: Study) -> str:
    design, samples = study.design, study.tables["samples"]
    parts = [
        "<h2>The same prompt, the same noise</h2><p>All arms draw with the same random numbers, so"
        f" a text differs from that of {escape(design.reference.name)} only where the format"
        " changed the draw. The first word that differs is marked; before it the texts are equal."
        "</p>"
    ]
    for model in design.models:
        parts.append(f"<h3>{escape(label(model))}</h3>")
        for place, temperature in enumerate(survival_temperatures(design)):
            shown = rows(samples, model=model, temperature=temperature, seed=design.seeds[0])
            texts = "".join(
                _texts_of(study, prompt.text, rows(shown, prompt=prompt.id))
                for prompt in design.prompts[:SHOWN_PROMPTS]
            )
            opened = " open" if place == len(survival_temperatures(design)) - 1 else ""
            parts.append(
                f"<details{opened}><summary>temperature {temperature:g}</summary>{texts}</details>"
            )
    return "".join(parts)


def _texts_of(study: Study, prompt: str, shown: DataFrame) -> str:
    plain = one(shown, arm=study.design.reference.name)
    lines = []
    for arm in study.design.arms:
        if arm.role == "null":
            continue
        row = one(shown, arm=arm.name)
        lines.append(f"<b>{escape(arm.name)}</b><span>{_marked(plain, row)}</span>")
    return f'<p class="prompt">{escape(prompt)}\u2026</p><div class="texts">{"".join(lines)}</div>'


def _marked(plain: Any, row: Any) -> str:
    """A text, on one line, with the first word marked that is not the reference's."""
    text = _one_line(row["text"])
    if row["arm"] == plain["arm"]:
        return escape(text)
    if row["equal"]:
        return f'<span class="same">{escape(text)}</span> <span class="small">(equal)</span>'
    start = divergent_word(_one_line(plain["text"]), text)
    stop = start
    while stop < len(text) and (stop == start or not text[stop].isspace()):
        stop += 1
    word = escape(text[start:stop]) or "(ends)"
    before, after = escape(text[:start]), escape(text[stop:])
    return f'<span class="same">{before}</span><mark>{word}</mark>{after}'


def _one_line(text: str) -> str:
    """`text` with a sign for every line break."""
    return text.strip(" ").replace("\n", " \u21b5 ")


def html_table(caption: str, head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table; numbers are set right, everything is escaped."""
    body = []
    for line in lines:
        cells = "".join(
            f'<td class="n">{number(value, 4)}</td>'
            if isinstance(value, float)
            else f"<td>{escape(str(value))}</td>"
            for value in line
        )
        body.append(f"<tr>{cells}</tr>")
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _tables(study: Study) -> str:
    design = study.design
    parts = ["<h2>Tables</h2>", _summary_table(study), _sensitivity_table(study)]
    weights = study.tables["weights"]
    parts.append(
        html_table(
            "Weights of the swapped layers: bits per weight, bytes, signal to quantization noise",
            ["model", "arm", "layers", "weights", "bytes", "bits/weight", "SQNR, dB"],
            [
                [
                    label(row["model"]),
                    row["arm"],
                    row["layers"],
                    f"{row['weights']:,}",
                    f"{row['bytes']:,}",
                    float(row["bits_per_weight"]),
                    float(row["sqnr_db"]),
                ]
                for _, row in weights.iterrows()
            ],
        )
    )
    if (speed := study.tables.get("speed")) is not None:
        parts.append(
            html_table(
                f"Speed on {_machine(study)}; median ratio to {design.reference.name} in the same"
                " round",
                ["model", "arm", "phase", "tokens/s (median)", "ratio", "interval"],
                [
                    [
                        label(row["model"]),
                        row["arm"],
                        row["phase"],
                        float(row["tokens_per_second"]),
                        float(row["ratio"]),
                        interval(row),
                    ]
                    for _, row in speed.iterrows()
                ],
            )
        )
    lines = [
        [
            row["claim"],
            label(row["model"]),
            row["comparison"],
            row["endpoint"],
            float(row["estimate"]),
            interval(row),
            float(row["margin"]),
            row["verdict"],
        ]
        for _, row in study.claims.iterrows()
        if row["verdict"] != "not tested"
    ]
    head = ["claim", "model", "comparison", "endpoint", "estimate", "interval", "margin", "verdict"]
    table = html_table("Every endpoint behind the verdicts", head, lines)
    parts.append(f"<details><summary>All {len(lines)} endpoints</summary>{table}</details>")
    return "".join(parts)


SUMMARY = {
    "kl_mean": "KL, mean over T",
    "kl_at_1": "KL at T 1",
    "disagreement_at_1": "1 \u2212 A at T 1",
    "same_top": "same top",
    "ln_ppl_ratio": "ln PPL ratio",
    "rms_delta_p_at_1": "RMS \u0394p",
}
"""Measures of the summary that the report shows, and what it calls them."""


def _summary_table(study: Study) -> str:
    summary, lines = study.tables["summary"], []
    names = {name: text for name, text in SUMMARY.items() if name in set(summary["measure"])}
    for model in study.design.models:
        for arm in study.design.others:
            cells = []
            for name in names:
                row = one(summary, model=model, arm=arm.name, source="all", measure=name)
                cells.append(f"{number(row['estimate'])} {interval(row, 2)}".strip())
            lines.append([label(model), arm.name, *cells])
    return html_table(
        f"Logits against {study.design.reference.name}, with intervals over prompts and passages",
        ["model", "arm", *names.values()],
        lines,
    )


def _sensitivity_table(study: Study) -> str:
    design, lines = study.design, []
    chosen = rows(study.tables["sensitivity"], source="all", measure="disagreement")
    for model in design.models:
        for arm in captions.arms_of(study):
            cells = [one(chosen, model=model, arm=arm, kind=kind) for kind in ("contrast", "peak")]
            lines.append(
                [
                    label(model),
                    arm,
                    *(f"{number(row['estimate'])} {interval(row, 2)}" for row in cells),
                ]
            )
    return html_table(
        "Sensitivity in 1 \u2212 agreement: mean in the band"
        f" {design.band[0]:g} to {design.band[1]:g} minus the rest of {design.surroundings[0]:g} to"
        f" {design.surroundings[1]:g}, and the temperature of the peak",
        ["model", "arm", "band contrast", "peak at"],
        lines,
    )


def _machine(study: Study) -> str:
    """Processor, instruction set and kernels on which speed was taken."""
    found = study.manifest.get("environments", {})
    speeds = [value for key, value in found.items() if key.endswith(" speed")] or [*found.values()]
    if not speeds:
        return "an unknown machine"
    names = {
        f"{value.get('cpu')}, {value.get('isa')}, {value.get('threads', 'all')} thread(s)"
        for value in speeds
    }
    return "; ".join(sorted(names))


def _methods(study: Study) -> str:
    design = study.design
    own = (
        ""
        if design.own_temperature is None
        else (
            f"the {design.reference.name} model's own samples at temperature"
            f" {design.own_temperature:g} (after each of {len(design.prompts)} prompts,"
            f" {len(design.seeds)}"
            " seed(s); only the generated part is compared)"
        )
    )
    held = f"{len(design.texts)} passages written for this purpose" if design.texts else ""
    temperatures = ", ".join(f"{value:g}" for value in design.temperatures)
    grid = design.logit_temperatures
    items = [
        "Arms: "
        + "; ".join(
            f"{arm.name} (format {arm.format}"
            + (f", blocks of {arm.blocksize}" if arm.format.startswith(("nf4", "fp4")) else "")
            + f", {arm.role})"
            for arm in design.arms
        )
        + ". The output embedding is "
        + ("" if design.quantize_head else "not ")
        + "quantized."
        f" Compute mode {design.compute}.",
        f"Logits: reference and arm read the same tokens,"
        f" {' and '.join(filter(None, (own, held)))}."
        f" At {len(grid)} temperatures from {grid[0]:g} to {grid[-1]:g}, and without sampling, the"
        " core computes KL divergence (both ways), total variation, and 1 \u2212 agreement: the"
        " probability that both, drawing with the same Gumbel noise, take different tokens, exactly"
        " sum over i of 1 / sum over j of max(p_j/p_i, q_j/q_i), taken from 1. \u0394p is the"
        " change"
        " of the probability of the token that follows in the text; ln PPL ratio is the mean change"
        " of its negative log-probability at temperature 1.",
        f"Generation: {len(design.prompts)} prompts, seeds {', '.join(map(str, design.seeds))},"
        f" temperatures {temperatures}, {design.max_new_tokens} tokens, top_k "
        + ("off" if design.top_k[0] == 0 else str(design.top_k[0]))
        + ". A token is drawn as the largest"
        " of logit + T \u00d7 noise, where the noise depends on seed, prompt, step and token id"
        " alone, so"
        " arms and temperatures share it; temperature 0 is greedy. rep-n is 1 \u2212 different /"
        " all runs"
        " of n tokens of a text; distinct-n is different / all over the seeds of a prompt.",
        f"Intervals: {percent_of(design.confidence)} % bootstrap percentile intervals,"
        f" {design.bootstrap_draws} draws of whole prompts (with all their seeds, temperatures and"
        " tokens), widened for few prompts as a t interval is. Each prompt or passage counts once.",
        "Verdicts: equality is confirmed when the interval lies inside the margin and refuted when"
        " it lies outside; \u201cmore\u201d is confirmed when the interval lies above 0 (for C5,"
        " slower by"
        " more than the margin) and refuted when it excludes even the smallest effect that counts."
        " C4 needs both: more departure inside the band than around it, and a steeper rise of"
        " surprise or of rep-4 there than the reference's. Margins, fixed beforehand: "
        + ", ".join(
            f"{claim} {name} {value:g}"
            for claim, rule in design.claims.items()
            for name, value in rule.endpoints.items()
        )
        + ".",
    ]
    if design.speed is not None:
        items.append(
            f"Speed: {design.speed.rounds} rounds in one process, in each every arm in turn on the"
            f" same model, another one first each time: reading {design.speed.prompt_tokens} tokens"
            f" (prefill) and writing {design.speed.decode_tokens} one by one from a single token"
            f" (decode), batch 1, after {design.speed.warmups} untimed run(s)."
        )
    return "<h2>Methods</h2><ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def percent_of(share: float) -> str:
    """95 for 0.95."""
    return f"{100 * share:g}"


def _limits(study: Study) -> str:
    design = study.design
    items = [
        "Only the abstract of the paper was available: what it calls quality, sensitivity and speed"
        " is defined here, and may be measured differently there.",
        f"{len(design.prompts)} prompts are few: intervals are wide, and a small effect would not"
        " be"
        " seen. \u201cInconclusive\u201d means just that.",
        "Verdicts are not corrected for their number; a study meant to decide should be larger and"
        " fixed beforehand.",
        f"Texts of {design.max_new_tokens} tokens are too short for loops to show; rep-n is read"
        " with that in mind.",
        "No task with right and wrong answers is part of this study.",
    ]
    if _demo(study):
        items.insert(
            0,
            "The demo models have one to two million weights and were trained on simple"
            " stories; nothing here carries over to models of another size, and claims"
            " about Llama 2 and Falcon cannot be tested with them.",
        )
    return "<h2>Limits</h2><ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _files(study: Study) -> str:
    manifest = study.manifest
    tables = "".join(
        f"<li><code>tables/{name}.csv</code>, <code>.parquet</code>: {escape(TABLES[name])}</li>"
        for name in study.tables
    )
    hashes = html_table(
        "SHA-256 of the model files",
        ["model", "file", "SHA-256"],
        [
            [model, file, digest]
            for model, entry in manifest["models"].items()
            for file, digest in entry["files"].items()
        ],
    )
    return (
        "<h2>Files</h2><p>Beside this page stand <code>design.json</code> (everything that was"
        " asked"
        " for, every default written out), <code>manifest.json</code> (versions, machine, hashes),"
        " <code>cells/</code> (what was computed) and <code>plots/</code> (PNG and SVG).</p>"
        f"<ul>{tables}</ul>{hashes}"
        f'<p class="soft">qllm {escape(str(manifest["qllm"]))}, Python'
        f" {escape(str(manifest['python']))}, NumPy {escape(str(manifest['numpy']))},"
        f" {escape(str(manifest['system']))}; {escape(_machine(study))}."
        f" Design <code>{manifest['design_sha256']}</code>,"
        f" prompts <code>{manifest['prompts_sha256']}</code>.</p>"
    )
