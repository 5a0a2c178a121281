"""The exceptions of qllm: one base, and children that are also the built-in exception which a
caller expects."""

from __future__ import annotations


class QllmError(Exception):
    """Base of every error that qllm raises on purpose; its text is one sentence for the user."""


class QllmValueError(QllmError, ValueError):
    """An argument, option, shape, dtype or stored value that cannot be used."""


class QllmFileError(QllmError, OSError):
    """A file or folder that is missing, damaged, hostile or of another kind."""


class QllmMemoryError(QllmError, MemoryError):
    """An allocation failed; the object that was being changed is as it was before."""


class QllmUnsupportedError(QllmValueError, NotImplementedError):
    """Understood, but not offered: the text names what is not supported, and what is."""
