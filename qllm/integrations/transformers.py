"""Quantized models of transformers, through its registry of quantizers.

    from transformers import AutoModelForCausalLM
    from qllm.integrations.transformers import QllmConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QllmConfig("nf4"))
    model.save_pretrained(other)                           # in the tensors of bitsandbytes
    model = AutoModelForCausalLM.from_pretrained(other)    # once this module is imported

Each weight is quantized as it is read. Works with transformers 4.57, and from 5.6 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import torch
    import transformers
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod
except ImportError as missing:
    raise ImportError(
        f"qllm.integrations.transformers needs torch and transformers ({missing})"
    ) from None
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if _VERSION < (4, 57) or (5, 0) <= _VERSION < (5, 6):  # 5.0 to 5.5 round stored integers
    raise ImportError(
        "qllm.integrations.transformers needs transformers 4.57, or 5.6 or later, not "
        f"{transformers.__version__}"
    )

from .. import bnb
from ..config import QuantConfig, check_compute
from ..errors import QllmFileError, QllmUnsupportedError, QllmValueError
from ..report import QuantReport
from ..strict_json import quoted
from . import torch_state
from .torch_linear import Linear
from .torch_quantize import linear_layers, put, require_quantized
from .transformers_layers import Swap

METHOD = "qllm"
"""`quant_method` of a `quantization_config`."""

_ARRIVES_IN_PARTS = _VERSION < (5, 0)
"""transformers 4 brings the tensors of a folder one by one, 5 those of a layer together."""

_ANYWHERE = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantization_config(METHOD)
class QllmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model whose linear layers become
    `qllm.integrations.torch.Linear`.

    `format` is nf4, fp4, nf4-dq, fp4-dq or int8; the other options are those of `quantize_`. A
    folder that is quantized already says itself what its layers are, and of its config `compute`
    and `int8_threshold` alone have an effect.
    """

    def __init__(
        self,
        format: str = "nf4",
        include: str | Sequence[str] | None = None,
        skip: str | Sequence[str] | None = None,
        blocksize: int = 64,
        quantize_head: bool = False,
        compute: str = "auto",
        int8_threshold: float = 6.0,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise QllmUnsupportedError(
                f"QllmConfig has no option {quoted(next(iter(unknown)))}; there are format, "
                "include, skip, blocksize, quantize_head, compute and int8_threshold"
            )
        if quant_method != METHOD:
            raise QllmValueError(f"quant_method is {quoted(quant_method)}; {METHOD} was expected")
        check_compute(compute)
        if (
            type(int8_threshold) not in (int, float)
            or not math.isfinite(int8_threshold)
            or int8_threshold < 0
        ):
            raise QllmValueError(
                f"int8_threshold is {quoted(int8_threshold)}; a number of at least 0 was expected"
            )
        chosen = require_quantized(QuantConfig(format, include, skip, blocksize, quantize_head))
        self.quant_method: Any = quant_method
        self.format, self.include, self.skip = chosen.format, chosen.include, chosen.skip
        self.blocksize, self.quantize_head = chosen.blocksize, chosen.quantize_head
        self.compute, self.int8_threshold = compute, float(int8_threshold)

    @property
    def selection(self) -> QuantConfig:
        """Which layers become what."""
        return QuantConfig(
            self.format, self.include, self.skip, self.blocksize, self.quantize_head
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """All members; transformers 4 writes configs by it."""
        members: dict[str, Any] = self.to_dict()
        return members

    @classmethod
    def from_bnb(cls, config: Mapping[str, Any], compute: str = "auto") -> QllmConfig:
        """From the members of a `BitsAndBytesConfig`, as `QuantConfig.from_bnb`; for a folder of
        bitsandbytes:

            config = AutoConfig.from_pretrained(folder)
            config.quantization_config = QllmConfig.from_bnb(config.quantization_config).to_dict()
            model = AutoModelForCausalLM.from_pretrained(folder, config=config)
        """
        members = dict(config)
        threshold = members.pop("llm_int8_threshold", 6.0)
        chosen = QuantConfig.from_bnb(members)
        return cls(
            chosen.format, chosen.include, chosen.skip, compute=compute, int8_threshold=threshold
        )


def bnb_config(model: torch.nn.Module) -> dict[str, Any]:
    """The `quantization_config` with which a folder of `model` is loaded by bitsandbytes:

        model.config.quantization_config = bnb_config(model)
        model.save_pretrained(folder)
    """
    layers = dict(linear_layers(model))
    ours = [layer for layer in layers.values() if isinstance(layer, Linear)]
    formats = sorted({layer.format for layer in ours})
    if not formats or ("int8" in formats and len(formats) > 1):
        raise QllmUnsupportedError(
            f"the model has layers in {', '.join(formats) or 'no quantized format'}; a folder of "
            "bitsandbytes holds int8 or 4-bit layers, not both"
        )
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    return bnb.quantization_config(
        formats[0],
        compute_dtype=dtype,
        skip_modules=[name for name, layer in layers.items() if not isinstance(layer, Linear)],
        threshold=ours[0].int8_threshold,
    )


@register_quantizer(METHOD)
class QllmQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models for a `QllmConfig`; `model.hf_quantizer` is one, and its
    `report` has every linear layer of the model."""

    quantization_config: QllmConfig

    def __init__(self, quantization_config: QllmConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._swap: Swap | None = None
        self._awaited: dict[str, set[str]] = {}
        self._arrived: dict[str, dict[str, torch.Tensor]] = {}
        self.report: QuantReport | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place is not None and str(place) not in ("cpu", *_ANYWHERE):
                raise QllmUnsupportedError(
                    f"device_map has {quoted(str(place))}; qllm loads on the CPU: leave device_map "
                    'out, or say "cpu", and move the model by .to("cuda") afterwards'
                )

    def update_device_map(self, device_map: Any) -> Any:
        anywhere = isinstance(device_map, str) and device_map in _ANYWHERE
        return {"": "cpu"} if anywhere else device_map

    # ------------------------------------------------------------------------------ while loading

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Nothing: no layers of other kinds are made linear ones."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        self._swap = Swap(
            model, config.selection, config.compute, config.int8_threshold, self.pre_quantized
        )
        if _ARRIVES_IN_PARTS and self.pre_quantized:
            # the only name under which transformers 4 neither looks for a parameter behind each
            # tensor of the folder nor rounds all of them to the dtype of the model
            config.quant_method = QuantizationMethod.BITS_AND_BYTES
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        swap, self._swap = self._swap, None
        assert swap is not None
        self.report = swap.finish()
        self.quantization_config.quant_method = METHOD
        model.config.quantization_config = self.quantization_config
        model.quantization_method = METHOD
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        found = torch_state.split(param_name)
        if found is None or self._swap is None:
            return False
        layer, part = found
        if self.pre_quantized:
            return part in self._awaited.get(layer, ())
        return part == "weight" and self._swap.selects(layer)

    # transformers 5

    def get_quantize_ops(self) -> Any:
        from .transformers_converters import Quantize

        return Quantize(self._loading())

    def get_weight_conversions(self) -> list[Any]:
        from .transformers_converters import Parts

        return [Parts(self._loading())] if self.pre_quantized else []

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype that a tensor of the folder is rounded to; None for parts of a weight."""
        from .transformers_converters import Parts

        return None if isinstance(converter, Parts) else dtype

    # transformers 4

    def update_expected_keys(
        self, model: Any, expected_keys: list[str], loaded_keys: list[str]
    ) -> list[str]:
        if not self.pre_quantized:
            return expected_keys
        parts: dict[str, set[str]] = {}
        for layer, part in filter(None, map(torch_state.split, loaded_keys)):
            parts.setdefault(layer, set()).add(part)
        self._awaited = {
            layer: found for layer, found in parts.items()
            if found != {"weight"} and self._loading().has(layer)
        }
        for layer, found in self._awaited.items():
            if "weight" not in found:
                raise QllmFileError(f"the folder has {layer}.{min(found)}, but no {layer}.weight")
        ours = [f"{layer}.{part}" for layer, found in self._awaited.items() for part in found]
        return list(dict.fromkeys(expected_keys + ours))

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Layers without a weight in the folder are new, and stay unquantized."""
        for key in missing_keys:
            if self.param_needs_quantization(model, key):
                self._loading().leave_new(key.removesuffix(".weight"))
        return missing_keys

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, **_: Any
    ) -> None:
        found = torch_state.split(param_name)
        assert found is not None
        layer, part = found
        if not self.pre_quantized:
            self._loading().quantize(layer, param_value.to(target_device))
            return
        arrived = self._arrived.setdefault(layer, {})
        arrived[part] = param_value
        if arrived.keys() == self._awaited[layer]:
            self._loading().take(layer, self._arrived.pop(layer))

    def _loading(self) -> Swap:
        assert self._swap is not None
        return self._swap

    # -------------------------------------------------------------------------------------- after

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, layer in list(linear_layers(model)):
            if isinstance(layer, Linear):
                put(model, name, layer.to_linear(dtype))
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the layers are: gradients go through them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
