"""Measures of one text, of two texts that should be equal, or of the texts of several seeds.

The measures on logits are computed by the core (`qllm.logit_stats`); those here need only token ids
and characters. Formulas: "seq-rep-n" of Welleck et al. (arXiv 1908.04319) on token ids and the
product of Su et al. (arXiv 2202.06417) over it, loops as Holtzman et al. (arXiv 1904.09751) see
them, distinct-n of Li et al. (arXiv 1510.03055), first divergent token of arXiv 2311.01544 carried
over to sampling with common noise.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence

LONGEST_PHRASE = 90
"""Tokens of the longest phrase that is looked for in loops."""

_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+[\"'\u201d\u2019)]*|\n)")


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of `n` consecutive tokens."""
    return list(zip(*(ids[start:] for start in range(n))))


def rep_n(ids: Sequence[int], n: int) -> float:
    """1 - different n-grams / all n-grams of one continuation; NaN when it is shorter than n."""
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def repetition(ids: Sequence[int]) -> dict[str, float]:
    """`rep_1` to `rep_4`, and `diversity`, the product over n = 2, 3, 4 of 1 - rep_n: 1 when no two
    tokens in a row come twice, NaN for fewer than four tokens."""
    found = {f"rep_{n}": rep_n(ids, n) for n in (1, 2, 3, 4)}
    return {**found, "diversity": math.prod(1 - found[f"rep_{n}"] for n in (2, 3, 4))}


def distinct_n(texts: Iterable[Sequence[int]], n: int) -> float:
    """Different n-grams / all n-grams over several continuations of one prompt; NaN without any."""
    seen: set[tuple[int, ...]] = set()
    total = 0
    for ids in texts:
        grams = ngrams(ids, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def loop_start(ids: Sequence[int]) -> int | None:
    """Where the loop begins in which a continuation ends; None when it ends in none.

    It ends in a loop when its tail is a phrase of at least 3 tokens twice or more in a row, or any
    phrase more than 50 times; phrases have at most 90 tokens and are not repetitions of a shorter
    one. The loop begins where the tail begins that repeats itself; among several the earliest.
    """
    found = None
    for period in range(1, min(LONGEST_PHRASE, len(ids) // 2) + 1):
        start = len(ids) - period  # ids[i] == ids[i + period] for all i from start on
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        times = (len(ids) - start) // period
        if times < 2 or (period < 3 and times <= 50):
            continue
        if (found is None or start < found) and _primitive(ids[-period:]):
            found = start
    return found


def _primitive(phrase: Sequence[int]) -> bool:
    """Whether a phrase is not some shorter one several times."""
    size = len(phrase)
    return not any(
        size % part == 0 and all(phrase[i] == phrase[i + part] for i in range(size - part))
        for part in range(1, size // 2 + 1)
    )


def sentences(text: str) -> list[str]:
    """The finished sentences of a text, without regard to case and spacing. A sentence ends with
    . ! ? or a line break; what follows the last of them is none yet."""
    found = (" ".join(part.casefold().split()) for part in _SENTENCE.findall(text))
    return [sentence for sentence in found if any(letter.isalnum() for letter in sentence)]


def repeated_sentences(text: str) -> float:
    """Share of the finished sentences that equal an earlier one; NaN without any."""
    found = sentences(text)
    return 1 - len(set(found)) / len(found) if found else math.nan


def zlib_ratio(text: str) -> float:
    """Bytes of the text compressed by zlib (level 9) / its bytes in UTF-8: small means repetitive,
    and a few words give more than 1. NaN for the empty text."""
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data, 9)) / len(data) if data else math.nan


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """The least number of insertions, deletions and exchanges of tokens that make `other` of `one`.

    Myers' bit-parallel algorithm (1999) in the form of Hyyro (2003), a whole column of the table of
    distances being one Python integer: bit i of `rise` (`fall`) says that the distance grows
    (shrinks) from row i to row i + 1.
    """
    if not one or not other:
        return max(len(one), len(other))
    places: dict[int, int] = {}
    for i, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(one)) - 1
    last = 1 << (len(one) - 1)
    rise, fall, distance = full, 0, len(one)
    for token in other:
        equal = places.get(token, 0)
        diagonal = (((equal & rise) + rise) ^ rise) | equal | fall
        right = (fall | ~(diagonal | rise)) & full
        left = rise & diagonal
        if right & last:
            distance += 1
        elif left & last:
            distance -= 1
        right = (right << 1 | 1) & full
        left = (left << 1) & full
        rise = (left | ~(diagonal | right)) & full
        fall = right & diagonal
    return distance


def spread(texts: Sequence[Sequence[int]]) -> float:
    """Mean over all pairs of continuations of one prompt of their edit distance / the longer
    length: 0 when all are equal, 1 when no two share anything. NaN for fewer than two."""
    pairs = [(one, other) for i, other in enumerate(texts) for one in texts[:i]]
    if not pairs:
        return math.nan
    return sum(_normalised(one, other) for one, other in pairs) / len(pairs)


def _normalised(one: Sequence[int], other: Sequence[int]) -> float:
    longest = max(len(one), len(other))
    return 0.0 if one == other else edit_distance(one, other) / longest


def ended(ids: Sequence[int], finish: str, length: int) -> bool:
    """Whether a continuation, cut to `length` tokens, ends with the end-of-text token."""
    return finish == "eos" and len(ids) <= length


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
