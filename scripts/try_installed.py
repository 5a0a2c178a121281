"""What an installed qllm must do, with NumPy alone; run outside of the sources:

    python scripts/try_installed.py

Every format is quantized and multiplied by each instruction set of the machine and compared with
the reference, a demo model is loaded, quantized and continues a text, and the command line answers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import qllm
from qllm import _core

SOURCES = Path(__file__).resolve().parent.parent


def kernels() -> int:
    """Products by every set against the reference; returns their number."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((100, 256), np.float32)
    x = rng.standard_normal((5, 256), np.float32)
    done = 0
    for format in ("f32", "f16", "bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"):
        quantized = qllm.quantize(weights, format)
        for isa in _core.cpu_info()["isas"]:
            y = quantized.matmul(x, isa=isa)
            np.testing.assert_array_equal(y, quantized.matmul_reference(x), f"{format}, {isa}")
            done += 1
    return done


def main() -> None:
    if Path(qllm.__file__).resolve().parent == SOURCES / "qllm":
        sys.exit(f"qllm was imported from the sources ({qllm.__file__}); run this elsewhere")
    if not (Path(qllm.get_include()) / "qllm.h").is_file():
        sys.exit("qllm.h is not in the installed package")
    count = kernels()
    model = qllm.Model.from_pretrained("demo:llama")
    model.quantize_("nf4")
    config = qllm.GenerationConfig(max_new_tokens=8, temperature=0)
    text = model.generate([1, 5, 9], config=config)
    if len(text.ids) != 8 and text.finish_reason == "length":
        sys.exit(f"8 tokens were asked for, {len(text.ids)} came")
    answer = subprocess.run([sys.executable, "-m", "qllm", "info"], capture_output=True, text=True)
    if answer.returncode != 0 or "instruction" not in answer.stdout:
        sys.exit(f"qllm info: {answer.stderr}{answer.stdout}")
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}, NumPy {np.__version__}: {count} products, {len(text.ids)} tokens")


if __name__ == "__main__":
    main()
