"""Cells of models that do not fit into memory: the reference and the arm are read layer by layer.

A layer of the reference is loaded, takes the hidden states of all texts one layer on, and is
dropped; then the same layer of the arm. So what is held at a time is one layer, or the embedding,
or the two output embeddings, and the hidden states, (tokens of all texts, hidden) float32 for each
of the two. The logits have the bits of a model that is held whole.

Nothing is generated: the passages of the design are all that is compared, and the cell of the
reference alone says what its layers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _core
from ..architectures import FLOAT_DTYPES, Architecture, Linear, bind, describe
from ..checkpoint import Checkpoint
from ..config import QuantConfig
from ..errors import QllmUnsupportedError, QllmValueError
from ..generation import host_threads
from ..layers import Layers, dtype_of, to_float32
from ..sampling import round_logits
from ..tokenizer import Tokenizer
from .arms import rows_of, uniform_4bit
from .cells import Task, compare_logits
from .design import Arm, Design


@dataclass(frozen=True)
class _Layer(Architecture):
    """One layer of an architecture, as the only one; without its output embedding."""

    @property
    def modules(self) -> tuple[Linear, ...]:
        return self.linears


@dataclass(frozen=True)
class _Head(Architecture):
    """The final norm and the output embedding of an architecture."""

    @property
    def modules(self) -> tuple[Linear, ...]:
        return (self.head,)


class Half:
    """The reference or the arm, of which a part at a time is held. `rows` of the table of weights,
    `kernels` and `weights` (bytes) grow with the parts that were loaded; `largest` are the bytes of
    the largest part with its keys and values."""

    def __init__(self, name: str, arm: Arm, design: Design) -> None:
        self.arm, self.design = arm, design
        self.checkpoint = Checkpoint.open(arm.path or name)
        what = str(self.checkpoint.folder / "config.json")
        self.architecture = bind(describe(self.checkpoint.config, what), self.checkpoint)
        self.rows: list[dict[str, Any]] = []
        self.kernels: dict[str, list[str]] = {}
        self.info: dict[str, Any] = {}
        self.weights = self.largest = self.kv = 0

    def embed(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The hidden states in front of the first layer, of each text."""
        architecture = self.architecture
        decoder = self._decoder(architecture)
        entry = self.checkpoint.entry(architecture.stored(architecture.embedding) + ".weight")
        decoder.load_embedding(
            entry.numpy(),
            FLOAT_DTYPES[entry.dtype],
            name=architecture.embedding,
            dtype=dtype_of(entry),
        )
        found = [decoder.embed(np.asarray(ids, np.int64)) for ids in texts]
        self.checkpoint.release(entry)
        self._count(decoder)
        return found

    def advance(self, number: int, hidden: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The hidden states behind layer `number`, of those in front of it."""
        decoder = self._load(self._layer(number))
        found = [decoder.blocks([decoder.sequence()] * len(rows), rows) for rows in hidden]
        if hidden:  # the scratch of a step stands, keys and values went with their sequences
            longest = max(hidden, key=len)
            sequence = decoder.sequence()
            decoder.blocks([sequence] * len(longest), longest)
            self.kv = max(self.kv, decoder.nbytes()["kv_cache"])
        self._count(decoder)
        return found

    def head(self) -> Any:
        """A decoder with the final norm and the output embedding."""
        decoder = self._load(self._ends())
        self._count(decoder)
        return decoder

    def _layer(self, number: int) -> _Layer:
        prefix, first = f"layers.{number}.", "layers.0."
        whole = self.architecture
        config = {**whole.decoder, "layers": 1}
        if config.get("sliding_window") is not None:
            config["sliding_window"] = config["sliding_window"][number : number + 1]
        return _Layer(
            **{
                **vars(whole),
                "decoder": config,
                "linears": tuple(
                    replace(linear, slot=linear.slot.replace(prefix, first))
                    for linear in whole.linears
                    if linear.slot.startswith(prefix)
                ),
                "vectors": tuple(
                    replace(vector, slot=vector.slot.replace(prefix, first))
                    for vector in whole.vectors
                    if vector.slot.startswith(prefix)
                ),
            }
        )

    def _ends(self) -> _Head:
        whole = self.architecture
        outside = tuple(v for v in whole.vectors if not v.slot.startswith("layers."))
        return _Head(**{**vars(whole), "linears": (), "vectors": outside})

    def _decoder(self, architecture: Architecture) -> Any:
        return _core.Decoder(
            architecture.decoder,
            device=self.arm.device or self.design.device,
            threads=self.arm.threads or self.design.threads,
            int8_threshold=self.design.int8_threshold,
            compute=self.arm.compute or self.design.compute,
        )

    def _load(self, part: _Layer | _Head) -> Any:
        """A decoder with the part, in the arm's format, and its rows of the table of weights."""
        arm = self.arm
        quantize_head = (
            self.design.quantize_head if arm.quantize_head is None else arm.quantize_head
        )
        decoder = self._decoder(part)
        layers = Layers(self.checkpoint, part, decoder)
        config = None
        if isinstance(part, _Layer) or quantize_head:
            config = QuantConfig(arm.format, None, None, arm.blocksize, quantize_head)
        layers.load(None if arm.codes == "uniform" else config)
        if config is not None and arm.codes == "uniform":
            layers.requantize(lambda w: uniform_4bit(w, arm.blocksize), "uniform", config)
        for vector in part.vectors:
            entry = self.checkpoint.entry(part.stored(vector.tensor))
            decoder.set_vector(vector.slot, to_float32(entry))
        self.rows += rows_of(layers.report())
        return decoder

    def _count(self, decoder: Any) -> None:
        """Notes what a part takes and is computed with."""
        held = decoder.nbytes()
        self.largest = max(self.largest, sum(held.values()))
        self.weights += held["weights"] + held["embedding"]
        self.info = decoder.info()
        for format, names in self.info["kernels"].items():
            known = self.kernels.setdefault(format, [])
            known += [name for name in names if name not in known]

    def environment(self) -> dict[str, Any]:
        """As `arms.LoadedArm.environment`."""
        return {
            "cpu": self.info["cpu_model"],
            "device": self.info["device"],
            "isa": self.info["isa"],
            "compute": self.info["compute"],
            "kernels": self.kernels,
        }


def logits(halves: Sequence[Half], texts: Sequence[Sequence[int]]) -> Iterator[list[np.ndarray]]:
    """For each text the logits of every half, (n, vocab) float32, all taken through the layers
    together."""
    hidden = [half.embed(texts) for half in halves]
    for number in range(halves[0].architecture.decoder["layers"]):
        for place, half in enumerate(halves):
            hidden[place] = half.advance(number, hidden[place])
    heads = [half.head() for half in halves]
    for text in range(len(texts)):
        yield [head.head(states[text]) for head, states in zip(heads, hidden)]


def compute_lockstep(task: Task) -> dict[str, Any]:
    """The body of the task's cell, as `cells.compute` gives it, with the passages alone."""
    design, arm = task.design, task.design.arm(task.arm)
    halves = [Half(task.model, design.reference, design)]
    if arm.role != "reference":
        halves.append(Half(task.model, arm, design))
    mine = halves[-1]
    read = list(_passages(task, halves[0])) if len(halves) == 2 else []
    rows = []
    found = logits(halves, [ids[:-1] for _, ids in read])
    decoder = mine._decoder(mine.architecture)
    threads = host_threads(decoder)
    for (text, ids), sides in zip(read, found):
        ref, test = (round_logits(side, design.logits_dtype) for side in sides)
        measures = compare_logits(design, ref, test, ids[1:], text.id, threads, decoder)
        rows.append({"source": "held", "id": text.id, "kind": text.kind, "seed": None, **measures})
    for _ in found:  # without texts, the layers are loaded for what they are
        pass
    states = sum(len(ids) - 1 for _, ids in read) * mine.architecture.decoder["hidden"] * 4
    return {
        "generations": [],
        "texts": rows,
        "play": [],
        "weights": mine.rows,
        "memory": {
            "weights": mine.weights,
            "kv": mine.kv,
            "peak_loading": None,
            "peak_running": max(half.largest for half in halves) + len(halves) * states,
        },
        "environment": mine.environment(),
    }


def _passages(task: Task, reference: Half) -> Iterator[tuple[Any, list[int]]]:
    file = reference.checkpoint.tokenizer_file
    if file is None:
        raise QllmUnsupportedError(f"{task.model} has no tokenizer.json, so texts cannot be read")
    tokenizer = Tokenizer(file, reference.architecture.decoder["vocab"])
    for text in task.design.texts:
        ids = tokenizer.encode(text.text)
        if len(ids) < 2:
            raise QllmValueError(
                f"the text {text.id!r} is {len(ids)} token for {task.model}; at least two are"
                " needed to compare anything"
            )
        yield text, ids
