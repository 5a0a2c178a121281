"""From a config.json to a decoder: which tensor of a checkpoint is which part of the model.

`describe` reads the config alone; `bind` finds and checks its tensors in a checkpoint. What is not
supported is refused by name: model types, activations, kinds of RoPE, and keys that may change what
the model computes. Code named in a config (`auto_map`) is never run.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import QllmFileError, QllmUnsupportedError
from ..safetensors import TensorEntry
from ..strict_json import quoted
from . import falcon as _falcon
from . import llama as _llama
from .fields import Fields
from .tables import Architecture, Linear, Vector

__all__ = [
    "Architecture",
    "FLOAT_DTYPES",
    "Linear",
    "MODEL_TYPES",
    "Vector",
    "bind",
    "describe",
]

MODEL_TYPES = (*_llama.FAMILIES, *_falcon.NAMES)
"""The values of model_type that are supported."""

FLOAT_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Stored dtype of an unquantized tensor -> format of qllm."""

# Buffers that old versions saved; everything in them follows from the config.
_BUFFERS = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|rotary\.inv_freq|rope\.freqs|masked_bias|attention_mask"
    r"|causal_mask)"
)
_BNB_PARTS = (".weight.", ".SCB", ".weight_format")


def describe(config: dict[str, Any], what: str = "config.json") -> Architecture:
    """The architecture in a parsed config.json; `what` names the file in error sentences.

    Raises `QllmUnsupportedError` for what is understood but not offered, `QllmFileError` for
    missing, wrong or contradictory values.
    """
    fields = Fields(config, what)
    model_type = fields.text("model_type")
    if model_type not in MODEL_TYPES:
        raise QllmUnsupportedError(
            f"{what} has model_type {quoted(model_type)}; supported are " + ", ".join(MODEL_TYPES)
        )
    _check_classes(fields)
    _check_quantization(fields)
    build = _llama.llama if model_type in _llama.FAMILIES else _falcon.falcon
    architecture = build(fields, model_type)
    fields.refuse_unknown(model_type)
    return architecture


def bind(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """`architecture` with `stored_prefix` and `tied` as the tensors of `checkpoint` have them.

    Every tensor that is needed must be there with its shape, as F32, F16 or BF16 or, for linear
    layers, in a layout of bitsandbytes (whose contents qllm.bnb checks); every tensor that is there
    must be needed.
    """
    architecture = _with_names(architecture, checkpoint)
    used: set[str] = set()
    embedding = architecture.stored(architecture.embedding) + ".weight"
    _check(checkpoint, embedding, architecture.embedding_shape, used)
    for linear in architecture.linears if architecture.tied else architecture.modules:
        _check_linear(checkpoint, architecture.stored(linear.module), linear, used)
    for vector in architecture.vectors:
        _check(checkpoint, architecture.stored(vector.tensor), (vector.size,), used)
    if architecture.tied:
        used.add(architecture.head.module + ".weight")
    unused = [
        name
        for name in checkpoint.names()
        if name not in used and not _BUFFERS.fullmatch(name)
    ]
    if unused:
        raise QllmFileError(
            f"{checkpoint.folder} has {len(unused)} tensors which a model of its config.json does "
            f"not have: {quoted(', '.join(unused))}"
        )
    return architecture


def _check_classes(fields: Fields) -> None:
    name, classes = fields.raw("architectures")
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(kind, str) for kind in classes):
        raise QllmFileError(
            f"{fields.what} has {name} {quoted(classes)}; a list of names was expected"
        )
    for kind in classes:
        if not kind.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise QllmUnsupportedError(
                f"{fields.what} has the architecture {quoted(kind)}; only causal language models "
                "(...ForCausalLM) are supported"
            )


def _check_quantization(fields: Fields) -> None:
    """Only the layouts of bitsandbytes are read, which qllm writes too; which layers have one, the
    tensors say."""
    quantization = fields.table("quantization_config")
    fields.raw("compression_config")
    if fields.members.get("compression_config") is not None:
        raise QllmUnsupportedError(
            f"{fields.what} has a compression_config; of quantized checkpoints only those of "
            "bitsandbytes are read"
        )
    if not quantization:
        return
    method = quantization.get("quant_method", "bitsandbytes" if _says_bnb(quantization) else None)
    if method not in ("bitsandbytes", "qllm"):
        raise QllmUnsupportedError(
            f"{fields.what} has a quantization_config with quant_method {quoted(method)}; of "
            "quantized checkpoints only those of bitsandbytes are read: use the model's original "
            "weights"
        )


def _says_bnb(quantization: dict[str, Any]) -> bool:
    return "load_in_4bit" in quantization or "load_in_8bit" in quantization


def _with_names(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """Finds the prefix under which the tensors are stored, and decides whether the output embedding
    is the input embedding."""
    embedding = architecture.embedding + ".weight"
    bare = embedding.removeprefix(architecture.prefix)
    head = architecture.head.module + ".weight"
    if embedding in checkpoint:
        architecture = replace(architecture, stored_prefix=architecture.prefix)
    elif bare not in checkpoint:
        raise QllmFileError(
            f"{checkpoint.folder} has no tensor {quoted(embedding)} (nor {quoted(bare)}), the "
            f"embedding of a model of model_type {architecture.model_type}"
        )
    if head not in checkpoint:
        if not architecture.tied:
            raise QllmFileError(
                f"{checkpoint.folder} has no tensor {quoted(head)}, the output embedding, and "
                "config.json does not say that it is the input embedding (tie_word_embeddings)"
            )
        return architecture
    if architecture.tied:
        stored = checkpoint.entry(architecture.stored(embedding))
        _check_same(checkpoint.entry(head), stored, checkpoint)
    return architecture


def _check_same(head: TensorEntry, embedding: TensorEntry, checkpoint: Checkpoint) -> None:
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    if not same or not _equal_bytes(head.data, embedding.data):
        raise QllmFileError(
            f"{checkpoint.folder / 'config.json'} says (tie_word_embeddings, or its default) that "
            f"the output embedding is the input embedding, but {quoted(head.name)} is stored and "
            "differs from it; set tie_word_embeddings to false if the stored one is meant"
        )


def _equal_bytes(a: memoryview, b: memoryview, piece: int = 1 << 24) -> bool:
    """Whether two views of one length hold the same bytes, without a large temporary."""
    return all(
        np.array_equal(
            np.frombuffer(a[at : at + piece], np.uint8), np.frombuffer(b[at : at + piece], np.uint8)
        )
        for at in range(0, len(a), piece)
    )


def _check_linear(checkpoint: Checkpoint, stored: str, linear: Linear, used: set[str]) -> None:
    weight = stored + ".weight"
    if linear.bias:
        _check(checkpoint, stored + ".bias", (linear.shape[0],), used)
    quantized = [
        name
        for part in _BNB_PARTS
        for name in checkpoint.names(stored + part)
        if part == ".weight." or name == stored + part
    ]
    if quantized:
        used.update(quantized, (weight,))
        return
    _check(checkpoint, weight, linear.shape, used)


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], used: set[str]) -> None:
    """The tensor `name` is there, unquantized and of the right shape."""
    if name not in checkpoint:
        raise QllmFileError(
            f"{checkpoint.folder} has no tensor {quoted(name)}, which a model of its config.json "
            "has"
        )
    used.add(name)
    entry = checkpoint.entry(name)
    if entry.dtype not in FLOAT_DTYPES:
        raise QllmUnsupportedError(
            f"tensor {quoted(name)} of {entry.file} is stored as {entry.dtype}; supported are "
            + ", ".join(FLOAT_DTYPES)
            + " and the layouts of bitsandbytes"
        )
    if entry.shape != shape:
        raise QllmFileError(
            f"tensor {quoted(name)} of {entry.file} has the shape {list(entry.shape)}, but by "
            f"config.json it is {list(shape)}"
        )
