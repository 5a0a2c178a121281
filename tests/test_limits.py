"""The loops that measure a machine's limits do all their work: their results are checked."""

from __future__ import annotations

import numpy as np
import pytest

import qllm
from qllm import _core

ISAS = _core.cpu_info()["isas"]
PAGE = 4096


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_read_limit_is_the_exclusive_or_of_the_words(isa: str, threads: int) -> None:
    buffer = _core.limit_buffer(37 * PAGE - 5)
    assert buffer.dtype == np.uint8 and buffer.shape == (37 * PAGE,)
    assert not buffer.flags.writeable and buffer.view(np.uint64).all()
    for begin, pages in ((0, 37), (PAGE, 1), (5 * PAGE, 32), (37 * PAGE, 0)):
        part = buffer[begin:begin + pages * PAGE].view(np.uint64)
        found = _core.read_limit(buffer, begin, pages * PAGE, isa=isa, threads=threads)
        assert found == int(np.bitwise_xor.reduce(part))


def test_read_limit_takes_any_bytes() -> None:
    bytes_ = np.random.default_rng(1).integers(0, 256, 3 * PAGE).astype(np.uint8)
    expected = int(np.bitwise_xor.reduce(bytes_.view(np.uint64)))
    assert _core.read_limit(bytes_, 0, 3 * PAGE) == expected


@pytest.mark.parametrize("isa", ISAS)
def test_multiply_limit_counts_what_its_sums_counted(isa: str) -> None:
    units = _core.multiply_units(isa=isa)
    assert "f32" in units and set(units) <= {"f32", "int16", "int8", "bf16"}
    assert ("bf16" in units) <= ("avx512bf16" in _core.cpu_info()["features"])
    for unit in units:
        one = _core.multiply_limit(unit, 1, isa=isa, threads=1)
        assert one >= 16
        for turns in (5, 4096, 10001):
            assert _core.multiply_limit(unit, turns, isa=isa, threads=1) == turns * one
        here = min(3, _core.cpu_info()["threads_available"])
        assert _core.multiply_limit(unit, 9000, isa=isa, threads=3) == here * 9000 * one


@pytest.mark.parametrize(("call", "words"), [
    (lambda: _core.limit_buffer(0), "nbytes"),
    (lambda: _core.limit_buffer(2**63 - 1), "nbytes"),
    (lambda: _core.read_limit(np.zeros(PAGE, np.uint8), 0, 2 * PAGE), "multiples of 4096"),
    (lambda: _core.read_limit(np.zeros(2 * PAGE, np.uint8), 7, PAGE), "multiples of 4096"),
    (lambda: _core.read_limit(np.zeros(2 * PAGE, np.uint8), -PAGE, PAGE), "multiples of 4096"),
    (lambda: _core.read_limit(np.zeros(PAGE, np.float32), 0, PAGE), "buffer"),
    (lambda: _core.read_limit(np.zeros(PAGE, np.uint8), 0, PAGE, threads=0), "threads"),
    (lambda: _core.multiply_limit("f64", 1), "multiplies in f32"),
    (lambda: _core.multiply_limit("int8", 1, isa="scalar"), "scalar multiplies in f32"),
    (lambda: _core.multiply_limit("f32", 0), "turns"),
    (lambda: _core.multiply_limit("f32", 2**41), "turns"),
])
def test_refusals(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(qllm.QllmError, match=words):
        call()
