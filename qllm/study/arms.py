"""A model in an arm: what cells read logits from and draw texts with, whatever computes it.

`load` gives a `LoadedArm`: an `OwnArm`, which is a model of this package, or a `ForeignArm`, which
is anything with the few members of `LogitsModel`. The study's own sampler draws from both, so that
all arms share noise, statistics and tables.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import _core
from ..errors import QllmValueError
from ..sampling import round_logits
from .design import Arm, Design

if TYPE_CHECKING:
    from ..generation import Generation, Request, Row
    from ..model import Model

UNIFORM_LEVELS = 16
"""Equally spaced from -1 to 1, the ends included: no level is 0, which makes them a bad choice for
weights around 0, as a positive control has to be."""

MEMORY = ("weights", "kv", "peak_loading", "peak_running")
"""Bytes: of the weights, embeddings included; of the keys and values of one text of full length; at
most while loading (the weights, and the pages of the largest tensor that is read); at most while
running (the weights, and the keys and values of one text). None depends on batches or threads."""


LOGITS_PER_PIECE = 1 << 24
"""Float32 values that `score_all` holds at a time."""


class LogitsModel(Protocol):
    """A causal language model of any make.

    It may also have `layers()`, rows of the table of weights as `LoadedArm.layers` has them, and
    `memory()`, a mapping with some of the keys of `MEMORY`.
    """

    @property
    def name(self) -> str:
        """What it is, for messages."""

    @property
    def vocab(self) -> int:
        """How many token ids it knows: as many as the reference."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of the token ids, teacher-forced: (n, vocab) float32."""


class LoadedArm(ABC):
    """An arm with its model, ready to be read and to write."""

    def __init__(self, design: Design, arm: Arm) -> None:
        self.design = design
        self.arm = arm

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each token, (n, vocab) float32, rounded as the design says."""

    def logprobs(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Natural log-probabilities of the tokens from `start` (1 or more) on, float64, each given
        all before it, at temperature 1."""
        logits = self.logits(ids[:-1])[start - 1 :]
        return logprobs(logits, ids[start:])

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The generations of `requests`, in their order."""

    @abstractmethod
    def layers(self) -> list[dict[str, Any]]:
        """A row for each linear layer: module, format, shape, bytes, bits_per_weight, rmse and
        sqnr_db (None where there is no figure)."""

    @abstractmethod
    def memory(self) -> dict[str, int | None]:
        """Bytes by the kinds of `MEMORY`, counted by those who hold them; None: not known."""

    @abstractmethod
    def environment(self) -> dict[str, Any]:
        """On what it is computed, as far as it says how: cpu, device, isa, compute, kernels; and
        what `config.json` calls the architecture."""


class OwnArm(LoadedArm):
    """A model of this package in an arm."""

    def __init__(self, model: Model, design: Design, arm: Arm, rows: list[dict[str, Any]]) -> None:
        super().__init__(design, arm)
        self.model = model
        self._rows = rows
        self._longest = 1  # tokens of a text

    @property
    def vocab(self) -> int:
        """How many token ids there are."""
        return int(self.model.architecture.decoder["vocab"])

    @property
    def threads(self) -> int | None:
        """Threads that this arm's computations on the processor use; None: all."""
        from ..generation import host_threads

        found = host_threads(self.model.decoder)
        return self.arm.threads or self.design.threads if found is None else found

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        found = self.model.logits(list(ids))
        assert isinstance(found, np.ndarray)
        return round_logits(found, self.design.logits_dtype)

    def logprobs(self, ids: Sequence[int], start: int) -> np.ndarray:
        if self.design.logits_dtype != "float32":
            return super().logprobs(ids, start)
        return np.asarray(self.model.score(list(ids)).logprobs, np.float64)[start - 1 :]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        size = self.arm.batch_size or self.design.batch_size
        found = self.model.generate_batch(requests, batch_size=size)
        for sample, request in zip(found, requests):
            most = len(sample.prompt_ids) + request.config.max_new_tokens
            self._longest = max(self._longest, most)
        return found

    def score_all(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Of texts, each a prompt's ids and those that follow it, the natural log-probabilities of
        the latter, as `logprobs` gives them. What texts have in common at their beginnings is
        computed once."""
        found: dict[tuple[int, ...], list[float]] = {}
        sequence, scores = self.model.decoder.sequence(), [0.0]
        read: tuple[int, ...] = ()
        wanted = sorted({(*prompt, *ids): len(prompt) for prompt, ids in texts}.items())
        for whole, start in wanted:
            alike = _common(read, whole)
            kept = max(0, min(alike, len(whole) - 1) - 1)  # the last is read again for its logits
            sequence.truncate(min(kept, sequence.length))
            kept = sequence.length
            scores = scores[: kept + 1] + self._scores(sequence, whole, kept)
            read = whole
            found[whole] = scores[start:]
        return [found[(*prompt, *ids)] for prompt, ids in texts]

    def _scores(self, sequence: Any, ids: Sequence[int], begin: int) -> list[float]:
        """Log-probabilities of the tokens behind position `begin`, to which `sequence` has come."""
        scores: list[float] = []
        piece = max(1, LOGITS_PER_PIECE // self.vocab)
        for first in range(begin, len(ids) - 1, piece):
            part = np.asarray(ids[first : min(first + piece, len(ids) - 1)], np.int64)
            logits = self.model.decoder.step([sequence] * len(part), part)
            rounded = round_logits(logits, self.design.logits_dtype)
            scores += logprobs(rounded, ids[first + 1 : first + 1 + len(part)]).tolist()
        return scores

    def layers(self) -> list[dict[str, Any]]:
        return self._rows

    def memory(self) -> dict[str, int | None]:
        largest = max(math.prod(row["shape"]) for row in self._rows)
        stored = next(iter(self.model.architecture.modules)).module  # all have one dtype
        size = self.model.checkpoint.entry(self.model.architecture.stored(stored) + ".weight")
        decoder, ids = self.model.decoder, np.zeros(self._longest, np.int64)
        before = decoder.nbytes()
        sequence = decoder.sequence()
        decoder.step([sequence] * len(ids), ids, np.arange(len(ids)) == 0)
        held = decoder.nbytes()
        weights, kv = held["weights"] + held["embedding"], held["kv_cache"] - before["kv_cache"]
        return {
            "weights": weights,
            "kv": kv,
            "peak_loading": weights + largest * size.numpy().itemsize,
            "peak_running": weights + kv,
        }

    def environment(self) -> dict[str, Any]:
        info = self.model.info()
        return {
            "cpu": info.cpu,
            "device": info.device,
            "isa": info.isa,
            "compute": info.compute,
            "architecture": self.model.checkpoint.config.get("model_type"),
            "kernels": info.kernels,
        }


class ForeignArm(LoadedArm):
    """A model from elsewhere in an arm, with the tokenizer of the reference."""

    def __init__(self, source: LogitsModel, design: Design, arm: Arm, reference: OwnArm) -> None:
        super().__init__(design, arm)
        if source.vocab != reference.vocab:
            raise QllmValueError(
                f"{source.name} knows {source.vocab} tokens and the reference {reference.vocab};"
                " only models with one vocabulary can be compared"
            )
        self.source = source
        self.reference = reference

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        found = np.asarray(self.source.logits(list(ids)), np.float32)
        if found.shape != (len(ids), self.source.vocab):
            raise QllmValueError(
                f"{self.source.name} gave logits of the shape {found.shape} for {len(ids)} tokens;"
                f" ({len(ids)}, {self.source.vocab}) was expected"
            )
        return round_logits(found, self.design.logits_dtype)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Requests with the same text so far share its logits, and a text is followed to its end
        before another: a source that keeps what it has read goes on from there."""
        from ..generation import Row, draw, prompt_key_of

        model = self.reference.model
        rows = []
        for index, request in enumerate(requests):
            given = request.prompt
            ids = tuple(model.encode(given) if isinstance(given, str) else given)
            eos = frozenset(() if request.config.ignore_eos else model.eos_token_id)
            rows.append(Row(index, ids, request.config, prompt_key_of(ids), eos))
        waiting = _by_text(rows)
        while waiting:
            ids, group = waiting.pop()
            last = self.logits(ids)[-1:]
            draw(group, np.repeat(last, len(group), axis=0), self.reference.threads)
            waiting += _by_text([row for row in group if row.finish_reason is None])
        return [row.result(model.tokenizer) for row in rows]

    def layers(self) -> list[dict[str, Any]]:
        rows = getattr(self.source, "layers", None)
        return [] if rows is None else list(rows())

    def memory(self) -> dict[str, int | None]:
        known = getattr(self.source, "memory", None)
        found: Mapping[str, Any] = {} if known is None else known()
        return {kind: found.get(kind) for kind in MEMORY}

    def environment(self) -> dict[str, Any]:
        return {
            "cpu": self.reference.model.info().cpu,
            "device": str(getattr(self.source, "device", "cpu")),
            "isa": "",
            "compute": self.source.name,
            "kernels": {},
        }


def _by_text(rows: Sequence[Row]) -> list[tuple[tuple[int, ...], list[Row]]]:
    """Rows by their token ids so far."""
    alike: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((*row.prompt_ids, *row.ids), []).append(row)
    return list(alike.items())


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    for place, (a, b) in enumerate(zip(one, two)):
        if a != b:
            return place
    return min(len(one), len(two))


def logprobs(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """log softmax(logits)[target] of each row: float64 (n,)."""
    return np.asarray(_core.logprobs(logits, np.asarray(targets, np.int64)), np.float64)


def load(name: str, arm: Arm, design: Design, reference: OwnArm | None = None) -> LoadedArm:
    """The model `name` in an arm of the design; one from elsewhere stands beside a reference."""
    if arm.source == "qllm":
        return load_own(name, arm, design)
    from .foreign import load as load_foreign

    assert reference is not None
    return ForeignArm(load_foreign(arm, name, design), design, arm, reference)


def load_own(name: str, arm: Arm, design: Design) -> OwnArm:
    """The model `name` of this package in an arm, straight from its file."""
    from ..config import QuantConfig
    from ..model import Model

    plain = arm.codes == "own"
    config = QuantConfig(arm.format, blocksize=arm.blocksize, quantize_head=_head(arm, design))
    model = Model.from_pretrained(
        arm.path or name,
        config if plain else None,
        device=arm.device or design.device,
        compute=arm.compute or design.compute,
        threads=arm.threads or design.threads,
        int8_threshold=design.int8_threshold,
    )
    rows = rows_of(model.report()) if plain else swap(model, arm, design)
    return OwnArm(model, design, arm, rows)


def swap(model: Model, arm: Arm, design: Design) -> list[dict[str, Any]]:
    """Puts the layers of a model into the arm's format; a row for each of its linear layers."""
    head = _head(arm, design)
    if arm.codes == "uniform":
        return rows_of(
            model.requantize_(
                lambda weight: uniform_4bit(weight, arm.blocksize), "uniform", quantize_head=head
            )
        )
    return rows_of(model.quantize_(arm.format, blocksize=arm.blocksize, quantize_head=head))


def _head(arm: Arm, design: Design) -> bool:
    """Whether the arm's output embedding is quantized too."""
    return design.quantize_head if arm.quantize_head is None else arm.quantize_head


def rows_of(report: Any) -> list[dict[str, Any]]:
    """A report of layers as plain rows."""
    return [
        {
            "module": row.module,
            "format": row.format,
            "shape": [int(size) for size in row.shape],
            "bytes": int(row.bytes),
            "bits_per_weight": float(row.bits_per_weight),
            "rmse": _finite(row.rmse),
            "sqnr_db": _finite(row.sqnr_db),
        }
        for row in report.rows
    ]


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: None stands for a figure that is none (SQNR of an exact layer)."""
    return None if value is None or not math.isfinite(value) else float(value)


def uniform_4bit(weight: np.ndarray, blocksize: int) -> Any:
    """`weight` (rows, cols) float32 in 4 bits with equally spaced levels, in the layout of nf4 with
    a table of its own: a code is the nearest of the levels times the largest absolute value of its
    block (blocks of `blocksize` weights in row order)."""
    flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
    blocks = -(-len(flat) // blocksize)
    padded = np.zeros(blocks * blocksize, np.float32)
    padded[: len(flat)] = flat
    absmax = np.abs(padded.reshape(blocks, blocksize)).max(axis=1)
    scale = np.repeat(np.where(absmax > 0, absmax, 1), blocksize)[: len(flat)]
    steps = (flat / scale + 1) * ((UNIFORM_LEVELS - 1) / 2)
    codes = np.clip(np.rint(steps), 0, UNIFORM_LEVELS - 1).astype(np.uint8)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(0))
    return _core.quantized_from_parts(
        "nf4",
        (int(weight.shape[0]), int(weight.shape[1])),
        codes[0::2] << 4 | codes[1::2],
        blocksize=blocksize,
        absmax=absmax,
        quant_map=np.linspace(-1, 1, UNIFORM_LEVELS, dtype=np.float32),
        dtype_name="float32",
        name="a layer with uniform codes",
    )
