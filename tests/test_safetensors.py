"""The safetensors reader: what it reads equals what the safetensors library wrote, byte for byte
and without a copy; every hostile file ends in a QllmFileError whose words say what is wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllm.errors import QllmFileError, QllmValueError
from qllm.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsFile

safetensors = pytest.importorskip("safetensors", reason="the library is the oracle of this file")
import safetensors.numpy  # noqa: E402


def pack(header: object, data: bytes = b"") -> bytes:
    """A file with this header (an object for JSON, or bytes taken as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(entry: object, data: bytes = bytes(8)) -> bytes:
    """A file with one tensor, named w."""
    return pack({"w": entry}, data)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------ good files


def test_tensors_equal_those_that_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = ["float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64"]
    arrays = {n: rng.integers(0, 100, (3, 5)).astype(n) for n in names}
    arrays |= {
        "scalar": np.array(7, np.uint8),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    with SafetensorsFile(path) as file:
        assert sorted(file.names) == sorted(arrays) and file.metadata == {"format": "np"}
        for name, array in arrays.items():
            entry = file.entry(name)
            assert entry.numpy().dtype == array.dtype and entry.shape == array.shape
            assert np.array_equal(entry.numpy(), array)
            assert bytes(entry.data) == array.tobytes() and entry.nbytes == array.nbytes


def test_bf16_comes_as_the_bits_that_torch_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch writes the bfloat16 file of this test")
    from safetensors.torch import save_file

    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    save_file({"w": values}, tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        bits = file.entry("w").numpy()
        assert file.entry("w").dtype == "BF16" and bits.dtype == np.uint16
        assert np.array_equal(bits, values.view(torch.uint16).numpy())


def test_entries_are_read_only_views_of_one_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, pack({"a": tensor(), "b": tensor(begin=8, end=16)}, bytes(range(16))))
    with SafetensorsFile(path) as file:
        a, b = file.entry("a"), file.entry("b")
        assert a.data.readonly and a.data.obj is b.data.obj and a.file == path
        with pytest.raises(ValueError):
            a.numpy()[0] = 1.0
        with pytest.raises(TypeError):
            a.data[0] = 1
        assert np.frombuffer(b.data, np.uint8).base is not None


@pytest.mark.parametrize("padding", range(8))
def test_any_alignment_of_the_data_reads_the_same(tmp_path: Path, padding: int) -> None:
    text = json.dumps({"w": tensor("F64", [3], 0, 24)}).encode() + b" " * padding
    path = write(tmp_path, pack(text, np.array([1.5, -2.0, 3.25]).tobytes()))
    with SafetensorsFile(path) as file:
        array = file.entry("w").numpy()
        assert array.flags.aligned and not array.flags.writeable
        assert array.tolist() == [1.5, -2.0, 3.25]


def test_a_held_entry_outlives_the_file(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, one(tensor(), np.float32([1, 2]).tobytes())))
    entry = file.entry("w")
    file.close()
    assert entry.numpy().tolist() == [1.0, 2.0]
    with pytest.raises(QllmValueError, match="was closed"):
        file.entry("w")


def test_a_file_without_tensors_is_legal(tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path, pack(b"{}"))) as file:
        assert file.names == [] and file.metadata == {}


@pytest.mark.parametrize(
    "shape, count", [([], 1), ([3], 3), ([1] * 8, 1), ([0], 0), ([4, 0, 2], 0)]
)
def test_legal_shapes(tmp_path: Path, shape: list[int], count: int) -> None:
    path = write(tmp_path, one(tensor("F32", shape, 0, 4 * count), bytes(4 * count)))
    with SafetensorsFile(path) as file:
        assert file.entry("w").shape == tuple(shape)
        assert file.entry("w").numpy().shape == tuple(shape)


# --------------------------------------------------------------------------------- hostile files


def a_million(value: bytes) -> bytes:
    """A header of 10^6 names, each with the same value."""
    return b"{" + b",".join(b'"%x":%s' % (i, value) for i in range(10**6)) + b"}"


HOSTILE_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "has 0 bytes, too few"),
    "7 bytes": (lambda: bytes(7), "has 7 bytes, too few"),
    "7 bytes of GGUF": (lambda: b"GGUF\3\0\0", "a GGUF file"),
    "header length 0": (lambda: struct.pack("<Q", 0) + bytes(8), "header of 0 bytes"),
    "header length 1": (lambda: struct.pack("<Q", 1) + b"{", "header of 1 bytes"),
    "header longer than file": (
        lambda: struct.pack("<Q", 100) + b"{}",
        "header of 100 bytes.*file of 10 bytes",
    ),
    "header length 2^64-1": (lambda: b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "HTML page": (lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
    "HTML page after blanks": (lambda: b"\n\n <html lang=en><head></head></html>", "a web page"),
    "GGUF": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "a GGUF file"),
    "zip": (lambda: b"PK\3\4" + bytes(range(1, 40)), "a zip archive.*convert it to safetensors"),
    "pickle protocol 2": (
        lambda: b"\x80\x02ccollections\nOrderedDict\n",
        "pickle.*convert it to safetensors",
    ),
    "pickle protocol 4": (lambda: b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(8), "an HDF5 file"),
    "NumPy": (lambda: b"\x93NUMPY\x01\x00v\x00{'descr'", "a NumPy file"),
    "gzip": (lambda: b"\x1f\x8b\x08\0\0\0\0\1\2\3", "a gzip archive"),
    "JSON text": (lambda: b'{"architectures": []}', "a JSON text"),
    "header not UTF-8": (lambda: pack(b'{"\xff\xfe":1}'), "not UTF-8 text: byte 2"),
    "header with a lone surrogate": (lambda: pack(b'{"\\ud800":1}'), "surrogates not allowed"),
    "header with a byte order mark": (lambda: pack(b"\xef\xbb\xbf{}"), "byte order mark"),
    "header a list": (lambda: pack(b"[]"), "must begin with '{'"),
    "header a number": (lambda: pack(b"12"), "must begin with '{'"),
    "header after a blank": (lambda: pack(b" {}"), "must begin with '{'"),
    "header not JSON": (lambda: pack(b"{'w': 1}"), "not valid JSON"),
    "header cut": (lambda: pack(b'{"w":'), "not valid JSON"),
    "header followed by text": (lambda: pack(b"{} {}"), "not valid JSON: Extra data"),
    "header padded with zeros": (lambda: pack(b"{}\0\0"), "not valid JSON"),
    "NaN": (lambda: pack(b'{"w": NaN}'), "holds NaN"),
    "Infinity": (lambda: pack(b'{"w": Infinity}'), "holds Infinity"),
    "-Infinity": (lambda: pack(b'{"w": -Infinity}'), "holds -Infinity"),
    "float beyond range": (lambda: pack(b'{"w": 1e999}'), "holds 1e999"),
    "integer of 10^5 digits": (
        lambda: pack(b'{"w": %s}' % (b"9" * 10**5)),
        "holds an integer of 100000 digits",
    ),
    "10^6 tensors": (
        lambda: pack(a_million(b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}')),
        "holds more than the 2000000 members",
    ),
    "10^6 keys": (lambda: pack(a_million(b"0")), f"1000000 tensors, more than the {MAX_TENSORS}"),
    "10^7 list elements": (
        lambda: pack(b'{"w": [' + b"1," * 10**7 + b"1]}"),
        "holds more than the 2000000 members",
    ),
    "nesting 10^5": (
        lambda: pack(b'{"w":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "nested too deep|must have exactly",
    ),
    "nesting 10^5 of objects": (
        lambda: pack(b'{"w":' * 10**5 + b"1" + b"}" * 10**5),
        "nested too deep|must have exactly",
    ),
    "duplicate names": (
        lambda: pack(
            b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "has the key 'w' twice",
    ),
    "duplicate keys of a tensor": (
        lambda: pack(b'{"w":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "has the key 'dtype' twice",
    ),
    "metadata not an object": (lambda: pack({"__metadata__": "pt"}), "__metadata__.*strings"),
    "metadata null": (lambda: pack({"__metadata__": None}), "__metadata__.*strings"),
    "metadata not strings": (lambda: pack({"__metadata__": {"n": 1}}), "__metadata__.*strings"),
    "one trailing byte": (lambda: one(tensor(), bytes(9)), "1 bytes after its last tensor"),
    "data without tensors": (lambda: pack(b"{}", b"x"), "1 bytes after its last tensor"),
    "cut by one byte": (lambda: one(tensor())[:-1], "ends at byte 8.*7 bytes.*cut short"),
}

HOSTILE_TENSORS: dict[str, tuple[object, str]] = {
    "not an object": ([], "must have exactly dtype, shape and data_offsets, but has 'list'"),
    "null": (None, "must have exactly dtype, shape and data_offsets"),
    "lacks dtype": ({"shape": [2], "data_offsets": [0, 8]}, "must have exactly dtype"),
    "unknown key": (tensor() | {"stride": [1]}, "must have exactly dtype.*'stride'"),
    "unknown dtype": (tensor("F31"), "unknown dtype 'F31'; known are BOOL"),
    "4-bit dtype": (tensor("F4", [16]), "unknown dtype 'F4'"),
    "dtype a number": (tensor(32), "unknown dtype '32'"),
    "dtype a list": (tensor(["F32"]), "unknown dtype"),
    "dtype in lower case": (tensor("f32"), "unknown dtype 'f32'"),
    "shape a number": (tensor(shape=2), "the shape '2'; a list of integers"),
    "shape null": (tensor(shape=None), "the shape 'None'; a list of integers"),
    "dim negative": (tensor(shape=[-2]), "the shape '\\[-2\\]'; a list of integers"),
    "dims negative whose product fits": (tensor(shape=[-1, -2]), "a list of integers"),
    "dim a float": (tensor(shape=[2.0]), "the shape '\\[2.0\\]'; a list of integers"),
    "dim a bool": (tensor(shape=[True, 2]), "the shape '\\[True, 2\\]'; a list of integers"),
    "dim a string": (tensor(shape=["2"]), "a list of integers"),
    "dim null": (tensor(shape=[None]), "a list of integers"),
    "dim 2^63": (tensor(shape=[2**63]), "the shape '\\[9223372036854775808\\]'"),
    "dim 2^64 + 2": (tensor(shape=[2**64 + 2]), "the shape"),
    "product 2^64": (tensor(shape=[2**32, 2**32]), "more than 2\\^63-1 bytes"),
    "product 2^64 and a zero": (tensor("U8", [2**32, 2**32, 0], 0, 0), "more than 2\\^63-1 bytes"),
    "product 2^64 + 8 in 64 bits is 8": (tensor("U8", [2**61 + 1, 8]), "more than 2\\^63-1 bytes"),
    "bytes overflow though elements do not": (tensor("F64", [2**62]), "more than 2\\^63-1 bytes"),
    "ndim 9": (tensor(shape=[1] * 8 + [2]), "has 9 dimensions; at most 8"),
    "ndim 70": (tensor(shape=[1] * 69 + [2]), "has 70 dimensions; at most 8"),
    "ndim 0 with the bytes of two": (
        tensor(shape=[]),
        "has 8 bytes, but F32 of shape \\[\\] takes 4",
    ),
    "zero-size dim with bytes": (tensor(shape=[0, 2]), "has 8 bytes, but F32.*takes 0"),
    "begin after end": (tensor(begin=8, end=0), "begins at byte 8, after its end at byte 0"),
    "offsets negative": (tensor(begin=-8, end=0), "two integers from 0"),
    "offsets floats": (tensor(begin=0.0, end=8.0), "two integers from 0"),
    "offsets bools": (tensor("U8", [1], False, True), "two integers from 0"),
    "offsets 2^63": (tensor(begin=0, end=2**63), "two integers from 0"),
    "one offset": ({"dtype": "F32", "shape": [2], "data_offsets": [8]}, "two integers from 0"),
    "three offsets": ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}, "two integers"),
    "past the end": (tensor(shape=[4], end=16), "ends at byte 16 of the data, but the file has 8"),
    "end 2^63-1": (tensor(end=2**63 - 1), "ends at byte 9223372036854775807"),
    "fewer bytes than shape x dtype": (
        tensor(shape=[3]),
        "has 8 bytes, but F32 of shape \\[3\\] takes 12",
    ),
    "more bytes than shape x dtype": (
        tensor(shape=[1]),
        "has 8 bytes, but F32 of shape \\[1\\] takes 4",
    ),
}

HOSTILE_LAYOUTS: dict[str, tuple[dict, str]] = {
    "gap at the start": ({"w": tensor("U8", [8], 8, 16)}, "bytes 0 to 8.*belong to no tensor"),
    "gap inside": (
        {"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [8], 8, 16)},
        "bytes 4 to 8 .*before tensor 'b', belong to no tensor",
    ),
    "gap at the end": ({"a": tensor("U8", [8], 0, 8)}, "8 bytes after its last tensor"),
    "overlap": (
        {"a": tensor("U8", [10], 0, 10), "b": tensor("U8", [8], 8, 16)},
        "tensor 'b'.*begins at byte 8 of the data, inside tensor 'a', which ends at byte 10",
    ),
    "the same bytes twice": (
        {"a": tensor("U8", [16], 0, 16), "b": tensor("U8", [16], 0, 16)},
        "inside tensor 'a'",
    ),
    "empty tensor inside another": (
        {"a": tensor("U8", [16], 0, 16), "b": tensor("U8", [0], 4, 4)},
        "inside tensor 'a'",
    ),
}


def refuse(folder: Path, content: bytes, words: str) -> None:
    path = write(folder, content)
    with pytest.raises(QllmFileError, match=words) as caught:
        SafetensorsFile(path)
    sentence = str(caught.value)
    assert isinstance(caught.value, OSError) and str(path) in sentence
    assert "\n" not in sentence and len(sentence) < 1000


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_file_is_refused_with_words(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE_FILES[name]
    refuse(tmp_path, make(), words)


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    entry, words = HOSTILE_TENSORS[name]
    refuse(tmp_path, one(entry), words)
    with pytest.raises(QllmFileError, match="tensor 'w'"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", HOSTILE_LAYOUTS)
def test_hostile_layout_is_refused_with_numbers(tmp_path: Path, name: str) -> None:
    header, words = HOSTILE_LAYOUTS[name]
    refuse(tmp_path, pack(header, bytes(16)), words)


def test_header_above_100_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 600)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # sparse: takes no room on the disk
    with pytest.raises(
        QllmFileError, match="states a header of 100000001 bytes.*at most 100000000"
    ):
        SafetensorsFile(path)


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path, pack({"\x1b[2Jw\n": tensor("F31")}, bytes(8)))
    with pytest.raises(QllmFileError, match="unknown dtype") as caught:
        SafetensorsFile(path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, words in [
        (tmp_path, "no regular file"),
        (tmp_path / "fifo", "no regular file"),
        (Path("/dev/null"), "no regular file"),
        (tmp_path / "absent", "cannot be opened: No such file"),
    ]:
        with pytest.raises(QllmFileError, match=words):
            SafetensorsFile(path)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path, one(tensor()))) as file:
        assert "w" in file and "v" not in file
        with pytest.raises(QllmFileError, match="has no tensor 'v'"):
            file.entry("v")


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def _replace(path: Path) -> None:
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    info = path.stat()
    os.utime(twin, ns=(info.st_atime_ns, info.st_mtime_ns))
    os.replace(twin, path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 1), id="truncated"),
        pytest.param(lambda path: path.open("ab").write(b"x"), id="longer"),
        pytest.param(_touch, id="other time"),
        pytest.param(_replace, id="replaced by an equal file"),
        pytest.param(os.remove, id="removed"),
    ],
)
def test_a_file_changed_after_it_was_opened_is_refused(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = write(tmp_path, one(tensor()))
    with SafetensorsFile(path) as file:
        assert file.unchanged() and file.entry("w").nbytes == 8
        change(path)
        assert not file.unchanged()
        with pytest.raises(QllmFileError, match="changed, replaced or removed after it was opened"):
            file.entry("w")


# ------------------------------------------------------------------------------------ properties

GOOD = pack(
    {
        "__metadata__": {"format": "pt"},
        "a.b": tensor("F16", [2, 3], 0, 12),
        "c": tensor("U8", [4], 12, 16),
        "d": tensor("F32", [], 16, 20),
    },
    bytes(range(20)),
)
FILES = settings(
    deadline=None,
    max_examples=300,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def agrees_with_the_library(path: Path) -> None:
    """Either the file is refused in one sentence, or the library reads the same tensors from it."""
    try:
        file = SafetensorsFile(path)
    except QllmFileError as error:
        assert "\n" not in str(error)
        return
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert sorted(file.names) == sorted(theirs)
    for name in file.names:
        entry = file.entry(name)
        assert bytes(entry.data) == bytes(theirs[name]["data"])
        assert list(entry.shape) == theirs[name]["shape"] and entry.dtype == theirs[name]["dtype"]
    file.close()


@FILES
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 8),
    tail=st.binary(max_size=4),
)
def test_a_damaged_file_is_refused_or_means_what_the_library_reads(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    content = bytearray(GOOD)
    for position, value in edits:
        content[position] = value
    agrees_with_the_library(write(tmp_path, bytes(content[: len(content) - cut]) + tail))


SCRAPS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**64)
    | st.floats(allow_nan=False)
    | st.sampled_from(["F32", "BF16", "U8", "w", ""]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "w"]), inner, max_size=3),
    max_leaves=8,
)


@FILES
@given(
    header=st.dictionaries(
        st.sampled_from(["w", "v", "__metadata__"]),
        st.builds(
            tensor,
            st.sampled_from(["F32", "U8", 3]),
            SCRAPS | st.just([2]),
            SCRAPS,
            SCRAPS | st.just(8),
        )
        | SCRAPS,
        max_size=3,
    )
)
def test_any_header_is_refused_or_means_what_the_library_reads(
    tmp_path: Path, header: dict
) -> None:
    agrees_with_the_library(write(tmp_path, pack(header, bytes(8))))


@FILES
@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["<f2", "<f4", "<u1", "<i8"]), st.lists(st.integers(0, 3), max_size=4)
        ),
        max_size=6,
    )
)
def test_every_file_of_the_library_reads_back(tmp_path: Path, arrays: dict) -> None:
    expected = {
        name: np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
        for name, (dtype, shape) in arrays.items()
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(expected, path)
    with SafetensorsFile(path) as file:
        assert sorted(file.names) == sorted(expected)
        for name, array in expected.items():
            assert np.array_equal(file.entry(name).numpy(), array)
