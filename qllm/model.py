"""A language model from a Hugging Face folder: load, swap formats, generate, measure, save."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from . import _core
from . import generation as _generation
from .architectures import FLOAT_DTYPES, Architecture, bind, describe
from .checkpoint import Checkpoint
from .config import GenerationConfig, QuantConfig, check_compute
from .errors import QllmFileError, QllmUnsupportedError, QllmValueError
from .generation import BATCH_SIZE, Generation, Progress, Request, Row
from .layers import Layers, dtype_of, to_float32
from .report import ModelInfo, QuantReport
from .strict_json import quoted
from .tokenizer import TextStream, Tokenizer

_LOGITS_PER_PIECE = 1 << 24  # float32 values that score() holds at a time


@dataclass(frozen=True, eq=False)
class Score:
    """How probable a model finds a text. `logprobs` (n - 1) float64 are natural logs of the
    probability of each token but the first, given those before it; `nll` is minus their sum;
    `nll_per_byte` divides it by the UTF-8 bytes of the text behind the first token (None without
    text)."""

    ids: list[int]
    logprobs: np.ndarray
    nll: float
    perplexity: float
    nll_per_byte: float | None


class Model:
    """A loaded model. Made by `Model.from_pretrained`.

    `checkpoint` is the mapped folder, `architecture` what its config.json says, `device` where the
    model computes. The weights are read from the folder once more at every swap, so the folder must
    stay as it is while the model is in use.
    """

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, decoder: Any, name: str
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.name = name
        self.decoder = decoder
        self.device: str = decoder.info()["device"]
        self._layers = Layers(checkpoint, architecture, decoder)
        self.eos_token_id: tuple[int, ...] = _eos_ids(checkpoint)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        quantization: str | QuantConfig | None = None,
        *,
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        isa: str | None = None,
        include: str | Sequence[str] | None = None,
        skip: str | Sequence[str] | None = None,
        blocksize: int = 64,
        int8_threshold: float | None = None,
        int8_outliers: Literal["row", "batch"] = "row",
        quantize_head: bool = False,
    ) -> Model:
        """Loads a folder, a built-in model ("demo:llama", "demo:falcon") or a model of the hub.

        `quantization` is a format (nf4, fp4, nf4-dq, fp4-dq, int8, bf16, f16, f32), to which the
        linear layers go straight from the mapped file, with `include`, `skip`, `blocksize` and
        `quantize_head` as in `quantize_`; or a `QuantConfig`, which holds all of these. None keeps
        the folder's formats, those of bitsandbytes included.

        `compute` is "exact" (float32 activations), "auto", the fastest mode whose rounding of
        activations is no coarser than bfloat16's (int16 by blocks for 4-bit weights, or bfloat16
        on processors with matrix units; bfloat16 for bfloat16 weights on processors that multiply
        it), or "int8", which rounds the activations of 4-bit weights to int8 by blocks; `info()`
        names the kernels.
        `threads` None and `isa` None (or a name from `qllm.cpu_info()["isas"]`) leave the choice to
        the machine. `int8_threshold` is the outlier threshold of LLM.int8() (None: the folder's,
        else 6), `int8_outliers` "row" or, as in bitsandbytes, "batch", by which a row's result
        depends on the others in its batch. `revision`, `cache_dir`, `token` and `local_files_only`
        go to the hub.

        Raises `QllmFileError` for a folder that is missing, damaged or contradicts itself,
        `QllmUnsupportedError` for what is understood but not offered, `QllmValueError` for
        arguments, `QllmMemoryError`.
        """
        check_compute(compute)
        for option, value in (("device", device), ("isa", isa), ("int8_outliers", int8_outliers)):
            if not isinstance(value, str) or not value.isprintable():
                if option != "isa" or value is not None:
                    raise QllmValueError(f"{option} is {quoted(value)}; a name was expected")
        config = _quant_config(quantization, include, skip, blocksize, quantize_head)
        checkpoint = Checkpoint.open(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        try:
            what = str(checkpoint.folder / "config.json")
            architecture = bind(describe(checkpoint.config, what), checkpoint)
            decoder = _core.Decoder(
                architecture.decoder,
                device=device,
                threads=threads,
                isa=isa,
                int8_threshold=_threshold(int8_threshold, checkpoint),
                int8_outliers=int8_outliers,
                compute=compute,
            )
            model = cls(checkpoint, architecture, decoder, os.fspath(name_or_folder))
            model._load(config)
        except BaseException:
            checkpoint.close()
            raise
        return model

    def _load(self, config: QuantConfig | None) -> None:
        architecture, checkpoint = self.architecture, self.checkpoint
        if not self._layers.shares_embedding(config):
            entry = checkpoint.entry(architecture.stored(architecture.embedding) + ".weight")
            self.decoder.load_embedding(
                entry.numpy(),
                FLOAT_DTYPES[entry.dtype],
                name=architecture.embedding,
                dtype=dtype_of(entry),
            )
            checkpoint.release(entry)
        for vector in architecture.vectors:
            values = to_float32(checkpoint.entry(architecture.stored(vector.tensor)))
            self.decoder.set_vector(vector.slot, values)
        self._layers.load(config)

    # ------------------------------------------------------------------------------- formats

    @property
    def formats(self) -> dict[str, str]:
        """Module name -> format of every linear layer."""
        return self._layers.formats

    def quantize_(
        self,
        format: str | QuantConfig,
        include: str | Sequence[str] | None = None,
        skip: str | Sequence[str] | None = None,
        *,
        blocksize: int = 64,
        quantize_head: bool = False,
    ) -> QuantReport:
        """Swaps linear layers to `format`, in place and straight from the mapped folder.

        `include` and `skip` are glob patterns (one or several) over module names as transformers
        has them, such as "model.layers.*.mlp.down_proj"; * also matches dots. A layer is swapped
        when it matches include (None: all) and does not match skip; the output embedding is left
        alone unless `quantize_head`. Layers outside the selection keep the format they have, so
        formats can be mixed by several calls. "bf16", "f16" and "f32" swap to these formats,
        "original" to what the folder has; these take back a quantized output embedding too.

        Returns a report of every linear layer. The swap is made whole or not at all: after an error
        or an interrupt all layers are as they were (put back from the folder, one by one; should
        that fail too, the error names the layers that have changed).

        Raises `QllmValueError` for a pattern that matches nothing, for weights that are not finite
        and for layers that the format cannot hold, `QllmUnsupportedError` for a layer which the
        folder has only quantized and which is to become something else.
        """
        config = _quant_config(format, include, skip, blocksize, quantize_head)
        if config is None:
            raise QllmValueError("format is None; name one, as in quantize_('nf4')")
        return self._layers.quantize(config)

    def requantize_(
        self,
        make: Callable[[np.ndarray], Any],
        format: str,
        include: str | Sequence[str] | None = None,
        skip: str | Sequence[str] | None = None,
        *,
        quantize_head: bool = False,
    ) -> QuantReport:
        """Replaces linear layers, chosen as in `quantize_`, by a quantization of your own.

        `make` is called with the weights of each, (rows, cols) float32 as the folder has them, and
        returns a `qllm.QuantizedTensor` of that shape; `format` is what reports call it. Returns a
        report of every linear layer. When `make` fails, the layers before stay replaced.
        """
        if not callable(make) or not isinstance(format, str) or not format:
            raise QllmValueError(
                "make must be a function from weights to a quantized tensor, and format its name"
            )
        config = QuantConfig("f32", include, skip, quantize_head=quantize_head)
        return self._layers.requantize(make, format, config)

    def report(self) -> QuantReport:
        """The report of all linear layers as they are now."""
        return self._layers.report()

    # ---------------------------------------------------------------------------------- text

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use. Raises `QllmFileError` when the folder has no
        tokenizer.json, `QllmUnsupportedError` without the package tokenizers."""
        path = self.checkpoint.tokenizer_file
        if path is None:
            raise QllmFileError(
                f"{self.checkpoint.folder} has no tokenizer.json, so text cannot be used; token "
                "ids can"
            )
        return Tokenizer(path, self.architecture.decoder["vocab"])

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, with BOS where tokenizer.json adds it."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        vocab = self.architecture.decoder["vocab"]
        return self.tokenizer.decode(
            _generation.token_ids(ids, vocab, "ids"), skip_special_tokens
        )

    def _tokenizer_or_none(self) -> Tokenizer | None:
        try:
            return self.tokenizer
        except (QllmFileError, QllmValueError):
            return None

    # ---------------------------------------------------------------------------- generation

    def generate(
        self,
        prompt: Any,
        *,
        config: GenerationConfig | None = None,
        prompt_key: Any = None,
        batch_size: int = BATCH_SIZE,
        **overrides: Any,
    ) -> Generation | list[Generation]:
        """Generates after `prompt`: a text, token ids, or a list of either, which gives a list.

        Options are those of `config` (default `GenerationConfig()`), changed by keyword:
        temperature, top_k, top_p, min_p, repetition_penalty, do_sample, max_new_tokens, seed, stop,
        eos_token_id, ignore_eos, keep_ties, logits_dtype. With a list of prompts an option may be a
        list with one value for each. Results do not depend on what else is in the batch.

        Raises `QllmValueError` before any work when an option has no meaning or prompt and
        max_new_tokens exceed the positions that the model has.
        """
        requests, single = self._requests(prompt, config, prompt_key, overrides)
        results = self.generate_batch(requests, batch_size=batch_size)
        return results[0] if single else results

    def generate_batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """The generations of `requests`, in their order.

        Equal prompts are computed once and share their keys and values; rows that finish leave the
        batch of `batch_size` rows, and waiting ones enter. `progress(finished, all)` is called
        whenever a request has finished.
        """
        batch_size = _generation.check_batch_size(batch_size)
        if not isinstance(requests, Iterable):
            raise QllmValueError(
                f"the requests are a {type(requests).__name__}; several Requests were expected"
            )
        if progress is not None and not callable(progress):
            raise QllmValueError(
                f"progress is a {type(progress).__name__}; a function of (finished, all) was "
                "expected"
            )
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        tokenizer = self._tokenizer_or_none()
        results: list[Generation | None] = [None] * len(rows)
        finished = 0
        for row in _generation.run(self.decoder, rows, batch_size):
            if row.finish_reason is not None:
                results[row.index] = row.result(tokenizer)
                finished += 1
                if progress is not None:
                    progress(finished, len(rows))
        return results  # type: ignore[return-value]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        streamer: Any = None,
        config: GenerationConfig | None = None,
        prompt_key: int | None = None,
        **overrides: Any,
    ) -> Iterator[str]:
        """Generates after one prompt and gives the text in pieces as it settles; joined, they are
        the text that `generate` gives. Bytes of an unfinished character, and text that may become a
        stop string, are held back.

        With `streamer`, an object of Hugging Face's kind, generation runs at once: its put gets the
        prompt's ids as an array (1, n), then each new token as an array (1,), and its end is
        called; the pieces are returned as an iterator too.
        """
        requests, single = self._requests(prompt, config, prompt_key, overrides)
        if not single:
            raise QllmValueError("stream takes one prompt, not a list; use generate for several")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise QllmValueError(
                f"streamer is a {type(streamer).__name__}; an object with put and end was expected"
            )
        row = self._row(0, requests[0])
        if streamer is None or row.stream is None:
            row.stream = TextStream(self.tokenizer, row.prompt_ids, row.config.stop)
        pieces = self._pieces(row, streamer)
        return pieces if streamer is None else iter(list(pieces))

    def _pieces(self, row: Row, streamer: Any) -> Iterator[str]:
        if streamer is not None:
            streamer.put(np.array([row.prompt_ids], np.int64))
        shown = 0
        for _ in _generation.run(self.decoder, [row], 1):
            if streamer is not None:
                streamer.put(np.array(row.ids[-1:], np.int64))
            piece = "".join(row.pieces[shown:])
            shown = len(row.pieces)
            if piece:
                yield piece
        if streamer is not None:
            streamer.end()

    def _requests(
        self, prompt: Any, config: GenerationConfig | None, prompt_key: Any,
        overrides: dict[str, Any]
    ) -> tuple[list[Request], bool]:
        """The requests of a call of generate, and whether it was one prompt."""
        base = GenerationConfig() if config is None else config
        if not isinstance(base, GenerationConfig):
            raise QllmValueError(
                f"config is a {type(base).__name__}; a GenerationConfig was expected"
            )
        single = not _generation.is_batch(prompt)
        prompts = [prompt] if single else list(prompt)
        options = _generation.per_prompt(
            overrides | {"prompt_key": prompt_key}, None if single else len(prompts)
        )
        return [
            Request(text, base.replace(**chosen), key)
            for text, chosen, key in zip(
                prompts, options, [option.pop("prompt_key") for option in options]
            )
        ], single

    def _row(self, index: int, request: Request) -> Row:
        """A request, checked, as a row of the loop."""
        if not isinstance(request, Request):
            raise QllmValueError(f"a Request was expected, not a {type(request).__name__}")
        if not isinstance(request.config, GenerationConfig):
            raise QllmValueError(
                f"the config of a Request is a {type(request.config).__name__}; a "
                "GenerationConfig was expected"
            )
        ids, config = self._prompt_ids(request.prompt), request.config
        positions = self.architecture.decoder["max_positions"]
        if len(ids) + config.max_new_tokens > positions:
            raise QllmValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {config.max_new_tokens} need "
                f"{len(ids) + config.max_new_tokens} positions, but the model has {positions}; "
                "shorten the prompt or lower max_new_tokens"
            )
        vocab = self.architecture.decoder["vocab"]
        for token in config.eos_token_id or ():
            if token >= vocab:
                raise QllmValueError(
                    f"eos_token_id has {token}, but the model has the token ids 0 to {vocab - 1}"
                )
        eos = self.eos_token_id if config.eos_token_id is None else config.eos_token_id
        key = request.prompt_key
        return Row(
            index,
            ids,
            config,
            _generation.prompt_key_of(ids) if key is None else _generation.check_prompt_key(key),
            frozenset() if config.ignore_eos else frozenset(eos),
            TextStream(self.tokenizer, ids, config.stop) if config.stop else None,
        )

    def _prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = tuple(self.encode(prompt))
        else:
            ids = _generation.token_ids(prompt, self.architecture.decoder["vocab"], "the prompt")
        if not ids:
            raise QllmValueError(
                "the prompt is empty; at least one token is needed to go on from"
            )
        return ids

    # ------------------------------------------------------------------------------ measures

    def logits(self, ids: Any) -> np.ndarray | list[np.ndarray]:
        """The logits after each token of a sequence, (tokens, vocab) float32, teacher-forced; of
        a list of sequences a list. Texts are encoded first."""
        single = not _generation.is_batch(ids)
        sequences = [self._checked_ids(item) for item in ([ids] if single else ids)]
        rows: list[Any] = []
        for item in sequences:
            rows += [self.decoder.sequence()] * len(item)
        tokens = np.array([token for item in sequences for token in item], np.int64)
        logits: np.ndarray = self.decoder.step(rows, tokens)
        if single:
            return logits
        ends = np.cumsum([len(item) for item in sequences])
        return [logits[end - len(item) : end] for end, item in zip(ends, sequences)]

    def score(self, text_or_ids: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text or of token ids, and its perplexity."""
        ids = self._checked_ids(text_or_ids)
        if len(ids) < 2:
            raise QllmValueError(
                f"the text has {len(ids)} token; at least 2 are needed, since the first one is not "
                "predicted"
            )
        vocab = self.architecture.decoder["vocab"]
        piece = max(1, _LOGITS_PER_PIECE // vocab)
        sequence, inputs, targets = self.decoder.sequence(), ids[:-1], ids[1:]
        threads = _generation.host_threads(self.decoder)
        parts = []
        for start in range(0, len(inputs), piece):
            tokens = np.array(inputs[start : start + piece], np.int64)
            logits = self.decoder.step([sequence] * len(tokens), tokens)
            wanted = np.array(targets[start : start + piece], np.int64)
            parts.append(_core.logprobs(logits, wanted, threads=threads))
        logprobs = np.concatenate(parts)
        nll = -math.fsum(logprobs)
        size = self._predicted_bytes(text_or_ids, ids)
        mean = nll / len(logprobs)
        return Score(
            list(ids),
            logprobs,
            nll,
            math.exp(mean) if mean < 709 else math.inf,
            nll / size if size else None,
        )

    def _predicted_bytes(self, text_or_ids: Any, ids: tuple[int, ...]) -> int | None:
        """UTF-8 bytes of the text that is predicted: all but that of the first token."""
        tokenizer = self._tokenizer_or_none()
        if tokenizer is None:
            return None
        text = text_or_ids if isinstance(text_or_ids, str) else tokenizer.decode(ids)
        return len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())

    def _checked_ids(self, value: Any) -> tuple[int, ...]:
        ids = self._prompt_ids(value)
        positions = self.architecture.decoder["max_positions"]
        if len(ids) > positions:
            raise QllmValueError(
                f"{len(ids)} tokens need as many positions, but the model has {positions}; cut the "
                "text"
            )
        return ids

    # ------------------------------------------------------------------------------- the rest

    def info(self) -> ModelInfo:
        """Sizes, formats, bytes held now, device, compute mode and kernels."""
        decoder, config = self.decoder.info(), self.architecture.decoder
        formats: dict[str, int] = {}
        for format in self.formats.values():
            formats[format] = formats.get(format, 0) + 1
        return ModelInfo(
            name=self.name,
            architecture=self.architecture.model_type,
            parameters=self.architecture.parameters,
            layers=config["layers"],
            hidden=config["hidden"],
            vocab=config["vocab"],
            max_positions=config["max_positions"],
            tied=self.architecture.tied,
            formats=formats,
            bytes=dict(self.decoder.nbytes()),
            device=decoder["device"],
            compute=decoder["compute"],
            attention=decoder["attention"],
            isa=decoder["isa"],
            threads=decoder["threads"],
            cpu=decoder["cpu_model"],
            kernels={name: list(run) for name, run in decoder["kernels"].items()},
            int8_threshold=decoder["int8_threshold"],
            int8_outliers=decoder["int8_outliers"],
            files=tuple(path.name for path in self.checkpoint.files),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as a folder that qllm, and transformers with bitsandbytes, load.

        Quantized layers are stored in the layouts of bitsandbytes, everything else in its dtype;
        config.json gets a quantization_config. Loading it gives bit-identical logits. The folder
        is written beside its place and renamed, so it is there whole or not at all; it must not
        exist, or be empty. Needs the package safetensors.

        A mixture of int8 and 4-bit layers is refused, because no quantization_config describes it.
        transformers leaves the layers of Falcon unquantized whatever that says, so it cannot load a
        quantized Falcon; qllm can.
        """
        from .saving import save

        save(self, folder)

    def __reduce__(self) -> Any:
        """A model lies in memory that Python knows nothing of, so it is neither pickled nor
        copied."""
        raise QllmUnsupportedError(
            f"a model cannot be pickled or copied; load {quoted(self.name)} again, or save() it "
            "and load the folder"
        )

    def __repr__(self) -> str:
        formats = "/".join(sorted(set(self.formats.values())))
        return f"<qllm.Model {self.name} ({self.architecture.model_type}, {formats})>"


def _quant_config(
    quantization: Any,
    include: Any,
    skip: Any,
    blocksize: int,
    quantize_head: bool,
) -> QuantConfig | None:
    """The options of a call as one object."""
    usual = isinstance(blocksize, (int, np.integer)) and blocksize == 64
    plain = include is None and skip is None and usual and quantize_head is False
    if quantization is None:
        if not plain:
            raise QllmValueError(
                "include, skip, blocksize and quantize_head say how to quantize, but no format is "
                "given; pass quantization, as in quantization='nf4'"
            )
        return None
    if isinstance(quantization, QuantConfig):
        if not plain:
            raise QllmValueError(
                "include, skip, blocksize and quantize_head stand in the QuantConfig; they cannot "
                "be given beside it"
            )
        return quantization
    return QuantConfig(quantization, include, skip, blocksize, quantize_head)


def _threshold(value: float | None, checkpoint: Checkpoint) -> float:
    """The threshold of int8: the caller's, else that of the folder's quantization_config, else
    6."""
    if value is not None:
        return value
    quantization = checkpoint.config.get("quantization_config") or {}
    name = "int8_threshold" if quantization.get("quant_method") == "qllm" else "llm_int8_threshold"
    stored = quantization.get(name, 6.0)
    if type(stored) not in (int, float) or not math.isfinite(stored) or stored < 0:
        raise QllmFileError(
            f"{checkpoint.folder / 'config.json'} has {name} {quoted(stored)}; a "
            "number of at least 0 was expected"
        )
    return float(stored)


def _eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json; () when neither has one."""
    for name, members in (
        ("generation_config.json", checkpoint.generation_config or {}),
        ("config.json", checkpoint.config),
    ):
        value = members.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise QllmFileError(
                f"{checkpoint.folder / name} has eos_token_id {quoted(value)}; token ids were "
                "expected"
            )
        return tuple(ids)
    return ()
