"""Writing a model as a Hugging Face folder, quantized layers in the layouts of bitsandbytes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import bnb
from .bnb import FORMATS as QUANTIZED_FORMATS
from .errors import QllmFileError, QllmUnsupportedError, QllmValueError
from .safetensors import TensorEntry
from .strict_json import quoted

if TYPE_CHECKING:
    from .architectures import Linear
    from .model import Model

SHARD_BYTES = 4 << 30
"""Data of one weight file, unless a single tensor is larger."""

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I8": "int8"}
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

# a tensor to write: its name, its dtype as in the file, and its values or their bits
_Tensor = tuple[str, str, np.ndarray]


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """See `Model.save`."""
    target = require_possible(folder)
    from safetensors import TensorSpec, serialize_file

    config = _config(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise QllmFileError(f"{target} cannot be written: {error.strerror}") from None
    try:
        _write_weights(_tensors(model), temporary, TensorSpec, serialize_file)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        _copy_others(model, temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise QllmFileError(
            f"{target} cannot be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_path(folder: Any) -> Path:
    """The absolute path of a folder that a caller names. Raises `QllmValueError` for what no folder
    can be called."""
    name = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else folder
    try:
        possible = isinstance(name, str) and name and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise QllmValueError(f"the folder is {quoted(name)}; the path of a folder was expected")
    return Path(os.path.abspath(name))


def require_possible(folder: Any) -> Path:
    """The absolute path of a folder to save in, which does not exist or is empty. Raises, before
    any work, what `save` would raise after it: for a missing package, or a folder in use."""
    try:
        from safetensors import TensorSpec, serialize_file  # noqa: F401
    except ImportError:
        raise QllmUnsupportedError(
            'saving needs the package safetensors, version 0.8 or later: pip install "qllm[save]"'
        ) from None
    target = folder_path(folder)
    try:
        if os.path.lexists(target) and (not target.is_dir() or target.is_symlink()):
            raise QllmFileError(
                f"{target} exists and is no folder; nothing is overwritten, choose another name"
            )
        if target.is_dir() and any(target.iterdir()):
            raise QllmFileError(
                f"{target} is not empty; nothing is overwritten, choose another folder or empty it"
            )
    except QllmFileError:
        raise
    except OSError as error:
        raise QllmFileError(f"{target} cannot be used: {error.strerror}") from None
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ----------------------------------------------------------------------------------- the config


def _config(model: Model) -> dict[str, Any]:
    """config.json of the saved model."""
    formats = model.formats
    quantized = {module: form for module, form in formats.items() if form in QUANTIZED_FORMATS}
    config = {
        name: value
        for name, value in model.checkpoint.config.items()
        if name != "quantization_config"
    }
    if model.architecture.tied and model.architecture.head.module in quantized:
        # the output embedding is stored on its own now
        config["tie_word_embeddings"] = False
    if not quantized:
        return config
    kinds = sorted(set(quantized.values()))
    if "int8" in kinds and len(kinds) > 1:
        raise QllmUnsupportedError(
            f"the model has layers in {', '.join(kinds)}; a checkpoint of bitsandbytes holds int8 "
            "or 4-bit layers, not both: swap one of them before saving"
        )
    skipped = [module for module in formats if module not in quantized]
    return config | {
        "quantization_config": bnb.quantization_config(
            kinds[0],
            compute_dtype=_compute_dtype(config),
            skip_modules=skipped,
            threshold=model.decoder.info()["int8_threshold"],
        )
    }


def _compute_dtype(config: dict[str, Any]) -> str:
    """The dtype in which transformers is to compute with 4-bit layers: the model's own."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if dtype in ("float16", "bfloat16", "float32") else "float32"


# ---------------------------------------------------------------------------------- the tensors


def _tensors(model: Model) -> Iterator[_Tensor]:
    """Every tensor of the saved model, in the order of the layers."""
    architecture, checkpoint = model.architecture, model.checkpoint
    embedding = architecture.stored(architecture.embedding) + ".weight"
    yield architecture.embedding + ".weight", *_stored(checkpoint.entry(embedding))
    for vector in architecture.vectors:
        entry = checkpoint.entry(architecture.stored(vector.tensor))
        yield vector.tensor, *_stored(entry)
    for linear in architecture.modules:
        if linear.bias:
            entry = checkpoint.entry(architecture.stored(linear.module) + ".bias")
            yield linear.module + ".bias", *_stored(entry)
        yield from _linear(model, linear)


def _linear(model: Model, linear: Linear) -> Iterator[_Tensor]:
    """The weight of a linear layer, in the format that it has now."""
    tied = model.architecture.tied and linear is model.architecture.head
    weight = model.decoder.linear(linear.slot)
    if weight.format in QUANTIZED_FORMATS:
        stated = bnb.BnbTensor(
            **{
                field.name: getattr(weight, field.name)
                for field in fields(bnb.BnbTensor)
                if field.name != "dtype_name"
            },
            dtype_name=model._layers.dtype_name(linear.module),
        )
        for name, array in bnb.state_dict_entries(linear.module, stated).items():
            yield name, {"u1": "U8", "i1": "I8", "f4": "F32"}[array.dtype.str[1:]], array
    elif not tied:
        yield linear.module + ".weight", _DTYPES[weight.format], weight.packed


def _stored(entry: TensorEntry) -> tuple[str, np.ndarray]:
    return entry.dtype, entry.numpy()


def _write_weights(
    tensors: Iterator[_Tensor], folder: Path, tensor_spec: Any, serialize_file: Any
) -> None:
    """Writes the tensors as one file, or as several and an index."""
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors):
        path = folder / f"part-{len(files)}.safetensors"
        specs = {
            name: tensor_spec(
                dtype=_NAMES[dtype],
                shape=array.shape,
                data_ptr=array.ctypes.data,
                data_len=array.nbytes,
            )
            for name, dtype, array in shard
        }
        serialize_file(specs, str(path), metadata={"format": "pt"})
        total += sum(array.nbytes for _, _, array in shard)
        files.append((path, [name for name, _, _ in shard]))
        del shard
    if len(files) == 1:
        os.replace(files[0][0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(path, folder / name)
        weight_map |= {tensor: name for tensor in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Iterator[_Tensor]) -> Iterator[list[_Tensor]]:
    """Tensors in groups of up to SHARD_BYTES, contiguous and little-endian."""
    shard: list[_Tensor] = []
    size = 0
    for name, dtype, array in tensors:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        if shard and size + array.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, dtype, array))
        size += array.nbytes
    if shard:
        yield shard


def _copy_others(model: Model, folder: Path) -> None:
    """The tokenizer's files and generation_config.json."""
    for name in _COPIED:
        source = model.checkpoint.member(name)
        if source is None:
            continue
        if not source.is_file():
            raise QllmFileError(f"{source} is no regular file, so {quoted(name)} cannot be copied")
        shutil.copyfile(source, folder / name)
