"""The loops of compiled functions, from the text of `objdump -d`: where they are, and what in them
costs more than it should.

x86-64 and 64-bit Arm.  A loop is a natural loop: a jump back to an instruction that every path to
the jump passes, with all instructions that lead to the jump without passing that one.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

FUNCTION = re.compile(r"^([0-9a-f]+) <(.+)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*?)\s*$")
PREFIXES = {"bnd", "notrack", "rep", "repz", "repnz", "lock", "data16", "cs", "ds"}
ALWAYS = {"jmp", "b"}  # jumps after which the next instruction is not reached
ENDS = {"ret", "ud2", "hlt", "br", "udf", "brk"}
X86_VECTOR = re.compile(r"%[xyz]mm\d+")
ARM_VECTOR = re.compile(r"\b[vqd]\d+\b")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump goes; None for other instructions and for jumps through registers."""
        arm = re.fullmatch(r"b(\.\w+)?|cbn?z|tbn?z", self.name)
        if not arm and not self.name.startswith(("j", "loop")):
            return None
        found = re.search(r"(?:^|[ ,])([0-9a-f]+) <", self.operands)
        return int(found[1], 16) if found else None

    @property
    def is_call(self) -> bool:
        return self.name in ("call", "callq", "bl", "blr")

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {self.operands}"


@dataclass(frozen=True)
class Loop:
    code: tuple[Instruction, ...]  # in the order of addresses
    always: tuple[Instruction, ...]  # those that no turn of the loop goes round


@dataclass(frozen=True, eq=False)
class Function:
    name: str
    address: int
    code: tuple[Instruction, ...]


def functions(disassembly: str, wanted: Container[int] | None = None) -> list[Function]:
    """From `objdump -d --no-show-raw-insn`; those at the addresses `wanted`, or all."""
    found: list[tuple[str, int, list[Instruction]]] = []
    inside = False
    for line in disassembly.splitlines():
        if line.endswith(">:") and (head := FUNCTION.match(line)):
            inside = wanted is None or int(head[1], 16) in wanted
            if inside:
                found.append((head[2], int(head[1], 16), []))
        elif inside and (match := INSTRUCTION.match(line)):
            words = f"{match[2]} {match[3]}".split(" ")
            while len(words) > 1 and words[0] in PREFIXES:
                words.pop(0)
            operands = re.split(r"\s+(?://|# )", " ".join(words[1:]))[0].strip()
            found[-1][2].append(Instruction(int(match[1], 16), words[0], operands))
    return [Function(name, address, tuple(code)) for name, address, code in found]


def source_files(symbols: str) -> dict[int, str]:
    """The C file of every local function, by address, from `objdump -t`: local symbols follow the
    name of their file."""
    files: dict[int, str] = {}
    current = ""
    for line in symbols.splitlines():
        words = line.split()
        if "df" in words and "*ABS*" in words:
            current = words[-1] if words[-1].endswith(".c") else ""
        elif len(words) > 4 and words[1] == "l" and words[2] == "F" and current:
            files[int(words[0], 16)] = current
    return files


def _blocks(function: Function) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks as ranges of instruction numbers, and the blocks that follow each."""
    code = function.code
    number = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0}
    for i, instruction in enumerate(code):
        target = instruction.target
        if target in number:
            starts.add(number[target])
        if target is not None or instruction.name in ALWAYS | ENDS:
            starts.add(i + 1)
    edges = sorted(start for start in starts if start < len(code)) + [len(code)]
    blocks = list(zip(edges[:-1], edges[1:]))
    of_start = {start: i for i, (start, _) in enumerate(blocks)}
    following: list[list[int]] = []
    for i, (_, end) in enumerate(blocks):
        last, after = code[end - 1], []
        if last.target in number:
            after.append(of_start[number[last.target]])
        if last.name not in ALWAYS | ENDS and i + 1 < len(blocks):
            after.append(i + 1)
        following.append(after)
    return blocks, following


def _dominators(following: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every path from the entry to it passes; blocks that are
    reached by no known path dominate nothing."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(following[0]))]
    while stack:  # depth first, without recursion
        block, rest = stack[-1]
        nearest = next((b for b in rest if b not in seen), None)
        if nearest is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(nearest)
            stack.append((nearest, iter(following[nearest])))
    order.reverse()
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in following[block]:
            before[after].append(block)
    result = [set(order) if b in seen and b else {b} for b in range(len(following))]
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(result[b] for b in before[block])) | {block}
            changed |= new != result[block]
            result[block] = new
    return result


def innermost_loops(function: Function) -> list[Loop]:
    """The loops that hold no other loop."""
    if not function.code:
        return []
    blocks, following = _blocks(function)
    dominators = _dominators(following)
    before: list[list[int]] = [[] for _ in blocks]
    for block, after in enumerate(following):
        for b in after:
            before[b].append(block)
    members: dict[int, set[int]] = {}  # of the loop with this head
    always: dict[int, set[int]] = {}
    for block, after in enumerate(following):
        for head in after:
            if head not in dominators[block]:
                continue
            inside, stack = members.setdefault(head, {head}), [block]
            always[head] = always.get(head, dominators[block]) & dominators[block]
            while stack:
                b = stack.pop()
                if b not in inside:
                    inside.add(b)
                    stack += before[b]

    def code(of: set[int]) -> tuple[Instruction, ...]:
        return tuple(i for b in sorted(of) for i in function.code[slice(*blocks[b])])

    return [Loop(code(inside), code(inside & always[head])) for head, inside in members.items()
            if not any(other in inside for other in members if other != head)]


def stores_of_vectors_to_the_stack(
    function: Function, code: tuple[Instruction, ...]
) -> list[Instruction]:
    """Stores to a fixed place of the frame: an array that a loop fills has an index or a pointer."""
    framed = any(i.name in ("mov", "lea") and re.fullmatch(r"(%rsp|.*\(%r\w+\)),\s*%rbp", i.operands)
                 for i in function.code)
    x86 = re.compile(r"-?(0x[0-9a-f]+)?\(%(rsp|rbp)\)$" if framed else r"-?(0x[0-9a-f]+)?\(%rsp\)$")
    found = []
    for i in code:
        if i.name.startswith(("str", "stp", "stur", "st1")):
            stored, _, place = i.operands.partition("[")
            spilled = ARM_VECTOR.search(stored) and re.match(r"(sp|x29)(, #-?\w+)?\]$", place)
        else:
            *read, place = re.split(r",\s*(?![^(]*\))", i.operands)
            spilled = i.name.startswith(("v", "mov")) and x86.search(place) and any(
                X86_VECTOR.search(operand) for operand in read)
        if spilled:
            found.append(i)
    return found
