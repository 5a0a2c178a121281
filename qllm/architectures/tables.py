"""What a family of models is made of: its decoder's config and the modules of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Linear:
    """A linear layer y = x W^T + b, W (rows, cols).

    `module` is its name in transformers ("model.layers.0.mlp.up_proj"), `slot` its name in the
    decoder ("layers.0.up").
    """

    module: str
    slot: str
    shape: tuple[int, int]
    bias: bool = False


@dataclass(frozen=True)
class Vector:
    """A norm weight or bias of `size` elements: tensor `tensor` -> slot `slot`."""

    tensor: str
    slot: str
    size: int


@dataclass(frozen=True)
class Architecture:
    """A model as its config.json describes it.

    `decoder` is the config of `qllm._core.Decoder`. Names are those of transformers, which begin
    with `prefix` except for the output embedding; `stored_prefix` is what stands there in the
    checkpoint at hand, "" when it was saved without. `tied`: the output embedding is the input
    embedding, and the checkpoint need not have it.
    """

    model_type: str
    decoder: dict[str, Any]
    prefix: str
    embedding: str
    head: Linear
    linears: tuple[Linear, ...]
    vectors: tuple[Vector, ...]
    tied: bool
    stored_prefix: str = field(default="")

    def stored(self, name: str) -> str:
        """The name in the checkpoint of a tensor or module with the name `name` in transformers."""
        if not name.startswith(self.prefix):
            return name
        return self.stored_prefix + name.removeprefix(self.prefix)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(vocab, hidden)"""
        return self.decoder["vocab"], self.decoder["hidden"]

    @property
    def modules(self) -> tuple[Linear, ...]:
        """Every linear layer, the output embedding last."""
        return (*self.linears, self.head)

    @property
    def parameters(self) -> int:
        """The number of trained values; a tied output embedding counts once."""
        total: int = self.decoder["vocab"] * self.decoder["hidden"]
        for linear in self.linears if self.tied else self.modules:
            rows, cols = linear.shape
            total += rows * cols + (rows if linear.bias else 0)
        return total + sum(vector.size for vector in self.vectors)


def norm(tensor: str, slot: str, size: int, bias: bool = False) -> list[Vector]:
    """The weight of a norm, and its bias."""
    parts = ("weight", "bias") if bias else ("weight",)
    return [Vector(f"{tensor}.{part}", f"{slot}.{part}", size) for part in parts]
