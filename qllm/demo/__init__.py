"""Two small trained models that come with the package: a Llama and a Falcon of under two million
parameters each, which write children's stories. Everything can be tried on them with no download;
they go by the names `demo:llama` and `demo:falcon`. CARD.md beside this file says what they are
and how they were trained."""

from __future__ import annotations

from pathlib import Path

from ..errors import QllmFileError
from ..strict_json import quoted

NAMES = ("llama", "falcon")
"""The models there are."""


def path(name: str) -> Path:
    """The folder of the model `name` ("llama" or "falcon"), in the layout of Hugging Face.

    Raises `QllmFileError` for another name, and when the package was installed without the folder.
    """
    if name not in NAMES:
        raise QllmFileError(
            f"there is no built-in model {quoted(name)}; there are {' and '.join(NAMES)}"
        )
    folder = Path(__file__).resolve().parent / name
    if not folder.is_dir():
        raise QllmFileError(
            f"the built-in model {quoted(name)} is missing from the package ({folder} is no "
            "folder); install qllm again"
        )
    return folder
