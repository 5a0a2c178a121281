"""The command `qllm`: info, quantize, generate, score, bench and study from a shell."""

from .entry import main

__all__ = ["main"]
