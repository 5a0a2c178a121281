"""qllm: the instrument for asking what quantization does to a language model."""

from .quantize import QuantizedTensor, quantize

__all__ = ["QuantizedTensor", "quantize"]
