"""A model in an arm: what cells read logits from and draw texts with, whatever computes it.

`load` gives a `LoadedArm`. Ordinary arms are models of this package; arms from elsewhere are
anything with the few members of `LogitsModel`, which the study's own sampler draws from, so that
all arms share noise, statistics and tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import _core
from ..errors import QllmValueError
from ..sampling import round_logits
from .design import Arm, Design

if TYPE_CHECKING:
    from ..generation import Generation, Request
    from ..model import Model

UNIFORM_LEVELS = 16
"""Equally spaced from -1 to 1, the ends included: no level is 0, which makes them a bad choice for
weights around 0, as a positive control has to be."""


class LogitsModel(Protocol):
    """A causal language model of any make. It may also have `layers()`, rows of the table of
    weights, and `memory()`, bytes by kind, as `LoadedArm` has them."""

    @property
    def name(self) -> str:
        """What it is, for messages."""

    @property
    def vocab(self) -> int:
        """How many token ids it knows: the reference's vocabulary."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of the token ids, teacher-forced: (n, vocab) float32."""


class LoadedArm:
    """A model of this package in an arm."""

    def __init__(self, model: Model, design: Design, arm: Arm, rows: list[dict[str, Any]]) -> None:
        self.model = model
        self.design = design
        self.arm = arm
        self._rows = rows

    @property
    def vocab(self) -> int:
        """How many token ids there are."""
        return int(self.model.architecture.decoder["vocab"])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(n, vocab) float32, rounded as the design says."""
        found = self.model.logits(list(ids))
        assert isinstance(found, np.ndarray)
        return round_logits(found, self.design.logits_dtype)

    def logprobs(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Natural log-probabilities of the tokens from `start` (1 or more) on, float64, each given
        all before it, at temperature 1."""
        if self.design.logits_dtype == "float32":
            scores = self.model.score(list(ids)).logprobs
            return np.asarray(scores, np.float64)[start - 1 :]
        logits = self.logits(ids[:-1])[start - 1 :]
        return np.asarray(_core.logprobs(logits, np.asarray(ids[start:], np.int64)), np.float64)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The generations of `requests`, as one batch."""
        size = self.arm.batch_size or self.design.batch_size
        return self.model.generate_batch(requests, batch_size=size)

    def layers(self) -> list[dict[str, Any]]:
        """A row of the table of weights for each linear layer."""
        return self._rows

    @property
    def threads(self) -> int:
        """Threads of the core that this arm uses."""
        return int(self.model.decoder.info()["threads"])

    def environment(self) -> dict[str, Any]:
        """On what it is computed, as far as it says how: device, instruction set, kernels."""
        info = self.model.info()
        return {
            "cpu": info.cpu,
            "device": info.device,
            "isa": info.isa,
            "compute": info.compute,
            "kernels": info.kernels,
        }


def load(name: str, arm: Arm, design: Design) -> LoadedArm:
    """The model `name` in an arm of the design."""
    from ..model import Model

    model = Model.from_pretrained(
        arm.path or name,
        compute=arm.compute or design.compute,
        threads=arm.threads or design.threads,
        int8_threshold=design.int8_threshold,
    )
    return LoadedArm(model, design, arm, swap(model, arm, design))


def swap(model: Model, arm: Arm, design: Design) -> list[dict[str, Any]]:
    """Puts the layers of a model into the arm's format; a row for each of its linear layers."""
    head = design.quantize_head if arm.quantize_head is None else arm.quantize_head
    report = model.quantize_(arm.format, blocksize=arm.blocksize, quantize_head=head)
    if arm.codes == "uniform":
        report = model.requantize_(
            lambda weight: uniform_4bit(weight, arm.blocksize), "uniform", quantize_head=head
        )
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


def require_same_tokens(model: LogitsModel, reference: LoadedArm) -> None:
    """Refuses a model whose logits are about another vocabulary."""
    if model.vocab != reference.vocab:
        raise QllmValueError(
            f"{model.name} knows {model.vocab} tokens and the reference {reference.vocab}; only"
            " models with one vocabulary can be compared"
        )
