"""qllm: the instrument for asking what quantization does to a language model."""

from .quantize import QuantizedTensor, quantize
from .sampling import LogitStats, Sampled, logit_stats, sample

__all__ = ["LogitStats", "QuantizedTensor", "Sampled", "logit_stats", "quantize", "sample"]

__version__ = "0.1.0"
