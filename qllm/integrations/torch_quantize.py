"""Swapping the linear layers of a torch module for quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from .. import _core
from ..bnb import FORMATS
from ..config import FLOAT_FORMATS, QuantConfig
from ..errors import QllmUnsupportedError
from ..layers import is_4bit, none_selected
from ..report import LayerReport, QuantReport
from .torch_linear import Linear, bnb_weight, float_weight, to_numpy
from .torch_ops import NUMBERS

_SAME_FORWARD = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
"""Subclasses of `torch.nn.Linear` that compute the same by a forward of their own."""


def quantize_(
    module: nn.Module,
    format: str | QuantConfig,
    *,
    include: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    blocksize: int = 64,
    quantize_head: bool = False,
    compute: str = "auto",
    int8_threshold: float = 6.0,
) -> QuantReport:
    """Swaps the linear layers of `module` for `qllm.integrations.torch.Linear`, in place, and
    returns a report with every linear layer, those that were left alone included.

    `format` is nf4, fp4, nf4-dq, fp4-dq or int8, or a `QuantConfig`, which then has the options of
    the selection. `include` and `skip` are glob patterns over the names of the layers (None: all,
    none); the output embedding, and a layer that shares its weight with an embedding, are left
    alone unless `quantize_head`. Layers of bitsandbytes that have the format already are taken over
    as they are. Each original weight is let go of before the next layer is made; when a layer
    raises, those before it stay swapped.
    """
    config = _config(format, include, skip, blocksize, quantize_head)
    if not isinstance(module, nn.Module) or isinstance(module, nn.Linear):
        raise QllmUnsupportedError(
            f"a {type(module).__name__} has no layers that could be swapped in place; "
            "Linear.from_linear makes a quantized layer from one"
        )
    reasons = selection(module, config)
    layers = dict(linear_layers(module))
    made: dict[int, tuple[Linear, dict[str, float] | None]] = {}  # under two names one layer
    rows = []
    for name, reason in reasons.items():
        layer, error = layers.pop(name), None
        if reason is None:
            if id(layer) not in made:
                made[id(layer)] = quantized_layer(layer, name, config, compute, int8_threshold)
            layer, error = made[id(layer)]
            put(module, name, layer)
        rows.append(row(name, layer, error, reason))
    return QuantReport(tuple(rows))


def _config(
    format: str | QuantConfig, include: str | Sequence[str] | None,
    skip: str | Sequence[str] | None, blocksize: int, quantize_head: bool,
) -> QuantConfig:
    if not isinstance(format, QuantConfig):
        format = QuantConfig(format, include, skip, blocksize, quantize_head)
    elif include is not None or skip is not None or quantize_head or blocksize != 64:
        raise QllmUnsupportedError("give the options of the selection in the QuantConfig alone")
    return require_quantized(format)


def require_quantized(config: QuantConfig) -> QuantConfig:
    """`config` itself; raises `QllmUnsupportedError` where its format is none for a layer."""
    if config.format not in FORMATS:
        raise QllmUnsupportedError(
            f"a layer cannot become {config.format}; it can become " + ", ".join(FORMATS)
        )
    return config


def selection(module: nn.Module, config: QuantConfig) -> dict[str, str | None]:
    """Every linear layer by name, with why it is left alone; None where it is to be swapped. Raises
    for a pattern that matches nothing, and where nothing is to be swapped."""
    layers = dict(linear_layers(module))
    config.require_matches(layers)
    reasons = {name: _reason(module, name, layer, config) for name, layer in layers.items()}
    if all(reason is not None for reason in reasons.values()):
        raise none_selected({name: reason or "" for name, reason in reasons.items()})
    return reasons


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer by its names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear) or float_weight(layer) is not None:
            yield name, layer


def _reason(module: nn.Module, name: str, layer: nn.Module, config: QuantConfig) -> str | None:
    """Why a layer is left alone; None where it is to be swapped."""
    reason = config.why_not(name, is_head(module, layer))
    if reason is not None:
        return reason
    if isinstance(layer, Linear):
        same = layer.format == config.format
        if same and (not is_4bit(layer.format) or layer.blocksize == config.blocksize):
            return f"already {layer.format}"
        raise QllmUnsupportedError(
            f"{name} cannot be swapped to {config.format}: it has its weight only as "
            f"{layer.format}; take the original module, or leave the layer out with skip"
        )
    return obstacle(module, name, layer)


def obstacle(module: nn.Module, name: str, layer: nn.Module) -> str | None:
    """What keeps a quantized layer from standing for this one."""
    kind = type(layer)
    parent = module.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention reads the weight itself"
    if _belongs_to_peft(module, name):
        return "an adapter of peft"
    weight = float_weight(layer)
    if weight is not None and weight.dtype not in NUMBERS and bnb_weight(layer) is None:
        return f"its weight is {weight.dtype}"
    if "parametrizations" in layer._modules:
        return "its weight is parametrized"
    full_name = f"{kind.__module__}.{kind.__qualname__}"
    if (
        isinstance(layer, nn.Linear)
        and kind.forward is not nn.Linear.forward
        and not kind.__module__.startswith("bitsandbytes.")
        and full_name not in _SAME_FORWARD
    ):
        return f"{kind.__name__} has a forward of its own"
    return None


def _belongs_to_peft(module: nn.Module, name: str) -> bool:
    """Whether the layer is a trainable part of an adapter, which sits beside its `base_layer`."""
    while name:
        name, _, last = name.rpartition(".")
        parent = type(module.get_submodule(name))
        if parent.__module__.startswith("peft.tuners."):
            return last != "base_layer" and hasattr(module.get_submodule(name), "base_layer")
    return False


def is_head(module: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is the output embedding."""
    head = getattr(module, "get_output_embeddings", None)
    if callable(head) and head() is layer:
        return True
    weight = getattr(layer, "weight", None)
    return weight is not None and any(
        isinstance(other, nn.Embedding) and other.weight is weight for other in module.modules()
    )


def quantized_layer(
    layer: nn.Module, name: str, config: QuantConfig, compute: str, int8_threshold: float
) -> tuple[Linear, dict[str, float] | None]:
    """The layer in place of `layer`, and its error against it where that is not quantized."""
    quantized = Linear.from_linear(
        layer, config.format, blocksize=config.blocksize, compute=compute,
        int8_threshold=int8_threshold, name=name,
    )
    weight = None if bnb_weight(layer) is not None else float_weight(layer)
    if weight is None or weight.is_meta:
        return quantized, None
    array, dtype = to_numpy(weight.cpu())
    image = quantized.weight.detach().cpu().numpy()
    return quantized, _core.image_error(image, array, dtype, name)


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def row(
    name: str, layer: nn.Module, error: dict[str, float] | None, reason: str | None
) -> LayerReport:
    if isinstance(layer, Linear):
        format, shape, size = layer.format, (layer.out_features, layer.in_features), layer.nbytes
    else:
        format, shape, size = _described(layer)
        if format in FLOAT_FORMATS:
            error = {"rmse": 0.0, "sqnr_db": float("inf")}
    rmse, sqnr = (None, None) if error is None else (error["rmse"], error["sqnr_db"])
    return LayerReport(
        name, format, shape, size, 8 * size / max(shape[0] * shape[1], 1), rmse, sqnr,
        reason is None, reason or "",
    )


def _described(layer: nn.Module) -> tuple[str, tuple[int, int], int]:
    """Format, shape and bytes of a layer that is not ours."""
    stored = bnb_weight(layer)
    if stored is not None:
        return stored.format, stored.shape, stored.nbytes
    weight = float_weight(layer)
    assert weight is not None
    name = str(weight.dtype).removeprefix("torch.")
    format = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(name, name)
    return format, (weight.shape[0], weight.shape[1]), weight.numel() * weight.element_size()
