"""The layouts in which bitsandbytes stores quantized layers, read strictly, written byte for byte.

A 4-bit layer at PREFIX (bitsandbytes `Linear4bit`, `QuantState.as_dict(packed=True)`), n = N * K:

    PREFIX.weight                      U8   ((n + 1) // 2, 1)       two codes a byte, first one high
    PREFIX.weight.absmax               F32  (ceil(n / blocksize),)  U8 codes when nested
    PREFIX.weight.quant_map            F32  (16,)                   code -> value
    PREFIX.weight.nested_absmax        F32  (ceil(blocks / 256),)   when nested
    PREFIX.weight.nested_quant_map     F32  (256,)                  when nested
    PREFIX.weight.quant_state.bitsandbytes__nf4 (or __fp4)  U8 (L,) UTF-8 JSON

The packed bytes may be stored under another dtype (`bnb_4bit_quant_storage`): same bytes.

An int8 layer (`Linear8bitLt`): PREFIX.weight I8 (N, K), PREFIX.SCB F32 (N,), and
PREFIX.weight_format U8 () = 0 for rows (absent in old files).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import QllmFileError, QllmUnsupportedError, QllmValueError
from .quantize import BLOCKSIZES, NESTED_BLOCKSIZE
from .safetensors import TensorEntry
from .strict_json import parse_object, quoted

FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8")

_STATE = "quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096
_DTYPES = ("bfloat16", "float16", "float32")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE + "nf4", _STATE + "fp4")
"""What can stand behind `PREFIX.weight.` of a 4-bit layer."""

_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_STATE_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, eq=False)
class BnbTensor:
    """A quantized weight W (N, K) as bitsandbytes stores it, in read-only views of the file.

    format            nf4 fp4                nf4-dq fp4-dq          int8
    packed            uint8 ((N*K+1)//2,)    uint8 ((N*K+1)//2,)    int8 (N, K)
    blocksize         32 .. 4096             32 .. 4096             None
    absmax            float32 (blocks,)      None                   None
    absmax_codes      None                   uint8 (blocks,)        None
    nested_absmax     None                   float32 (nested,)      None
    nested_quant_map  None                   float32 (256,)         None
    offset            None                   float                  None
    quant_map         float32 (16,)          float32 (16,)          None
    scb               None                   None                   float32 (N,)
    dtype_name        of what dequantizing returns: bfloat16, float16 or float32; None for int8

    Element (r, c) has flat index i = r * K + c, its code is the high nibble of packed[i // 2] for
    even i and the low one for odd i, and absmax[i // blocksize] belongs to it. When nested,
    absmax[b] = nested_quant_map[absmax_codes[b]] * nested_absmax[b // 256] + offset.
    int8: W = packed * scb / 127.
    """

    format: str
    shape: tuple[int, int]
    packed: np.ndarray
    blocksize: int | None = None
    absmax: np.ndarray | None = None
    absmax_codes: np.ndarray | None = None
    nested_absmax: np.ndarray | None = None
    nested_quant_map: np.ndarray | None = None
    offset: float | None = None
    quant_map: np.ndarray | None = None
    scb: np.ndarray | None = None
    dtype_name: str | None = None


class Tensors(Protocol):
    """Tensors by name: a `Checkpoint`, or what offers the same of another source."""

    def names(self, prefix: str, /) -> list[str]: ...
    def entry(self, name: str, /) -> TensorEntry: ...
    def __contains__(self, name: str, /) -> bool: ...


def read_weight(checkpoint: Tensors, prefix: str) -> BnbTensor | None:
    """The quantized weight of the layer at `prefix` ("model.layers.0.mlp.up_proj"), or None when
    the weight is not quantized.

    Every part is checked against the others and against what bitsandbytes can write. Raises
    `QllmFileError` for a missing weight and for anything that does not fit, `QllmUnsupportedError`
    for layouts of int8 weights other than rows.
    """
    weight = checkpoint.entry(prefix + ".weight")
    parts = {
        name.removeprefix(weight.name + "."): checkpoint.entry(name)
        for name in checkpoint.names(weight.name + ".")
    }
    scb = prefix + ".SCB"
    if parts:
        if scb in checkpoint:
            raise QllmFileError(
                f"{_what(weight)} has both 4-bit state and int8 scales {quoted(scb)}"
            )
        return _read_4bit(weight, parts)
    if scb in checkpoint:
        layout = prefix + ".weight_format"
        return _read_int8(
            weight,
            checkpoint.entry(scb),
            checkpoint.entry(layout) if layout in checkpoint else None,
        )
    if weight.dtype in ("U8", "I8"):
        raise QllmFileError(
            f"{_what(weight)} is {weight.dtype}, as quantized weights are, but the "
            f"checkpoint has neither {quoted(weight.name + '.absmax')} nor {quoted(scb)}"
        )
    return None


def _read_4bit(weight: TensorEntry, parts: dict[str, TensorEntry]) -> BnbTensor:
    what = _what(weight)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise QllmFileError(
            f"{what} has the part {quoted(unknown[0])}, which no 4-bit weight has; known are "
            + ", ".join(PARTS)
        )
    states = [key for key in parts if key.startswith(_STATE)]
    if len(states) != 1:
        raise QllmFileError(
            f"{what} needs exactly one of {_STATE}nf4 and {_STATE}fp4, but has {len(states)}"
        )
    nested = "nested_absmax" in parts or "nested_quant_map" in parts
    needed = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    missing = sorted(needed - set(parts))
    if missing:
        raise QllmFileError(f"{what} lacks its part {quoted(missing[0])}")
    quant_type = states[0].removeprefix(_STATE)
    state = _read_state(parts[states[0]], quant_type, nested)
    rows, cols = state["shape"]
    blocks = -(-rows * cols // state["blocksize"])
    packed = _packed(weight, rows, cols)
    quant_map = _floats(parts["quant_map"], 16)
    if not nested:
        return BnbTensor(
            quant_type,
            (rows, cols),
            packed,
            state["blocksize"],
            absmax=_scales(parts["absmax"], blocks),
            quant_map=quant_map,
            dtype_name=state["dtype"],
        )
    return BnbTensor(
        quant_type + "-dq",
        (rows, cols),
        packed,
        state["blocksize"],
        absmax_codes=_array(parts["absmax"], "U8", (blocks,)),
        nested_absmax=_scales(parts["nested_absmax"], -(-blocks // NESTED_BLOCKSIZE)),
        nested_quant_map=_floats(parts["nested_quant_map"], 256),
        offset=state["nested_offset"],
        quant_map=quant_map,
        dtype_name=state["dtype"],
    )


def _read_state(entry: TensorEntry, quant_type: str, nested: bool) -> dict[str, Any]:
    """The checked members of the JSON state; `nested_offset` is rounded to float32."""
    what = _what(entry)
    if entry.dtype != "U8" or len(entry.shape) != 1 or entry.nbytes > _MAX_STATE_BYTES:
        raise QllmFileError(
            f"{what} is {entry.dtype} of shape {list(entry.shape)}; U8 of one dimension "
            f"with at most {_MAX_STATE_BYTES} bytes was expected"
        )
    state = parse_object(bytes(entry.data), what)
    expected = _STATE_KEYS | (_NESTED_STATE_KEYS if nested else set())
    if set(state) != expected:
        raise QllmFileError(
            f"{what} has the keys {quoted(sorted(state))}; expected are {sorted(expected)}"
        )
    if state["quant_type"] != quant_type:
        raise QllmFileError(
            f"{what} says quant_type {quoted(state['quant_type'])}, but its name says {quant_type}"
        )
    blocksize, shape = state["blocksize"], state["shape"]
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise QllmFileError(
            f"{what} has the blocksize {quoted(blocksize)}; a power of two from "
            f"{BLOCKSIZES[0]} to {BLOCKSIZES[-1]} was expected"
        )
    if not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        raise QllmFileError(
            f"{what} has the dtype {quoted(state['dtype'])}; expected is one of "
            + ", ".join(_DTYPES)
        )
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size <= _MAX_INT for size in shape)
    ):
        raise QllmFileError(
            f"{what} has the shape {quoted(shape)}; two positive integers were expected"
        )
    if shape[0] * shape[1] > _MAX_INT:
        raise QllmFileError(f"{what} has the shape {shape}, more than 2^63-1 elements")
    if nested:
        _check_nested_state(state, what)
    return state


def _check_nested_state(state: dict[str, Any], what: str) -> None:
    size, dtype, offset = (
        state[key] for key in ("nested_blocksize", "nested_dtype", "nested_offset")
    )
    if type(size) is not int or size != NESTED_BLOCKSIZE:
        raise QllmFileError(
            f"{what} has the nested_blocksize {quoted(size)}; {NESTED_BLOCKSIZE} was expected"
        )
    if dtype != "float32":
        raise QllmFileError(f"{what} has the nested_dtype {quoted(dtype)}; float32 was expected")
    if type(offset) not in (int, float) or abs(offset) > float(np.finfo(np.float32).max):
        raise QllmFileError(
            f"{what} has the nested_offset {quoted(offset)}; a number within the "
            "range of float32 was expected"
        )
    state["nested_offset"] = float(np.float32(offset))


def _packed(weight: TensorEntry, rows: int, cols: int) -> np.ndarray:
    """The packed bytes, whatever dtype they are stored under."""
    expected = (rows * cols + 1) // 2
    if weight.nbytes != expected:
        odd = (
            ", an odd number, of which the last needs a byte of its own" if rows * cols % 2 else ""
        )
        raise QllmFileError(
            f"{_what(weight)} has {weight.nbytes} packed bytes, but {rows} x {cols} = "
            f"{rows * cols} elements of 4 bits{odd} take {expected}"
        )
    if len(weight.shape) != 2 or weight.shape[1] != 1:
        raise QllmFileError(
            f"{_what(weight)} has the shape {list(weight.shape)}; packed 4-bit weights "
            "are stored as one column"
        )
    return np.frombuffer(weight.data, np.uint8)


def _read_int8(weight: TensorEntry, scales: TensorEntry, layout: TensorEntry | None) -> BnbTensor:
    what = _what(weight)
    if weight.dtype != "I8" or len(weight.shape) != 2 or 0 in weight.shape:
        raise QllmFileError(
            f"{what} is {weight.dtype} of shape {list(weight.shape)}, but has int8 scales; "
            "I8 of two dimensions was expected"
        )
    if layout is not None:
        if layout.dtype != "U8" or layout.nbytes != 1:
            raise QllmFileError(
                f"{_what(layout)} is {layout.dtype} of shape {list(layout.shape)}; one "
                "U8 was expected"
            )
        if layout.data[0] != 0:
            raise QllmUnsupportedError(
                f"{_what(layout)} is {layout.data[0]}; only 0, int8 weights in "
                "rows, is read: save the model again with a recent bitsandbytes"
            )
    codes = weight.numpy()
    scb = _scales(scales, weight.shape[0])
    for row in np.flatnonzero(scb == 0):
        if codes[row].any():
            raise QllmFileError(
                f"{_what(scales)} has the scale 0 for row {row}, whose weights in "
                f"{quoted(weight.name)} are not all 0"
            )
    return BnbTensor("int8", (weight.shape[0], weight.shape[1]), codes, scb=scb)


def _what(entry: TensorEntry) -> str:
    return f"tensor {quoted(entry.name)} of {entry.file}"


def _array(entry: TensorEntry, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if entry.dtype != dtype or entry.shape != shape:
        raise QllmFileError(
            f"{_what(entry)} is {entry.dtype} of shape {list(entry.shape)}; {dtype} of "
            f"shape {list(shape)} was expected"
        )
    return entry.numpy()


def _floats(entry: TensorEntry, count: int) -> np.ndarray:
    """`count` finite float32 values."""
    values = _array(entry, "F32", (count,))
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise QllmFileError(
            f"{_what(entry)} has the value {values[bad[0]]} at index {bad[0]}; finite "
            "values were expected"
        )
    return values


def _scales(entry: TensorEntry, count: int) -> np.ndarray:
    """`count` finite float32 values, none negative."""
    values = _floats(entry, count)
    bad = np.flatnonzero(values < 0)
    if bad.size:
        raise QllmFileError(
            f"{_what(entry)} has the value {values[bad[0]]} at index {bad[0]}; a scale "
            "is never negative"
        )
    return values


def state_dict_entries(prefix: str, weight: Any) -> dict[str, np.ndarray]:
    """The tensors under which bitsandbytes stores the quantized `weight` of the layer at `prefix`,
    in its order: the same names, dtypes, shapes and bytes.

    `weight` has the attributes of `BnbTensor` which its format uses: packed, blocksize, quant_map,
    dtype_name and absmax, or absmax_codes, nested_absmax, nested_quant_map and offset; for int8
    packed and scb. Arrays may be of any shape with the right number of elements.
    """
    name = prefix + ".weight"
    if weight.format == "int8":
        rows, cols = weight.shape
        return {
            name: _as(weight.packed, np.int8).reshape(rows, cols),
            prefix + ".SCB": _as(weight.scb, np.float32).reshape(rows),
            prefix + ".weight_format": np.zeros((), np.uint8),
        }
    if weight.format not in FORMATS:
        raise QllmValueError(
            f"bitsandbytes has no format {quoted(weight.format)}; it has " + ", ".join(FORMATS)
        )
    nested = weight.format.endswith("-dq")
    quant_type = weight.format.removesuffix("-dq")
    absmax = _as(weight.absmax_codes, np.uint8) if nested else _as(weight.absmax, np.float32)
    entries = {
        name: _as(weight.packed, np.uint8).reshape(-1, 1),
        name + ".absmax": absmax.reshape(-1),
        # + 0.0: the code of minus zero stands in the stored table as plain zero
        name + ".quant_map": _as(weight.quant_map, np.float32).reshape(16) + np.float32(0),
    }
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": int(weight.blocksize),
        "dtype": weight.dtype_name,
        "shape": [int(n) for n in weight.shape],
    }
    if nested:
        entries[name + ".nested_absmax"] = _as(weight.nested_absmax, np.float32).reshape(-1)
        entries[name + ".nested_quant_map"] = _as(weight.nested_quant_map, np.float32).reshape(256)
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(np.float32(weight.offset)),
        }
    text = json.dumps(state).encode("utf-8")
    entries[f"{name}.{_STATE}{quant_type}"] = np.frombuffer(text, np.uint8)
    return entries


def _as(array: np.ndarray, dtype: type) -> np.ndarray:
    """`array` in C order, refused when it is of another dtype: nothing is converted on the way."""
    if array.dtype != dtype:
        raise QllmValueError(f"an array of {np.dtype(dtype)} was expected, not of {array.dtype}")
    return np.ascontiguousarray(array)


def quantization_config(
    format: str,
    *,
    compute_dtype: str = "float32",
    skip_modules: list[str] | None = None,
    threshold: float = 6.0,
) -> dict[str, Any]:
    """The member `quantization_config` of config.json which makes transformers load such layers
    with bitsandbytes; equal to `BitsAndBytesConfig(...).to_dict()`.

    `format` is nf4, fp4, nf4-dq, fp4-dq or int8; `compute_dtype` the name of the dtype in which
    4-bit layers compute; `skip_modules` the layers that are not quantized (it replaces the default
    of transformers, so it must name the output embedding when that is not quantized); `threshold`
    the outlier threshold of int8.
    """
    if format not in FORMATS:
        raise QllmValueError(
            f"bitsandbytes has no format {quoted(format)}; it has " + ", ".join(FORMATS)
        )
    is_int8 = format == "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": is_int8,
        "_load_in_4bit": not is_int8,
        "llm_int8_threshold": float(threshold),
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4" if is_int8 else format.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": format.endswith("-dq"),
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": not is_int8,
        "load_in_8bit": is_int8,
    }
