"""Files of a study's folder: written whole or not at all, and checked when they are read back."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import QllmError, QllmFileError
from ..strict_json import parse_object

FOLDERS = ("cells", "tables", "plots")
FILES = ("report.html", "manifest.json", "design.json", "play.json")
"""What a study writes into its folder; nothing else there is ever touched."""

MAX_CELL_BYTES = 2_000_000_000
"""Longest unpacked cell that is read."""

_PARTIAL = ".partial"


class DamagedCell(QllmFileError):
    """A cell that cannot be what was written; it is computed again."""


def write_bytes(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: a reader, and a run that is killed, see the old file or the new one.
    Raises `QllmFileError` with the reason of the system; a full disk leaves the old file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # the reason is the first one
                partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        rest = "; what is finished stays, and the same call goes on once there is room"
        raise QllmFileError(
            f"{path} cannot be written: {error.strerror or error}{rest if full else ''}"
        ) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def _sync_folder(folder: Path) -> None:
    """Makes a new name in the folder last; where folders cannot be opened, the system does it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_cell(path: Path, fingerprint: str, body: dict[str, Any]) -> None:
    """A cell as gzipped JSON: the same body gives the same bytes. Numbers that are not finite are
    not allowed in `body`."""
    text = json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    head = json.dumps({"fingerprint": fingerprint, "sha256": digest})
    data = f'{head[:-1]}, "body": {text}}}\n'.encode()
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0))


def read_cell(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The body of a cell that `write_cell` wrote, or None when there is no such file.

    Raises `DamagedCell` when the file is cut or changed, or belongs to other models, another design
    or another version (another `fingerprint`).
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read(MAX_CELL_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError) as error:
        raise DamagedCell(f"{path} is damaged ({error})") from None
    except Exception as error:  # zlib.error is no subclass of the above
        raise DamagedCell(f"{path} is damaged ({error})") from None
    if len(data) > MAX_CELL_BYTES:
        raise DamagedCell(f"{path} is damaged (it unpacks to more than {MAX_CELL_BYTES} bytes)")
    try:
        cell = parse_object(data, str(path), max_members=100_000_000)
    except QllmError as error:
        raise DamagedCell(f"{path} is damaged ({error})") from None
    body = cell.get("body")
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
    if (
        not isinstance(body, dict)
        or cell.get("sha256") != hashlib.sha256(text.encode()).hexdigest()
    ):
        raise DamagedCell(f"{path} is damaged (its checksum does not match)")
    if cell.get("fingerprint") != fingerprint:
        raise DamagedCell(f"{path} belongs to another design, model or version")
    return body


def clear(folder: Path) -> None:
    """Removes what a study has written into `folder`, and nothing else."""
    try:
        for name in FOLDERS:
            path = folder / name
            if path.is_symlink():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise QllmFileError(f"{folder} cannot be cleared: {error.strerror or error}") from None


def remove_partials(folder: Path) -> None:
    """Removes what killed runs have left half written."""
    for name in ("", *FOLDERS):
        for path in (folder / name).glob(f"*{_PARTIAL}"):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise QllmFileError(
                    f"{path} cannot be removed: {error.strerror or error}"
                ) from None
