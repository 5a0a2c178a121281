"""The benchmarks run and say what they measured; how long anything takes is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_linear_times_every_candidate_in_every_round(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    words = ["--rows", "2", "--out-features", "64", "--in-features", "128", "--threads", "1",
             "--rounds", "3", "--memory", "0.00002", "--json", str(out)]
    result = subprocess.run([sys.executable, str(BENCHMARKS / "linear.py"), *words],
                            capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    names = {"torch bf16", "torch f32", "bitsandbytes nf4", "bitsandbytes int8",
             *(f"qllm {name}" for name in ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"))}
    assert set(found["seconds"]) == set(found["copies"]) == names
    assert all(len(times) == 3 and min(times) > 0 for times in found["seconds"].values())
    assert found["copies"]["qllm nf4"] == -(-20000 // (64 * 128 * 9 // 16))
    assert all(name in result.stdout for name in names)
