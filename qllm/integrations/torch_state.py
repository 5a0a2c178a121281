"""Quantized weights in state dicts, under the keys of bitsandbytes and with its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _core, bnb
from ..errors import QllmFileError
from ..layers import from_bnb
from ..quantize import QuantizedTensor
from ..safetensors import TensorEntry
from ..strict_json import quoted

_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
PARTS = ("weight", "SCB", "weight_format", *(f"weight.{part}" for part in bnb.PARTS))
"""The names, behind a layer's own, that a weight and its parts can have."""

_WHERE = Path("the state dict")
_ANY = "layer"  # a prefix for names that are to have none


class _StateTensors:
    """The tensors of a state dict as those of a checkpoint; `_ANY` stands for its prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def _key(self, name: str) -> str:
        return self._prefix + name.removeprefix(_ANY + ".")

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._state

    def names(self, prefix: str) -> list[str]:
        start = self._key(prefix)
        return [
            f"{_ANY}.{key.removeprefix(self._prefix)}"
            for key in self._state
            if key.startswith(start)
        ]

    def entry(self, name: str) -> TensorEntry:
        key = self._key(name)
        if key not in self._state:
            raise QllmFileError(f"the state dict has no tensor {quoted(key)}")
        tensor = self._state[key].detach()
        if tensor.dtype not in _DTYPES or tensor.is_meta:
            found = "on the meta device" if tensor.is_meta else str(tensor.dtype)
            raise QllmFileError(f"tensor {quoted(key)} of the state dict is {found}")
        data: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return TensorEntry(
            name, _DTYPES[tensor.dtype], tuple(tensor.shape), memoryview(data), _WHERE
        )


def keys(state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The keys of the weight and of its parts that a state dict has under `prefix`."""
    for key in state:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (
            name.startswith("weight.") or name in ("weight", "SCB", "weight_format")
        ):
            yield key


def split(key: str) -> tuple[str, str] | None:
    """A key as the name of its layer and one of `PARTS`; None for other keys."""
    for part in PARTS:
        if key.endswith("." + part):
            return key.removesuffix("." + part), part
    return None


def read(state: Mapping[str, Tensor], prefix: str) -> QuantizedTensor | None:
    """The quantized weight under `prefix` ("model.layers.0.mlp.up_proj.", or ""), its tables used
    as they are stored; None for a weight that is not quantized. Raises `QllmFileError`."""
    stored = bnb.read_weight(_StateTensors(state, prefix), _ANY)
    if stored is None:
        return None
    weight: QuantizedTensor = from_bnb(stored, prefix + "weight")
    return weight


def entries(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes keeps for a weight: name behind the layer's prefix -> tensor
    of its own memory."""
    return {
        name.removeprefix(_ANY + "."): torch.from_numpy(array.copy())
        for name, array in bnb.state_dict_entries(_ANY, weight).items()
    }


def meta_entries(format: str, rows: int, cols: int, blocksize: int) -> dict[str, Tensor]:
    """What `entries` has for a weight of that shape, on the meta device; the length of the JSON
    state is not known before its values are."""
    if format == "int8":
        weight = torch.empty((rows, cols), dtype=torch.int8, device="meta")
        return {
            "weight": weight,
            "SCB": torch.empty((rows,), device="meta"),
            "weight_format": torch.empty((), dtype=torch.uint8, device="meta"),
        }
    blocks, nested = -(-rows * cols // blocksize), format.endswith("-dq")

    def bytes_of(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    found = {
        "weight": bytes_of((rows * cols + 1) // 2, 1),
        "weight.absmax": bytes_of(blocks) if nested else torch.empty((blocks,), device="meta"),
        "weight.quant_map": torch.empty((16,), device="meta"),
    }
    if nested:
        found["weight.nested_absmax"] = torch.empty((-(-blocks // 256),), device="meta")
        found["weight.nested_quant_map"] = torch.empty((256,), device="meta")
    found[f"weight.quant_state.bitsandbytes__{format.removesuffix('-dq')}"] = bytes_of(0)
    return found


def image(weight: QuantizedTensor) -> Tensor:
    """A weight packed for the CPU kernels, as uint8 (n,)."""
    return torch.from_numpy(_core.image(weight))
