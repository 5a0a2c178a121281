"""Quantized layers as bitsandbytes stores them: what bitsandbytes saved is read, what is written
has the same bytes as what bitsandbytes would write, and every damaged state ends in one
sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import pytest

from qllm.bnb import BnbTensor, quantization_config, read_weight, state_dict_entries
from qllm.checkpoint import Checkpoint
from qllm.errors import QllmFileError, QllmUnsupportedError, QllmValueError

save_numpy = pytest.importorskip(
    "safetensors.numpy", reason="the library writes the files of these tests"
).save_file

FORMATS_4BIT = ["nf4", "fp4", "nf4-dq", "fp4-dq"]
PREFIX = "model.layers.0.mlp.up_proj"
WEIGHT = PREFIX + ".weight"


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch", reason="bitsandbytes, the oracle, works on torch tensors")
    pytest.importorskip("bitsandbytes", reason="it is the oracle of this test")
    return module


def save_bnb(
    torch: Any,
    folder: Path,
    format: str,
    rows: int,
    cols: int,
    dtype: str = "bfloat16",
    storage: str = "uint8",
    blocksize: int = 64,
) -> dict[str, Any]:
    """The state dict of a bitsandbytes layer with random weights, saved as a folder."""
    import bitsandbytes as bnb
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator).to(getattr(torch, dtype))
    if format == "int8":
        layer = bnb.nn.Linear8bitLt(cols, rows, bias=True, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(cols, rows, bias=True)
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics="-dq" in format,
            quant_type=format[:3],
            quant_storage=getattr(torch, storage),
            module=layer,
        )
    state = {f"{PREFIX}.{key}": value for key, value in layer.to("cpu").state_dict().items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(state, folder / "model.safetensors")
    return state


def stored(torch: Any, tensor: Any) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


# ------------------------------------------------------------------- against bitsandbytes itself

CASES = [
    (format, rows, cols)
    for format in FORMATS_4BIT
    for rows, cols in [(96, 128), (5, 40), (3, 7), (1, 2), (300, 172)]
]


@pytest.mark.parametrize("format, rows, cols", CASES)
def test_4bit_layers_of_bitsandbytes_are_read(
    torch: Any, tmp_path: Path, format: str, rows: int, cols: int
) -> None:
    state = save_bnb(torch, tmp_path, format, rows, cols)
    with Checkpoint.open(tmp_path) as checkpoint:
        weight = read_weight(checkpoint, PREFIX)
        assert weight is not None and weight.format == format and weight.shape == (rows, cols)
        assert weight.blocksize == 64 and weight.dtype_name == "bfloat16" and weight.scb is None
        assert np.array_equal(weight.packed, state[WEIGHT].numpy().reshape(-1))
        assert np.array_equal(weight.quant_map, state[WEIGHT + ".quant_map"].numpy())
        absmax = state[WEIGHT + ".absmax"].numpy()
        if format.endswith("-dq"):
            assert weight.absmax is None and np.array_equal(weight.absmax_codes, absmax)
            for name in ("nested_absmax", "nested_quant_map"):
                assert np.array_equal(getattr(weight, name), state[f"{WEIGHT}.{name}"].numpy())
            assert weight.offset == np.float32(weight.offset)
        else:
            assert weight.absmax_codes is None and np.array_equal(weight.absmax, absmax)


@pytest.mark.parametrize("format, rows, cols", CASES + [("int8", 12, 40), ("int8", 1, 1)])
def test_written_entries_equal_those_of_bitsandbytes(
    torch: Any, tmp_path: Path, format: str, rows: int, cols: int
) -> None:
    state = save_bnb(torch, tmp_path, format, rows, cols)
    with Checkpoint.open(tmp_path) as checkpoint:
        entries = state_dict_entries(PREFIX, read_weight(checkpoint, PREFIX))
    expected = {name: value for name, value in state.items() if name != PREFIX + ".bias"}
    assert set(entries) == set(expected)
    for name, value in expected.items():
        array = stored(torch, value)
        assert entries[name].dtype == array.dtype and entries[name].shape == array.shape, name
        assert entries[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_packed_bytes_under_another_storage_dtype(torch: Any, tmp_path: Path, storage: str) -> None:
    save_bnb(torch, tmp_path / "plain", "nf4", 16, 64)
    save_bnb(torch, tmp_path / "other", "nf4", 16, 64, storage=storage)
    with Checkpoint.open(tmp_path / "plain") as plain, Checkpoint.open(tmp_path / "other") as other:
        assert other.entry(WEIGHT).dtype != "U8"
        assert np.array_equal(read_weight(plain, PREFIX).packed, read_weight(other, PREFIX).packed)


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_blocksizes_and_dtypes_of_bitsandbytes(
    torch: Any, tmp_path: Path, blocksize: int, dtype: str
) -> None:
    save_bnb(torch, tmp_path, "fp4", 96, 128, dtype, blocksize=blocksize)
    with Checkpoint.open(tmp_path) as checkpoint:
        weight = read_weight(checkpoint, PREFIX)
        assert weight.blocksize == blocksize and weight.dtype_name == dtype
        assert weight.absmax.size == 96 * 128 // blocksize


@pytest.mark.parametrize("format", FORMATS_4BIT)
def test_bitsandbytes_dequantizes_what_is_written(torch: Any, tmp_path: Path, format: str) -> None:
    """Our entries, given to bitsandbytes' own reader, are the weight that it had quantized."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = save_bnb(torch, tmp_path, format, 64, 128, "float32")
    with Checkpoint.open(tmp_path) as checkpoint:
        entries = state_dict_entries(PREFIX, read_weight(checkpoint, PREFIX))

    def dequantized(tensors: dict[str, Any]) -> Any:
        parts = {k: v for k, v in tensors.items() if k.startswith(WEIGHT + ".")}
        return dequantize_4bit(tensors[WEIGHT], QuantState.from_dict(parts, torch.device("cpu")))

    ours = {name: torch.from_numpy(array.copy()) for name, array in entries.items()}
    assert torch.equal(dequantized(ours), dequantized(dict(state)))


def test_int8_layers_of_bitsandbytes_are_read(torch: Any, tmp_path: Path) -> None:
    state = save_bnb(torch, tmp_path, "int8", 24, 40, "float16")
    with Checkpoint.open(tmp_path) as checkpoint:
        weight = read_weight(checkpoint, PREFIX)
        assert weight.format == "int8" and weight.shape == (24, 40) and weight.blocksize is None
        assert weight.packed.dtype == np.int8
        assert np.array_equal(weight.packed, state[WEIGHT].numpy())
        assert np.array_equal(weight.scb, state[PREFIX + ".SCB"].numpy())


@pytest.mark.parametrize("format", [*FORMATS_4BIT, "int8"])
def test_quantization_config_is_that_of_transformers(format: str) -> None:
    transformers = pytest.importorskip("transformers", reason="it is the oracle of this test")
    expected = transformers.BitsAndBytesConfig(
        load_in_8bit=format == "int8",
        load_in_4bit=format != "int8",
        llm_int8_threshold=5.0,
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_type="fp4" if format == "int8" else format[:3],
        bnb_4bit_use_double_quant=format.endswith("-dq"),
    ).to_dict()
    found = quantization_config(
        format, compute_dtype="bfloat16", skip_modules=["lm_head"], threshold=5.0
    )
    assert json.dumps(found) == json.dumps(expected)


# ---------------------------------------------------------------------- without any other library


def weight_4bit(nested: bool = False, rows: int = 4, cols: int = 160) -> SimpleNamespace:
    """A weight of made-up values, blocksize 64: (4, 160) has 10 blocks and 320 packed bytes."""
    blocks = -(-rows * cols // 64)
    weight = SimpleNamespace(
        format="nf4-dq" if nested else "nf4",
        shape=(rows, cols),
        blocksize=64,
        dtype_name="bfloat16",
        packed=(np.arange((rows * cols + 1) // 2) % 256).astype(np.uint8),
        quant_map=np.linspace(-1, 1, 16, dtype=np.float32),
    )
    if nested:
        weight.absmax_codes = np.arange(blocks, dtype=np.uint8)
        weight.nested_absmax = np.ones(-(-blocks // 256), np.float32)
        weight.nested_quant_map = np.linspace(-1, 1, 256, dtype=np.float32)
        weight.offset = 0.1
    else:
        weight.absmax = np.linspace(0, 1, blocks, dtype=np.float32)
    return weight


def weight_int8() -> SimpleNamespace:
    """Three rows of four; the second is all zero and has the scale 0."""
    return SimpleNamespace(
        format="int8",
        shape=(3, 4),
        scb=np.float32([1, 0, 2]),
        packed=np.int8([[127, 1, 2, 3], [0, 0, 0, 0], [-127, 5, 6, 7]]),
    )


def open_entries(folder: Path, entries: dict[str, np.ndarray]) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_numpy(entries, folder / "model.safetensors")
    return Checkpoint.open(folder)


def fields(weight: Any) -> dict[str, Any]:
    return {name: getattr(weight, name, None) for name in BnbTensor.__dataclass_fields__}


@pytest.mark.parametrize(
    "weight",
    [
        weight_4bit(),
        weight_4bit(True),
        weight_int8(),
        weight_4bit(rows=3, cols=3),
        weight_4bit(True, 300, 64),
    ],
)
def test_written_weights_read_back(tmp_path: Path, weight: SimpleNamespace) -> None:
    with open_entries(tmp_path, state_dict_entries(PREFIX, weight)) as checkpoint:
        read = read_weight(checkpoint, PREFIX)
        if weight.format.endswith("-dq"):
            weight.offset = float(np.float32(0.1))
        for name, value in fields(weight).items():
            assert np.array_equal(getattr(read, name), value), name


def test_the_state_is_written_as_text_with_the_keys_in_order() -> None:
    entries = state_dict_entries(PREFIX, weight_4bit(True))
    text = entries[WEIGHT + ".quant_state.bitsandbytes__nf4"].tobytes().decode()
    assert (
        text
        == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 160], '
        '"nested_blocksize": 256, "nested_dtype": "float32", '
        '"nested_offset": 0.10000000149011612}'
    )


def test_minus_zero_of_the_table_is_written_as_zero() -> None:
    weight = weight_4bit()
    weight.quant_map[8] = -0.0
    table = state_dict_entries(PREFIX, weight)[WEIGHT + ".quant_map"]
    assert not np.signbit(table[8]) and np.signbit(weight.quant_map[8])


def test_arrays_of_another_dtype_are_not_converted() -> None:
    weight = weight_4bit()
    weight.absmax = weight.absmax.astype(np.float64)
    with pytest.raises(QllmValueError, match="array of float32 was expected, not of float64"):
        state_dict_entries(PREFIX, weight)


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantization_config("int4"),
        lambda: state_dict_entries(PREFIX, SimpleNamespace(format="int4", shape=(1, 1))),
    ],
)
def test_a_format_that_bitsandbytes_has_not_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(QllmValueError, match="no format 'int4'; it has nf4, fp4"):
        call()


def test_an_unquantized_weight_is_none(tmp_path: Path) -> None:
    with open_entries(
        tmp_path, {WEIGHT: np.zeros((2, 2), np.float16), PREFIX + ".bias": np.zeros(2, np.float16)}
    ) as checkpoint:
        assert read_weight(checkpoint, PREFIX) is None
        with pytest.raises(QllmFileError, match="has no tensor 'other.weight'"):
            read_weight(checkpoint, "other")


def test_layers_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    entries = state_dict_entries("a.b", weight_4bit()) | state_dict_entries("a.b2", weight_int8())
    with open_entries(tmp_path, entries) as checkpoint:
        assert read_weight(checkpoint, "a.b").format == "nf4"
        assert read_weight(checkpoint, "a.b2").format == "int8"


# -------------------------------------------------------------------------------- hostile states

STATE = WEIGHT + ".quant_state.bitsandbytes__nf4"
Entries = dict[str, np.ndarray]


def text(value: str | bytes) -> np.ndarray:
    return np.frombuffer(value if isinstance(value, bytes) else value.encode(), np.uint8).copy()


def set_state(**members: object) -> Callable[[Entries], object]:
    """Replaces members of the JSON state; the value `...` removes one."""

    def change(entries: Entries) -> None:
        state = json.loads(entries[STATE].tobytes()) | members
        kept = {key: value for key, value in state.items() if value is not ...}
        entries[STATE] = text(json.dumps(kept))

    return change


def put(part: str, array: np.ndarray) -> Callable[[Entries], object]:
    return lambda entries: entries.update({WEIGHT + part: array})


def raw_state(value: str | bytes) -> Callable[[Entries], object]:
    return lambda entries: entries.update({STATE: text(value)})


def at(part: str, index: int, value: float) -> Callable[[Entries], object]:
    """Sets one value of a part."""

    def change(entries: Entries) -> None:
        array = entries[WEIGHT + part].copy()
        array[index] = value
        entries[WEIGHT + part] = array

    return change


def drop(part: str) -> Callable[[Entries], object]:
    return lambda entries: entries.pop(WEIGHT + part)


def f32(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


TWICE = '{"quant_type": "nf4", "blocksize": 64, "blocksize": 128}'

HOSTILE_4BIT: dict[str, tuple[Callable[[Entries], object], str]] = {
    "blocksize 0": (set_state(blocksize=0), "blocksize '0'; a power of two from 32 to 4096"),
    "blocksize negative": (set_state(blocksize=-64), "blocksize '-64'; a power of two"),
    "blocksize odd": (set_state(blocksize=63), "blocksize '63'; a power of two"),
    "blocksize no power of two": (set_state(blocksize=96), "blocksize '96'; a power of two"),
    "blocksize 16": (set_state(blocksize=16), "blocksize '16'; a power of two from 32"),
    "blocksize 2^40": (set_state(blocksize=2**40), "blocksize '1099511627776'; a power of two"),
    "blocksize a float": (set_state(blocksize=64.0), "blocksize '64.0'; a power of two"),
    "blocksize a bool": (set_state(blocksize=True), "blocksize 'True'; a power of two"),
    "blocksize a string": (set_state(blocksize="64"), "a power of two"),
    "blocksize other than that of absmax": (
        set_state(blocksize=128),
        "shape \\[10\\]; F32 of shape \\[5\\]",
    ),
    "absmax too short": (put(".absmax", f32(9)), "F32 of shape \\[9\\]; F32 of shape \\[10\\]"),
    "absmax too long": (put(".absmax", f32(11)), "F32 of shape \\[11\\]; F32 of shape \\[10\\]"),
    "absmax empty": (put(".absmax", f32(0)), "F32 of shape \\[0\\]"),
    "absmax of two dimensions": (put(".absmax", f32(10).reshape(10, 1)), "shape \\[10, 1\\]"),
    "absmax F16": (put(".absmax", np.ones(10, np.float16)), "is F16 of shape"),
    "absmax codes without nested parts": (put(".absmax", np.ones(10, np.uint8)), "is U8 of shape"),
    "absmax NaN": (at(".absmax", 3, np.nan), "absmax' .*value nan at index 3; finite"),
    "absmax Inf": (at(".absmax", 4, np.inf), "absmax' .*value inf at index 4; finite"),
    "absmax -Inf": (at(".absmax", 4, -np.inf), "value -inf at index 4"),
    "absmax negative": (at(".absmax", 5, -0.5), "value -0.5 at index 5; a scale is never negative"),
    "absmax missing": (drop(".absmax"), "lacks its part 'absmax'"),
    "code table of 15": (
        put(".quant_map", f32(15)),
        "quant_map'.*F32 of shape \\[15\\]; F32 of shape \\[16\\]",
    ),
    "code table of 256": (
        put(".quant_map", f32(256)),
        "F32 of shape \\[256\\]; F32 of shape \\[16\\]",
    ),
    "code table NaN": (at(".quant_map", 2, np.nan), "quant_map' .*value nan at index 2"),
    "code table Inf": (at(".quant_map", 15, np.inf), "quant_map' .*value inf at index 15"),
    "code table missing": (drop(".quant_map"), "lacks its part 'quant_map'"),
    "dtype load": (
        set_state(dtype="load"),
        "dtype 'load'; expected is one of bfloat16, float16, float32",
    ),
    "dtype int8": (set_state(dtype="int8"), "dtype 'int8'; expected is one of"),
    "dtype a list": (set_state(dtype=["float16"]), "expected is one of bfloat16"),
    "quant_type of another name": (
        set_state(quant_type="fp4"),
        "quant_type 'fp4', but its name says nf4",
    ),
    "quant_type a number": (set_state(quant_type=4), "quant_type '4'"),
    "shape null": (set_state(shape=None), "shape 'None'; two positive integers"),
    "shape of one": (set_state(shape=[640]), "two positive integers"),
    "shape of three": (set_state(shape=[4, 4, 40]), "two positive integers"),
    "shape negative": (set_state(shape=[-4, -160]), "two positive integers"),
    "shape with 0": (set_state(shape=[0, 160]), "two positive integers"),
    "shape of floats": (set_state(shape=[4.0, 160]), "two positive integers"),
    "shape of bools": (set_state(shape=[True, 640]), "two positive integers"),
    "shape 2^63": (set_state(shape=[1, 2**63]), "two positive integers"),
    "shape product overflow": (set_state(shape=[2**32, 2**32]), "more than 2\\^63-1 elements"),
    "shape larger than the bytes": (
        set_state(shape=[4, 168]),
        "has 320 packed bytes, but 4 x 168 = 672 elements.*take 336",
    ),
    "shape smaller than the bytes": (set_state(shape=[4, 80]), "320 packed bytes, but 4 x 80"),
    "odd count without its last byte": (
        set_state(shape=[1, 641]),
        "1 x 641 = 641 elements of 4 bits, an odd number.*take 321",
    ),
    "packed as a row": (put("", np.zeros((1, 320), np.uint8)), "stored as one column"),
    "packed of one dimension": (put("", np.zeros(320, np.uint8)), "stored as one column"),
    "packed cut": (put("", np.zeros((319, 1), np.uint8)), "has 319 packed bytes"),
    "two states": (put(".quant_state.bitsandbytes__fp4", text("{}")), "exactly one of.*but has 2"),
    "no state": (drop(".quant_state.bitsandbytes__nf4"), "exactly one of.*but has 0"),
    "an unknown part": (
        put(".zero_point", f32(1)),
        "the part 'zero_point', which no 4-bit weight has",
    ),
    "another quantization type": (
        put(".quant_state.bitsandbytes__int4", text("{}")),
        "the part 'quant_state.bitsandbytes__int4'",
    ),
    "int8 scales too": (
        lambda entries: entries.update({PREFIX + ".SCB": f32(4)}),
        "both 4-bit state and int8 scales",
    ),
    "one nested part": (put(".nested_absmax", f32(1)), "lacks its part 'nested_quant_map'"),
    "state of another dtype": (
        put(STATE.removeprefix(WEIGHT), np.zeros(9, np.int8)),
        "is I8 of shape",
    ),
    "state of two dimensions": (
        put(STATE.removeprefix(WEIGHT), np.zeros((3, 3), np.uint8)),
        "U8 of one dimension",
    ),
    "state too long": (raw_state(" " * 4097), "with at most 4096 bytes"),
    "state empty": (raw_state(""), "is not valid JSON"),
    "state not JSON": (raw_state("nf4"), "is not valid JSON"),
    "state a list": (raw_state("[]"), "must be a JSON object, but is a list"),
    "state not UTF-8": (raw_state(b'{"\xff": 1}'), "is not UTF-8"),
    "state with a byte order mark": (raw_state(b"\xef\xbb\xbf{}"), "byte order mark"),
    "state with NaN": (raw_state('{"blocksize": NaN}'), "holds NaN"),
    "state with 1e999": (raw_state('{"blocksize": 1e999}'), "holds 1e999"),
    "state nested deeply": (raw_state("[" * 4000), "nested too deep|not valid JSON"),
    "state with a key twice": (raw_state(TWICE), "has the key 'blocksize' twice"),
    "state lacks a key": (set_state(dtype=...), "has the keys .*; expected are"),
    "state with an unknown key": (set_state(code=[1]), "has the keys .*'code'.*expected are"),
    "nested state without nested parts": (
        set_state(nested_blocksize=256, nested_dtype="float32", nested_offset=0.0),
        "has the keys",
    ),
}

HOSTILE_NESTED: dict[str, tuple[Callable[[Entries], object], str]] = {
    "nested map of 255": (
        put(".nested_quant_map", f32(255)),
        "shape \\[255\\]; F32 of shape \\[256\\]",
    ),
    "nested map of 257": (
        put(".nested_quant_map", f32(257)),
        "shape \\[257\\]; F32 of shape \\[256\\]",
    ),
    "nested map NaN": (at(".nested_quant_map", 7, np.nan), "nested_quant_map' .*nan at index 7"),
    "nested map missing": (drop(".nested_quant_map"), "lacks its part 'nested_quant_map'"),
    "nested absmax missing": (drop(".nested_absmax"), "lacks its part 'nested_absmax'"),
    "nested absmax too long": (
        put(".nested_absmax", f32(2)),
        "shape \\[2\\]; F32 of shape \\[1\\]",
    ),
    "nested absmax NaN": (at(".nested_absmax", 0, np.nan), "nested_absmax' .*nan at index 0"),
    "nested absmax Inf": (at(".nested_absmax", 0, np.inf), "nested_absmax' .*inf at index 0"),
    "nested absmax negative": (at(".nested_absmax", 0, -1), "nested_absmax'.*never negative"),
    "codes too short": (
        put(".absmax", np.zeros(9, np.uint8)),
        "U8 of shape \\[9\\]; U8 of shape \\[10\\]",
    ),
    "codes F32": (put(".absmax", f32(10)), "F32 of shape \\[10\\]; U8 of shape \\[10\\]"),
    "codes I8": (put(".absmax", np.zeros(10, np.int8)), "is I8 of shape"),
    "nested blocksize 64": (
        set_state(nested_blocksize=64),
        "nested_blocksize '64'; 256 was expected",
    ),
    "nested blocksize 0": (set_state(nested_blocksize=0), "nested_blocksize '0'; 256 was expected"),
    "nested blocksize a float": (set_state(nested_blocksize=256.0), "nested_blocksize '256.0'"),
    "nested dtype load": (
        set_state(nested_dtype="load"),
        "nested_dtype 'load'; float32 was expected",
    ),
    "nested offset a string": (set_state(nested_offset="0"), "nested_offset '0'; a number"),
    "nested offset a bool": (set_state(nested_offset=True), "nested_offset 'True'; a number"),
    "nested offset null": (set_state(nested_offset=None), "nested_offset 'None'; a number"),
    "nested offset 1e300": (set_state(nested_offset=1e300), "nested_offset '1e\\+300'; a number"),
    "nested offset absent": (set_state(nested_offset=...), "has the keys"),
}

SCB, LAYOUT = PREFIX + ".SCB", PREFIX + ".weight_format"

HOSTILE_INT8: dict[str, tuple[str, np.ndarray | None, str]] = {
    "scale 0 of a row that is not": (SCB, np.float32([0, 0, 2]), "the scale 0 for row 0, whose"),
    "scale too short": (SCB, f32(2), "F32 of shape \\[2\\]; F32 of shape \\[3\\]"),
    "scale of two dimensions": (SCB, f32(3).reshape(3, 1), "F32 of shape \\[3, 1\\]; F32 of shape"),
    "scale F16": (SCB, np.ones(3, np.float16), "is F16 of shape"),
    "scale NaN": (SCB, np.float32([1, np.nan, 2]), "value nan at index 1; finite"),
    "scale Inf": (SCB, np.float32([1, 0, np.inf]), "value inf at index 2; finite"),
    "scale negative": (SCB, np.float32([1, 0, -2]), "value -2.0 at index 2; a scale is never"),
    "scale missing": (SCB, None, "has neither .*absmax' nor .*SCB'"),
    "layout of Turing": (LAYOUT, np.array(2, np.uint8), "is 2; only 0, int8 weights in rows"),
    "layout of two values": (LAYOUT, np.zeros(2, np.uint8), "one U8 was expected"),
    "layout a float": (LAYOUT, np.zeros((), np.float32), "one U8 was expected"),
    "weight U8": (WEIGHT, np.zeros((3, 4), np.uint8), "I8 of two dimensions was expected"),
    "weight of one dimension": (WEIGHT, np.zeros(12, np.int8), "I8 of two dimensions"),
    "weight F16 beside scales": (WEIGHT, np.zeros((3, 4), np.float16), "I8 of two dimensions"),
    "weight without rows": (WEIGHT, np.zeros((0, 4), np.int8), "I8 of two dimensions"),
}


def refuse(folder: Path, entries: Entries, kind: type, words: str) -> None:
    with open_entries(folder, entries) as checkpoint:
        with pytest.raises(kind, match=words) as caught:
            read_weight(checkpoint, PREFIX)
    assert str(folder) in str(caught.value) and PREFIX in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE_4BIT)
def test_hostile_4bit_state_is_refused_with_words(tmp_path: Path, name: str) -> None:
    change, words = HOSTILE_4BIT[name]
    entries = state_dict_entries(PREFIX, weight_4bit())
    change(entries)
    refuse(tmp_path, entries, QllmFileError, words)


@pytest.mark.parametrize("name", HOSTILE_NESTED)
def test_hostile_nested_state_is_refused_with_words(tmp_path: Path, name: str) -> None:
    change, words = HOSTILE_NESTED[name]
    entries = state_dict_entries(PREFIX, weight_4bit(nested=True))
    change(entries)
    refuse(tmp_path, entries, QllmFileError, words)


@pytest.mark.parametrize("name", HOSTILE_INT8)
def test_hostile_int8_layer_is_refused_with_words(tmp_path: Path, name: str) -> None:
    part, value, words = HOSTILE_INT8[name]
    entries = state_dict_entries(PREFIX, weight_int8()) | {part: value}
    kind = QllmUnsupportedError if name == "layout of Turing" else QllmFileError
    refuse(
        tmp_path, {key: array for key, array in entries.items() if array is not None}, kind, words
    )


def test_an_offset_of_few_digits_is_rounded_to_float32(tmp_path: Path) -> None:
    entries = state_dict_entries(PREFIX, weight_4bit(nested=True))
    set_state(nested_offset=0.1)(entries)
    with open_entries(tmp_path, entries) as checkpoint:
        assert read_weight(checkpoint, PREFIX).offset == float(np.float32(0.1)) != 0.1


def test_int8_without_the_layout_of_old_files_is_rows(tmp_path: Path) -> None:
    entries = state_dict_entries(PREFIX, weight_int8())
    del entries[LAYOUT]
    with open_entries(tmp_path, entries) as checkpoint:
        assert np.array_equal(read_weight(checkpoint, PREFIX).packed, weight_int8().packed)
