"""What a study tells while it runs: nothing, a bar or lines, or whatever a callback makes of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ..errors import QllmValueError


@dataclass(frozen=True)
class Event:
    """Step `done` of `total` has ended, or is going on, or (`notice`) something worth a line has
    happened.

    Steps are cells and what is made of them; cells are unequal, so the work is counted in `tokens`
    of `total_tokens`, those that models read and write (an estimate: texts may end early).
    `seconds_left` is what the rest takes at the pace of this run, None before there is one.
    """

    done: int
    total: int
    text: str
    notice: bool = False
    tokens: int = 0
    total_tokens: int = 0
    seconds_left: float | None = None
    ended: bool = True
    """False: the step `done` + 1 is going on, and only `tokens` and `seconds_left` are new."""


Listener = Callable[[Event], None]


@contextmanager
def listening(progress: bool | Listener | None) -> Iterator[Listener]:
    """The listener that `progress` means: None and False are silent, True is a bar on a terminal
    and plain lines elsewhere (both on stderr), a callable is called with every `Event`. At the end,
    an interrupt included, the bar leaves its line to what is printed next."""
    if progress is None or progress is False:
        yield lambda event: None
    elif progress is True:
        with _bar() if sys.stderr.isatty() else nullcontext(_lines()) as tell:
            yield tell
    elif callable(progress):
        yield progress
    else:
        raise QllmValueError("progress must be None, True, False or a callable")


def duration(seconds: float) -> str:
    """A time in the two largest units that it fills: 8 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    count = max(0, round(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for place, (size, name) in enumerate(units):
        if count >= size or size == 1:
            text = f"{count // size} {name}"
            rest = count % size // units[place + 1][0] if size > 1 else 0
            return f"{text} {rest} {units[place + 1][1]}" if rest else text
    raise AssertionError("seconds are whole")


class Pace:
    """How much work is done, and how long the rest will take if it goes on like this.

    `total` tokens in all; `skip` tells of work that was done before, `work` of what was done now.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.tokens = 0
        self._clock = clock
        self._start = clock()
        self._worked = 0

    def skip(self, tokens: int) -> None:
        """Counts work of an earlier run, which says nothing about the pace of this one."""
        self.tokens += tokens
        self._start = self._clock() if self._worked == 0 else self._start

    def work(self, tokens: int) -> None:
        """Counts work of this run."""
        self.tokens += tokens
        self._worked += tokens

    def seconds_left(self, under_way: int = 0) -> float | None:
        """Seconds for the rest; `under_way` tokens of the step that is going on are done, too."""
        worked = self._worked + under_way
        if worked <= 0:
            return None
        elapsed = self._clock() - self._start
        return elapsed / worked * max(0, self.total - self.tokens - under_way)


def _status(event: Event) -> str:
    """How far the work is, for a line: "31 % of 120,000 tokens, about 3 min left, "."""
    if not event.total_tokens:
        return ""
    text = f" ({100 * event.tokens // event.total_tokens} % of {event.total_tokens:,} tokens"
    if event.seconds_left is not None and event.tokens < event.total_tokens:
        text += f", about {duration(event.seconds_left)} left"
    return text + ")"


def _lines() -> Listener:
    start = time.monotonic()

    def tell(event: Event) -> None:
        if not event.ended:
            return
        place = "note" if event.notice else f"{event.done}/{event.total}"
        status = "" if event.notice else _status(event)
        print(
            f"[{time.monotonic() - start:7.1f} s] {place}: {event.text}{status}",
            file=sys.stderr,
            flush=True,
        )

    return tell


_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}{postfix}]"


@contextmanager
def _bar() -> Iterator[Listener]:
    from tqdm import tqdm

    bar: Any = None

    def tell(event: Event) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                total=event.total_tokens,
                unit_scale=True,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format=_BAR,
            )
        if event.notice:
            bar.write(event.text, file=sys.stderr)
            return
        if event.ended:
            bar.set_description_str(
                f"{event.done}/{event.total} {event.text}: ", refresh=False
            )
        if event.seconds_left is not None:
            bar.set_postfix_str(f"about {duration(event.seconds_left)} left", refresh=False)
        bar.update(event.tokens - bar.n)
        bar.refresh()

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
