"""Build rules only: the sources, the instruction-set flags of single files, the sanitizer switch.

QLLM_SANITIZE=address,undefined (or thread)  builds the extension for those sanitizers
QLLM_WERROR=1                                 turns warnings into errors (CI does)
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Command, Extension, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
          "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
# A file's name ends in the instruction set it may use; the choice among them is made at run time.
X86 = {
    "_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.c": AVX512,
    "_avx512vbmi.c": [*AVX512, "-mavx512vbmi"],
    "_avx512bf16.c": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
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


def sources(left_out: str) -> list[str]:
    """The C files of all rooms but one."""
    files = sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").rglob("*.c"))
    return [file for file in files if not file.startswith(f"csrc/{left_out}/")]


def flags_by_suffix(compiler: list[str]) -> dict[str, list[str]]:
    """The instruction sets of the machine that `compiler` builds for, which may be another one."""
    answer = subprocess.run([*compiler, "-dumpmachine"], check=True, capture_output=True, text=True)
    machine = answer.stdout.split("-")[0]
    return {"x86_64": X86, "aarch64": ARM64, "arm64": ARM64}.get(machine, {})


class BuildExt(build_ext):
    """Leaves out the files of other machines, adds each file's own flags to its compilation, and
    compiles as many files at once as there are processors."""

    def build_extensions(self) -> None:
        compile_one, link = self.compiler._compile, self.compiler.link_shared_object
        sets = flags_by_suffix(self.compiler.compiler_so)
        foreign = tuple(suffix for suffix in {**X86, **ARM64} if suffix not in sets)
        for ext in self.extensions:
            ext.sources = [file for file in ext.sources if not file.endswith(foreign)]
        pool, running = ThreadPoolExecutor(os.cpu_count()), []

        def start(obj, src, ext, cc_args, extra_postargs, pp_opts):
            extra = [flag for suffix, flags in sets.items() if src.endswith(suffix)
                     for flag in flags]
            running.append(pool.submit(compile_one, obj, src, ext, cc_args,
                                       list(extra_postargs) + extra, pp_opts))

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
        foreign = tuple(suffix for suffix in {**X86, **ARM64} if suffix not in sets)
        header = HERE / "qllm" / "include" / "qllm.h"

        def compiled(file: str) -> str:
            extra = [flag for suffix, flags in sets.items() if file.endswith(suffix)
                     for flag in flags]
            return compiler.compile([file], output_dir=f"{self.folder}/objects",
                                    include_dirs=["csrc", str(header.parent)],
                                    extra_postargs=[*compile_flags(), *extra])[0]

        files = [file for file in sources(left_out="python") if not file.endswith(foreign)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, files))
        compiler.create_static_lib(objects, "qllm", output_dir=self.folder)
        self.mkpath(f"{self.folder}/include")
        self.copy_file(str(header), f"{self.folder}/include")


def compile_flags() -> list[str]:
    return [*COMMON, "-Werror"] if os.environ.get("QLLM_WERROR") == "1" else list(COMMON)


def extension() -> Extension:
    compile_args, link_args = compile_flags(), ["-lm", "-lpthread", "-ldl"]
    if sanitize := os.environ.get("QLLM_SANITIZE"):
        compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1",
                         "-DQLLM_PLAIN_INLINE"]
        if "undefined" in sanitize:
            compile_args.append("-fno-sanitize-recover=undefined")
        link_args.append(f"-fsanitize={sanitize}")
    return Extension("qllm._core", sources(left_out="api"), include_dirs=["csrc", numpy.get_include()],
                     depends=[str(path) for path in (HERE / "csrc").rglob("*.h")],
                     extra_compile_args=compile_args, extra_link_args=link_args)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt, "static_library": StaticLibrary})
