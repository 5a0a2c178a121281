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
    """Step `done` of `total` has ended, or (`notice`) something worth a line has happened."""

    done: int
    total: int
    text: str
    notice: bool = False


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


def _lines() -> Listener:
    start = time.monotonic()

    def tell(event: Event) -> None:
        place = "note" if event.notice else f"{event.done}/{event.total}"
        print(
            f"[{time.monotonic() - start:7.1f} s] {place}: {event.text}",
            file=sys.stderr,
            flush=True,
        )

    return tell


@contextmanager
def _bar() -> Iterator[Listener]:
    from tqdm import tqdm

    bar: Any = None

    def tell(event: Event) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=event.total, unit="step", file=sys.stderr, dynamic_ncols=True)
        if event.notice:
            bar.write(event.text, file=sys.stderr)
        else:
            bar.set_description_str(event.text, refresh=False)
            bar.update(event.done - bar.n)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
