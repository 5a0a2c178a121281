"""Runs all notebooks in their order, each from its top, in one folder, so that they share a study:

    pip install "qllm[notebooks]"
    python notebooks/run_all.py [FOLDER]

FOLDER (made if it is not there; else a temporary one) receives the executed notebooks and what they
write. An error in a cell ends the run with that cell and its error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells, which were run in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in NOTEBOOKS:
            start = time.monotonic()
            nbformat.write(execute(path, folder), folder / path.name)
            print(f"{path.name}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
