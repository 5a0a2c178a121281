"""Falcon in its four shapes: 7B (multi-query, parallel block), 11B and 40B/180B (new decoder
architecture with one or two norms), RW (serial block, ALiBi, biases).

Sources: transformers 5.24, models/falcon; the old names RefinedWeb (40B) and RefinedWebModel (7B,
RW) and their keys n_layer, n_head, n_head_kv are those of the models' own first code, which
transformers 4 reads as well.

The rows of query_key_value lie, in every shape, by groups: for each key-value head its query heads,
then its key, then its value. 7B has one group of all query heads, RW as many groups as heads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import QllmFileError, QllmUnsupportedError
from .fields import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Fields, activation
from .rope import rope_config
from .tables import Architecture, Linear, Vector, norm

NAMES = ("falcon", "RefinedWeb", "RefinedWebModel")
"""model_type of the family."""


def falcon(fields: Fields, model_type: str) -> Architecture:
    """The architecture of a config.json with one of NAMES as model_type."""
    vocab = fields.integer("vocab_size")
    hidden = fields.integer("hidden_size", "n_embed")
    layers = fields.integer("num_hidden_layers", "n_layer", high=MAX_LAYERS)
    heads = fields.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    if hidden % heads:
        raise QllmFileError(
            f"{fields.what} has hidden_size {hidden}, which is no multiple of num_attention_heads "
            f"{heads}"
        )
    block, kv_heads = _block(fields, model_type, heads)
    head_dim = hidden // heads
    max_positions = fields.integer("max_position_embeddings", default=2048, high=MAX_POSITIONS)
    config = {
        "vocab": vocab,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": fields.integer("ffn_hidden_size", default=4 * hidden),
        "block": block,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon", default=1e-5, high=1.0),
        "activation": activation(fields, "activation", "gelu"),
        "gated": False,
        "fused_qkv": True,
        "qk_norm": False,
        "attention_scale": head_dim**-0.5,
        "sliding_window": None,
    } | _position(fields, heads, head_dim, max_positions)
    if fields.boolean("apply_residual_connection_post_layernorm", default=False):
        raise QllmUnsupportedError(
            f"{fields.what} has apply_residual_connection_post_layernorm true, which is not "
            "supported; no published Falcon has it"
        )
    bias = fields.boolean("bias", default=False)
    linears: list[Linear] = []
    vectors: list[Vector] = []
    for layer in range(layers):
        linears += _layer_linears(layer, config, bias)
        vectors += _layer_vectors(layer, config)
    vectors += norm("transformer.ln_f", "final_norm", hidden, bias=True)
    return Architecture(
        model_type,
        config,
        "transformer.",
        "transformer.word_embeddings",
        Linear("lm_head", "head", (vocab, hidden)),
        tuple(linears),
        tuple(vectors),
        fields.boolean("tie_word_embeddings", default=True),
    )


def _block(fields: Fields, model_type: str, heads: int) -> tuple[str, int]:
    """The kind of block, and the number of key-value heads."""
    new = fields.boolean("new_decoder_architecture", default=model_type == "RefinedWeb")
    # the first code of 7B and RW had other defaults than transformers
    multi_query = fields.boolean("multi_query", default=model_type != "RefinedWebModel")
    parallel = fields.boolean("parallel_attn", default=model_type != "RefinedWebModel")
    norms = fields.integer("num_ln_in_parallel_attn", default=2 if new else 1, low=1, high=2)
    stated = fields.integer("num_kv_heads", "n_head_kv", default=heads)
    if new:
        if not parallel:
            raise QllmUnsupportedError(
                f"{fields.what} has new_decoder_architecture with parallel_attn false; that "
                "architecture is always parallel"
            )
        if heads % stated:
            raise QllmFileError(
                f"{fields.what} has num_attention_heads {heads}, which is no multiple of "
                f"num_kv_heads {stated}"
            )
        return ("parallel2" if norms == 2 else "parallel"), stated
    if norms == 2:
        raise QllmUnsupportedError(
            f"{fields.what} has num_ln_in_parallel_attn 2, which only the new_decoder_architecture "
            "has"
        )
    if not multi_query and stated != heads:
        raise QllmFileError(
            f"{fields.what} has num_kv_heads {stated} and multi_query false; without the "
            f"new_decoder_architecture that is as many as num_attention_heads, {heads}"
        )
    return ("parallel" if parallel else "serial"), (1 if multi_query else heads)


def _position(fields: Fields, heads: int, head_dim: int, max_positions: int) -> dict[str, Any]:
    """RoPE, or ALiBi, which needs none of its keys."""
    if not fields.boolean("alibi", default=False):
        return rope_config(fields, head_dim, max_positions)
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"):
        fields.raw(name)
    return {
        "position": "alibi",
        "alibi_slopes": alibi_slopes(heads),
        "max_positions": max_positions,
    }


def alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head, float32 (heads), rounded to bfloat16 as Falcon was trained.

    ALiBi (arXiv 2108.12409): 2^(-8 i / n) for i = 1 .. n when n is a power of two; else those of
    the next lower power, then every other one of the next higher.
    """
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    slopes = [base**i for i in range(1, power + 1)]
    extra = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
    slopes += [extra**i for i in range(1, 2 * (heads - power), 2)]
    bits = np.array(slopes, np.float32).view(np.uint32)  # positive: no carry leaves the word
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def _layer_linears(layer: int, config: dict[str, Any], bias: bool) -> list[Linear]:
    hidden, intermediate = config["hidden"], config["intermediate"]
    rows = (config["heads"] + 2 * config["kv_heads"]) * config["head_dim"]
    module, slot = f"transformer.h.{layer}.", f"layers.{layer}."
    return [
        Linear(module + "self_attention.query_key_value", slot + "qkv", (rows, hidden), bias),
        Linear(module + "self_attention.dense", slot + "o", (hidden, hidden), bias),
        Linear(module + "mlp.dense_h_to_4h", slot + "up", (intermediate, hidden), bias),
        Linear(module + "mlp.dense_4h_to_h", slot + "down", (hidden, intermediate), bias),
    ]


def _layer_vectors(layer: int, config: dict[str, Any]) -> list[Vector]:
    module, slot = f"transformer.h.{layer}.", f"layers.{layer}."
    names = {
        "serial": ("input_layernorm", "post_attention_layernorm"),
        "parallel": ("input_layernorm",),
        "parallel2": ("ln_attn", "ln_mlp"),
    }[config["block"]]
    slots = ("attention_norm", "mlp_norm")
    return [
        vector
        for name, target in zip(names, slots)
        for vector in norm(module + name, slot + target, config["hidden"], bias=True)
    ]
