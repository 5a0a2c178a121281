"""The machine code of kernels, from the cubin files that nvcc writes: how many instructions their
hot loops have.

A cubin is an ELF file with a section `.text.<kernel>` for each kernel, of 16-byte instructions
whose low 12 bits are the operation.  The operations below and the place of a jump's distance were
found by comparing with NVIDIA's disassembler, for compute capabilities 8.0 to 12.0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIZE = 16  # bytes of an instruction
NAMES = {0x23C: "HMMA", 0x237: "IMMA", 0x984: "LDS", 0x981: "LDG", 0x387: "STL", 0x983: "LDL"}
JUMPS = (0x947, 0x547)  # BRA, with and without a register that is the same for the warp


@dataclass(frozen=True)
class Kernel:
    name: str
    code: tuple[int, ...]  # instructions, 128 bits each
    capability: int  # 90 for 9.0

    def count(self, name: str, first: int = 0, end: int | None = None) -> int:
        """Instructions of that name in [first, end)."""
        return sum(NAMES.get(word & 0xFFF) == name for word in self.code[first:end])

    def _target(self, i: int) -> int | None:
        """The instruction to which instruction i jumps."""
        word = self.code[i]
        if word & 0xFFF not in JUMPS:
            return None
        distance = word >> 34 & (1 << 48) - 1
        distance -= (distance >> 47) << 48
        if self.capability >= 90:
            distance = distance << 8 | word >> 16 & 0xFF
        return i + 1 + distance * 4 // SIZE

    def loops(self) -> list[tuple[int, int]]:
        """[first, end) of each."""
        return sorted({(target, i + 1) for i in range(len(self.code))
                       if (target := self._target(i)) is not None and target <= i})

    def hot_loop(self, operation: str) -> tuple[int, int]:
        """[first, end) of the loop with the most instructions of that name, of those that hold no
        smaller loop with any."""
        loops = [loop for loop in self.loops() if self.count(operation, *loop)]
        inner = [(a, b) for a, b in loops
                 if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
        assert inner, f"{self.name} has no loop with {operation}"
        return max(inner, key=lambda loop: self.count(operation, *loop))

    def share(self, operation: str) -> float:
        """Instructions of the hot loop for each of that name."""
        first, end = self.hot_loop(operation)
        return (end - first) / self.count(operation, first, end)


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    start, = struct.unpack_from("<Q", data, 40)
    count, names = struct.unpack_from("<HH", data, 60)
    headers = [struct.unpack_from("<IIQQQQ", data, start + 64 * i) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, size in headers:
        end = data.index(b"\0", texts + name)
        yield data[texts + name:end].decode(), data[offset:offset + size]


def kernels(path: Path, capability: int) -> list[Kernel]:
    found = []
    for name, code in _sections(path.read_bytes()):
        if name.startswith(".text."):
            words = (int.from_bytes(code[i:i + SIZE], "little") for i in range(0, len(code), SIZE))
            found.append(Kernel(name.removeprefix(".text."), tuple(words), capability))
    return found


@dataclass(frozen=True)
class Registers:
    used: int
    stack: int   # bytes
    spilled: int


def registers(log: str) -> dict[str, Registers]:
    """By kernel, from what `ptxas -v` prints."""
    found, name, stack, spilled = {}, "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spilled = int(match[1]), int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name] = Registers(int(match[1]), stack, spilled)
    return found
