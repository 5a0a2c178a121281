"""What `qllm bench` times: a model from a folder, or random weights of a Llama's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import _core
from ..architectures import describe
from ..model import Model

def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int,
           vocab: int = 32000) -> dict[str, Any]:
    """The config.json of a Llama."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": _POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }


def _falcon(hidden: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """The config.json of a Falcon: of the first kind with one key-value head, else of the new
    one."""
    new = kv_heads > 1
    return {
        "model_type": "falcon", "vocab_size": 65024, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_kv_heads": kv_heads,
        "new_decoder_architecture": new, "multi_query": True, "parallel_attn": True, "bias": False,
        "alibi": False, "layer_norm_epsilon": 1e-5, "max_position_embeddings": _POSITIONS,
        "rope_theta": 10000.0, "activation": "gelu", "tie_word_embeddings": True,
    }


_POSITIONS = 4096

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(128, 2, 4, 2, 256, 512),
    "small": _llama(1024, 16, 16, 4, 2816, 8192),
    "1.1b": _llama(2048, 22, 32, 4, 5632),
    "7b": _llama(4096, 32, 32, 32, 11008),
    "13b": _llama(5120, 40, 40, 40, 13824),
    "70b": _llama(8192, 80, 64, 8, 28672),
    "falcon-7b": _falcon(4544, 32, 71, 1),
    "falcon-40b": _falcon(8192, 60, 128, 8),
}
"""The config.json of shapes by name: Llamas, those from 7b on as Llama 2 has them, and Falcons.
small has some 180 million weights, more than caches hold in any format."""


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
    """Random weights of a shape, in every format at once, the output embedding in bf16. They are
    made on the device where it can."""

    def __init__(self, shape: str, formats: list[str], *, device: str, compute: str,
                 threads: int | None, isa: str | None) -> None:
        config = SHAPES[shape]
        family = "Falcon" if config["model_type"] == "falcon" else "Llama"
        self.name = f"a random {family} of shape {shape}"
        self.vocab, self.max_positions = config["vocab_size"], _POSITIONS
        self.architecture = describe(config)
        self.decoders = {
            format: _core.Decoder(self.architecture.decoder, device=device, threads=threads,
                                  isa=isa, compute=compute)
            for format in formats}
        self.linear_bytes = dict.fromkeys(formats, 0)
        self.weights = self.parameters = 0
        for seed, (slot, size) in enumerate(next(iter(self.decoders.values())).slots().items()):
            if not (slot == "embedding" and self.architecture.tied):
                self.parameters += math.prod(size)
            for format, decoder in self.decoders.items():
                self._set(decoder, slot, size, format, seed)
            if len(size) == 2 and slot not in ("embedding", "head"):
                self.weights += math.prod(size)
        if self.architecture.tied:
            for decoder in self.decoders.values():
                decoder.tie_embedding()

    def _set(self, decoder: Any, slot: str, size: tuple[int, ...], format: str, seed: int) -> None:
        """One slot of a decoder; norms are one, biases of norms zero."""
        if len(size) == 1:
            value = 0.0 if slot.endswith("bias") else 1.0
            decoder.set_vector(slot, np.full(size, value, np.float32))
        elif slot == "head":
            decoder.set_random(slot, "bf16", seed=seed)
        elif slot == "embedding":
            if not self.architecture.tied:
                decoder.set_random(slot, "bf16", seed=seed)
        else:
            self.linear_bytes[format] += decoder.set_random(slot, format, seed=seed)

    def ready(self, format: str) -> Ready:
        decoder = self.decoders[format]
        return Ready(decoder, decoder.nbytes()["weights"],
                     8 * self.linear_bytes[format] / self.weights,
                     decoder.info()["kernels"].get(format, []))

    def kv_bytes(self, value: int) -> int:
        """Bytes of keys and values of a position, at `value` bytes each."""
        c = self.architecture.decoder
        return int(2 * value * c["layers"] * c["kv_heads"] * c["head_dim"])
