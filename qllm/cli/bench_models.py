"""What `qllm bench` times: a model from a folder, or random weights of a Llama's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import _core
from ..architectures import describe
from ..model import Model

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 256,
             "vocab": 512},
    "small": {"hidden": 1024, "layers": 16, "heads": 16, "kv_heads": 4, "intermediate": 2816,
              "vocab": 8192},
    "1.1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "intermediate": 5632,
             "vocab": 32000},
}
"""Llama shapes by name; small has some 180 million weights, more than caches hold in any format."""

_POSITIONS = 2048


@dataclass(frozen=True)
class Ready:
    """A decoder in a format. `bytes_per_token` are those of the weights that a step of one token
    reads: the linear layers and the output embedding."""

    decoder: Any
    bytes_per_token: int
    bits_per_weight: float
    kernels: list[str] = field(default_factory=list)


class Subject(Protocol):
    """A model in several formats."""

    name: str
    parameters: int
    vocab: int
    max_positions: int

    def ready(self, format: str) -> Ready:
        """The decoder with its linear layers in this format, until another is asked for."""


class Loaded:
    """A model from a folder. It is held once, and swaps formats in place."""

    def __init__(self, model: Model) -> None:
        info = model.info()
        self.model = model
        self.name = model.name
        self.parameters, self.vocab = info.parameters, info.vocab
        self.max_positions = info.max_positions

    def ready(self, format: str) -> Ready:
        report = self.model.quantize_(format)
        decoder = self.model.decoder
        sizes = decoder.nbytes()
        nbytes = sizes["weights"] + (sizes["embedding"] if self.model.architecture.tied else 0)
        return Ready(decoder, nbytes, report.bits_per_weight,
                     self.model.info().kernels.get(format, []))


class Random:
    """Random weights of a Llama's shape, in every format at once, the output embedding in bf16."""

    def __init__(self, shape: str, formats: list[str], *, device: str, compute: str,
                 threads: int | None, isa: str | None) -> None:
        sizes = SHAPES[shape]
        self.name = f"a random Llama of shape {shape}"
        self.vocab, self.max_positions = sizes["vocab"], _POSITIONS
        config = describe(_config(sizes)).decoder
        self.decoders = {
            format: _core.Decoder(config, device=device, threads=threads, isa=isa, compute=compute)
            for format in formats}
        self.linear_bytes = dict.fromkeys(formats, 0)
        self.weights = self.parameters = 0
        rng = np.random.default_rng(0)
        for slot, shape_ in next(iter(self.decoders.values())).slots().items():
            self.parameters += math.prod(shape_)
            values = rng.standard_normal(shape_, dtype=np.float32) * np.float32(0.02)
            self._set(slot, values)

    def _set(self, slot: str, values: np.ndarray) -> None:
        """One slot of every decoder."""
        if values.ndim == 1:
            for decoder in self.decoders.values():
                decoder.set_vector(slot, values + np.float32(1))
            return
        if slot in ("embedding", "head"):
            weight = _core.quantize(values, "bf16")
            for decoder in self.decoders.values():
                if slot == "head":
                    decoder.set_linear(slot, weight)
                else:
                    decoder.set_embedding(weight)
            return
        self.weights += values.size
        for format, decoder in self.decoders.items():
            weight = _core.quantize(values, format)
            decoder.set_linear(slot, weight)
            self.linear_bytes[format] += weight.nbytes

    def ready(self, format: str) -> Ready:
        decoder = self.decoders[format]
        return Ready(decoder, decoder.nbytes()["weights"],
                     8 * self.linear_bytes[format] / self.weights,
                     decoder.info()["kernels"].get(format, []))


def _config(sizes: dict[str, int]) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "model_type": "llama", "vocab_size": sizes["vocab"], "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"], "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": _POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }
