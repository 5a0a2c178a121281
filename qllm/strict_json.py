"""JSON from files that nobody vouches for: one meaning per text, bounded cost, clear refusals.

Python's `json` accepts more than the standard and lets a later duplicate win, so two readers may
see two different files. Here a duplicate key, NaN or Infinity, a byte order mark, bytes that are
not UTF-8, a nesting bomb and a flood of members are all refused with `QllmFileError`.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import QllmFileError

_PICKLE = "a Python pickle; qllm reads no pickles, convert it to safetensors"
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file; fetch that with `git lfs pull`"),
    (b"GGUF", "a GGUF file; qllm reads safetensors"),
    (b"PK\x03\x04", "a zip archive, probably a pickle of torch.save; convert it to safetensors"),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"\x89HDF\r\n", "an HDF5 file; qllm reads safetensors"),
    (b"\x93NUMPY", "a NumPy file; qllm reads safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"{", "a JSON text"),
)
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


class _Refused(ValueError):
    """What a hook of the parser says about the text; never leaves this module."""


def quoted(value: object, limit: int = 120) -> str:
    """`value` as text in quotes for an error sentence, on one line, cut at `limit` characters."""
    try:
        text = str(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    except ValueError:  # Python writes no integers of more than some thousand digits
        text = f"a {type(value).__name__} of thousands of digits"
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def lone_surrogate(text: str) -> str | None:
    """Where `text` has half of a UTF-16 pair, which no UTF-8 text can hold, as a clause; or
    None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"the lone surrogate U+{code:04X} at position {error.start}, which is no character"
    return None


def foreign_kind(start: bytes) -> str | None:
    """What a file is that begins with the bytes `start` (a few hundred), when it is a well-known
    other kind: "a GGUF file; ...", or None. Meant for files which have failed as what they should
    be: a safetensors file may by chance begin with the two bytes of a pickle."""
    if start.lstrip().lower().startswith(_MARKUP):
        return "a web page, probably an error page saved instead of the file; download it again"
    return next((kind for magic, kind in _FOREIGN if start.startswith(magic)), None)


def parse_object(data: bytes, what: str, max_members: int = 1_000_000) -> dict[str, Any]:
    """The JSON object in the UTF-8 text `data`.

    `what` names the text at the start of an error sentence. `max_members` bounds the colons, and
    four times `max_members` the commas, before anything is built. Raises `QllmFileError`.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise QllmFileError(f"{what} begins with a byte order mark; save it as UTF-8 without one")
    if data.count(b":") > max_members or data.count(b",") > 4 * max_members:
        raise QllmFileError(
            f"{what} holds more than the {max_members} members that are read at most"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
        )
        if b"\\ud" in data or b"\\uD" in data:  # a lone surrogate is no text: ValueError
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise QllmFileError(
            f"{what} is not UTF-8 text: byte {error.start} cannot be decoded"
        ) from None
    except RecursionError:
        raise QllmFileError(f"{what} is nested too deeply to be read") from None
    except _Refused as error:
        raise QllmFileError(f"{what} {error}") from None
    except ValueError as error:
        raise QllmFileError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise QllmFileError(f"{what} must be a JSON object, but is a {type(value).__name__}")
    return value


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the file `path` of at most `max_bytes` bytes. Raises `QllmFileError`."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise QllmFileError(f"{path} is not a regular file")
        if info.st_size > max_bytes:
            raise QllmFileError(
                f"{path} has {info.st_size} bytes, more than the {max_bytes} that are read at most"
            )
        data = path.read_bytes()
    except QllmFileError:
        raise
    except OSError as error:
        raise QllmFileError(f"{path} cannot be read: {error.strerror}") from None
    kind = foreign_kind(data[:512])
    if kind is not None and not data.startswith(b"{"):
        raise QllmFileError(f"{path} is {kind}")
    return parse_object(data, str(path))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"has the key {quoted(key)} twice")
            seen.add(key)
    for key in members:
        if not key.isascii():
            key.encode("utf-8")  # a lone surrogate is no text: UnicodeEncodeError, a ValueError
    return members


def _refuse_constant(word: str) -> None:
    raise _Refused(f"holds {word}, which is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"holds {digits[:40]}, which is too large for a number")
    return value


def _short(digits: str) -> int:
    if len(digits) > 20:
        raise _Refused(f"holds an integer of {len(digits)} digits; at most 64 bits are read")
    return int(digits)
