"""Whole models in qllm, llama.cpp and transformers behind one function.

Every engine has `generate(prompt, new, sequences)`: the prompt's tokens are computed once or for
each sequence, as the library does it, then `new` tokens are taken greedily in each of the
sequences, which decode together; the tokens are returned, a list per sequence.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import ggml_layer
import numpy as np

import qllm


class Ours:
    """qllm's decoder, step by step and greedily, as `Model.generate` uses it, which would compute
    sequences that draw the same tokens only once. `head` is a format for the output embedding, or
    None, which leaves it in bfloat16."""

    def __init__(self, folder: Path, format: str, head: str | None, compute: str,
                 threads: int) -> None:
        self.model = qllm.Model.from_pretrained(folder, format, compute=compute, threads=threads)
        if head is not None:
            self.model.quantize_(head, include="lm_head", quantize_head=True)

    def generate(self, prompt: list[int], new: int, sequences: int = 1) -> list[list[int]]:
        decoder = self.model.decoder
        first, ids = decoder.sequence(), np.array(prompt, np.int64)
        logits = decoder.step([first] * len(ids), ids, np.arange(len(ids)) == len(ids) - 1)
        tokens = np.repeat(qllm.sample(logits, temperature=0.0).tokens, sequences)
        several = [first, *(first.fork() for _ in range(sequences - 1))]
        found = [tokens]
        for _ in range(new - 1):
            tokens = qllm.sample(decoder.step(several, tokens), temperature=0.0).tokens
            found.append(tokens)
        return np.stack(found, axis=1).tolist()

    def close(self) -> None:
        del self.model


def silence_llama_cpp() -> None:
    """Stops what llama.cpp writes to standard error."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENT, None)


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain functions, without Python in the inner loop but
    for the choice of the greatest logit. A prompt is computed once, and its keys and values are
    shared by all sequences."""

    def __init__(self, file: Path, threads: int, positions: int, sequences: int = 1) -> None:
        import llama_cpp

        self.c = llama_cpp
        silence_llama_cpp()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = ggml_layer.amx_works()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(file), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {file}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = positions
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = sequences
        options.kv_unified = True
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp could not make a context of {positions} positions")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def _decode(self, tokens: list[int], positions: list[int], sequences: list[int],
                wanted: list[bool]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = wanted[i]
        status = self.c.llama_decode(self.context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode gave {status}")

    def logits(self, i: int) -> np.ndarray:
        """The logits behind token i of the last batch, (vocab,) float32: a view."""
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.vocab,))

    def prefill(self, prompt: list[int]) -> np.ndarray:
        """Computes a prompt anew, 512 tokens at a time: the logits behind its last token."""
        self.c.llama_memory_clear(self.memory, False)
        for first in range(0, len(prompt), 512):
            part = prompt[first:first + 512]
            wanted = [first + i + 1 == len(prompt) for i in range(len(part))]
            self._decode(part, list(range(first, first + len(part))), [0] * len(part), wanted)
        return self.logits(len(part) - 1)

    def generate(self, prompt: list[int], new: int, sequences: int = 1) -> list[list[int]]:
        token = int(self.prefill(prompt).argmax())
        for i in range(1, sequences):
            self.c.llama_memory_seq_cp(self.memory, 0, i, -1, -1)
        found = [[token] for _ in range(sequences)]
        for step in range(new - 1):
            self._decode([ids[-1] for ids in found], [len(prompt) + step] * sequences,
                         list(range(sequences)), [True] * sequences)
            for i, ids in enumerate(found):
                ids.append(int(self.logits(i).argmax()))
        return found

    def close(self) -> None:
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)


class Transformers:
    """transformers in bfloat16, or with bitsandbytes in nf4, fp4 or int8."""

    def __init__(self, folder: Path, format: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch = torch
        options: dict[str, Any] = {}
        if format != "bf16":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_8bit=True) if format == "int8" else transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=format,
                bnb_4bit_compute_dtype=torch.bfloat16)
            options["device_map"] = "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, **options).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, prompt: list[int], new: int, sequences: int = 1) -> list[list[int]]:
        ids = self.torch.tensor([prompt] * sequences)
        with self.torch.inference_mode():
            found = self.model.generate(ids, attention_mask=self.torch.ones_like(ids),
                                        do_sample=False, max_new_tokens=new, pad_token_id=0)
        return found[:, len(prompt):].tolist()

    def close(self) -> None:
        del self.model


Engine = Ours | LlamaCpp | Transformers
