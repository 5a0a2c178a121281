"""Swapping the linear layers of a model while its weights are read.

The model stands on the meta device, and a layer is swapped when its weight arrives, so that no more
than one weight is held unquantized. Which loader brings it does not matter here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config import QuantConfig
from ..errors import QllmError, QllmFileError, QllmUnsupportedError, QllmValueError
from ..layers import none_selected
from ..report import QuantReport
from . import torch_state
from .torch_linear import Linear, bias_of, float_weight
from .torch_quantize import is_head, linear_layers, obstacle, put, quantized_layer, row, selection


class Swap:
    """The linear layers of a model of transformers whose weights have not arrived.

    They become quantized as `config` says; with `stored` the weights are quantized already, and
    what they are decides, not `config`. Raises where nothing is selected, or cannot be done.
    """

    def __init__(
        self, model: nn.Module, config: QuantConfig, compute: str, int8_threshold: float,
        stored: bool,
    ) -> None:
        self.model, self._config = model, config
        self._compute, self._int8_threshold = compute, int8_threshold
        self._reasons: dict[str, str | None]
        if stored:
            self._reasons = dict.fromkeys(
                (name for name, _ in linear_layers(model)), "not quantized in the folder"
            )
        else:
            self._reasons = selection(model, config)
            self._refuse_tied_head()
        self._errors: dict[str, dict[str, float] | None] = {}
        self.failure: QllmError | None = None
        """What kept a weight from being quantized or read, where it could not be raised."""

    def _refuse_tied_head(self) -> None:
        config: Any = self.model.config
        tied = config.get_text_config(decoder=True).tie_word_embeddings
        for name, layer in linear_layers(self.model):
            if tied and self.selects(name) and is_head(self.model, layer):
                raise QllmUnsupportedError(
                    f"{name} shares its weight with the embedding, and cannot be quantized while "
                    "the model is loaded: leave out quantize_head"
                )

    @property
    def names(self) -> list[str]:
        """The linear layers."""
        return list(self._reasons)

    def selects(self, name: str) -> bool:
        """Whether the layer is to be quantized when its weight arrives."""
        return name in self._reasons and self._reasons[name] is None

    def weight_of(self, name: str) -> nn.Parameter:
        """The parameter that the layer has now."""
        return self.model.get_parameter(name + ".weight")

    def leave_new(self, name: str) -> None:
        """Leaves a layer alone whose weight does not arrive."""
        self._reasons[name] = "the folder has no weight for it"

    def quantize(self, name: str, weight: Tensor) -> nn.Parameter:
        """Swaps the layer `name` for one with this weight, quantized; returns its parameter."""
        layer, expected = self.model.get_submodule(name), self.weight_of(name).shape
        if weight.shape != expected:
            raise QllmValueError(
                f"{name}.weight has the shape {list(weight.shape)}, but the layer has "
                f"{list(expected)}"
            )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made, self._errors[name] = quantized_layer(
            layer, name, self._config, self._compute, self._int8_threshold
        )
        put(self.model, name, made)
        return self.weight_of(name)

    def take(self, name: str, parts: Mapping[str, Tensor]) -> nn.Parameter:
        """Swaps the layer `name` for one with the quantized weight of which `parts` has the
        tensors, under the names in `torch_state.PARTS`; returns its parameter."""
        self.has(name)
        layer = self.model.get_submodule(name)
        try:
            weight = torch_state.read({f"{name}.{part}": parts[part] for part in parts}, name + ".")
        except QllmFileError as error:
            raise QllmFileError(f"the layer {name}: {error}") from None
        expected = float_weight(layer)
        if weight is None or expected is None or weight.shape != expected.shape:
            raise QllmFileError(
                f"{name}.weight has the shape {None if weight is None else list(weight.shape)}, "
                f"but the layer has {None if expected is None else list(expected.shape)}"
            )
        made = Linear.from_quantized(
            weight, bias_of(layer), compute=self._compute, int8_threshold=self._int8_threshold
        )
        self._reasons[name] = None
        put(self.model, name, made)
        return self.weight_of(name)

    def has(self, name: str) -> bool:
        """Whether the model has the layer `name`, for which there is a quantized weight. Raises
        where it has a module of that name that cannot take one."""
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return False
        why: str | None = f"the module is a {type(layer).__name__}"
        if float_weight(layer) is not None:
            why = obstacle(self.model, name, layer)
        if why is not None:
            raise QllmUnsupportedError(
                f"{name} is quantized in the folder, and cannot be here: {why}"
            )
        return True

    def finish(self) -> QuantReport:
        """Every linear layer, when all that there is has arrived."""
        if self.failure is not None:
            raise self.failure
        layers = dict(linear_layers(self.model))
        for name, layer in layers.items():
            if self.selects(name) and not isinstance(layer, Linear):
                self.leave_new(name)
        if not any(self.selects(name) for name in layers):
            raise none_selected({name: reason or "" for name, reason in self._reasons.items()})
        return QuantReport(
            tuple(
                row(name, layer, self._errors.get(name), self._reasons.get(name))
                for name, layer in layers.items()
            )
        )
