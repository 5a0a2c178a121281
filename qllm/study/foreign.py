"""Arms from elsewhere: adapters that give the logits of other libraries' models.

Token ids come from the study's own tokenizer, so an arm must have the same vocabulary; what it
computes them with is its own business. Sampling, statistics and report are the study's.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..architectures import describe
from ..checkpoint import Checkpoint
from ..errors import QllmUnsupportedError, QllmValueError
from ..strict_json import quoted
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from .arms import LogitsModel
    from .design import Arm, Design

PACKAGES = {"transformers": ("torch", "transformers"), "gguf": ("llama_cpp",)}
"""What each source needs."""

_INSTALL = {"torch": "torch", "transformers": "transformers", "llama_cpp": "llama-cpp-python"}


def load(arm: Arm, model_name: str, design: Design) -> LogitsModel:
    """The model of an arm whose `source` is "transformers" or "gguf", with as many tokens as the
    study's model `model_name` has.

    `arm.path` is a folder or name for transformers (None: the study's model) or a GGUF file;
    `arm.options` go to the loader. Logits of tokens that the study's model has not, which pad a
    vocabulary, are cut off with a warning.

    Raises `QllmUnsupportedError` for packages that are missing, `QllmValueError` for another
    vocabulary or options that are refused, `QllmFileError` for what cannot be loaded.
    """
    if arm.source == "live":
        raise QllmValueError(
            f"arm {quoted(arm.name)} is a live object, which only run(..., live=...) can be given"
        )
    _require(arm)
    with Checkpoint.open(model_name) as checkpoint:
        architecture = describe(checkpoint.config, str(checkpoint.folder / "config.json"))
        vocab = int(architecture.decoder["vocab"])
        folder, file = checkpoint.folder, checkpoint.tokenizer_file
    tokenizer = None if file is None else Tokenizer(file, vocab)
    threads = arm.threads or design.threads
    found: Any
    if arm.source == "transformers":
        from ..integrations.transformers_logits import TransformersLogits

        path = arm.path or str(folder)
        _require_same_tokenizer(arm, Path(path), tokenizer, vocab)
        found = TransformersLogits(path, arm.options, threads)
    else:
        from ..integrations.gguf_logits import GgufLogits

        if arm.path is None:
            raise QllmValueError(f"arm {quoted(arm.name)} is a GGUF arm without the path of a file")
        found = GgufLogits(arm.path, arm.options, threads)
        if tokenizer is not None:
            _require_same_pieces(arm, tokenizer, found.piece, min(vocab, found.vocab))
    model: LogitsModel = _with_vocab(arm, found, vocab, model_name)
    return model


def _require(arm: Arm) -> None:
    missing = [name for name in PACKAGES[arm.source] if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(_INSTALL[name] for name in missing)
        raise QllmUnsupportedError(
            f"arm {quoted(arm.name)} needs {names}, which this Python has not: pip install {names}"
        )


class Live:
    """An object with `logits(ids)` as a model of `vocab` tokens. Its own `name`, `vocab`, `device`,
    `layers()` and `memory()` are used where it has them."""

    def __init__(self, arm: Arm, model: Any, vocab: int) -> None:
        self._model = model
        self.name = str(getattr(model, "name", arm.name))
        self.vocab = int(getattr(model, "vocab", vocab))
        self.device = str(getattr(model, "device", "cpu"))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(n, vocab) float32."""
        return np.asarray(self._model.logits(list(ids)), np.float32)

    def layers(self) -> list[dict[str, Any]]:
        """Rows of the table of weights."""
        rows = getattr(self._model, "layers", None)
        return list(rows()) if callable(rows) else []

    def memory(self) -> dict[str, int]:
        """Bytes by kind."""
        known = getattr(self._model, "memory", None)
        return dict(known()) if callable(known) else {}


class _Cut:
    """A model without the logits behind the first `vocab`."""

    def __init__(self, model: Any, vocab: int) -> None:
        self._model = model
        self.name: str = model.name
        self.vocab = vocab

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(n, vocab) float32."""
        return np.ascontiguousarray(self._model.logits(ids)[:, : self.vocab])

    @property
    def device(self) -> str:
        """Where the model computes."""
        return str(getattr(self._model, "device", "cpu"))

    def memory(self) -> dict[str, int]:
        """Bytes of the weights."""
        found: dict[str, int] = self._model.memory()
        return found


def _with_vocab(arm: Arm, model: Any, vocab: int, model_name: str) -> Any:
    if model.vocab == vocab:
        return model
    if model.vocab < vocab:
        raise QllmValueError(
            f"arm {quoted(arm.name)} ({model.name}) knows {model.vocab} tokens and {model_name}"
            f" {vocab}; only models with one vocabulary can be compared"
        )
    warnings.warn(
        f"arm {arm.name} ({model.name}) has {model.vocab} logits and {model_name} has {vocab}"
        " tokens: the logits beyond them, which pad its vocabulary, are left out",
        stacklevel=3,
    )
    return _Cut(model, vocab)


def _require_same_tokenizer(
    arm: Arm, path: Path, tokenizer: Tokenizer | None, vocab: int
) -> None:
    """Compares the tokenizer in the folder of an arm with the study's, where both have one."""
    file = path / "tokenizer.json"
    if tokenizer is None or not file.is_file() or file == tokenizer.path:
        return
    _require_same_pieces(arm, tokenizer, Tokenizer(file, vocab).piece, vocab)


def _require_same_pieces(arm: Arm, tokenizer: Tokenizer, piece: Any, count: int) -> None:
    """Refuses an arm that writes a token in another way. Tokens that one of the two does not have
    are not compared: files pad vocabularies with names of their own."""
    for token in range(count):
        ours, theirs = tokenizer.piece(token), piece(token)
        if ours is not None and theirs is not None and ours != theirs:
            raise QllmValueError(
                f"arm {quoted(arm.name)} has another vocabulary: token {token} is"
                f" {quoted(theirs)} there and {quoted(ours)} in the study's tokenizer"
            )
