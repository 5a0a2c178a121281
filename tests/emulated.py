"""The kernels of kernels/ on the processor: builds them with g++ (kernels/emulate) and calls them.

    device = emulated.device()
    x = device.array(np.arange(32, dtype=np.float32))
    device.call("gpu_test_something", x, 32)      # a C function of kernels/test_hooks*.cu
    x.get()
    qllm.Model.from_pretrained(folder, device=emulated.name())

A C function for tests takes pointers, int64_t, float or bool, and last a qllm_error *; it returns a
qllm_status.  Set in the environment of a call: QLLM_EMULATE_ORDER=reversed, QLLM_EMULATE_THREADS,
QLLM_EMULATE_STREAMS=late, QLLM_EMULATE_GRAPHS=0, QLLM_EMULATE_MEMORY, QLLM_EMULATE_HOST_MEMORY=1,
QLLM_EMULATE_DEVICES (their number; kernels/emulate).

QLLM_TEST_SANITIZE=1 builds for the address and undefined-behaviour sanitizers, whose runtime must
then be preloaded; QLLM_TEST_CUDA=1 takes qllm/_cuda.so, built with QLLM_TEST_HOOKS=1, instead.
"""

from __future__ import annotations

import ast
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qllm import _core

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "emulated"
VARIANTS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                  "-fno-sanitize-recover=undefined"],
    "ucontext": ["-O2", "-DQLLM_EMULATE_UCONTEXT"],
}
ON_A_GPU = os.environ.get("QLLM_TEST_CUDA") == "1"
without_a_gpu = pytest.mark.skipif(ON_A_GPU, reason="the emulation can be told to fail, a GPU not")
STATUSES = ["OK", "VALUE", "MEMORY", "UNSUPPORTED", "INTERNAL"]  # of csrc/core/status.h


def compilers() -> tuple[list[str], list[str]]:
    """Of C and of C++, as commands; skips the test where there is none."""
    c, cxx = (shlex.split(os.environ.get(name) or default)
              for name, default in (("CC", "cc"), ("CXX", "g++")))
    for command in (c, cxx):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed: kernels cannot be built for the processor")
    return c, cxx


def build_rules() -> dict[str, list[str]]:
    """COMMON, DEVICE_C and CUDA_ARCHES of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("COMMON", "DEVICE_C", "CUDA_ARCHES")}


def processor_flags() -> list[str]:
    """fmaf as one instruction where there is one: the same bits, some ten times faster."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= words else []


def _digest(path: str) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def _is_fresh(record: Path, command: list[str]) -> bool:
    """Whether the last compilation was this one, of files that are still the same."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return bool(known["command"] == command
                    and all(_digest(path) == was for path, was in known["files"].items()))
    except (OSError, ValueError, KeyError):
        return False


def _run(command: list[str]) -> None:
    without = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def _compile(command: list[str], folder: Path, source: str) -> tuple[Path, bool]:
    """The object file, and whether it is a new one."""
    target = folder / (source.replace("/", "_") + ".o")
    record, listing = target.with_suffix(".json"), target.with_suffix(".d")
    if target.exists() and _is_fresh(record, command):
        return target, False
    record.unlink(missing_ok=True)
    _run([*command, "-MMD", "-MF", str(listing), "-c", source, "-o", str(target)])
    words = listing.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
    read = [word for word in words if not os.path.isabs(word)]
    record.write_text(json.dumps({"command": command, "files": {p: _digest(p) for p in read}}))
    return target, True


def build(variant: str = "plain", sources: Sequence[str] | None = None) -> Path:
    """The library of a variant, built if need be: of all kernels/*.cu and what setup.py puts beside
    them, or of those sources alone (paths from the repository's root); and of the emulation."""
    c, cxx = compilers()
    rules = build_rules()
    flags = [*rules["COMMON"], *VARIANTS[variant], "-fPIC", "-Icsrc"]
    if os.environ.get("QLLM_WERROR") == "1":
        flags.append("-Werror")
    cxx_flags = [flag for flag in flags if not flag.startswith("-std=")]
    commands = {
        ".c": [*c, *flags],
        ".cu": [*cxx, "-x", "c++", "-std=c++17", *cxx_flags, *processor_flags(), "-Ikernels",
                "-Wno-unknown-pragmas"],
    }
    commands[".cc"] = commands[".cu"]
    patterns = ["kernels/*.cu", *rules["DEVICE_C"]] if sources is None else list(sources)
    files = [path for pattern in [*patterns, "kernels/emulate/*.cc"] for path in ROOT.glob(pattern)]
    files.sort(key=lambda path: path.stat().st_size, reverse=True)  # the longest first

    folder = FOLDER / variant
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("\n".join(sorted(patterns)).encode()).hexdigest()[:12]
    library = folder / ("_emulated.so" if sources is None else f"_{name}.so")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(
                lambda path: _compile(commands[path.suffix], folder,
                                      path.relative_to(ROOT).as_posix()), files))
        record = library.with_suffix(".json")
        made = [str(path) for path, _ in objects]
        command = [*cxx, "-shared", *VARIANTS[variant], *made, "-lm", "-lpthread"]
        if not library.exists() or not _is_fresh(record, command):
            fresh = library.with_suffix(f".{os.getpid()}")
            _run([*command, "-o", str(fresh)])
            fresh.replace(library)  # who has the old one loaded keeps it
            record.write_text(json.dumps({"command": command,
                                          "files": {path: _digest(path) for path in made}}))
    return library


def environment(variant: str) -> dict[str, str]:
    """For a new process that loads the library of a variant: a sanitizer's runtime comes first."""
    result = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if variant == "sanitized":
        _, cxx = compilers()
        paths = [subprocess.run([*cxx, f"-print-file-name={name}"], check=True, text=True,
                                capture_output=True).stdout.strip()
                 for name in ("libasan.so", "libstdc++.so")]
        result |= {"LD_PRELOAD": " ".join(paths), "PYTHONMALLOC": "malloc",
                   "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return result


# ------------------------------------------------------------------------------------- calling


class Error(ctypes.Structure):
    """qllm_error of csrc/core/status.h."""

    _fields_ = [("status", ctypes.c_int), ("text", ctypes.c_char * 512)]


class DeviceError(Exception):
    """What a C function refused: its sentence, and in `status` the name of its qllm_status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = STATUSES[status]


class Array:
    """An array in the device's memory, freed with the object."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.device, self.shape, self.dtype = device, shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        pointer = ctypes.c_void_p()
        device.call("gpu_test_alloc", self.nbytes, ctypes.byref(pointer))
        self.pointer = pointer
        weakref.finalize(self, device.library.gpu_test_free, pointer)

    def set(self, values: npt.ArrayLike) -> None:
        host = np.ascontiguousarray(values, self.dtype).reshape(self.shape)
        self.device.call("gpu_test_copy_in", self, host, self.nbytes)

    def get(self) -> npt.NDArray[Any]:
        host = np.empty(self.shape, self.dtype)
        self.device.call("gpu_test_copy_out", host, self, self.nbytes)
        return host


def _argument(value: object) -> Any:
    if isinstance(value, Array):
        return value.pointer
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, (bool, np.bool_)):
        return ctypes.c_bool(bool(value))
    if isinstance(value, (int, np.integer)):
        return ctypes.c_int64(int(value))
    if isinstance(value, (float, np.floating)):
        return ctypes.c_float(float(value))
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    return value  # None, and what ctypes has made


class Device:
    """A library of kernels, and the memory of its device."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: object) -> None:
        error = Error()
        status = getattr(self.library, name)(*map(_argument, arguments), ctypes.byref(error))
        if status != 0:
            raise DeviceError(status, error.text.decode())

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Contents are not set: 0xFF bytes where kernels are emulated."""
        return Array(self, (shape,) if isinstance(shape, int) else shape, dtype)

    def array(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Array:
        host = np.asarray(values, dtype)
        result = self.empty(host.shape, host.dtype)
        result.set(host)
        return result


def library() -> Path:
    """The library that tests of kernels load."""
    if ON_A_GPU:
        return ROOT / "qllm" / "_cuda.so"
    return build("sanitized" if os.environ.get("QLLM_TEST_SANITIZE") == "1" else "plain")


@functools.cache
def device() -> Device:
    return Device(library())


@functools.cache
def name() -> str:
    """What models call the device of that library, which is opened: "emulated" or "cuda"."""
    return str(_core._load_device(library()))
