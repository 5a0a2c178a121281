"""How transformers 5 hands over weights: operations on the tensors of a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..errors import QllmError
from . import torch_state
from .transformers_layers import Swap


class Quantize(ConversionOps):
    """Quantizes the weights that `swap` selects."""

    def __init__(self, swap: Swap) -> None:
        self._swap = swap

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return {key: self._converted(key, _one(value)) for key, value in input_dict.items()}

    def _converted(self, key: str, weight: Tensor) -> Tensor:
        name = key.removesuffix(".weight")
        if name == key or not self._swap.selects(name):
            return weight
        return _kept(self._swap, name, lambda: self._swap.quantize(name, weight))


class Take(ConversionOps):
    """Takes quantized weights over, of which `input_dict` has the parts."""

    def __init__(self, swap: Swap) -> None:
        self._swap = swap

    def __deepcopy__(self, memo: Any) -> Take:
        return self  # every layer's converter has a copy of its operations, not of the model

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", **__: Any
    ) -> dict[str, Any]:
        parts = {part: _one(value) for part, value in input_dict.items()}
        name = full_layer_name.removesuffix(".weight")
        weight = parts.get("weight")
        if len(parts) == 1 and weight is not None and weight.is_floating_point():
            return {full_layer_name: weight.to(self._swap.weight_of(name).dtype)}
        return {full_layer_name: _kept(self._swap, name, lambda: self._swap.take(name, parts))}


class Parts(WeightConverter):
    """Brings the parts of a layer's quantized weight together."""

    def __init__(self, swap: Swap) -> None:
        super().__init__(list(torch_state.PARTS), "weight", operations=[Take(swap)])
        self._layers = _Layers(swap)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = torch_state.split(source_key)
        if found is None or not self._layers.have(*found):
            return source_key, None
        layer, part = found
        return layer + ".weight", part


class _Layers:
    """The linear layers of a model, with or without the prefix that a folder may lack or have."""

    def __init__(self, swap: Swap) -> None:
        self._swap, self._prefix = swap, getattr(swap.model, "base_model_prefix", "") + "."
        self._names = {name.removeprefix(self._prefix) for name in swap.names}

    def __deepcopy__(self, memo: Any) -> _Layers:
        return self

    def have(self, layer: str, part: str) -> bool:
        known = layer.removeprefix(self._prefix) in self._names
        return known or (part != "weight" and self._swap.has(layer))


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _kept(swap: Swap, name: str, made: Callable[[], nn.Parameter]) -> Tensor:
    """What `made` gives. transformers would report an error of ours with a traceback, in place of
    raising it, so that the first is kept for the end, and the layers stay as they are."""
    if swap.failure is None:
        try:
            return made()
        except QllmError as error:
            swap.failure = error
    return swap.weight_of(name)
