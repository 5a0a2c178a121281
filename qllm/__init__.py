"""qllm: the instrument for asking what quantization does to a language model."""

from importlib import import_module
from pathlib import Path
from typing import Any

from .config import GenerationConfig, QuantConfig
from .errors import (
    QllmError,
    QllmFileError,
    QllmMemoryError,
    QllmUnsupportedError,
    QllmValueError,
)
from .generation import Generation, Request
from .model import Model, Score
from .quantize import QuantizedTensor, quantize
from .report import LayerReport, ModelInfo, QuantReport
from .sampling import LogitStats, Sampled, logit_stats, sample

__all__ = [
    "Generation",
    "GenerationConfig",
    "LayerReport",
    "LogitStats",
    "Model",
    "ModelInfo",
    "QllmError",
    "QllmFileError",
    "QllmMemoryError",
    "QllmUnsupportedError",
    "QllmValueError",
    "QuantConfig",
    "QuantReport",
    "QuantizedTensor",
    "Request",
    "Sampled",
    "Score",
    "get_include",
    "logit_stats",
    "quantize",
    "sample",
]

__version__ = "0.1.0"


def get_include() -> str:
    """The folder of qllm.h, the header for C programs (docs/c-api.md)."""
    return str(Path(__file__).resolve().parent / "include")


def __getattr__(name: str) -> Any:
    """`qllm.study`, imported when it is first asked for."""
    if name == "study":
        return import_module(f"{__name__}.study")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
