"""Turns a model of karpathy/llama2.c (legacy .bin) and its tokenizer (.bin) into a Hugging Face
folder.

    python scripts/convert_llama2c.py stories260K.bin tok512.bin stories260K-hf

writes config.json, model.safetensors (float32) and tokenizer.json, which transformers and qllm
open. Needs numpy, safetensors and tokenizers (pip install "qllm[test]").

The model file (llama2.c, export.py, `legacy_export`), little-endian: seven int32 dim, hidden_dim,
n_layers, n_heads, n_kv_heads, vocab (negative: the output layer has its own matrix), seq_len; then
float32: embedding; stacks over the layers of attention norm, wq, wk, wv, wo, ffn norm, w1, w2, w3;
final norm; two tables (seq_len, head_dim / 2) of the cosines and sines of the rotary embedding; the
output matrix when it is separate.

llama2.c rotates the pairs (0, 1), (2, 3), ... of a head, Hugging Face rotates (i, i + head_dim /
2): the rows of wq and wk are put into that order, which leaves every q.k as it was.

The tokenizer file (llama2.c, tokenizer.py, `export`): int32 longest piece; per piece float32 score,
int32 length and the bytes, U+2581 already replaced by a space. It is a SentencePiece BPE model with
byte fallback, in which scores are the negated order of merges: a pair is merged when its
concatenation is a piece, the highest score first. tokenizer.json lists these pairs in that order.
As in llama2.c's run.c one space is put in front of the text and no other is touched. (SentencePiece
itself, with the settings of that model, also removes runs of spaces and spaces at both ends.)
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

HEADER_BYTES = 28
ROPE_THETA = 10000.0
NORM_EPS = 1e-5
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2; after them come the 256 bytes <0x00> .. <0xFF>
SPACE = "\u2581"


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and the tensors, under the names of transformers' LlamaForCausalLM."""
    data = path.read_bytes()
    config = read_header(path, data)
    vocab, dim, hidden = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    layers, length = config["num_hidden_layers"], config["max_position_embeddings"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    shapes = {
        "embedding": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * head_dim, dim),
        "wv": (layers, kv_heads * head_dim, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "cos": (length, head_dim // 2),
        "sin": (length, head_dim // 2),
    } | ({} if config["tie_word_embeddings"] else {"output": (vocab, dim)})
    expected = HEADER_BYTES + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(data) != expected:
        raise SystemExit(f"{path} has {len(data)} bytes, but its header asks for {expected}")
    parts, offset = {}, HEADER_BYTES
    for name, shape in shapes.items():
        parts[name] = np.frombuffer(data, "<f4", math.prod(shape), offset).reshape(shape)
        offset += parts[name].nbytes
    check_rotary_tables(path, parts["cos"], parts["sin"], head_dim)
    return config, named_tensors(parts, layers, heads, kv_heads)


def read_header(path: Path, data: bytes) -> dict[str, Any]:
    """config.json from the seven integers at the start of a model file."""
    if len(data) < HEADER_BYTES:
        raise SystemExit(f"{path} has {len(data)} bytes, fewer than the header of a llama2.c model")
    header = struct.unpack("<7i", data[:HEADER_BYTES])
    dim, hidden, layers, heads, kv_heads, vocab, length = header
    if min(*header[:5], abs(vocab), length) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise SystemExit(f"{path} is no llama2.c model: its header says {header}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": abs(vocab),
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": vocab > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def check_rotary_tables(path: Path, cos: np.ndarray, sin: np.ndarray, head_dim: int) -> None:
    """The tables in the file are those of ROPE_THETA, which config.json will state."""
    angles = np.outer(np.arange(len(cos)), ROPE_THETA ** (-np.arange(0, head_dim, 2) / head_dim))
    worst = max(np.abs(np.cos(angles) - cos).max(), np.abs(np.sin(angles) - sin).max())
    if not worst < 1e-3:
        raise SystemExit(
            f"the rotary tables of {path} differ by {worst} from those of theta {ROPE_THETA}"
        )


def named_tensors(
    parts: dict[str, np.ndarray], layers: int, heads: int, kv_heads: int
) -> dict[str, np.ndarray]:
    """The tensors under their names in transformers, wq and wk in its order of rows."""
    tensors = {"model.embed_tokens.weight": parts["embedding"], "model.norm.weight": parts["norm"]}
    if "output" in parts:
        tensors["lm_head.weight"] = parts["output"]
    for layer in range(layers):
        of_layer = {
            "input_layernorm": parts["attention_norm"][layer],
            "post_attention_layernorm": parts["ffn_norm"][layer],
            "self_attn.q_proj": halves_first(parts["wq"][layer], heads),
            "self_attn.k_proj": halves_first(parts["wk"][layer], kv_heads),
            "self_attn.v_proj": parts["wv"][layer],
            "self_attn.o_proj": parts["wo"][layer],
            "mlp.gate_proj": parts["w1"][layer],
            "mlp.down_proj": parts["w2"][layer],
            "mlp.up_proj": parts["w3"][layer],
        }
        tensors |= {
            f"model.layers.{layer}.{name}.weight": np.ascontiguousarray(array)
            for name, array in of_layer.items()
        }
    return tensors


def halves_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * head_dim, dim) from pair order 0 1 2 3 ... to 0 2 4 ... 1 3 5 ... in each
    head."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read_pieces(path: Path, vocab: int) -> list[tuple[str, float]]:
    """The pieces and their scores, with U+2581 for a space as in SentencePiece."""
    data, offset, pieces = path.read_bytes(), 4, []
    while offset + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        text = data[offset + 8 : offset + 8 + length]
        if length < 0 or len(text) != length:
            raise SystemExit(f"{path} ends inside piece {len(pieces)}")
        pieces.append((text.decode("utf-8").replace(" ", SPACE), score))
        offset += 8 + length
    if offset != len(data) or len(pieces) != vocab:
        raise SystemExit(
            f"{path} has {len(pieces)} pieces, but the model has a vocabulary of {vocab}"
        )
    pieces[:3] = [(name, 0.0) for name in SPECIAL]  # llama2.c writes them as text to print
    for value in range(256):
        if pieces[3 + value][0] != f"<0x{value:02X}>":
            raise SystemExit(f"piece {3 + value} of {path} is {pieces[3 + value][0]!r}, not a byte")
    return pieces


def merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, the highest score first, as SentencePiece
    merges them. Ties of score cannot disagree: one piece has one score."""
    score = {piece: value for piece, value in pieces[3 + 256 :]}
    pairs = [(piece[:cut], piece[cut:]) for piece in score for cut in range(1, len(piece))]
    return sorted(
        (pair for pair in pairs if pair[0] in score and pair[1] in score),
        key=lambda pair: -score[pair[0] + pair[1]],
    )


def write_tokenizer(pieces: list[tuple[str, float]], path: Path) -> None:
    """tokenizer.json: BPE with byte fallback, a space before the text, <s> in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise SystemExit("the tokenizer has a piece twice")
    tokenizer = Tokenizer(
        models.BPE(vocab, merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    tokenizer.save(str(path))


def convert(model: Path, tokenizer: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json into `folder`."""
    from safetensors.numpy import save_file

    config, tensors = read_model(model)
    pieces = read_pieces(tokenizer, config["vocab_size"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(pieces, folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Turn a llama2.c model and tokenizer into a Hugging Face folder.",
        epilog=(
            "example: python scripts/convert_llama2c.py stories260K.bin tok512.bin stories260K-hf"
        ),
    )
    parser.add_argument("model", type=Path, help="model in the legacy .bin layout of llama2.c")
    parser.add_argument("tokenizer", type=Path, help="tokenizer in the .bin layout of llama2.c")
    parser.add_argument("folder", type=Path, help="folder to write, made when it does not exist")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.tokenizer, arguments.folder)


if __name__ == "__main__":
    main()
