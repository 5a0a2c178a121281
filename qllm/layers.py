"""The linear layers of a loaded model: from the mapped folder into the decoder, in any format."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import _core, bnb
from .architectures import FLOAT_DTYPES, Architecture, Linear
from .checkpoint import Checkpoint
from .config import FLOAT_FORMATS, ORIGINAL, QuantConfig
from .errors import QllmError, QllmFileError, QllmUnsupportedError, QllmValueError
from .report import LayerReport, QuantReport
from .safetensors import TensorEntry
from .strict_json import quoted


@dataclass(frozen=True)
class _State:
    """What the decoder holds of a layer. `stored`: it is as the folder has it. The figures of the
    error are None while nobody has asked, or where there is nothing to compare with."""

    format: str
    blocksize: int | None
    stored: bool
    bytes: int
    bits_per_weight: float
    rmse: float | None = None
    sqnr_db: float | None = None


class Layers:
    """The linear layers of `architecture`, whose tensors are in `checkpoint`, set in `decoder`.

    A change of several layers is made whole or not at all: when one fails, those before it are put
    back from the folder in the format they had, which gives the same bytes again.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, decoder: Any) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._decoder = decoder
        self._modules = {linear.module: linear for linear in architecture.modules}
        self._states: dict[str, _State] = {}
        self._turn = threading.Lock()  # changes of two threads come one after the other

    @property
    def formats(self) -> dict[str, str]:
        """Module name -> format, every linear layer."""
        return {module: self._states[module].format for module in self._modules}

    def load(self, config: QuantConfig | None) -> None:
        """Sets every layer, in the folder's format where `config` does not select it. The largest
        comes first, when least memory is taken: its pages of the file count beside it."""
        selected = set() if config is None else set(self._select(config)[0])
        largest_first = sorted(self._modules.items(), key=lambda item: -math.prod(item[1].shape))
        for module, linear in largest_first:
            if config is not None and module in selected:
                self._states[module] = self._set(linear, config.format, config.blocksize)
            else:
                self._states[module] = self._set(linear, ORIGINAL, 0)

    def shares_embedding(self, config: QuantConfig | None) -> bool:
        """Whether `load(config)` gives the decoder its embedding too: the tied output embedding, in
        the format of the folder."""
        head = self._architecture.head
        if not self._architecture.tied:
            return False
        if config is None or head.module not in self._select(config)[0]:
            return True
        return config.format in (ORIGINAL, FLOAT_DTYPES[self._entry(head).dtype])

    def quantize(self, config: QuantConfig) -> QuantReport:
        """Swaps the layers that `config` selects; see `Model.quantize_`."""
        with self._turn:
            return self._quantize(config)

    def _quantize(self, config: QuantConfig) -> QuantReport:
        selected, reasons = self._select(config)
        before, current = dict(self._states), None
        try:
            for module in selected:
                linear, state = self._modules[module], self._states[module]
                if self._is(linear, state, config):
                    reasons[module] = f"already {state.format}"
                    continue
                current = module
                self._states[module] = self._set(linear, config.format, config.blocksize)
                current = None
                self._states[module] = self._with_error(linear, self._states[module])
            changed = {m for m, state in self._states.items() if state is not before[m]}
            return self._report(changed, reasons)
        except BaseException as error:
            if current is not None:  # an interrupt can come before the change is noted
                self._note(current)
            self._put_back(before, error)
            raise

    def requantize(
        self, make: Callable[[np.ndarray], Any], format: str, config: QuantConfig
    ) -> QuantReport:
        """Replaces the layers that `config` selects by what `make` gives for their weights in the
        folder (rows, cols) float32, a `_core.QuantizedTensor`; reports call its format `format`.
        When a layer fails, those before it stay replaced."""
        with self._turn:
            selected, reasons = self._select(config)
            for module in selected:
                linear = self._modules[module]
                weight = make(to_float32(self._entry(linear)))
                self._decoder.set_linear(linear.slot, weight, self._bias(linear))
                self._states[module] = _State(
                    format, weight.blocksize, False, weight.nbytes, weight.bits_per_weight
                )
            return self._report(set(selected), reasons)

    def report(self) -> QuantReport:
        """The report of the layers as they are now."""
        with self._turn:
            return self._report(set(), {})

    def _report(self, changed: set[str], reasons: dict[str, str]) -> QuantReport:
        rows = []
        for module, linear in self._modules.items():
            state = self._with_error(linear, self._states[module])
            self._states[module] = state
            rows.append(
                LayerReport(
                    module,
                    state.format,
                    linear.shape,
                    state.bytes,
                    state.bits_per_weight,
                    state.rmse,
                    state.sqnr_db,
                    module in changed,
                    reasons.get(module, ""),
                )
            )
        return QuantReport(tuple(rows))

    def dtype_name(self, module: str) -> str:
        """The dtype which dequantizing the layer gives in other libraries: that of the folder."""
        weight = self._stored_quantized(self._modules[module])
        if weight is not None:
            return weight.dtype_name or "float16"
        dtype = self._entry(self._modules[module]).dtype
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]

    # ---------------------------------------------------------------------------- one layer

    def _entry(self, linear: Linear) -> TensorEntry:
        name = linear.module
        if self._architecture.tied and linear is self._architecture.head:
            name = self._architecture.embedding
        return self._checkpoint.entry(self._architecture.stored(name) + ".weight")

    def _stored_quantized(self, linear: Linear) -> bnb.BnbTensor | None:
        """The layer's weight where the folder has it quantized."""
        if self._architecture.tied and linear is self._architecture.head:
            return None
        weight = bnb.read_weight(self._checkpoint, self._architecture.stored(linear.module))
        if weight is not None and weight.shape != linear.shape:
            raise QllmFileError(
                f"the quantized weight of {linear.module} in {self._checkpoint.folder} has the "
                f"shape {list(weight.shape)}, but by config.json it is {list(linear.shape)}"
            )
        return weight

    def _bias(self, linear: Linear) -> np.ndarray | None:
        if not linear.bias:
            return None
        entry = self._checkpoint.entry(self._architecture.stored(linear.module) + ".bias")
        return to_float32(entry)

    def _set(self, linear: Linear, format: str, blocksize: int) -> _State:
        """Puts the layer into the decoder; `format` may be "original"."""
        stored = self._stored_quantized(linear)
        if stored is not None:
            # _select and _put_back ask only for the stored format here
            weight = from_bnb(stored, linear.module)
            self._decoder.set_linear(linear.slot, weight, self._bias(linear))
            return _State(
                weight.format, weight.blocksize, True, weight.nbytes, weight.bits_per_weight
            )
        entry = self._entry(linear)
        original = FLOAT_DTYPES[entry.dtype]
        if format == ORIGINAL:
            format = original
        size = load_entry(
            self._decoder, linear.slot, entry, format, blocksize or 64, self._bias(linear),
            linear.module,
        )
        self._checkpoint.release(entry)
        if self._architecture.tied and linear is self._architecture.head and format == original:
            self._decoder.tie_embedding()
        return _State(
            format,
            (blocksize or 64) if is_4bit(format) else None,
            format == original,
            size,
            8 * size / math.prod(linear.shape),
            *((0.0, np.inf) if format == original else ()),
        )

    def _with_error(self, linear: Linear, state: _State) -> _State:
        """`state` with its error figures, measured now when they are not known."""
        if state.rmse is not None or state.stored:
            return state
        entry = self._entry(linear)
        error = self._decoder.linear_error(
            linear.slot, entry.numpy(), dtype=dtype_of(entry), name=linear.module
        )
        self._checkpoint.release(entry)
        return replace(state, rmse=error["rmse"], sqnr_db=error["sqnr_db"])

    def _is(self, linear: Linear, state: _State, config: QuantConfig) -> bool:
        """Whether the layer already has what `config` asks for."""
        if config.format == ORIGINAL:
            return state.stored
        blocksize = config.blocksize if is_4bit(config.format) else None
        return state.format == config.format and state.blocksize == blocksize

    def _note(self, module: str) -> None:
        """Notes what the decoder has of a layer whose change was broken off."""
        linear, state = self._modules[module], self._states[module]
        try:
            weight = self._decoder.linear(linear.slot)
        except QllmError:  # nobody knows, so it is put back
            self._states[module] = replace(state, format="an unknown format")
            return
        if (weight.format, weight.blocksize) != (state.format, state.blocksize):
            self._states[module] = _State(
                weight.format, weight.blocksize, False, weight.nbytes, weight.bits_per_weight
            )

    def _put_back(self, before: dict[str, _State], error: BaseException) -> None:
        """Every changed layer as it was; when that fails too, an error that names the others."""
        changed = [
            module
            for module, state in self._states.items()
            if (state.format, state.blocksize) != (before[module].format, before[module].blocksize)
        ]
        for done, module in enumerate(changed):
            state = before[module]
            try:
                self._set(
                    self._modules[module],
                    ORIGINAL if state.stored else state.format,
                    state.blocksize or 0,
                )
                self._states[module] = state
            except QllmError as second:
                left = ", ".join(changed[done:])
                raise type(second)(
                    f"{error}; and the layers {left} could not be put back to their former "
                    f"format and have {self._states[module].format} now: {second}"
                ) from error

    # ------------------------------------------------------------------------- the selection

    def _select(self, config: QuantConfig) -> tuple[list[str], dict[str, str]]:
        """The modules that `config` selects, and for each other one why it does not."""
        head = self._architecture.head.module
        config.require_matches(self._modules)
        selected, reasons = [], {}
        for module in self._modules:
            is_head = module == head and not self._restores_head(config)
            reason = config.why_not(module, is_head)
            if reason is None:
                selected.append(module)
            else:
                reasons[module] = reason
        if not selected:
            raise none_selected(reasons)
        self._refuse_stored(selected, config)
        return selected, reasons

    def _restores_head(self, config: QuantConfig) -> bool:
        """Whether a swap to a float format is to take back an earlier one of the output
        embedding."""
        head = self._architecture.head.module
        state = self._states.get(head)
        if state is None or state.stored:
            return False
        return config.format == ORIGINAL or config.format in FLOAT_FORMATS

    def _refuse_stored(self, selected: list[str], config: QuantConfig) -> None:
        """A layer that the folder has only quantized cannot become anything else."""
        if config.format == ORIGINAL:
            return
        for module in selected:
            stored = self._stored_quantized(self._modules[module])
            if stored is None:
                continue
            same = stored.format == config.format
            if same and is_4bit(config.format):
                same = stored.blocksize == config.blocksize
            if not same:
                raise QllmUnsupportedError(
                    f"{module} cannot be swapped to {config.format}: {self._checkpoint.folder} has "
                    f"it only as {stored.format}, with no full-precision weights; load the "
                    "original model, or leave the layer out with skip"
                )


def none_selected(reasons: Mapping[str, str]) -> QllmValueError:
    """The error of a call that would change nothing, with the reasons by module."""
    last = list(reasons.items())[-3:]
    return QllmValueError(
        "no linear layer is selected: " + "; ".join(f"{module}: {why}" for module, why in last)
    )


def is_4bit(format: str) -> bool:
    return format.startswith(("nf4", "fp4"))


def dtype_of(entry: TensorEntry) -> str | None:
    """The dtype to state for an array that shows bits of bfloat16."""
    return "bfloat16" if entry.dtype == "BF16" else None


def load_entry(
    decoder: Any,
    slot: str,
    entry: TensorEntry,
    format: str,
    blocksize: int,
    bias: np.ndarray | None,
    name: str,
) -> int:
    """Puts an unquantized tensor of the folder into a linear slot, quantized on the way; returns
    the bytes that `format` takes for it."""
    array, dtype = entry.numpy(), dtype_of(entry)
    size: int = decoder.load_linear(slot, array, format, blocksize, bias, name=name, dtype=dtype)
    return size


def to_float32(entry: TensorEntry) -> np.ndarray:
    """An unquantized tensor as float32, exactly."""
    if entry.dtype == "BF16":
        return (entry.numpy().astype(np.uint32) << 16).view(np.float32)
    return entry.numpy().astype(np.float32)


def from_bnb(stored: bnb.BnbTensor, name: str) -> Any:
    """A weight of the folder in a layout of bitsandbytes as `_core.QuantizedTensor`, its tables
    used as they are stored."""
    return _core.quantized_from_parts(
        stored.format,
        stored.shape,
        stored.packed,
        blocksize=stored.blocksize,
        absmax=stored.absmax,
        absmax_codes=stored.absmax_codes,
        nested_absmax=stored.nested_absmax,
        nested_quant_map=stored.nested_quant_map,
        offset=stored.offset,
        quant_map=stored.quant_map,
        scb=stored.scb,
        dtype_name=stored.dtype_name,
        name=name,
    )
