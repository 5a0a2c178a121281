"""Texts from files and standard input, and results to standard output."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from ..errors import QllmFileError
from ..strict_json import quoted

STDIN = "-"

MAX_TEXT_BYTES = 1 << 28
"""Most bytes of a text that is read: a pipe or a device may never end."""


def read_text(name: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-". Raises `QllmFileError`."""
    what = "standard input" if name == STDIN else name
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
    except IsADirectoryError:
        raise QllmFileError(f"{name} is a folder; a text file was expected") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QllmFileError(f"{quoted(name)} cannot be read: {reason}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise QllmFileError(
            f"{what} has more than the {MAX_TEXT_BYTES} bytes that are read at most; cut the text"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QllmFileError(
            f"{what} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start};"
            " convert it with iconv"
        ) from None
    if not text:
        raise QllmFileError(f"{what} is empty; a text was expected")
    return text


def print_json(value: Any) -> None:
    """One JSON text; numbers that JSON has not are null."""
    print(json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def shown(text: str) -> str:
    """Generated text as it may go to standard output: on a terminal without control characters,
    which a model could draw and a terminal would obey."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
