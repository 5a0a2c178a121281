"""A Hugging Face folder of a random model of a Llama's shape, written in pieces.

The weights are normal of deviation 0.02, as a model is initialised; norms are one. They are the
same for the same shape on every machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "1.1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "intermediate": 5632,
             "vocab": 32000},
    "small": {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 4, "intermediate": 2816,
              "vocab": 8192},
    "tiny": {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 512,
             "vocab": 512},
}
POSITIONS = 2048
SPECIAL = ("<unk>", "<s>", "</s>")


def default_folder(shape: str) -> Path:
    """Where the folder of a shape lies unless another place is named."""
    return Path(tempfile.gettempdir()) / "qllm-bench" / f"llama-{shape}-random"


def config(shape: dict[str, int]) -> dict[str, Any]:
    """config.json."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape["vocab"], "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }


def tensor_shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """All tensors by name, in the order of the file."""
    hidden, inner = shape["hidden"], shape["intermediate"]
    keys = hidden // shape["heads"] * shape["kv_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab"], hidden)}
    for i in range(shape["layers"]):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.k_proj.weight": (keys, hidden),
            layer + "self_attn.v_proj.weight": (keys, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (shape["vocab"], hidden)}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, uint16, to nearest, ties to even; no NaN."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def contents(name: str, shape: tuple[int, ...], seed: int) -> Iterator[bytes]:
    """The bytes of a tensor, a few MB at a time."""
    if len(shape) == 1:
        yield bf16_bits(np.ones(shape, np.float32)).tobytes()
        return
    rng = np.random.default_rng([seed, *name.encode()])
    step = max(1, (1 << 21) // shape[1])
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        values = rng.standard_normal((rows, shape[1]), dtype=np.float32)
        yield bf16_bits(values * np.float32(0.02)).tobytes()


def byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte, 0 to 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]


def tokenizer(vocab: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE without merges: special tokens, bytes, and words that no
    text gives."""
    pieces = [*SPECIAL, *byte_letters()]
    pieces += [f"<|{i}|>" for i in range(len(pieces), vocab)]
    added = [{"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, piece in enumerate(SPECIAL)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False,
                      "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}}


def make(folder: Path, shape: dict[str, int]) -> Path:
    """The folder, made unless it is there."""
    if (folder / "config.json").exists():
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wanted = config(shape)
        differ = [key for key in wanted if found.get(key) != wanted[key]
                  and key.endswith(("size", "layers", "heads"))]
        if differ:
            raise SystemExit(f"{folder} holds a model of another shape ({', '.join(differ)}); "
                             "name another --folder")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes, end = tensor_shapes(shape), 0
    for name, dims in shapes.items():
        begin, end = end, end + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = folder / "model.safetensors.part"
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in shapes.items():
            for piece in contents(name, dims, 1):
                file.write(piece)
    unfinished.replace(folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(shape["vocab"])),
                                           encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>"}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1), encoding="utf-8")
    return folder
