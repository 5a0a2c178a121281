"""argparse as qllm uses it: it raises instead of exiting, knows what a misspelt word probably
meant, and its types say in a sentence what they expect."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from ..strict_json import quoted


class UsageError(Exception):
    """The command line means nothing; the text is one sentence."""


class Answer(Exception):
    """--help or --version was met; the text is the answer."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations that raises `UsageError` and `Answer`."""

    def __init__(self, **options: Any) -> None:
        self.option_names: list[str] = []
        super().__init__(**options, add_help=False, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("-h", "--help", action=Show, help="show this page")

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        self.option_names += [flag for flag in flags if flag.startswith("-")]
        return super().add_argument(*flags, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def refuse_unknown_options(self, words: Iterable[str]) -> None:
        """Raises `UsageError` for an option that was misspelt, which argparse would tell only after
        what is missing on account of it. As there, an option begins with a dash and holds no
        space."""
        known = [name for name in self.option_names if name.startswith("--")]
        for word in words:
            if word == "--":
                return
            name = word.split("=", 1)[0]
            if name.startswith("--") and " " not in word and name not in known:
                hint = did_you_mean(name, known) or f" (see {self.prog} --help)"
                raise UsageError(f"{self.prog} has no option {name}{hint}")


class Show(argparse.Action):
    """An option whose answer is a text: `const`, or the help of its parser."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str | None = None,
                 help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise Answer(self.const or parser.format_help())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """"; did you mean 'x'?" with the known word nearest to `word`, else an empty text."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def suggestion(word: str, what: str, known: Sequence[str]) -> str:
    """"there is no <what> 'word'", with the nearest of the known words; or all of them, where none
    is near or they are few."""
    near = did_you_mean(word, known) if len(known) > 3 else ""
    hint = near or f"; there are {', '.join(known)}"
    return f"there is no {what} {word!r}{hint}"


# ------------------------------------------------------------------------------- types of values


def one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """A type that takes the names given, and says which one was probably meant."""

    def convert(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(suggestion(word, what, known))
        return word

    return convert


def with_number(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """The same for names that a colon and a number may follow: cuda:1."""

    def convert(word: str) -> str:
        one_of(what, known)(word.partition(":")[0])
        return word

    return convert


def whole(low: int) -> Callable[[str], int]:
    """A type that takes whole numbers from `low`."""

    def convert(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(
                f"{quoted(word)} was given; a whole number of at least {low} was expected")
        return value

    return convert


def number(word: str) -> float:
    """A type that takes numbers; their range is checked where they are used."""
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{quoted(word)} was given; a number was expected") from None


def text(word: str) -> str:
    """A type that takes text, refusing bytes that are not UTF-8."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return word


def names(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type that takes several of the known names, separated by commas."""
    one = one_of(what, known)
    return lambda word: [one(part.strip()) for part in word.split(",")]
