"""Chat templates of a model's folder, rendered by jinja2 in its sandbox.

A template is a program of the folder's. It runs only where a conversation is to be rendered, and
then without access to anything but the messages: no attributes that begin with an underscore, no
changes of what it was given, no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from ..checkpoint import Checkpoint
from ..errors import QllmFileError, QllmUnsupportedError, QllmValueError
from ..strict_json import parse_object, quoted

MAX_FILE = 1 << 26
"""Most bytes of tokenizer_config.json, which also lists added tokens, or of a template's file."""
MAX_TEXT = 1 << 24
"""Most characters that a template may write."""

Message = Mapping[str, Any]


def _read(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_FILE:
        raise QllmFileError(f"{path} has {path.stat().st_size} bytes; at most {MAX_FILE} are read")
    return path.read_bytes()


class ChatTemplates:
    """The templates that a model's folder holds, by name ("default" where there is one alone): in
    chat_template.jinja, else under `chat_template` in tokenizer_config.json. `special_tokens` are
    the texts of bos_token, eos_token and so on.

    Raises `QllmFileError` for files that are damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        path = self.folder / "tokenizer_config.json"
        data = _read(path)
        config = {} if data is None else parse_object(data, str(path))
        self.special_tokens = dict(_special_tokens(config))
        self.templates = self._templates(config.get("chat_template"))
        path = self.folder / "chat_template.jinja"
        data = _read(path)
        if data is not None:
            try:
                self.templates["default"] = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise QllmFileError(f"{path} is not UTF-8: {error}") from None

    def _templates(self, stored: Any) -> dict[str, str]:
        if stored is None:
            return {}
        if isinstance(stored, str):
            return {"default": stored}
        if isinstance(stored, list) and all(
            isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("template"), str)
            for item in stored
        ):
            return {item["name"]: item["template"] for item in stored}
        raise QllmFileError(
            f"{self.folder / 'tokenizer_config.json'} has a chat_template that is neither a text "
            "nor a list of names with templates"
        )

    def choose(self, name: str | None = None) -> str:
        """The template of that name, or the default one."""
        if not self.templates:
            raise QllmUnsupportedError(
                f"{self.folder} has no chat template, neither in chat_template.jinja nor in "
                "tokenizer_config.json; evaluate it without one"
            )
        wanted = "default" if name is None else name
        if wanted not in self.templates:
            raise QllmValueError(
                f"there is no chat template {quoted(wanted)} in {self.folder}; there are "
                + ", ".join(sorted(self.templates))
            )
        return self.templates[wanted]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        name: str | None = None,
    ) -> str:
        """The conversation as one text. Without the opening of the model's answer the last message
        is left open, so that the model goes on with it."""
        text = _render(
            self.choose(name),
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )
        if add_generation_prompt or not messages:
            return text
        last = str(messages[-1].get("content", "")).strip()
        at = text.rfind(last)
        if at < 0:
            raise QllmValueError(
                f"the chat template of {self.folder} does not write the last message as it is, so "
                "that it cannot be gone on with"
            )
        return text[: at + len(last)]


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """bos_token and its like, stored as texts or as objects that hold one."""
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _complain(message: str) -> None:
    """What templates call for conversations that they refuse."""
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces, length = [], 0
    try:
        for piece in environment.from_string(template).generate(**values):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise QllmFileError(f"the chat template wrote more than {MAX_TEXT} characters")
    except jinja2.exceptions.TemplateError as error:
        kind = "is not a template" if isinstance(error, jinja2.TemplateSyntaxError) else "refuses"
        raise QllmValueError(f"the chat template {kind}: {quoted(str(error), 300)}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise QllmValueError(f"the chat template fails: {quoted(str(error), 300)}") from None
    return "".join(pieces)
