"""Build rules only: the sources, the instruction-set flags of single files, the sanitizer switch,
and the kernels for NVIDIA GPUs, which are built where nvcc is there and left out where it is not.

QLLM_SANITIZE=address,undefined (or thread)  builds the extension for those sanitizers, no kernels
QLLM_WERROR=1                                 turns warnings into errors (CI does)
QLLM_CFLAGS=-O0                               more flags for the C compiler, behind all others
QLLM_CUDA=1                                   a failure to build qllm/_cuda.so is an error
QLLM_NO_CUDA=1                                leaves qllm/_cuda.so out
QLLM_CUDA_ARCHES="80 90"                      the compute capabilities it is built for, without dots
QLLM_TEST_HOOKS=1                             puts the functions for tests of kernels into it
NVCC                                          nvcc, if it is not the one on PATH
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Command, Extension, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

HERE = Path(__file__).parent

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
          "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
# A file's name ends in the instruction set it may use; the choice among them is made at run time.
X86 = {
    "_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.c": AVX512,
    "_avx512vbmi.c": [*AVX512, "-mavx512vbmi"],
    "_avx512bf16.c": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
    "_avx512amx.c": [*AVX512, "-mavx512vbmi"],  # the tiles are named in assembly
}
# gcc's first scheduling pass moves loads and table look-ups so far ahead on Arm that the sums of a
# kernel no longer fit into the registers; clang has no such pass, and says so.
IN_ORDER = ["-fno-schedule-insns", "-Wno-ignored-optimization-argument"]
ARM64 = {
    "_neon.c": IN_ORDER,
    "_neondot.c": ["-march=armv8.2-a+dotprod", *IN_ORDER],
}
# -ffp-contract=off: a fused multiply-add stands only where the source says so, since the order and
# the roundings of every sum are part of the format's definition.
COMMON = ["-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
          "-fno-trapping-math",
          "-Wall", "-Wextra"]

# What a device library (kernels/) holds of csrc/: formats and configurations mean the same there.
DEVICE_C = ["csrc/core/*.c", "csrc/decoder/checks.c", "csrc/decoder/config.c",
            "csrc/decoder/positions.c", "csrc/decoder/slots.c"]
# On the host nothing throws, and the linker leaves out what nothing calls; of the code beside the
# kernels it is the size that counts.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-asynchronous-unwind-tables",
              "-ffunction-sections", "-fdata-sections"]
# -fmad=false: as -ffp-contract=off above. Registers that do not suffice are a warning.
NVCC_FLAGS = ["-std=c++17", "-fmad=false", "-Xptxas=--warn-on-spills", "-Ikernels", "-Icsrc",
              "-Xcompiler=" + ",".join([*HOST_FLAGS, "-Os", "-fno-exceptions", "-Wall", "-Wextra"])]
# Machine code for these, which later ones of the same first digits run too (8.6 and 8.9 that of
# 8.0); newer ones translate the PTX of the last when they first run it.
CUDA_ARCHES = ["80", "90", "100", "120"]


def sources(left_out: str) -> list[str]:
    """The C files of all rooms but one."""
    files = sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").rglob("*.c"))
    return [file for file in files if not file.startswith(f"csrc/{left_out}/")]


def flags_by_suffix(compiler: list[str]) -> dict[str, list[str]]:
    """The instruction sets of the machine that `compiler` builds for, which may be another one."""
    answer = subprocess.run([*compiler, "-dumpmachine"], check=True, capture_output=True, text=True)
    machine = answer.stdout.split("-")[0]
    return {"x86_64": X86, "aarch64": ARM64, "arm64": ARM64}.get(machine, {})


def own_flags(file: str, sets: dict[str, list[str]]) -> list[str]:
    """What a file is compiled with besides the common flags."""
    return [flag for suffix, flags in sets.items() if file.endswith(suffix) for flag in flags]


def of_this_machine(files: list[str], sets: dict[str, list[str]]) -> list[str]:
    """Without the files for instruction sets of other machines."""
    foreign = tuple(suffix for suffix in {**X86, **ARM64} if suffix not in sets)
    return [file for file in files if not file.endswith(foreign)]


def is_set(name: str) -> bool:
    return os.environ.get(name) == "1"


def run(command: list[str]) -> str:
    """What it prints; CompileError with that when it fails."""
    try:
        done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def find_nvcc() -> list[str]:
    nvcc = shlex.split(os.environ.get("NVCC") or "nvcc")
    if shutil.which(nvcc[0]) is None:
        raise CompileError(f"{nvcc[0]} is not installed; it comes with the CUDA toolkit")
    return nvcc


def gpu_code_flags(nvcc: list[str]) -> list[str]:
    """For the asked-for architectures, or those of CUDA_ARCHES that this nvcc knows; PTX last."""
    arches = os.environ.get("QLLM_CUDA_ARCHES", "").replace(",", " ").split()
    if not arches:
        known = run([*nvcc, "--list-gpu-code"]).split()
        arches = [arch for arch in CUDA_ARCHES if f"sm_{arch}" in known]
    if not arches:
        raise CompileError(f"{nvcc[0]} builds for none of the architectures {CUDA_ARCHES}")
    small = "--compress-mode" in run([*nvcc, "--help"])  # a sixth of the bytes
    return [*(["--compress-mode=size"] if small else []),
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches),
            f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}"]


def build_cuda(target: Path, temporary: Path, cc: list[str]) -> None:
    """Compiles what is new of kernels/*.cu and DEVICE_C, into one library that needs no CUDA to be
    installed where it is loaded."""
    nvcc = find_nvcc()
    code = gpu_code_flags(nvcc)
    werror = is_set("QLLM_WERROR")
    kernels = [path for path in HERE.glob("kernels/*.cu")
               if is_set("QLLM_TEST_HOOKS") or not path.name.startswith("test_hooks")]
    kernels.sort(key=lambda path: path.stat().st_size, reverse=True)  # the longest first
    files = [*kernels, *(path for pattern in DEVICE_C for path in HERE.glob(pattern))]
    headers = [*HERE.glob("kernels/*.h"), *HERE.glob("csrc/*/*.h"), HERE / "setup.py"]
    arches = [flag.split("_")[-1] for flag in code if flag.startswith("-gencode")]
    folder = temporary.absolute() / "-".join(["cuda", *arches])
    folder.mkdir(parents=True, exist_ok=True)

    def command_for(path: Path) -> list[str]:
        if path.suffix == ".c":
            return [*cc, *COMMON, *HOST_FLAGS, "-Icsrc", *(["-Werror"] if werror else [])]
        has_kernels = "GPU_KERNEL" in path.read_text(encoding="utf-8")
        return [*nvcc, "--threads=0", *NVCC_FLAGS, *(code if has_kernels else code[-1:]),
                *(["-Werror=all-warnings", "-Xcompiler=-Werror"] if werror else [])]

    def compile_one(path: Path) -> str:
        obj = folder / f"{path.name}.o"
        if newer_group([path, *headers], obj):
            partial = obj.with_suffix(".partial.o")
            run([*command_for(path), "-c", str(path), "-o", str(partial)])
            partial.replace(obj)
        return str(obj)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*nvcc, "-shared", "--cudart=static", *code,
         "-Xlinker=-s,-z,defs,--exclude-libs,ALL,--gc-sections",
         *objects, "-o", str(target.absolute())])



class BuildExt(build_ext):
    """Leaves out the files of other machines, adds each file's own flags to its compilation, and
    compiles as many files at once as there are processors."""

    def run(self) -> None:
        super().run()
        target = Path(self.get_ext_fullpath("qllm._core")).parent / "_cuda.so"
        target.unlink(missing_ok=True)  # an old one would not fit the package
        if is_set("QLLM_NO_CUDA") or os.environ.get("QLLM_SANITIZE"):
            return
        try:
            build_cuda(target, Path(self.build_temp), list(self.compiler.compiler_so))
        except CompileError as error:
            if is_set("QLLM_CUDA"):
                raise
            self.warn(f"without kernels for GPUs: {error}")

    def build_extensions(self) -> None:
        compile_one, link = self.compiler._compile, self.compiler.link_shared_object
        sets = flags_by_suffix(self.compiler.compiler_so)
        for ext in self.extensions:
            ext.sources = of_this_machine(ext.sources, sets)
        pool, running = ThreadPoolExecutor(os.cpu_count()), []

        def start(obj, src, ext, cc_args, extra_postargs, pp_opts):
            running.append(pool.submit(compile_one, obj, src, ext, cc_args,
                                       [*extra_postargs, *own_flags(src, sets)], pp_opts))

        def link_when_compiled(*args, **kwargs):
            for compilation in running:
                compilation.result()
            link(*args, **kwargs)

        self.compiler._compile, self.compiler.link_shared_object = start, link_when_compiled
        with pool:
            super().build_extensions()


class StaticLibrary(Command):
    """The library for C programs, without Python: docs/c-api.md."""

    description = "build libqllm.a and put its header beside it"
    user_options = [("folder=", None, "where they are written [build/c]")]

    def initialize_options(self) -> None:
        self.folder = "build/c"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        compiler = new_compiler()
        customize_compiler(compiler)
        sets = flags_by_suffix(compiler.compiler_so)
        header = HERE / "qllm" / "include" / "qllm.h"

        def compiled(file: str) -> str:
            flags = [*compile_flags(), *own_flags(file, sets)]
            return compiler.compile([file], output_dir=f"{self.folder}/objects",
                                    include_dirs=["csrc", str(header.parent)],
                                    extra_postargs=flags)[0]

        files = of_this_machine(sources(left_out="python"), sets)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, files))
        compiler.create_static_lib(objects, "qllm", output_dir=self.folder)
        self.mkpath(f"{self.folder}/include")
        self.copy_file(str(header), f"{self.folder}/include")


def compile_flags() -> list[str]:
    """For all C files; what QLLM_CFLAGS has comes last."""
    werror = ["-Werror"] if is_set("QLLM_WERROR") else []
    return [*COMMON, *werror, *shlex.split(os.environ.get("QLLM_CFLAGS", ""))]


def extension() -> Extension:
    compile_args, link_args = compile_flags(), ["-lm", "-lpthread", "-ldl"]
    if sanitize := os.environ.get("QLLM_SANITIZE"):
        # -g1: with what debuggers know of variables, gcc takes minutes for a file
        compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g1", "-O1",
                         "-DQLLM_PLAIN_INLINE"]
        if "undefined" in sanitize:
            compile_args.append("-fno-sanitize-recover=undefined")
        link_args.append(f"-fsanitize={sanitize}")
    return Extension("qllm._core", sources(left_out="api"), include_dirs=["csrc", numpy.get_include()],
                     depends=[str(path) for path in (HERE / "csrc").rglob("*.h")],
                     extra_compile_args=compile_args, extra_link_args=link_args)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt, "static_library": StaticLibrary})
