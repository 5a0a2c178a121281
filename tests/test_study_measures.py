"""Measures of texts against strings made by hand, and against slow definitions written out."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.study.measures import (
    distinct_n,
    divergent_word,
    edit_distance,
    ended,
    first_divergence,
    loop_start,
    ngrams,
    rep_n,
    repeated_sentences,
    repetition,
    sentences,
    spread,
    zlib_ratio,
)

FEW = st.lists(st.integers(0, 3), max_size=20)


def test_repetition_by_hand():
    ids = [1, 2, 1, 2, 1, 2]
    assert ngrams(ids, 5) == [(1, 2, 1, 2, 1), (2, 1, 2, 1, 2)]
    assert rep_n(ids, 1) == pytest.approx(4 / 6)
    assert rep_n(ids, 2) == pytest.approx(3 / 5)  # 12 and 21 of five
    assert rep_n(ids, 4) == pytest.approx(1 / 3)
    assert rep_n([7, 8, 9], 2) == 0
    assert math.isnan(rep_n([7, 8, 9], 4)) and math.isnan(rep_n([], 1))


def test_diversity_by_hand():
    found = repetition([1, 2, 1, 2, 1, 2])
    assert found["diversity"] == pytest.approx((2 / 5) * (2 / 4) * (2 / 3))
    assert found["rep_2"] == pytest.approx(3 / 5)
    assert repetition(range(9))["diversity"] == 1
    assert math.isnan(repetition([1, 2, 3])["diversity"])


def test_distinct_over_texts_by_hand():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1, 2], [1, 2]], 2) == pytest.approx(1 / 2)
    assert math.isnan(distinct_n([[1], []], 2))


@given(FEW, st.integers(1, 4))
def test_repetition_is_what_distinct_lacks(ids, n):
    if len(ids) >= n:
        assert rep_n(ids, n) == pytest.approx(1 - distinct_n([ids], n))
        assert 0 <= rep_n(ids, n) < 1
    if len(ids) >= 4:
        assert 0 < repetition(ids)["diversity"] <= 1


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([], None),
        ([5, 1, 2, 3], None),
        ([5, 1, 2, 3, 1, 2, 3], 1),  # three tokens twice
        ([5, 3, 1, 2, 3, 1, 2, 3], 1),  # the tail repeats itself from the first 3 on
        ([5, 1, 2, 1, 2, 1, 2], None),  # two tokens, three times only
        ([5, *[1, 2] * 50], None),
        ([5, *[1, 2] * 51], 1),
        ([5, *[1] * 50], None),  # nor is 1 1 1 a phrase of three
        ([5, *[1] * 51], 1),
        ([1, 2, 3, 1, 2, 3, 4], None),  # it went on
        ([9, *range(90), *range(90)], 1),
        ([9, *range(91), *range(91)], None),  # too long a phrase
        ([8, 9, 7, 4, 5, 6, 4, 5, 6, 9, 7, 4, 5, 6, 4, 5, 6], 1),  # the earlier of two loops
    ],
)
def test_loops_by_hand(ids, start):
    assert loop_start(ids) == start


def loop_written_out(ids):
    """The definition, trying every phrase and every number of times."""
    found = []
    for size in range(1, min(90, len(ids)) + 1):
        phrase = ids[-size:]
        shorter = any(phrase == phrase[:part] * (size // part) for part in range(1, size))
        times = 1
        while ids[-size * (times + 1) :] == phrase * (times + 1):
            times += 1
        if not shorter and times >= 2 and (size >= 3 or times > 50):
            start = len(ids) - size * times
            while start > 0 and ids[start - 1] == ids[start - 1 + size]:
                start -= 1
            found.append(start)
    return min(found, default=None)


@given(FEW, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 60))
def test_loops_as_defined(head, phrase, times):
    ids = head + phrase * times
    assert loop_start(ids) == loop_written_out(ids)
    if times > 50:
        assert loop_start(ids) <= len(head)


def test_sentences_by_hand():
    text = 'He ran.  She sat!\n"Who?" he RAN. ... he ran. And th'
    assert sentences(text) == ["he ran.", "she sat!", '"who?"', "he ran.", "he ran."]
    assert repeated_sentences(text) == pytest.approx(2 / 5)
    assert repeated_sentences("One. Two.") == 0
    assert math.isnan(repeated_sentences("not yet one")) and math.isnan(repeated_sentences(""))


def test_zlib_ratio():
    assert math.isnan(zlib_ratio(""))
    assert zlib_ratio("ab" * 500) < 0.05
    assert zlib_ratio("\u00e4") == len(zlib.compress("\u00e4".encode(), 9)) / 2


def table_of_distances(one, other):
    """The textbook's dynamic programme."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0, :] = np.arange(len(one) + 1), np.arange(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)
            )
    return table[-1, -1]


@given(FEW, FEW)
def test_edit_distance_is_the_textbooks(one, other):
    assert edit_distance(one, other) == table_of_distances(one, other)


def test_edit_distance_by_hand():
    assert edit_distance(*([ord(letter) for letter in word] for word in ("kitten", "sitting"))) == 3
    long = list(range(300))
    assert edit_distance(long, long[1:] + [7]) == 2
    assert edit_distance(long, long) == 0 and edit_distance([], long) == 300


@given(FEW, FEW, FEW)
def test_edit_distance_is_a_distance(one, two, three):
    assert edit_distance(one, two) == edit_distance(two, one)
    assert (edit_distance(one, two) == 0) == (one == two)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)


def test_spread_by_hand():
    assert spread([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]]) == pytest.approx(2 / 3 * 1 / 4)
    assert spread([[1, 2], [1, 2]]) == 0 and spread([[1], [2]]) == 1 and spread([[], []]) == 0
    assert math.isnan(spread([[1, 2]])) and math.isnan(spread([]))


def test_ended():
    assert ended([1, 2, 0], "eos", 3) and not ended([1, 2, 0], "eos", 2)
    assert not ended([1, 2, 3], "length", 3)


def test_first_divergence():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([], []) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([1], [1, 2]) == 1


def test_divergent_word():
    assert divergent_word("the cat sat", "the car sat") == 4
    assert divergent_word("same", "same") == 4
    assert divergent_word("one two", "one") == 3
    assert divergent_word("one twofold", "one two") == 4
    assert divergent_word("a b", "a b c") == 2
    assert divergent_word("", "x") == 0
