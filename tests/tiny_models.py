"""Tiny random checkpoints, written with NumPy alone, for tests that need no other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qllm.architectures import describe

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FALCON = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bias": True,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def tensors(config: dict[str, Any], dtype: str = "float32") -> dict[str, np.ndarray]:
    """All tensors of a model of `config`, random; norms near 1, weights of deviation 0.2."""
    rng = np.random.default_rng(1)
    architecture = describe(config)
    shapes = {architecture.embedding + ".weight": architecture.embedding_shape}
    for linear in architecture.linears if architecture.tied else architecture.modules:
        shapes[linear.module + ".weight"] = linear.shape
        if linear.bias:
            shapes[linear.module + ".bias"] = linear.shape[:1]
    shapes |= {vector.tensor: (vector.size,) for vector in architecture.vectors}
    arrays = {}
    for name, shape in shapes.items():
        centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        arrays[name] = (centre + 0.2 * rng.standard_normal(shape)).astype(_dtype(dtype))
    return arrays


def _dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return ml_dtypes.bfloat16


def write(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """A folder with config.json and model.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer.json of `vocab` tokens: <s>, </s>, then single bytes from 0x00, written as
    byte-level BPE writes them; <s> in front of every text. Bytes beyond `vocab` are <unk>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = byte_letters()
    pieces = ["<unk>", "<s>", "</s>", *letters]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces[:vocab])}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in pieces[:3]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_letters() -> list[str]:
    """The letter by which byte-level BPE (GPT-2) writes each byte, 0 to 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]
