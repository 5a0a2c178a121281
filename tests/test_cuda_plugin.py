"""Devices that are plugins: how they are found, opened, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import emulated
import qllm
from qllm import _core
from reference_decoder import Weights, llama, prefill, tokens

ROOT = Path(__file__).resolve().parent.parent

OTHER_ABI = """
#include "core/backend.h"
__attribute__((visibility("default"))) const qllm_backend *qllm_device_table(qllm_error *error)
{
    static const qllm_backend table = {.abi = QLLM_BACKEND_ABI - 1, .name = "cuda"};
    (void)error;
    return &table;
}
"""
NO_DEVICE = """
#include "core/status.h"
__attribute__((visibility("default"))) const void *qllm_device_table(qllm_error *error)
{
    error->status = QLLM_UNSUPPORTED;
    const char *text = "device \\"cuda\\": no GPU can be used";
    for (int i = 0; (error->text[i] = text[i]) != 0; i++) {}
    return 0;
}
"""


def shared_library(folder: Path, source: str) -> Path:
    """A plugin of a few lines, compiled."""
    compiler = emulated.compilers()[0]
    (folder / "plugin.c").write_text(source)
    library = folder / "_cuda.so"
    subprocess.run([*compiler, "-std=c11", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}",
                    str(folder / "plugin.c"), "-o", str(library)], check=True, timeout=60)
    return library


@pytest.mark.parametrize("source, words", [
    (OTHER_ABI, r"device 'cuda' was built for ABI (\d+) of the device table, this build has ABI"),
    (NO_DEVICE, 'device "cuda": no GPU can be used'),
    ("int some_function;", "_cuda.so has no function qllm_device_table, so it holds no kernels"),
    ("int other(void); int some_function(void) { return other(); }", "undefined symbol: other"),
])
def test_plugins_that_cannot_be_used_say_why(tmp_path: Path, source: str, words: str) -> None:
    library = shared_library(tmp_path, source)
    for _ in range(2):  # a refusal leaves nothing behind
        with pytest.raises(qllm.QllmUnsupportedError, match=words):
            _core._load_device(library)


def test_files_that_are_no_plugin(tmp_path: Path) -> None:
    path = tmp_path / "_cuda.so"
    with pytest.raises(qllm.QllmUnsupportedError, match="no kernels for it, there is no .*_cuda.so"
                                                        "; build qllm where nvcc is found"):
        _core._load_device(path)
    path.write_bytes(b"no library")
    with pytest.raises(qllm.QllmUnsupportedError, match="kernels cannot be opened: .*_cuda.so"):
        _core._load_device(path)
    for wrong in (3, None, "a\0b"):
        with pytest.raises((TypeError, ValueError)):
            _core._load_device(wrong)


def test_a_plugin_is_registered_once_under_its_own_name() -> None:
    library, name = emulated.library(), emulated.name()
    assert _core._load_device(library) == name
    found = _core.device_info(name)
    assert 0 <= found["free"] <= found["memory"] and found["name"] and found["driver"]
    assert _core.Decoder(llama(), device=name).info()["device"] == name
    with pytest.raises(qllm.QllmUnsupportedError, match=f"use one of: cpu.*{name}"):
        _core.Decoder(llama(), device="tpu")


@emulated.without_a_gpu
def test_one_of_several_gpus_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_EMULATE_DEVICES", "2")
    weights = Weights(llama(layers=1), "f32")
    logits = []
    for device in ("emulated", "emulated:0", "emulated:1"):
        decoder, facts = weights.decoder(device=device), _core.device_info(device)
        assert facts is not None and decoder.info()["device"] == device
        assert decoder.info()["cpu_model"] == facts["name"]
        logits.append(prefill(decoder, tokens(3)))
    assert facts["name"] == "emulated GPU 1" and np.ptp(logits, axis=0).max() == 0
    for wrong, words in (
        ("emulated:2", 'device "emulated:2": there are 2, counted from 0; use device="emulated"'),
        ("emulated:", "'emulated:': expected the number of a GPU behind the colon, as in 'emulat"),
        ("emulated:-1", "expected the number of a GPU"),
        ("emulated:99999999999", "expected the number of a GPU"),
        ("cpu:0", "device 'cpu:0': a processor has no number; use device='cpu'"),
    ):
        for ask in (_core.device_info, lambda name: _core.device_limits(name, 64),
                    lambda name: _core.Decoder(llama(), device=name)):
            with pytest.raises(qllm.QllmValueError, match=words):
                ask(wrong)
    with pytest.raises(qllm.QllmUnsupportedError, match="device 'tpu' is not offered"):
        _core.Decoder(llama(), device="tpu:1")


def test_cuda_is_looked_for_beside_the_extension(tmp_path: Path) -> None:
    """Another copy of the extension, with a plugin of its own beside it."""
    shared_library(tmp_path, NO_DEVICE)
    extension = Path(_core.__file__)
    (tmp_path / extension.name).symlink_to(extension)
    program = (
        "import importlib.util, sys\n"
        "import qllm.errors\n"
        f"spec = importlib.util.spec_from_file_location('qllm._core', {str(tmp_path / extension.name)!r})\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "sys.modules['qllm._core'] = core\n"
        "spec.loader.exec_module(core)\n"
        "try:\n"
        "    core.device_info('cuda')\n"
        "except qllm.errors.QllmUnsupportedError as error:\n"
        "    print(error)\n"
        "print(core.device_info('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.stdout == 'device "cuda": no GPU can be used\nNone\n', done.stderr
