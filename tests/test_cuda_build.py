"""What nvcc makes of the kernels: registers that do not spill, and hot loops that keep within the
instructions a GPU can issue while it reads weights at full speed.

Runs where nvcc is, for one kind of GPU; QLLM_TEST_ARCHES=all takes every kernel for all kinds that
setup.py builds for, which takes minutes, QLLM_TEST_ARCHES="80 90" some.  A build with QLLM_WERROR=1
ends where registers spill, too."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import cubin
import emulated
import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = os.environ.get("QLLM_TEST_ARCHES") == "all"
ARCHES = (emulated.build_rules()["CUDA_ARCHES"] if ALL
          else os.environ.get("QLLM_TEST_ARCHES", "90").split())
# Kernels with registers alone, and those which have arrays in a thread's own memory, or are large.
SOURCES = {"skinny": 22, "prefill": 8, "quantize_device": 3}
OTHERS = {"attention": 7, "attention_plain": 1, "exact_linear": 13, "exact_ops": 8, "limits": 2, "linear": 2,
          "linear_entry": 2, "logit_stats": 2, "pack": 2, "random_weight": 3, "sampler": 1, "small": 2}
FORMS = {"nf4, fp4": 0, "nf4-dq, fp4-dq": 1, "int8": 2, "bf16": 3}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@functools.cache
def compiled(source: str, arch: str) -> tuple[dict[str, cubin.Kernel], dict[str, cubin.Registers]]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        done = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", "-cubin", "-Xptxas",
             "-v", "-Ikernels", "-Icsrc", source, "-o", str(target)],
            cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        code = {kernel.name: kernel for kernel in cubin.kernels(target, int(arch))}
    return code, cubin.registers(done.stdout + done.stderr)


def skinny(arch: str) -> dict[tuple[int, ...], cubin.Kernel]:
    """By (form, rows of tiles, eights of rows of x, whether these are in shared memory)."""
    found = {}
    for name, kernel in compiled("kernels/skinny.cu", arch)[0].items():
        if match := re.search(r"skinnyILi(\d)ELi(\d)ELi(\d)ELb(\d)E", name):
            found[tuple(map(int, match.groups()))] = kernel
    return found


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source,count", [*SOURCES.items(), *(OTHERS.items() if ALL else ())])
def test_registers_do_not_spill(source: str, count: int, arch: str) -> None:
    used = compiled(f"kernels/{source}.cu", arch)[1]
    assert len(used) == count
    for name, registers in used.items():
        assert registers.spilled == 0 and (registers.stack == 0 or source in OTHERS), name
        if re.search(r"skinnyILi\dELi\dELi1E", name):  # two blocks of 256 threads share a processor
            assert registers.used <= 128, name


def test_every_file_with_kernels_is_known() -> None:
    found = {path.stem for path in (ROOT / "kernels").glob("*.cu")
             if re.search(r"^(template.*\n)?GPU_KERNEL", path.read_text(encoding="utf-8"), re.M)}
    assert {name for name in found if "test_hooks" not in name} == {*SOURCES, *OTHERS}


def test_the_library_is_small() -> None:
    library = ROOT / "qllm" / "_cuda.so"
    if not library.exists():
        pytest.skip("it is not built here")
    assert library.stat().st_size < 3_000_000


@pytest.mark.parametrize("arch", ARCHES)
def test_hot_loops_of_4_bit_codes(arch: str) -> None:
    """A lane has 32 weights of a tile, which take 4 HMMA and 16 look-ups for 8 rows of x."""
    kernels = skinny(arch)
    for form, most in ((0, 2.0), (1, 2.3)):
        for tiles in (1, 2, 4):
            each = kernels[form, tiles, 1, 1].share("HMMA") * 4 / 32
            assert each <= most, (form, tiles)
        assert each <= most - 0.3, form  # of four rows of tiles


@pytest.mark.parametrize("arch", ARCHES)
def test_hot_loops_of_the_other_formats(arch: str) -> None:
    kernels = skinny(arch)
    for tiles in (1, 2):
        assert kernels[3, tiles, 1, 1].share("HMMA") * 4 / 32 <= 0.7
        assert kernels[2, tiles, 1, 1].share("IMMA") * 2 / 32 <= 0.5


@pytest.mark.parametrize("arch", ARCHES)
def test_one_look_up_for_two_codes(arch: str) -> None:
    """Nothing else reads shared memory in the loop but the rows of x and the nested scales."""
    for (form, tiles, eights, is_resident), kernel in skinny(arch).items():
        if form > 1:
            continue
        a, b = kernel.hot_loop("HMMA")
        tiles_of_turns = kernel.count("HMMA", a, b) // (4 * eights)
        assert kernel.count("LDS", a, b) <= tiles_of_turns * (16 + 2 * is_resident) + 4 * form
        assert kernel.count("LDL", a, b) == kernel.count("STL", a, b) == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_hot_loops_of_many_rows(arch: str) -> None:
    """Instructions for each of the tensor cores, with two rows of tiles; the end of a slice and the
    copies of x included."""
    loops = {}
    for name, kernel in compiled("kernels/prefill.cu", arch)[0].items():
        if match := re.search(r"prefillILi(\d)ELi2E", name):
            form = int(match[1])
            loops[form] = kernel.share("IMMA" if form == 2 else "HMMA")
    assert len(loops) == 4
    assert loops[0] < 8.5 and loops[1] < 9 and loops[2] < 9 and loops[3] < 6


def test_the_reader_sees_other_loops() -> None:
    """Jumps back and forth, in both encodings of a distance."""
    def jump(distance: int, capability: int) -> int:
        steps = distance * cubin.SIZE // 4
        if capability < 90:
            return 0x947 | (steps & (1 << 48) - 1) << 34
        return 0x947 | (steps & 0xFF) << 16 | (steps >> 8 & (1 << 48) - 1) << 34

    for capability in (80, 90):
        code = (0x918, 0x23C, 0x23C, jump(-3, capability), 0x984, jump(1, capability), 0x23C,
                jump(-2, capability), jump(-9, capability))
        kernel = cubin.Kernel("k", code, capability)
        assert kernel.loops() == [(0, 9), (1, 4), (6, 8)]
        assert kernel.hot_loop("HMMA") == (1, 4) and kernel.share("HMMA") == 1.5
        assert kernel.hot_loop("LDS") == (0, 9) and kernel.share("LDS") == 9
        with pytest.raises(AssertionError, match="k has no loop with IMMA"):
            kernel.hot_loop("IMMA")
