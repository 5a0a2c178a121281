"""The report: one HTML file that a reader understands without the paper, with nothing to load.

All numbers and captions are computed from the tables, the methods from the design; every text that
comes from a model, a prompt or a name is escaped, and the page forbids every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from . import captions, explorer
from .files import write_text
from .lookup import label
from .markup import bullets, escape, figure_html
from .methods import demonstration, limits, methods, provenance
from .plots import PICTURES, Drawn, absent, write_plots
from .side_by_side import side_by_side
from .tables_html import tables_html
from .verdict_table import counts, verdict_table

if TYPE_CHECKING:
    from .result import Study


def write_report(study: Study) -> None:
    """Draws the pictures into `plots/` and writes `report.html`."""
    pictures = write_plots(study, study.folder / "plots")
    write_text(study.report, report_html(study, pictures))


def report_html(study: Study, pictures: Mapping[str, Drawn]) -> str:
    """The whole page; `pictures` are those of `write_plots`."""
    title = f"Quantization and temperature: {', '.join(map(label, study.design.models))}"
    scripts = [_file("sort_tables.js")] + ([explorer.script()] if "play" in pictures else [])
    parts = [
        f"<h1>{escape(title)}</h1>",
        _question(study),
        *_answer(study),
        *(
            f"<h2>{escape(picture.heading)}</h2>{_figure(study, name, pictures)}"
            for name, picture in PICTURES.items()
            if name in pictures and name != "play"
        ),
        _left_out(study, pictures),
        explorer.explorer_html(study, _figure(study, "play", pictures))
        if "play" in pictures
        else "",
        side_by_side(study),
        tables_html(study),
        methods(study),
        limits(study),
        provenance(study),
        *(f"<script>{script}</script>" for script in scripts),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_file('report.css')}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _policy(scripts: list[str]) -> str:
    """What a browser may do with the page: run these scripts, show pictures that stand in it."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts]
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


def _question(study: Study) -> str:
    design = study.design
    arms = ", ".join(arm.name for arm in design.arms if arm.role == "arm")
    lede = (
        '<p class="lede">A language model gives, for every next token, a probability; temperature'
        " sharpens (below 1) or flattens (above 1) these before one is drawn. Quantization stores"
        f" the weights in fewer bits. This study asks what the formats {escape(arms)} change at"
        f" each temperature, compared with the weights in {escape(design.reference.name)}, and"
        " whether what the abstract of arXiv 2309.05210 says about it holds here.</p>"
    )
    if demonstration(design):
        lede += (
            '<p class="soft">The demo models are tiny, so this is a demonstration of the method:'
            " what it finds holds for them and for no other model.</p>"
        )
    return lede


def _answer(study: Study) -> list[str]:
    """The verdicts first, then whether the instrument works, then the study in short."""
    parts = [
        "<h2>Verdicts</h2>",
        f"<p>{counts(study.verdicts)}.</p>",
        verdict_table(study),
    ]
    for good, sentence in (captions.null_sentence(study), captions.control_sentence(study)):
        parts.append(f'<p class="{"check" if good else "check broken"}">{escape(sentence)}</p>')
    said = captions.short_answer(study)
    return [*parts, "<h2>Short answer</h2>", *(f"<p>{escape(sentence)}</p>" for sentence in said)]


def _figure(study: Study, name: str, pictures: Mapping[str, Drawn]) -> str:
    number = 1 + list(pictures).index(name)
    return figure_html(PICTURES[name].caption(study), pictures[name], number)


def _left_out(study: Study, pictures: Mapping[str, Drawn]) -> str:
    """Which figures the page has not, and why."""
    reasons = [
        f"\u201c{picture.heading}\u201d is left out: {why}."
        for name, picture in PICTURES.items()
        if name not in pictures and (why := absent(study, name)) is not None
    ]
    return bullets(reasons) if reasons else ""
