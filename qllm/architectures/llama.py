"""Llama and those built like it: Mistral, Qwen2, Qwen3.

Sources: transformers 5.24, models/{llama,mistral,qwen2,qwen3}; a key that is absent has the default
of the family's configuration class there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QllmFileError, QllmUnsupportedError
from ..strict_json import quoted
from .fields import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Fields, activation
from .rope import rope_config
from .tables import Architecture, Linear, Vector, norm


@dataclass(frozen=True)
class _Family:
    """How the members of the group differ. Biases: True, False, or the key which says so."""

    kv_heads: int | None  # when the key is absent; None: as many as heads
    max_positions: int
    head_dim: int | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False


FAMILIES = {
    "llama": _Family(
        None, 2048, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": _Family(8, 4096 * 32),
    "qwen2": _Family(32, 32768, qkv_bias=True),
    "qwen3": _Family(
        32, 32768, head_dim=128, qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True
    ),
}


def llama(fields: Fields, model_type: str) -> Architecture:
    """The architecture of a config.json of one of FAMILIES."""
    family = FAMILIES[model_type]
    vocab, hidden = fields.integer("vocab_size"), fields.integer("hidden_size")
    intermediate = fields.integer("intermediate_size")
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    absent = fields.members.get("num_key_value_heads", 0) is None or family.kv_heads is None
    kv_heads = fields.integer(
        "num_key_value_heads", default=heads if absent else family.kv_heads, high=MAX_HEADS
    )
    if heads % kv_heads:
        raise QllmFileError(
            f"{fields.what} has num_attention_heads {heads}, which is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim = fields.integer("head_dim", default=family.head_dim, high=MAX_HEADS)
    if head_dim is None:
        if hidden % heads:
            raise QllmFileError(
                f"{fields.what} has hidden_size {hidden}, which is no multiple of "
                f"num_attention_heads {heads}, and no head_dim"
            )
        head_dim = hidden // heads
    max_positions = fields.integer(
        "max_position_embeddings", default=family.max_positions, high=MAX_POSITIONS
    )
    config = {
        "vocab": vocab,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": intermediate,
        "block": "serial",
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps", default=1e-6, high=1.0),
        "activation": activation(fields, "hidden_act", "silu"),
        "gated": True,
        "fused_qkv": False,
        "qk_norm": family.qk_norm,
        "attention_scale": head_dim**-0.5,
        "sliding_window": _sliding_window(fields, model_type, layers),
    } | rope_config(fields, head_dim, max_positions)
    linears: list[Linear] = []
    vectors: list[Vector] = []
    biases = _biases(fields, family)
    for layer in range(layers):
        linears += _layer_linears(layer, config, biases)
        vectors += _layer_vectors(layer, config)
    vectors += norm("model.norm", "final_norm", hidden)
    return Architecture(
        model_type,
        config,
        "model.",
        "model.embed_tokens",
        Linear("lm_head", "head", (vocab, hidden)),
        tuple(linears),
        tuple(vectors),
        fields.boolean("tie_word_embeddings", default=False),
    )


def _biases(fields: Fields, family: _Family) -> dict[str, bool]:
    """Whether the query, key and value, the output, and the MLP layers have a bias."""
    kinds = {"qkv": family.qkv_bias, "o": family.o_bias, "mlp": family.mlp_bias}
    return {
        kind: fields.boolean(bias, default=False) if isinstance(bias, str) else bias
        for kind, bias in kinds.items()
    }


def _layer_linears(layer: int, config: dict[str, Any], biases: dict[str, bool]) -> list[Linear]:
    hidden, intermediate = config["hidden"], config["intermediate"]
    queries = config["heads"] * config["head_dim"]
    keys = config["kv_heads"] * config["head_dim"]
    module, slot = f"model.layers.{layer}.", f"layers.{layer}."
    return [
        Linear(module + "self_attn.q_proj", slot + "q", (queries, hidden), biases["qkv"]),
        Linear(module + "self_attn.k_proj", slot + "k", (keys, hidden), biases["qkv"]),
        Linear(module + "self_attn.v_proj", slot + "v", (keys, hidden), biases["qkv"]),
        Linear(module + "self_attn.o_proj", slot + "o", (hidden, queries), biases["o"]),
        Linear(module + "mlp.gate_proj", slot + "gate", (intermediate, hidden), biases["mlp"]),
        Linear(module + "mlp.up_proj", slot + "up", (intermediate, hidden), biases["mlp"]),
        Linear(module + "mlp.down_proj", slot + "down", (hidden, intermediate), biases["mlp"]),
    ]


def _layer_vectors(layer: int, config: dict[str, Any]) -> list[Vector]:
    module, slot = f"model.layers.{layer}.", f"layers.{layer}."
    vectors = norm(module + "input_layernorm", slot + "attention_norm", config["hidden"])
    vectors += norm(module + "post_attention_layernorm", slot + "mlp_norm", config["hidden"])
    if config["qk_norm"]:
        for name in ("q_norm", "k_norm"):
            vectors += norm(f"{module}self_attn.{name}", slot + name, config["head_dim"])
    return vectors


def _sliding_window(fields: Fields, model_type: str, layers: int) -> np.ndarray | None:
    """Positions which each layer sees, int64 (layers), 0 = all; None when all see all."""
    types = _layer_types(fields, layers)
    if model_type == "llama":
        windowed = [False] * layers
    elif model_type == "mistral":
        windowed = [_window(fields, 4096) is not None] * layers
    else:
        used = fields.boolean("use_sliding_window", default=False)
        # the first layers see everything, whatever the number of layers
        first = fields.integer("max_window_layers", default=28, low=0, high=2**31 - 1)
        fields.raw("sliding_window")
        windowed = [used and layer >= first for layer in range(layers)]
        if types is not None and used:
            windowed = types
        if used and _window(fields, 4096) is None:
            windowed = [False] * layers
    if types is not None and types != windowed:
        raise QllmUnsupportedError(
            f"{fields.what} has layer_types with {sum(types)} of {layers} layers of "
            f"sliding_attention, which does not go with the other keys of model_type {model_type}, "
            f"by which {sum(windowed)} layers have a sliding window"
        )
    if not any(windowed):
        return None
    window = _window(fields, 4096)
    return np.array([window if on else 0 for on in windowed], np.int64)


def _window(fields: Fields, default: int) -> int | None:
    """sliding_window; null means none, an absent key the default of the family."""
    if fields.members.get("sliding_window", default) is None:
        fields.raw("sliding_window")
        return None
    tokens: int = fields.integer("sliding_window", default=default, high=MAX_POSITIONS)
    return tokens


def _layer_types(fields: Fields, layers: int) -> list[bool] | None:
    """For each layer whether layer_types says that it has a sliding window; None without it."""
    name, types = fields.raw("layer_types")
    if types is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers:
        raise QllmFileError(
            f"{fields.what} has {name} {quoted(types)}; a list of {layers} kinds, one a layer, was "
            "expected"
        )
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise QllmUnsupportedError(
                f"{fields.what} has {quoted(kind)} in {name}; supported are " + ", ".join(known)
            )
    return [known[kind] for kind in types]
