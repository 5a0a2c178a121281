"""What `import qllm` does and does not do, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter and hands back what it printed."""
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True,
                          text=True, timeout=120)


PACKAGES = """
import sys
before = set(sys.modules)
import {module}
added = {{name.partition(".")[0] for name in set(sys.modules) - before}}
import json
print(json.dumps(sorted(added - set(sys.stdlib_module_names))))
"""


def third_party(module: str) -> set[str]:
    run = fresh(PACKAGES.format(module=module))
    assert run.returncode == 0, run.stderr
    return {name for name in json.loads(run.stdout) if not name.startswith("_sysconfigdata")}


def test_import_loads_numpy_and_nothing_else() -> None:
    assert third_party("qllm, qllm._core") == {"qllm", "numpy"}


def test_the_look_at_modules_sees_other_packages() -> None:
    assert "pytest" in third_party("pytest")


def test_import_says_nothing() -> None:
    run = fresh("import qllm, qllm._core")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's way")
def test_import_starts_no_thread() -> None:
    """NumPy's own threads are there before."""
    run = fresh("import os, numpy\n"
                "count = lambda: len(os.listdir('/proc/self/task'))\n"
                "before = count()\n"
                "import qllm, qllm._core\n"
                "print(count() - before)")
    assert (run.stdout, run.stderr) == ("0\n", "")
