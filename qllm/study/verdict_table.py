"""The verdicts as a table: what a study says about each claim, and on what it rests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .claims import CLAIMS
from .lookup import label, rows
from .markup import badge, escape
from .wording import estimate

if TYPE_CHECKING:
    from pandas import DataFrame

    from .result import Study

HEAD = ("model", "verdict", "estimate", "prompts", "reason")
NONE = "\u2013"


def verdict_table(study: Study) -> str:
    """Claims by models, as an HTML table: verdict, estimate with interval, number of prompts and
    the reason in a sentence. A claim on which all models agree word by word has one line."""
    lines = []
    for claim, sentence in CLAIMS.items():
        found = rows(study.verdicts, claim=claim)
        same = (
            len(found) > 1
            and found["estimate"].isna().all()
            and len(found[["verdict", "reason"]].drop_duplicates()) == 1
        )
        shown = found.iloc[:1] if same else found
        for number, (_, row) in enumerate(shown.iterrows()):
            name = "all models" if same else label(row["model"])
            head = (
                f'<th scope="rowgroup" rowspan="{len(shown)}">{escape(claim)}<span'
                f' class="claim">{escape(sentence)}</span></th>'
                if number == 0
                else ""
            )
            lines.append(f"<tr>{head}{_cells(name, row)}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", *HEAD))
    return (
        '<div class="scroll" tabindex="0"><table class="claims"><caption>What this study says'
        f" about the claims</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _cells(name: str, row: Any) -> str:
    prompts = row["prompts"]
    count = NONE if prompts is None or math.isnan(prompts) or prompts == 0 else f"{prompts:.0f}"
    number = NONE if math.isnan(row["estimate"]) else estimate(row)
    cells = (escape(name), badge(row["verdict"]), escape(number), count, escape(row["reason"]))
    return "".join(
        f'<td class="{head}{" none" if cell == NONE else ""}" data-h="{head}">{cell}</td>'
        for head, cell in zip(HEAD, cells)
    )


def counts(verdicts: DataFrame) -> str:
    """How many verdicts of each kind, in words."""
    found = verdicts["verdict"].value_counts()
    words = ("confirmed", "refuted", "inconclusive", "not testable")
    return ", ".join(f"{found[word]} {word}" for word in words if word in found)
