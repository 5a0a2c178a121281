"""Attention of compute="auto" against NumPy, on emulated kernels: values within the roundings that
kernels/attention.h states, and the same bits whatever stands beside a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import emulated
import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[Any]
PAGE = 64
SPLITS, ROWS, PLAIN = range(3)


@pytest.fixture(params=["", "reversed"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> emulated.Device:
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)
    return emulated.device()


def bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of values that are rounded to bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Heads:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 0
    alibi: bool = False
    interleaved: bool = False  # queries lie in rows of a fused qkv matrix

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return float(np.float32(self.head_dim**-0.5))


class Pool:
    """Pages of keys and values of one layer of two, the other left as poison, and sequences that
    own or share them: lists of page numbers."""

    def __init__(self, shape: Heads, pages: int, seed: int = 0) -> None:
        self.shape, self.layer = shape, shape.kv_heads * 2 * PAGE * shape.head_dim
        rng = np.random.default_rng(seed)
        values = rng.normal(0, 1, (pages, shape.kv_heads, 2, PAGE, shape.head_dim))
        self.bits = bf16(values)
        self.memory = np.full((pages, 2 * self.layer), 0xFFFF, np.uint16)
        self.memory[:, self.layer:] = self.bits.reshape(pages, -1)

    def poison(self, page: int, first: int) -> None:
        """Positions from `first` on of a page have never been written."""
        memory = self.memory[page, self.layer:].reshape(self.bits.shape[1:])
        memory[:, :, first:] = 0xFFFF


@dataclass(frozen=True)
class Row:
    pages: tuple[int, ...]
    position: int
    q: Floats  # (heads, head_dim)


def rows_of(shape: Heads, places: list[tuple[list[int], int]], seed: int = 1) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(tuple(pages), position,
                rng.normal(0, 1.5, (shape.heads, shape.head_dim)).astype(np.float32))
            for pages, position in places]


def bias_of(shape: Heads, positions: int) -> Floats | None:
    if not shape.alibi:
        return None
    slopes = 1.4 ** -np.arange(1, shape.heads + 1)
    return np.asarray(slopes[:, None] * np.arange(positions), np.float32)


def attend(device: emulated.Device, pool: Pool, rows: list[Row], form: int, max_pages: int = 16,
           times: int = 1) -> Floats:
    """(rows, heads, head_dim) as the device computes it; a row of NaN where nothing is written."""
    s, n = pool.shape, len(rows)
    q_group = (s.group + 2) * s.head_dim if s.interleaved else s.group * s.head_dim
    q = np.full((n, s.kv_heads, q_group), np.nan, np.float32)
    index = np.full((n, max_pages), -1, np.int32)
    for r, row in enumerate(rows):
        q[r, :, :s.group * s.head_dim] = row.q.reshape(s.kv_heads, -1)
        index[r, :len(row.pages)] = row.pages
    bias = bias_of(s, max_pages * PAGE)
    out = device.empty((n, s.heads + 1, s.head_dim), np.float32)
    pages, values = pool.memory.shape
    sizes = np.array([n, s.heads, s.kv_heads, s.head_dim, s.window, s.kv_heads * q_group, q_group,
                      (s.heads + 1) * s.head_dim, max_pages, pages, values, pool.layer,
                      max_pages * PAGE, form, times], np.int64)
    device.call("gpu_test_attention", device.array(q), device.array(pool.memory),
                device.array(index), device.array(np.array([r.position for r in rows], np.int32)),
                None if bias is None else device.array(bias), out, sizes, s.scale)
    result = out.get()
    assert np.isnan(result[:, s.heads]).all()  # the gap between rows
    return result[:, :s.heads]


def reference(pool: Pool, row: Row) -> Floats:
    s, end = pool.shape, row.position + 1
    begin = max(0, end - s.window) if s.window else 0
    stored = from_bf16(pool.bits).astype(np.float64)
    keys, values = (np.concatenate([stored[p, :, i] for p in row.pages], 1)[:, begin:end]
                    for i in range(2))
    bias = bias_of(s, end)
    out = np.empty((s.heads, s.head_dim))
    for h in range(s.heads):
        score = keys[h // s.group] @ row.q[h].astype(np.float64) * s.scale
        if bias is not None:
            score += bias[h, begin:]
        e = np.exp(score - score.max())
        out[h] = e @ values[h // s.group] / e.sum()
    return out


def check(pool: Pool, rows: list[Row], out: Floats) -> None:
    """Values are of size 1, and so are averages of them: 1e-5 is the bound of their roundings.  A
    score is a float32 beside its bias, whose last place is an error of the weights."""
    for row, found in zip(rows, out, strict=True):
        bias = bias_of(pool.shape, row.position + 1)
        atol = 1e-5 + (0 if bias is None else bias.max() * 2**-23)
        np.testing.assert_allclose(found, reference(pool, row), rtol=0, atol=atol)


SHAPES = {
    "one query head for each": Heads(3, 3, 64),
    "groups": Heads(8, 2, 32),
    "groups of three": Heads(6, 2, 24, interleaved=True),
    "multi-query, more than a tile": Heads(18, 1, 8),
    "wide": Heads(2, 1, 128),
    "odd width": Heads(2, 2, 72, interleaved=True),
    "widest": Heads(10, 1, 256),
    "window": Heads(4, 2, 16, window=70),
    "short window": Heads(2, 2, 40, window=3),
    "alibi": Heads(4, 4, 16, alibi=True),
    "alibi, multi-query": Heads(5, 1, 136, alibi=True, window=300),
}
# First of a page, last of a split, in the middle of the second and third split.
PLACES = [([3], 0), ([1, 2, 0, 5], 255), ([1, 2, 0, 5, 4], 256), ([2, 6], 63),
          ([7, 2, 1, 0, 3, 4, 8, 9, 10], 530), ([3, 11], 97)]


@pytest.mark.parametrize("form", [SPLITS, ROWS, PLAIN])
@pytest.mark.parametrize("name", SHAPES)
def test_values(device: emulated.Device, name: str, form: int) -> None:
    pool = Pool(SHAPES[name], 12)
    pool.poison(11, 97 - PAGE + 1)
    rows = rows_of(SHAPES[name], PLACES)
    if name.startswith(("wid", "alibi, ")):  # large ones: fewer
        rows = rows[3:]
    check(pool, rows, attend(device, pool, rows, form))


@pytest.mark.parametrize("shape", [Heads(2, 1, 12), Heads(3, 3, 7, window=5), Heads(2, 1, 264),
                                   Heads(3, 1, 2, alibi=True)])
def test_heads_that_tiles_do_not_hold(device: emulated.Device, shape: Heads) -> None:
    sizes = np.array([4, shape.heads, shape.kv_heads, shape.head_dim, 0, 0, 0, 0, 16, 12, 0, 0, 0,
                      0, 1], np.int64)
    form = np.zeros(1, np.int64)
    device.call("gpu_test_attention_form", sizes, 4, form)
    assert form[0] == PLAIN
    pool, rows = Pool(shape, 12), rows_of(shape, [PLACES[1], PLACES[5]])
    check(pool, rows, attend(device, pool, rows, int(form[0])))


def test_choice_of_the_form() -> None:
    def chosen(rows: int, sequences: int, max_pages: int = 16) -> int:
        sizes = np.array([rows, 32, 32, 128, 0, 0, 0, 0, max_pages, 0, 0, 0, 0, 0, 1], np.int64)
        form = np.zeros(1, np.int64)
        emulated.device().call("gpu_test_attention_form", sizes, sequences, form)
        return int(form[0])

    assert chosen(1, 1) == chosen(64, 64) == chosen(64, 9) == chosen(512, 512, 4) == SPLITS
    assert chosen(8, 1) == chosen(64, 8) == chosen(512, 2) == ROWS
    assert chosen(512, 512, 2048) == ROWS  # its partial sums would take gigabytes


def same_bits(a: Floats, b: Floats) -> None:
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint32),
                                  np.ascontiguousarray(b).view(np.uint32))


# Rows of forks over a shared prefix of 300 positions, of another sequence, of padding, and the
# consecutive rows of one sequence, as a batch may have them.
MIXED = [([0, 1, 2, 3, 4, 5], 322), ([0, 1, 2, 3, 4, 6], 322), ([0, 1, 2, 3, 4, 7], 340),
         ([8, 9], 100), ([], 0), ([0, 1, 2, 3, 4, 5], 310),
         *[([10, 11], position) for position in range(60, 79)], ([], 0), ([0, 1, 2, 3, 4, 6], 323)]


@pytest.mark.parametrize("shape", [Heads(4, 4, 16), Heads(6, 2, 40, window=90),
                                   Heads(20, 1, 16, alibi=True)])
def test_rows_do_not_depend_on_their_company(device: emulated.Device, shape: Heads) -> None:
    pool, rows = Pool(shape, 12), rows_of(shape, MIXED)
    together = attend(device, pool, rows, SPLITS, times=2)
    same_bits(together, attend(device, pool, rows, ROWS))
    for r, row in enumerate(rows):
        if not row.pages:
            assert not together[r].any()
    check(pool, [row for row in rows if row.pages], together[[bool(r.pages) for r in rows]])
    for r in (0, 3, 5, 20, 24, 26):
        for form, max_pages in ((SPLITS, 8), (ROWS, 64)):
            same_bits(attend(device, pool, rows[r:r + 1], form, max_pages)[0], together[r])
    backwards = attend(device, pool, rows[::-1], SPLITS)
    same_bits(backwards[::-1], together)


def test_shared_pages_are_as_good_as_copies(device: emulated.Device) -> None:
    """The same prefix, once shared by all rows and once copied for each."""
    shape = Heads(4, 2, 32)
    pool, prefix, forks = Pool(shape, 30), [0, 1, 2, 3, 4], 5
    shared = [(prefix[:5] + [5 + i], 321 + 2 * i) for i in range(forks)]
    rows = rows_of(shape, shared)
    for i in range(forks):
        copies = range(10 + 4 * i, 14 + 4 * i)
        pool.memory[copies] = pool.memory[prefix[:4]]
        pool.bits[copies] = pool.bits[prefix[:4]]
    copied = [replace(row, pages=tuple(range(10 + 4 * i, 14 + 4 * i)) + row.pages[4:])
              for i, row in enumerate(rows)]
    out = attend(device, pool, rows, SPLITS)
    same_bits(out, attend(device, pool, copied, SPLITS))
    check(pool, rows, out)


def test_rows_beside_a_sequence_that_overflowed(device: emulated.Device) -> None:
    """Infinite and undefined keys and values of one sequence stay there."""
    shape = Heads(2, 2, 16)
    pool = Pool(shape, 6)
    rows = rows_of(shape, [([0, 1], 70), ([0, 2], 70), ([3, 4], 80)])
    alone = attend(device, pool, rows, SPLITS)
    layer = pool.memory[:, pool.layer:].reshape(pool.bits.shape)
    layer[2, 0, 1, 3] = 0x7F80  # a value of the second row's own page
    layer[4, 1, 0, 5] = 0x7FC0  # a key of the third row's
    for form in (SPLITS, ROWS):
        out = attend(device, pool, rows, form)
        same_bits(out[0], alone[0])
        same_bits(out[1:, [1, 0], :][[0, 1], [0, 1]], alone[1:, [1, 0], :][[0, 1], [0, 1]])
        assert np.isposinf(out[1, 0]).all() and np.isnan(out[2, 1]).all()


def test_rounding_is_that_of_bf16_keys(device: emulated.Device) -> None:
    """With float32 queries of many bits, scores of size 10 and one key that wins by far, the result
    is that key's value to within the 16 bits that a weight has."""
    shape = Heads(2, 2, 64)
    pool = Pool(shape, 2)
    rows = rows_of(shape, [([0, 1], 100)])
    row = replace(rows[0], q=np.float32(from_bf16(pool.bits)[1, :, 0, 20] * np.float32(4 / 3)))
    out = attend(device, pool, [row], SPLITS)
    np.testing.assert_allclose(out[0], reference(pool, row), rtol=0, atol=2e-5)
