"""What `import qllm` does and does not do, seen from a fresh interpreter; and whether the package
and its stubs name what there is."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qllm
from qllm import _core

ROOT = Path(__file__).resolve().parent.parent
STUB = Path(qllm.__file__).parent / "_core.pyi"



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


def test_the_public_names_are_there_and_explained() -> None:
    assert qllm.__all__ == sorted(qllm.__all__) and len(set(qllm.__all__)) == len(qllm.__all__)
    for name in qllm.__all__:
        documented = getattr(qllm, name).__doc__
        # a dataclass without a docstring gets its signature
        assert documented and not documented.startswith(f"{name}("), f"qllm.{name} has no docstring"


def stub_names() -> set[str]:
    """The public functions, classes and values that the stubs declare for use at run time."""
    names = set()
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            if not any(ast.unparse(base) == "TypedDict" for base in node.bases):
                names.add(node.name)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return {name for name in names if not name.startswith("_")}


def test_the_stubs_name_what_the_core_offers() -> None:
    offered = {name for name in vars(_core) if not name.startswith("_")}
    assert stub_names() == offered
    assert [name for name in offered if not getattr(_core, name).__doc__] == []


def test_the_package_passes_mypy(tmp_path: Path) -> None:
    """Strictly, as pyproject.toml says."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_stubs_have_the_signatures_of_the_core(tmp_path: Path) -> None:
    """mypy's stubtest, on the core alone."""
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", "--mypy-config-file", str(config),
         "qllm._core"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
