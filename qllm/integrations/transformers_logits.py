"""Logits from a model that transformers loads."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..errors import QllmFileError, QllmValueError
from ..strict_json import quoted
from .prefix import PrefixReader

# An arm from elsewhere computes with its own kernels, not with qllm's under its operators.
os.environ.setdefault("QLLM_BNB_BACKEND", "0")

REFUSED = ("trust_remote_code", "use_safetensors", "weights_only", "state_dict", "config")
"""Options that are not passed on: code of a model folder is never run, and nothing is unpickled."""


class TransformersLogits(PrefixReader):
    """A causal language model by `AutoModelForCausalLM.from_pretrained(path, **options)`, from
    safetensors files alone and without any code of its folder. In a mapping, as a file has it,
    `quantization_config` names its `quant_method`. `dtype` is the folder's unless given. `threads`
    are those of torch in this process.

    Raises `QllmValueError` for options that are refused, `QllmFileError` for what transformers
    cannot load.
    """

    def __init__(
        self, path: str | Path, options: Mapping[str, Any], threads: int | None = None
    ) -> None:
        super().__init__()
        for key in options:
            if key in REFUSED:
                raise QllmValueError(
                    f"the option {key} is not passed on to transformers: code of a model's folder"
                    " is never run, and weights come from safetensors files"
                )
        self.name = f"transformers {path}"
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = _load(path, options)
        self._cache: Any = None
        self._length = 0  # positions in it
        parameters = inspect.signature(self._model.forward).parameters
        # transformers renamed it during version 5
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.vocab = int(self._model.get_output_embeddings().weight.shape[0])
        """Columns of the logits; folders may pad them."""

    @property
    def device(self) -> str:
        """Where the model computes."""
        return str(self._model.device)

    def memory(self) -> dict[str, int]:
        """Bytes of the weights."""
        return {"weights": int(self._model.get_memory_footprint())}

    def _extend(self, ids: Sequence[int], start: int) -> np.ndarray:
        tokens = torch.tensor([list(ids)], device=self._model.device)
        cache, self._cache = self._cache, None
        with torch.inference_mode():
            found = self._model(input_ids=tokens, use_cache=True, **{self._cache_name: cache})
        self._cache = found[self._cache_name]
        self._length = start + len(ids)
        rows: np.ndarray = found.logits[0].float().cpu().numpy()
        return rows

    def _truncate(self, length: int) -> bool:
        cache = self._cache
        if not isinstance(cache, transformers.DynamicCache) or any(cache.is_sliding):
            return False  # a window has dropped what stood before it
        cache.crop(length - self._length)  # a negative number: how many to remove
        self._length = length
        return True

    def _clear(self) -> None:
        self._cache = None


def _load(path: str | Path, options: Mapping[str, Any]) -> Any:
    """The model, with transformers kept from printing."""
    logging: Any = transformers.logging
    auto: Any = transformers.AutoModelForCausalLM
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(
            path, **{"dtype": "auto", **options}, trust_remote_code=False, use_safetensors=True
        ).eval()
    except Exception as error:  # of transformers, its hub client and its quantizers
        first = str(error).strip().split("\n", 1)[0]
        raise QllmFileError(f"transformers cannot load {path}: {quoted(first, 200)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
