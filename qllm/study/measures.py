"""Measures of one text, or of two texts that should be equal.

The measures on logits are computed by the core (`qllm.logit_stats`); those here need only token ids
and characters. Formulas: reference "seq-rep-n" of Welleck et al. (arXiv 1908.04319) on token ids,
distinct-n of Li et al. (arXiv 1510.03055), first divergent token of arXiv 2311.01544 carried over
to sampling with common noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of `n` consecutive tokens."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def rep_n(ids: Sequence[int], n: int) -> float:
    """1 - different n-grams / all n-grams of one continuation; NaN when it is shorter than n."""
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def distinct_n(texts: Iterable[Sequence[int]], n: int) -> float:
    """Different n-grams / all n-grams over several continuations of one prompt; NaN without any."""
    grams = [gram for ids in texts for gram in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def zlib_ratio(text: str) -> float:
    """Bytes of the text compressed by zlib (level 9) / its bytes in UTF-8: small means repetitive,
    and a few words give more than 1. NaN for the empty text."""
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data, 9)) / len(data) if data else math.nan


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position (from 0) at which two continuations differ, an end counting as different
    from a token; None when they are equal."""
    for position, (one, two) in enumerate(zip(reference, other)):
        if one != two:
            return position
    return None if len(reference) == len(other) else min(len(reference), len(other))


def divergent_word(reference: str, other: str) -> int:
    """Where the word begins that holds the first character in which `other` differs from
    `reference`; the length of `other` when it only ends sooner, or not at all."""
    place = 0
    while place < min(len(reference), len(other)) and reference[place] == other[place]:
        place += 1
    if place == len(other) and (reference == other or reference[place].isspace()):
        return place
    while place > 0 and not other[place - 1].isspace():
        place -= 1
    return place
