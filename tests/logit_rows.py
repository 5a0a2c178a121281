"""Rows of logits of the kinds that samplers and statistics must agree on."""

from __future__ import annotations

import numpy as np

F32 = np.float32


def rows_of(kind: str, n: int, vocab: int) -> np.ndarray:
    """(n, vocab) logits of one kind; each row has one that is finite."""
    rng = np.random.default_rng([len(kind), n, vocab])
    rows = rng.normal(0, 3, (n, vocab)).astype(F32)
    if kind == "ties":
        rows = np.round(rows / 2).astype(F32) * F32(0.5)
        rows[rng.random(rows.shape) < 0.3] *= F32(-0.0)
    elif kind == "excluded":
        rows[rng.random(rows.shape) < 0.6] = -np.inf
        rows[:, rng.integers(vocab)] = 1.5
    elif kind == "wide":
        rows = (rows * 10 ** rng.uniform(-3, 37, rows.shape)).astype(F32)
    elif kind == "equal":
        rows[:] = F32(2.5)
    return rows


KINDS = ["normal", "ties", "excluded", "wide", "equal"]
