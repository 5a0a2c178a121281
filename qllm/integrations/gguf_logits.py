"""Logits from a GGUF file, by llama.cpp through llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from ..errors import QllmFileError, QllmMemoryError, QllmValueError
from ..strict_json import quoted
from .prefix import PrefixReader

_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)

_BATCH = 512
_SMALLEST_CONTEXT = 512

_DEFAULTS: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
"""Keys and values in float32, so that what differs comes from the weights."""


class GgufLogits(PrefixReader):
    """The model in a GGUF file. `options` are fields of llama.cpp's `llama_model_params` and
    `llama_context_params`, such as n_gpu_layers; keys and values are float32 unless type_k and
    type_v say otherwise. `threads` None leaves their number to llama.cpp.

    Raises `QllmFileError` for a file that llama.cpp cannot load, `QllmValueError` for options that
    it has not.
    """

    def __init__(
        self, path: str | Path, options: Mapping[str, Any], threads: int | None = None
    ) -> None:
        super().__init__()
        self.name = f"GGUF {path}"
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        llama_cpp.llama_log_set(_SILENT, None)
        model_options = llama_cpp.llama_model_default_params()
        self._options = llama_cpp.llama_context_default_params()
        # No weights repacked for the processor: llama.cpp's kernels for AMX, which it then takes,
        # fault in its builds of 2026 (ggml-org/llama.cpp pull request 26954).
        if hasattr(model_options, "use_extra_bufts"):
            model_options.use_extra_bufts = False
        given = {**_DEFAULTS, **options}
        if threads is not None:
            given = {"n_threads": threads, "n_threads_batch": threads, **given}
        for key, value in given.items():
            _set_option([model_options, self._options], key, value)
        if not os.path.isfile(path):
            raise QllmFileError(f"there is no GGUF file {path}")
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_options)
        if not self._model:
            raise QllmFileError(f"llama.cpp cannot load {path}; it must be a GGUF file of a model"
                                " that this version knows")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._capacity = 0

    def piece(self, token: int) -> str | None:
        """How the file's vocabulary writes a token; None for one that it marks as unused."""
        unused = llama_cpp.LLAMA_TOKEN_ATTR_UNUSED | llama_cpp.LLAMA_TOKEN_ATTR_UNDEFINED
        attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
        if attributes == 0 or attributes & unused:
            return None
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def memory(self) -> dict[str, int]:
        """Bytes of the weights."""
        return {"weights": int(llama_cpp.llama_model_size(self._model))}

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        if len(ids) > self._capacity:
            self._grow(len(ids))
        return super().logits(ids)

    def _extend(self, ids: Sequence[int], start: int) -> np.ndarray:
        parts = [
            self._decode(ids[first : first + _BATCH], start + first)
            for first in range(0, len(ids), _BATCH)
        ]
        return np.concatenate(parts)

    def _truncate(self, length: int) -> bool:
        memory = llama_cpp.llama_get_memory(self._context)
        return bool(llama_cpp.llama_memory_seq_rm(memory, 0, length, -1))

    def _clear(self) -> None:
        if self._context:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _grow(self, length: int) -> None:
        """A new, empty context of at least `length` positions."""
        self.forget()
        if self._context:
            llama_cpp.llama_free(self._context)
        self._capacity = max(self._capacity, _SMALLEST_CONTEXT)
        while self._capacity < length:
            self._capacity *= 2
        self._options.n_ctx = self._capacity
        self._options.n_batch = _BATCH
        self._context = llama_cpp.llama_init_from_model(self._model, self._options)
        if not self._context:
            self._capacity = 0
            raise QllmMemoryError(
                f"llama.cpp cannot make room for {length} positions of {self.name}"
            )

    def _decode(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """The logits after each of at most `_BATCH` tokens at the positions from `start` on."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = True
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise QllmFileError(f"llama.cpp failed to read {len(tokens)} tokens ({status})")
        rows = np.empty((len(tokens), self.vocab), np.float32)
        for i in range(len(tokens)):
            pointer = llama_cpp.llama_get_logits_ith(self._context, i)
            rows[i] = np.ctypeslib.as_array(pointer, (self.vocab,))
        return rows

    def __del__(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            if self._batch:
                llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_model_free(self._model)


def _set_option(places: Sequence[Any], key: str, value: Any) -> None:
    """Sets the field `key` of the first of the structures that has it."""
    for place in places:
        if key in [field[0] for field in place._fields_]:
            try:
                setattr(place, key, value)
            except TypeError:
                raise QllmValueError(
                    f"the option {key} of llama.cpp cannot be {quoted(value)}"
                ) from None
            return
    known = [field[0] for place in places for field in place._fields_]
    raise QllmValueError(
        f"llama.cpp has no option {quoted(key)}; there are {', '.join(known)}"
    )
