"""A strict reader of one safetensors file: mapped, read-only, nothing copied.

The format (huggingface/safetensors, README "Format"): 8 bytes with the length N of the header,
little-endian; N bytes of JSON, which maps each name to {"dtype", "shape", "data_offsets": [begin,
end]}; then the data, to which the offsets refer. The header is checked completely when a file is
opened, and the tensors must tile the data: a hole, an overlap, a duplicate name or a trailing byte
is an error, so a file has one meaning for every reader and hides nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import QllmFileError, QllmValueError
from .strict_json import foreign_kind, parse_object, quoted

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read: the limit of the safetensors library."""

MAX_TENSORS = 250_000
"""Most tensors in one file: more than the largest public models have in all their shards."""

MAX_DIMS = 8
"""Most dimensions of one tensor."""

_MAX_INT = 2**63 - 1

# dtype in the file -> (bytes per element, NumPy type of the view). NumPy has no bfloat16 and no
# 8-bit floats: their bits are shown as unsigned integers of the same width.
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "|b1"),
    "U8": (1, "|u1"),
    "I8": (1, "|i1"),
    "F8_E4M3": (1, "|u1"),
    "F8_E5M2": (1, "|u1"),
    "F8_E8M0": (1, "|u1"),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
    "C64": (8, "<c8"),
}


@dataclass(frozen=True, eq=False)
class TensorEntry:
    """One tensor of a file: its description, and its bytes as a read-only view into the mapping.

    `dtype` is the name in the file ("BF16", "F16", "F32", "I8", "U8", ...). `data` is a view of
    bytes (uint8, C order, little-endian), valid as long as it is held, also after the file was
    closed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the data: elements times bytes per element."""
        return self.data.nbytes

    def numpy(self) -> np.ndarray:
        """The tensor as a read-only array of `shape`.

        BF16 comes as uint16, 8-bit floats come as uint8: their bits. It is a view of the mapping,
        or a copy where the file puts the tensor at an address that is no multiple of its element
        size.
        """
        dtype = np.dtype(_DTYPES[self.dtype][1])
        if not self.data.nbytes:
            array = np.empty(self.shape, dtype)
        else:
            array = np.frombuffer(self.data, dtype).reshape(self.shape)
            if not array.flags.aligned:
                array = array.copy()
        array.flags.writeable = False
        return array


@dataclass(frozen=True)
class _Header:
    """What the header says of one tensor; offsets are bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open safetensors file. Raises `QllmFileError` for anything that is not exactly right.

    The file must stay as it is while it is open: `entry` compares size, time of modification and
    inode, and refuses a file that was changed or replaced. (A file cut short during a read still
    ends the process with SIGBUS: that is how mapped files work.)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise QllmFileError(
                    f"{self.path} is no regular file; a safetensors file was expected"
                )
            with open(self.path, "rb") as stream:
                info = os.fstat(stream.fileno())
                self.identity = _identity(info)
                header, start = _read_header(self.path, stream, info.st_size)
                self.metadata, self._headers = _check_header(
                    header, info.st_size - start, self.path
                )
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except QllmFileError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise QllmFileError(f"{self.path} cannot be opened: {reason}") from None
        self._start = start
        self._data: memoryview | None = memoryview(self._map)[start:]

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the order of the header."""
        return list(self._headers)

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def entry(self, name: str) -> TensorEntry:
        """The tensor `name`. Raises `QllmFileError` when there is none or the file has changed
        since it was opened, `QllmValueError` after `close`."""
        header = self._headers.get(name)
        if header is None:
            raise QllmFileError(f"{self.path} has no tensor {quoted(name)}")
        if self._data is None:
            raise QllmValueError(f"{self.path} was closed; open it again to read {quoted(name)}")
        self.require_unchanged()
        return TensorEntry(
            name, header.dtype, header.shape, self._data[header.begin : header.end], self.path
        )

    def release(self, name: str) -> None:
        """Lets go of the memory that the pages of the tensor `name` take in this process. Its
        entries stay valid: what is read again comes from the file again, or from the system's
        cache. Without effect on systems that do not offer it."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or self._data is None:
            return
        header = self._headers[name]
        first = -(-(self._start + header.begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self._start + header.end) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(advice, first, last - first)

    def unchanged(self) -> bool:
        """Whether the path still names the file that was opened, of the same size and time."""
        try:
            return _identity(os.stat(self.path)) == self.identity
        except OSError:
            return False

    def require_unchanged(self) -> None:
        """Raises `QllmFileError` unless `unchanged`."""
        if not self.unchanged():
            raise QllmFileError(
                f"{self.path} was changed, replaced or removed after it was opened; "
                "open the checkpoint again"
            )

    def close(self) -> None:
        """Lets go of the mapping; entries that are still held keep it alive."""
        if self._data is not None:
            self._data.release()
            self._data = None
            try:
                self._map.close()
            except BufferError:
                pass  # an entry is still held: the mapping ends with the last of them

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _identity(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _read_header(path: Path, stream: Any, size: int) -> tuple[bytes, int]:
    """The header text and the offset of the data, from a file of `size` bytes."""
    start = stream.read(8)
    if len(start) < 8:
        kind = foreign_kind(start)
        raise QllmFileError(
            f"{path} has {size} bytes, too few for a safetensors file"
            + (f"; it is {kind}" if kind else "")
        )
    length = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER_BYTES or length > size - 8:
        kind = foreign_kind(start + stream.read(504))
        if kind is not None:
            raise QllmFileError(f"{path} is no safetensors file but {kind}")
        raise QllmFileError(
            f"{path} states a header of {length} bytes, but a header ends within the file of "
            f"{size} bytes and has at most {MAX_HEADER_BYTES}: the file is cut short, or "
            "no safetensors file"
        )
    if length < 2:
        raise QllmFileError(
            f"{path} states a header of {length} bytes; the shortest one, {{}}, has 2"
        )
    header = stream.read(length)
    if len(header) != length:
        raise QllmFileError(f"{path} ended inside its header; it is being changed by somebody else")
    return header, 8 + length


def _check_header(
    text: bytes, data_bytes: int, path: Path
) -> tuple[dict[str, str], dict[str, _Header]]:
    """Metadata and tensors of the header `text`, checked against `data_bytes` bytes of data."""
    what = f"the header of {path}"
    if not text.startswith((b"{", b"\xef\xbb\xbf")):
        raise QllmFileError(f"{what} must begin with '{{', but begins with {text[:1]!r}")
    # Each tensor has four keys; twice as many leave room for colons in names and metadata.
    members = parse_object(text, what, max_members=8 * MAX_TENSORS)
    metadata = members.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise QllmFileError(f"__metadata__ in {what} must map names to strings")
    if len(members) > MAX_TENSORS:
        raise QllmFileError(
            f"{what} names {len(members)} tensors, more than the {MAX_TENSORS} that are "
            "read at most"
        )
    headers = {
        name: _check_tensor(name, entry, data_bytes, path) for name, entry in members.items()
    }
    _check_tiling(headers, data_bytes, path)
    return metadata, headers


def _check_tensor(name: str, entry: Any, data_bytes: int, path: Path) -> _Header:
    """The header of one tensor: right types, and as many bytes as dtype and shape ask for."""
    what = f"tensor {quoted(name)} of {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise QllmFileError(
            f"{what} must have exactly dtype, shape and data_offsets, but has {quoted(found)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise QllmFileError(
            f"{what} has the unknown dtype {quoted(dtype)}; known are " + ", ".join(_DTYPES)
        )
    if not isinstance(shape, list) or not all(_is_size(dim) for dim in shape):
        raise QllmFileError(
            f"{what} has the shape {quoted(shape)}; a list of integers from 0 to 2^63-1 "
            "was expected"
        )
    if len(shape) > MAX_DIMS:
        raise QllmFileError(f"{what} has {len(shape)} dimensions; at most {MAX_DIMS} are read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(x) for x in offsets):
        raise QllmFileError(
            f"{what} has the data_offsets {quoted(offsets)}; two integers from 0 to "
            "2^63-1 were expected"
        )
    begin, end = offsets
    if begin > end:
        raise QllmFileError(f"{what} begins at byte {begin}, after its end at byte {end}")
    if end > data_bytes:
        raise QllmFileError(
            f"{what} ends at byte {end} of the data, but the file has {data_bytes} bytes of "
            "data: it is cut short or damaged, fetch it again"
        )
    # The product without the zero dimensions, because array libraries overflow on that one too.
    if math.prod(dim for dim in shape if dim) * _DTYPES[dtype][0] > _MAX_INT:
        raise QllmFileError(f"{what} has the shape {shape}, more than 2^63-1 bytes")
    expected = math.prod(shape) * _DTYPES[dtype][0]
    if end - begin != expected:
        raise QllmFileError(
            f"{what} has {end - begin} bytes, but {dtype} of shape {shape} takes {expected}"
        )
    return _Header(dtype, tuple(shape), begin, end)


def _check_tiling(headers: dict[str, _Header], data_bytes: int, path: Path) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    position, previous = 0, ""
    for name, header in sorted(headers.items(), key=lambda item: (item[1].begin, item[1].end)):
        if header.begin < position:
            raise QllmFileError(
                f"tensor {quoted(name)} of {path} begins at byte {header.begin} of the data, "
                f"inside tensor {quoted(previous)}, which ends at byte {position}"
            )
        if header.begin > position:
            raise QllmFileError(
                f"bytes {position} to {header.begin} of the data of {path}, before tensor "
                f"{quoted(name)}, belong to no tensor"
            )
        position, previous = header.end, name
    if position != data_bytes:
        raise QllmFileError(
            f"{path} has {data_bytes - position} bytes after its last tensor, which belong "
            "to no tensor"
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT
