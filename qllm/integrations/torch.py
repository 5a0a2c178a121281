"""Quantized linear layers for torch modules.

    from qllm.integrations.torch import Linear, quantize_

    report = quantize_(model, "nf4", skip="*.down_proj")   # any torch module, in place
    layer = Linear.from_linear(torch.nn.Linear(64, 64), "int8")
"""

from .torch_linear import Linear
from .torch_quantize import quantize_

__all__ = ["Linear", "quantize_"]
