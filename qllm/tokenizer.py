"""Text to token ids and back, by the `tokenizers` library and the model's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import QllmError, QllmFileError, QllmUnsupportedError, QllmValueError
from .strict_json import lone_surrogate, quoted

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are no complete UTF-8 character."""

_CONTEXT = 8  # ids before a continuation which settle how its first ids are written


class Tokenizer:
    """The tokenizer in the file tokenizer.json at `path`, for a model of `vocab` tokens.

    Raises `QllmUnsupportedError` without the package tokenizers, `QllmFileError` for a file that it
    does not read.
    """

    def __init__(self, path: Path, vocab: int) -> None:
        try:
            import tokenizers
        except ImportError:
            raise QllmUnsupportedError(
                'text needs the package tokenizers: pip install "qllm[text]"; token ids work '
                "without it"
            ) from None
        self.path = path
        self.vocab = vocab
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            raise _refusal(error, f"{path} is no tokenizer that the package tokenizers reads")
        # a limit on lengths in the file would cut texts without a word
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with the special tokens (such as BOS) that tokenizer.json adds,
        unless they are not wanted."""
        if not isinstance(text, str):
            raise QllmValueError(f"a text was expected, not a {type(text).__name__}")
        surrogate = lone_surrogate(text)
        if surrogate:
            raise QllmValueError(f"the text {quoted(text, 40)} has {surrogate}")
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise _refusal(error, f"the text {quoted(text, 40)} cannot be encoded")
        for token in ids:
            if token >= self.vocab:
                raise QllmFileError(
                    f"{self.path} gives the token id {token}, but the model has {self.vocab} tokens"
                )
        return list(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no complete character become U+FFFD."""
        if type(skip_special_tokens) is not bool:
            raise QllmValueError(
                f"skip_special_tokens is {quoted(skip_special_tokens)}; True or False was expected"
            )
        try:
            text: str = self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens
            )
            return text
        except BaseException as error:
            raise _refusal(error, "the token ids cannot be decoded")

    def piece(self, token: int) -> str | None:
        """How the vocabulary writes a token id, special ones included; None where it has none."""
        piece: str | None = self._tokenizer.id_to_token(token)
        return piece

    def continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text which `ids` add after `prompt_ids`, special tokens left out."""
        context = list(prompt_ids[-_CONTEXT:])
        return after(self.decode(context), self.decode(context + list(ids)))


def after(before: str, whole: str) -> str:
    """What `whole` has beyond `before`, where trailing U+FFFD of `before` may have become a
    character."""
    if not whole.startswith(before):
        before = before.rstrip(REPLACEMENT)
    return whole[len(before) :]


def _refusal(error: BaseException, what: str) -> BaseException:
    """The exception to raise for one from the library, which also panics with a BaseException."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, QllmError)):
        return error
    first_line = str(error).strip().split("\n", 1)[0]
    return QllmFileError(f"{what}: {quoted(first_line)}")


class TextStream:
    """The text of a growing continuation, in pieces that never change again.

    `push(id)` returns the text that the id has settled, "" while a character is incomplete or what
    is there may be the beginning of a string in `stop`. When a stop string appears, `stopped` is
    set and the text before it has been returned.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._begin = 0  # the ids from here on are decoded again with every new one
        self._known = tokenizer.decode(self._ids)
        self._count = len(self._ids)  # ids whose text is in _known
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is settled by one more token id."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._known.rstrip(REPLACEMENT)):
            return ""  # an incomplete character, or a token without text
        return self._settle(text)

    def finish(self) -> str:
        """The rest of the text, when no more ids come."""
        if self.stopped:
            return ""
        new = self._settle(self._tokenizer.decode(self._ids[self._begin :]))
        if self.stopped:
            return new
        held, self._held = self._held, ""
        return new + held

    def _settle(self, text: str) -> str:
        self._held += after(self._known, text)
        # go on from the ids just decoded: they are the context of the next ones
        self._begin, self._count = max(self._count - 1, 0), len(self._ids)
        self._known = self._tokenizer.decode(self._ids[self._begin :])
        return self._release()

    def _release(self) -> str:
        found = [at for at in (self._held.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        keep = max((_overlap(self._held, string) for string in self._stop), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` which begins `string`, shorter than it."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
