"""A linear layer with a quantized weight, as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core
from ..bnb import FORMATS
from ..config import check_compute
from ..errors import QllmError, QllmUnsupportedError, QllmValueError
from ..layers import is_4bit
from ..quantize import BLOCKSIZES, QuantizedTensor
from ..strict_json import quoted
from . import torch_device, torch_ops, torch_state

_grad_enabled = torch.is_grad_enabled
_autocasting = torch.is_autocast_enabled
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


class Linear(nn.Linear):
    """y = x W^T + bias with W (out_features, in_features) in nf4, fp4, nf4-dq, fp4-dq or int8.

    x (..., in_features) is float32, float16 or bfloat16, and y has its dtype; sums are float32.
    `compute` and `int8_threshold` as for `Model`; the threads are those of torch, and on a GPU its
    current stream (compute "auto" and "exact"). Gradients go to
    x, by the exactly dequantized weight, and to `bias`; the weight has none. `weight` is a uint8
    tensor with a packed form of W, private to a build of qllm; state dicts and pickles have the
    tensors of bitsandbytes instead, byte for byte, and `load_state_dict` takes these, or an
    unquantized weight, which it quantizes.

    Made like `torch.nn.Linear`, or from a layer by `from_linear`, from a weight by
    `from_quantized`. A row of y does not depend on the other rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "nf4",
        *,
        blocksize: int = 64,
        compute: str = "auto",
        int8_threshold: float = 6.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._prepare(in_features, out_features, format, blocksize, compute, int8_threshold)
        self.weight_dtype = torch.get_default_dtype() if dtype is None else dtype
        torch_ops.number_of(self.weight_dtype, "dtype")
        place = torch.device(device) if device is not None else torch.get_default_device()
        on_meta = place.type == "meta"
        start = nn.Linear(
            in_features, out_features, bias, "meta" if on_meta else "cpu", self.weight_dtype
        )
        image = self._meta_image() if on_meta else self._quantized_image(start.weight, "weight")
        self._set(image, start.bias)
        self.to(place)

    def _prepare(
        self, in_features: int, out_features: int, format: str, blocksize: int, compute: str,
        int8_threshold: float,
    ) -> None:
        nn.Module.__init__(self)
        if format not in FORMATS:
            raise QllmValueError(
                f"there is no format {quoted(format)} for a layer; there are " + ", ".join(FORMATS)
            )
        if is_4bit(format) and blocksize not in BLOCKSIZES:
            raise QllmValueError(
                f"blocksize is {quoted(blocksize)}; a power of two from {BLOCKSIZES[0]} to "
                f"{BLOCKSIZES[-1]} was expected"
            )
        check_compute(compute)
        self.in_features, self.out_features = in_features, out_features
        self.format = format
        self.blocksize = blocksize if is_4bit(format) else None
        self.compute = compute
        self.int8_threshold = float(int8_threshold)
        self.weight_dtype = torch.float32

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "nf4",
        *,
        blocksize: int = 64,
        compute: str = "auto",
        int8_threshold: float = 6.0,
        name: str = "weight",
    ) -> Linear:
        """A layer that does what `linear` does, with its weight quantized and its bias shared.

        `linear` is a `torch.nn.Linear`, a `Conv1D` of transformers, whose weight is (in, out), or
        a `Linear4bit` or `Linear8bitLt` of bitsandbytes that has the format already: then its
        values are taken as they are. `name` stands in the sentence about NaN and infinity, which
        raise `QllmValueError`.
        """
        stored = bnb_weight(linear)
        if stored is not None:
            if stored.format != format or (is_4bit(format) and stored.blocksize != blocksize):
                raise QllmUnsupportedError(
                    f"{name} is quantized already, to {_described(stored)}, and cannot become "
                    f"{format}; take the original layer"
                )
            return cls.from_quantized(
                stored, bias_of(linear), compute=compute, int8_threshold=int8_threshold
            )
        weight = float_weight(linear)
        if weight is None:
            raise QllmUnsupportedError(
                f"a {type(linear).__name__} cannot be quantized; torch.nn.Linear was expected"
            )
        torch_ops.number_of(weight.dtype, name)
        rows, cols = weight.shape
        self = cls.__new__(cls)
        self._prepare(cols, rows, format, blocksize, compute, int8_threshold)
        self.weight_dtype = weight.dtype
        if weight.is_meta:
            image = self._meta_image()
        else:
            image = self._quantized_image(weight.cpu(), name).to(weight.device)
        self._set(image, bias_of(linear))
        self.train(linear.training)
        return self

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute: str = "auto",
        int8_threshold: float = 6.0,
    ) -> Linear:
        """A layer with a weight of `qllm.quantize`, or of a model's decoder."""
        rows, cols = weight.shape
        self = cls.__new__(cls)
        self._prepare(cols, rows, weight.format, weight.blocksize or 64, compute, int8_threshold)
        self.weight_dtype = getattr(torch, weight.dtype_name or "float16")
        self._set(torch_state.image(weight), bias)
        return self

    # ------------------------------------------------------------------------------ the weight

    def _set(self, image: Tensor, bias: Tensor | None) -> None:
        self._set_image(image)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    def _set_image(self, image: Tensor) -> None:
        self.weight = nn.Parameter(image, requires_grad=False)

    def _sizes(self) -> tuple[int, int]:
        return _core.image_sizes(
            self.format, self.out_features, self.in_features, self.blocksize or 0
        )

    def _meta_image(self) -> Tensor:
        return torch.empty(self._sizes()[0], dtype=torch.uint8, device="meta")

    def _quantized_image(self, weight: Tensor, name: str) -> Tensor:
        """A weight (out_features, in_features) in the layer's format."""
        array, dtype = to_numpy(weight)
        return torch.from_numpy(
            _core.image_from_source(
                array, self.format, self.blocksize or 64, name=name, dtype=dtype
            )
        )

    def reset_parameters(self) -> None:
        """New random values, as those of `torch.nn.Linear`."""
        start = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "cpu", self.weight_dtype
        )
        self._set_image(self._quantized_image(start.weight, "weight"))
        if self.bias is not None and start.bias is not None:
            with torch.no_grad():
                self.bias.copy_(start.bias)

    def quantized(self) -> QuantizedTensor:
        """The weight as standard bytes."""
        self._require_values()
        dtype = torch_ops.NAMES[self.weight_dtype] if is_4bit(self.format) else None
        return _core.image_weight(self.weight.detach().cpu().numpy(), dtype)

    def _require_values(self) -> None:
        if self.weight.is_meta:
            raise QllmValueError("the layer is on the meta device, where weights have no values")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features), exactly, each value rounded to `dtype` once, on
        the layer's device."""
        torch_ops.number_of(dtype, "dtype")
        self._require_values()
        return torch_ops.dequantize(self.weight, 0, self.out_features, dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the dequantized weight, rounded to `dtype` (None: the dtype from
        which the weight was quantized), and the bias."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        values = self.dequantize(dtype or self.weight_dtype)
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight's codes and scales, as `QuantizedTensor.nbytes`."""
        return self._sizes()[1]

    @property
    def kernel(self) -> str:
        """What multiplies one row on this CPU, or on the GPU where the layer is."""
        if self.weight.is_cuda:
            return torch_device.kernel(self.weight, self.compute, self.int8_threshold)
        return _core.image_linear_name(self.weight.detach().cpu().numpy(), 1, self.compute)

    # ------------------------------------------------------------------------------ the product

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._through_dispatcher(x)
        parameters: dict[str, Any] = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if (
            type(x) is Tensor
            and not (_grad_enabled() and (x.requires_grad or _needs_grad(bias)))
            and not _modes()
            and _transform() is None
        ):
            multiply = None
            if x.is_cpu and weight.is_cpu and not _autocasting("cpu"):
                multiply = torch_ops.multiply
            elif x.is_cuda and weight.is_cuda and not _autocasting("cuda"):
                multiply = torch_ops.multiply_on_device
            if multiply is not None:
                return multiply(
                    x, weight, bias, self.out_features, self.compute, self.int8_threshold
                )
        return self._through_dispatcher(x)

    def _through_dispatcher(self, x: Tensor) -> Tensor:
        """For gradients, autocasting, compiling, and whatever else looks at operators."""
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x
        return torch_ops.linear(
            x, self.weight, self.bias, self.out_features, self.compute, self.int8_threshold
        )

    def extra_repr(self) -> str:
        blocks = "" if self.blocksize is None else f", blocksize={self.blocksize}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format!r}{blocks}, "
            f"compute={self.compute!r}"
        )

    # --------------------------------------------------------------------------------- keeping

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        def keep_bytes(tensor: Tensor) -> Tensor:
            # module.type(dtype) would convert the bytes as if each were a number
            moved = fn(tensor)
            kept = tensor.dtype != torch.uint8 or moved.dtype == torch.uint8
            return moved if kept else tensor.to(moved.device)

        parent: Any = super()
        parent._apply(keep_bytes, recurse)
        return self

    def _entries(self) -> dict[str, Tensor]:
        """The weight under the keys of bitsandbytes, on the layer's device."""
        if self.weight.is_meta:
            return torch_state.meta_entries(
                self.format, self.out_features, self.in_features, self.blocksize or 0
            )
        found = torch_state.entries(self.quantized())
        return {name: tensor.to(self.weight.device) for name, tensor in found.items()}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in self._entries().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        own = set(torch_state.keys(state_dict, prefix))
        rest = {key: value for key, value in state_dict.items() if key not in own}
        if prefix + "weight" not in own:
            missing_keys.append(prefix + "weight")
            unexpected_keys.extend(sorted(own) if strict else ())
        else:
            try:
                self._set_image(self._read_image(state_dict, prefix))
            except QllmError as error:
                error_msgs.append(str(error))
        weight, self._parameters["weight"] = self._parameters["weight"], None  # for the bias alone
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters["weight"] = weight

    def _read_image(self, state: Any, prefix: str) -> Tensor:
        stored, shape = torch_state.read(state, prefix), (self.out_features, self.in_features)
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        if stored is None:
            weight = state[prefix + "weight"].detach()
            torch_ops.number_of(weight.dtype, prefix + "weight")
            found = tuple(weight.shape)
        else:
            found = stored.shape
        if found != shape:
            raise QllmValueError(
                f"{prefix}weight has the shape {list(found)}, but the layer has {list(shape)}"
            )
        if stored is None:
            self.weight_dtype = weight.dtype
            return self._quantized_image(weight.cpu(), prefix + "weight").to(device)
        if (stored.format, stored.blocksize) != (self.format, self.blocksize):
            raise QllmValueError(
                f"{prefix}weight is {_described(stored)}, but the layer is made for {self.format}"
                + ("" if self.blocksize is None else f" of blocksize {self.blocksize}")
            )
        if stored.dtype_name is not None:
            self.weight_dtype = getattr(torch, stored.dtype_name)
        return torch_state.image(stored).to(device)

    def __copy__(self) -> Linear:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: standard bytes in place of the packed form."""
        state = self.__dict__.copy()
        state["_parameters"] = {**self._parameters, "weight": None}
        state["_weight"] = None if self.weight.is_meta else (self.quantized(), self.weight.device)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        stored = state.pop("_weight")
        parent: Any = super()
        parent.__setstate__(state)
        if stored is None:
            self._set_image(self._meta_image())
        else:
            self._set_image(torch_state.image(stored[0]).to(stored[1]))


def _needs_grad(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def to_numpy(weight: Tensor) -> tuple[Any, str | None]:
    """A tensor on the CPU as a NumPy array of the same memory, and the dtype to state for it."""
    weight = weight.detach()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view("uint16"), "bfloat16"
    return weight.numpy(), None


def float_weight(module: nn.Module) -> Tensor | None:
    """The unquantized weight (out_features, in_features) of a linear layer; None where the module
    is none that `Linear` can stand for."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, Linear):
        return None
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return weight.detach().t()
    return weight.detach() if isinstance(module, nn.Linear) else None


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def bnb_weight(module: nn.Module) -> QuantizedTensor | None:
    """The weight of a quantized layer of bitsandbytes; None for any other module."""
    if not type(module).__module__.startswith("bitsandbytes."):
        return None
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise QllmUnsupportedError(
            "a layer of bitsandbytes has computed in evaluation mode on this CPU, where it rounds "
            "its scales to bfloat16; take it as it was loaded"
        )
    return torch_state.read(module.state_dict(), "")


def _described(weight: QuantizedTensor) -> str:
    size = "" if weight.blocksize is None else f" of blocksize {weight.blocksize}"
    return weight.format + size

