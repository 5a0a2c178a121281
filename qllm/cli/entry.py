"""From the words of a command line to an exit code: 0, 1 for a failure, 2 for a command line that
means nothing, 130 for Ctrl-C, 141 for a reader that has left. What went wrong is one line on
stderr; a traceback appears only with QLLM_DEBUG=1."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import QllmError
from .grammar import parse
from .parser import UsageError

INTERRUPTED = 130
READER_LEFT = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: the one of this process) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("QLLM_DEBUG", "") not in ("", "0")
    _be_robust()
    try:
        with warnings.catch_warnings():
            setattr(warnings, "showwarning", _show_warning)
            return _run(words)
    except UsageError as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        note = f"; {interrupt}" if str(interrupt) else ""
        return _say(f"interrupted{note}", INTERRUPTED)
    except BrokenPipeError:
        _leave_stdout()
        return READER_LEFT
    except Exception as error:
        if debug:
            raise
        return _say(f"error: {_sentence(error)}", 1)


def _run(words: list[str]) -> int:
    arguments = parse(words)
    if isinstance(arguments, str):  # a text that was asked for: help or version
        print(arguments.rstrip("\n"))
    else:
        module, function = arguments.run.split(":")
        getattr(importlib.import_module(module, __package__), function)(arguments)
    sys.stdout.flush()
    return 0


def _sentence(error: Exception) -> str:
    """What happened, on one line."""
    if isinstance(error, QllmError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = str(error) or "there is not enough memory"
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("qllm"):
        text = f"the Python package {error.name} is missing: pip install 'qllm[study]'"
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror or error}"
    else:
        text = (f"{type(error).__name__}: {error} (qllm did not expect this; with QLLM_DEBUG=1 it"
                " shows where it happened)")
    return " ".join(text.split())


def _say(text: str, code: int) -> int:
    """Prints one line on stderr, after what stdout still holds, and hands the code on."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _leave_stdout()
    print(f"qllm: {text}", file=sys.stderr, flush=True)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"qllm: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _be_robust() -> None:
    """Lets text that the terminal's encoding lacks be shown as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _leave_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush has nobody to miss."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
