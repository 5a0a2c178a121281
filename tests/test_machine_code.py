"""The inner loops of the linear kernels as the compiler left them: no vector register is stored to
the stack there, and nothing is called.

Either costs what the kernels were written to save, passes every other test, and comes and goes with
a compiler's version.  gcc is what the kernels are laid out for; an extension that another compiler
built is not looked at.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import machine_code
import pytest

from qllm import _core

MACHINE = platform.machine()
SETS = [isa for isa in _core.cpu_info()["compiled"] if isa != "scalar"]
# what a multiplication of vectors is called; the other loops copy, decode or count
MULTIPLY = re.compile(r"vfn?m(add|sub)\w+|vdpbf16ps|tdp\w+|vpdp\w+|vpmadd\w+|fml[as]|[su]dot|[su]m[lu]\w+")

# what gcc 12 still spills, vectors a turn of the loop: no more than that, and nowhere else
STILL_SPILLED = {
    ("linear_avx2.c", "linear_int8"): 3,
    ("linear_avx2.c", "linear_blocks_int16"): 8,
    ("linear_avx2.c", "linear_nested_int16"): 7,
    ("linear_avx512.c", "linear_blocks_int16"): 1,
    ("linear_avx512.c", "linear_nested_int16"): 1,
    ("linear_avx512.c", "linear_blocks_int8"): 1,
    ("linear_avx512.c", "linear_nested_int8"): 1,
    ("linear_avx512vbmi.c", "linear_blocks_int16"): 1,
    ("linear_avx512vbmi.c", "linear_nested_int16"): 1,
    ("linear_avx512vbmi.c", "linear_blocks_int8"): 1,
    ("linear_avx512vbmi.c", "linear_nested_int8"): 1,
}


def tool(name: str) -> str | None:
    return shutil.which(f"{MACHINE}-linux-gnu-{name}") or shutil.which(name)


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def objdump(*options: str | Path) -> str:
    program = tool("objdump")
    if program is None:
        pytest.skip("objdump is not installed")
    return run(program, *options)


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[machine_code.Function]]:
    """The functions of each file of linear kernels."""
    library = Path(_core.__file__)
    if "GCC: (" not in objdump("-s", "-j", ".comment", library).replace("\n", ""):
        text = run(tool("strings") or "strings", "-n", "4", library)
        if "GCC: (" not in text:
            pytest.skip("the extension was not built by gcc")
    files = machine_code.source_files(objdump("-t", library))
    if not files:
        pytest.skip("the extension was stripped of its symbols")
    wanted = {address for address, file in files.items() if file.startswith("linear_")}
    found: dict[str, list[machine_code.Function]] = {}
    text = objdump("-d", "--no-show-raw-insn", library)
    for function in machine_code.functions(text, wanted):
        found.setdefault(files[function.address], []).append(function)
    return found


@functools.lru_cache(maxsize=None)
def hot_loops(function: machine_code.Function) -> list[machine_code.Loop]:
    loops = machine_code.innermost_loops(function)
    return [loop for loop in loops if any(MULTIPLY.fullmatch(i.name) for i in loop.code)]


def complaints(function: machine_code.Function, spills: int = 0) -> list[str]:
    """A line for every loop with what must not be there, if there are more than so many spills.
    What a turn may go round is seldom met: the scales of the nested formats are read anew once in
    256 columns."""
    lines = []
    for loop in hot_loops(function):
        bad = machine_code.stores_of_vectors_to_the_stack(function, loop.always)
        bad = bad if len(bad) > spills else []
        bad += [i for i in loop.always if i.is_call]
        if bad:
            lines.append(f"{function.name}, loop of {len(loop.code)} instructions, {len(bad)} bad: "
                         f"{'; '.join(map(str, bad[:4]))}")
    return lines


@pytest.mark.parametrize("isa", SETS)
def test_inner_loops_neither_spill_nor_call(
    isa: str, kernels: dict[str, list[machine_code.Function]]
) -> None:
    files = [file for file in kernels if file.endswith(f"_{isa}.c")]
    # there are loops for one row and for more, or the search has missed them
    assert sum(len(hot_loops(function)) for file in files for function in kernels[file]) >= 4
    found = [line for file in files for function in kernels[file]
             for line in complaints(function, STILL_SPILLED.get((file, function.name), 0))]
    assert not found, "\n".join(found)


# -------------------------------------------------------------------------- the checker can refuse

X86 = """
0000000000001000 <kernel>:
    1000:\tpush   %rbp
    1001:\tmov    %rsp,%rbp
    1004:\tvmovaps %ymm9,-0x50(%rbp)
    1009:\tnopl   0x0(%rax)
    1010:\tvfmadd231ps (%rdi,%rax,1),%ymm0,%ymm1
    1016:\tvmovups %ymm1,0x40(%rsp,%rax,1)
    101c:\tSTORE
    1022:\tadd    $0x20,%rax
    1026:\tcmp    %rax,%rsi
    1029:\tjne    1010 <kernel+0x10>
    102b:\tvmovaps %ymm1,-0x30(%rbp)
    1030:\tret
"""
ARM = """
0000000000001000 <kernel>:
    1000:\tstp\tx29, x30, [sp, #-64]!
    1004:\tstr\tq9, [sp, #32]
    1008:\tld1r\t{v2.4s}, [x1], #4
    100c:\tfmla\tv1.4s, v0.4s, v2.4s
    1010:\tSTORE
    1014:\tsubs\tx0, x0, #0x1
    1018:\tb.ne\t1008 <kernel+0x8>  // b.any
    101c:\tstr\tq1, [sp, #48]
    1020:\tret
"""


def listing(text: str, store: str) -> list[str]:
    (function,) = machine_code.functions(text.replace("STORE", store))
    (loop,) = hot_loops(function)
    assert loop.code[-1].target == loop.code[0].address
    return complaints(function)


@pytest.mark.parametrize("store", [
    "vmovaps %ymm1,-0x70(%rbp)", "vmovups %zmm31,0x40(%rsp)", "vmovdqa %xmm3,(%rsp)",
    "vmovdqu64 %zmm17,0x1c0(%rsp)", "vextractf128 $0x1,%ymm3,-0x40(%rbp)",
    "call   2000 <helper>", "call   *%rdx", "notrack call *0x8(%rax)",
])
def test_spills_and_calls_of_x86_are_found(store: str) -> None:
    assert len(listing(X86, store)) == 1


@pytest.mark.parametrize("store", [
    "vmovaps %ymm1,0x40(%rdi)", "vmovups %ymm1,(%rsp,%rcx,4)", "vmovaps -0x70(%rbp),%ymm1",
    "mov    %rcx,0x8(%rsp)", "vaddps 0x20(%rsp),%ymm1,%ymm2", "prefetcht0 0x1000(%rsp)",
])
def test_what_else_a_loop_of_x86_does_is_not(store: str) -> None:
    assert listing(X86, store) == []


def test_the_base_pointer_is_the_stack_only_where_it_was_made_so() -> None:
    plain = X86.replace("mov    %rsp,%rbp", "mov    %rdi,%rbp")
    assert listing(plain, "vmovaps %ymm1,-0x70(%rbp)") == []
    assert len(listing(plain, "vmovaps %ymm1,0x70(%rsp)")) == 1


@pytest.mark.parametrize("store", [
    "str\tq1, [sp, #512]", "str\tq1, [sp]", "stp\tq1, q2, [sp, #32]", "stur\tq7, [x29, #-48]",
    "st1\t{v4.16b-v7.16b}, [sp]", "bl\t2000 <helper>", "blr\tx3",
])
def test_spills_and_calls_of_arm_are_found(store: str) -> None:
    assert len(listing(ARM, store)) == 1


@pytest.mark.parametrize("store", [
    "str\tq1, [x0, #16]", "str\tq1, [sp, x2]", "ldr\tq1, [sp, #16]", "str\tx1, [sp, #16]",
    "st1\t{v4.16b-v7.16b}, [x9]",
])
def test_what_else_a_loop_of_arm_does_is_not(store: str) -> None:
    assert listing(ARM, store) == []


def test_only_the_innermost_of_loops_counts() -> None:
    nested = """
0000000000000000 <kernel>:
    0:\tvmovaps %ymm1,0x20(%rsp)
    6:\tcall   100 <helper>
    b:\tvfmadd231ps (%rdi),%ymm0,%ymm1
    10:\tdec    %rax
    13:\tjne    b <kernel+0xb>
    15:\tdec    %rbx
    18:\tjne    0 <kernel>
    1a:\tje     20 <kernel+0x20>
    1c:\tvfmadd231ps (%rdi),%ymm0,%ymm1
    20:\tvmovaps %ymm1,0x20(%rsp)
    24:\tret
    25:\tvmovaps %ymm1,0x40(%rsp)
    2a:\tjmp    1c <kernel+0x1c>
"""
    (function,) = machine_code.functions(nested)
    (loop,) = machine_code.innermost_loops(function)  # the last jump goes back, and is none
    assert [i.address for i in loop.code] == [0xB, 0x10, 0x13] and loop.always == loop.code
    assert complaints(function) == []


def test_what_a_turn_may_go_round_does_not_count() -> None:
    seldom = """
0000000000000000 <kernel>:
    0:\tvfmadd231ps (%rdi),%ymm0,%ymm1
    5:\ttest   $0x3f,%rax
    8:\tje     20 <kernel+0x20>
    a:\tdec    %rax
    d:\tjne    0 <kernel>
    f:\tret
    20:\tvmovaps %ymm1,0x20(%rsp)
    26:\tcall   100 <helper>
    2b:\tjmp    a <kernel+0xa>
"""
    (function,) = machine_code.functions(seldom)
    (loop,) = machine_code.innermost_loops(function)
    assert len(loop.code) == 8 and [i.address for i in loop.always] == [0, 5, 8, 0xA, 0xD]
    assert complaints(function) == []


SOURCE = """
typedef float vector __attribute__((vector_size(BYTES)));
#define EACH _Pragma("GCC unroll 64") for (int j = 0; j < SUMS; j++)
void kernel(const vector *x, long n, vector *y)
{
    vector sum[SUMS], w = y[SUMS];
    EACH sum[j] = y[j];
    for (long i = 0; i < n; i++)
        EACH sum[j] += w * x[i + j];
    EACH y[j] = sum[j];
}
"""


@pytest.mark.parametrize("sums", [4, 40])
def test_a_compiled_loop_with_too_many_sums_is_refused(sums: int, tmp_path: Path) -> None:
    compiler = tool("gcc")
    flags = {"x86_64": ["-mavx2", "-mfma", "-DBYTES=32"], "aarch64": ["-DBYTES=16"]}.get(MACHINE)
    if compiler is None or flags is None:
        pytest.skip("there is no gcc for a machine whose code is known here")
    source, output = tmp_path / "kernel.c", tmp_path / "kernel.o"
    source.write_text(SOURCE)
    run(compiler, "-O3", "-ffp-contract=fast", f"-DSUMS={sums}", *flags, "-c", source, "-o", output)
    (function,) = machine_code.functions(objdump("-d", "--no-show-raw-insn", output))
    assert hot_loops(function)
    assert bool(complaints(function)) == (sums == 40)
