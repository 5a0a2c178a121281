"""Logits of texts that begin alike, each position computed once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class PrefixReader(ABC):
    """A model that keeps the keys, values and logits of the text that it has read last.

    `logits` reads what a text does not share with that one. Results do not depend on what was read
    before, but for the rounding by which a model computes a few positions otherwise than many.
    """

    vocab: int

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._rows: list[np.ndarray] = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(n, vocab) float32: the logits after each of the token ids."""
        given = [int(token) for token in ids]
        kept = common_length(self._ids, given)
        if kept < len(given):
            if kept < len(self._ids):
                kept = kept if kept and self._truncate(kept) else self.forget()
            try:
                found = self._extend(given[kept:], kept)
            except BaseException:
                self.forget()
                raise
            self._ids, self._rows = given, self._rows[:kept] + list(found)
        if not given:
            return np.empty((0, self.vocab), np.float32)
        return np.stack(self._rows[: len(given)])

    def forget(self) -> int:
        """Forgets what was read; returns how many positions are left, 0."""
        self._ids, self._rows = [], []
        self._clear()
        return 0

    @abstractmethod
    def _extend(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Reads ids at the positions from `start` on, behind what is kept: (n, vocab) float32."""

    @abstractmethod
    def _truncate(self, length: int) -> bool:
        """Forgets positions from `length` on; False where the model cannot."""

    @abstractmethod
    def _clear(self) -> None:
        """Forgets all positions."""


def common_length(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    for place, (a, b) in enumerate(zip(one, two)):
        if a != b:
            return place
    return min(len(one), len(two))
