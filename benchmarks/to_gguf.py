"""Converts a Hugging Face folder of a Llama to GGUF, and that to llama.cpp's quantized types.

    python benchmarks/to_gguf.py FOLDER OUT --types BF16 Q4_0 Q4_K_M

writes OUT/bf16.gguf from the safetensors files, then OUT/q4_0.gguf and so on from it by
llama.cpp's own quantizer. Needs pip install "qllm[bench]".
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qllm.checkpoint import Checkpoint

TYPES = ("BF16", "Q8_0", "Q4_0", "IQ4_NL", "Q4_K_M")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection (heads * head_dim, k), in whose heads rotation pairs
    lie half a head apart, with pairs side by side, as llama.cpp rotates them."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def add_tokenizer(writer: Any, folder: Path, vocab: int) -> None:
    """The byte-level BPE of tokenizer.json."""
    import gguf

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise SystemExit(f"{folder}/tokenizer.json is a {model['type']} tokenizer; only byte-level "
                         "BPE is converted")
    pieces = {i: piece for piece, i in model["vocab"].items()}
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    pieces |= {token["id"]: token["content"] for token in content["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if i in special else
             gguf.TokenType.NORMAL if i in pieces else gguf.TokenType.UNUSED for i in range(vocab)]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces.get(i, f"[unused{i}]") for i in range(vocab)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or ["a a"])  # llama.cpp asks for a list that is not empty


def add_config(writer: Any, config: dict[str, Any]) -> None:
    """The shape, under GGUF's names."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    parameters = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(config.get("rope_theta", parameters.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    for name in ("bos", "eos"):
        if isinstance(config.get(f"{name}_token_id"), int):
            getattr(writer, f"add_{name}_token_id")(config[f"{name}_token_id"])


def convert(folder: Path, out: Path) -> Path:
    """Writes the bf16 file of a folder."""
    import gguf

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    if config.get("model_type") != "llama" or (config.get("rope_scaling") or {}):
        raise SystemExit(f"{folder} holds a {config.get('model_type')} model or scaled rotations; "
                         "plain Llamas are converted")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"],
             "k_proj": config.get("num_key_value_heads", config["num_attention_heads"])}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    add_config(writer, config)
    add_tokenizer(writer, folder, config["vocab_size"])
    for name in checkpoint.names():
        entry = checkpoint.entry(name)
        if entry.dtype != "BF16":
            raise SystemExit(f"{name} is {entry.dtype}; bfloat16 is converted")
        bits = entry.numpy()  # uint16
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SystemExit(f"GGUF has no name for the tensor {name}")
        if bits.ndim == 1:
            writer.add_tensor(target, (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        for part, count in heads.items():
            if name.endswith(f"{part}.weight"):
                bits = interleaved(bits, count)
        writer.add_tensor(target, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint.close()
    return out


def quantize(source: Path, out: Path, kind: str, threads: int) -> Path:
    """A file of a quantized type, by llama.cpp."""
    import engines
    import llama_cpp

    engines.silence_llama_cpp()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = threads
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), parameters)
    if status != 0:
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")
    return out


def ensure(folder: Path, out: Path, kind: str, threads: int) -> Path:
    """The file of a type, made unless it is there."""
    path = out / f"{kind.lower()}.gguf"
    if path.exists():
        return path
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    if kind == "BF16":
        convert(folder, unfinished)
    else:
        quantize(ensure(folder, out, "BF16", threads), unfinished, kind, threads)
    unfinished.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Llama folder to GGUF files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", nargs="+", default=["BF16"], choices=TYPES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    for kind in options.types:
        print(ensure(options.folder, options.out, kind, options.threads))


if __name__ == "__main__":
    main()
