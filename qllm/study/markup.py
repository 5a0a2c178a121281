"""Pieces of HTML: everything that is not written here is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import TYPE_CHECKING

from .wording import estimate, number

if TYPE_CHECKING:
    from .plots import Drawn

_CONTROLS = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def printable(text: str) -> str:
    """`text` with control characters, which a model may write, as replacement marks."""
    return text.translate(_CONTROLS)


def escape(text: str, quote: bool = True) -> str:
    """`text` as HTML."""
    return escape_html(printable(text), quote)


@dataclass(frozen=True)
class Value:
    """A cell of a table that shows a text and is sorted by a number."""

    text: str
    number: float


def value(row: object, digits: int = 3) -> Value:
    """The estimate of a row of a table, with its interval."""
    return Value(estimate(row, digits), float(row["estimate"]))  # type: ignore[index]


def html_table(caption: str, head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table that a reader may sort; numbers are set right."""
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><caption>{escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(item: object) -> str:
    if isinstance(item, Value):
        return f'<td class="n" data-v="{item.number!r}">{escape(item.text)}</td>'
    if isinstance(item, bool):
        return f"<td>{'yes' if item else 'no'}</td>"
    if isinstance(item, int):
        return f'<td class="n" data-v="{item}">{item:,}</td>'
    if isinstance(item, float):
        return f'<td class="n" data-v="{item!r}">{number(item, 4)}</td>'
    return f"<td>{escape(str(item))}</td>"


def folded(summary: str, content: str, opened: bool = False) -> str:
    """Content behind a line that opens it."""
    return (
        f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}"
        "</details>"
    )


def figure_html(caption: str, drawn: Drawn, number: int) -> str:
    """A picture in the form that fits the width of the window."""
    wide, narrow = (
        "data:image/svg+xml;base64," + base64.b64encode(data).decode()
        for data in (drawn.wide, drawn.narrow)
    )
    text = escape(caption)
    return (
        f'<figure><picture><source media="(max-width: 44rem)" srcset="{narrow}">'
        f'<img alt="{text}" src="{wide}"></picture><figcaption><b>Figure {number}.</b> {text}'
        "</figcaption></figure>"
    )


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def badge(word: str) -> str:
    """A verdict, with a sign that does not need its colour."""
    sign = {"confirmed": "\u2713", "refuted": "\u2717", "inconclusive": "?"}.get(word, "\u2013")
    kind = word if word in ("confirmed", "refuted", "inconclusive") else "untested"
    return (
        f'<span class="verdict {kind}"><span aria-hidden="true">{sign}</span>'
        f" {escape(word)}</span>"
    )
