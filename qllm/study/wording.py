"""Numbers as a reader wants them: significant digits, real minus signs, intervals, lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_RAISED = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits, powers of ten written out as such."""
    if math.isnan(value):
        return "\u2013"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "\u2212")
    if 10**digits <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "\u2212")
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        return f"{mantissa} \u00d7 10{str(int(power)).translate(_RAISED)}".replace("-", "\u2212")
    return text.replace("-", "\u2212")


def interval(row: Any, digits: int = 3) -> str:
    """[low, high] of a row, or nothing when it has no interval or no width."""
    if math.isnan(row["low"]) or row["low"] == row["high"]:
        return ""
    return f"[{number(row['low'], digits)}, {number(row['high'], digits)}]"


def estimate(row: Any, digits: int = 3) -> str:
    """The estimate of a row and its interval."""
    return f"{number(row['estimate'], digits)} {interval(row, digits)}".rstrip()


def percent(value: float) -> str:
    """A share as a percentage: whole, or with one digit below 10 %."""
    if math.isnan(value):
        return "\u2013"
    places = 1 if 0 < abs(value) < 0.0995 else 0
    return f"{100 * value:.{places}f} %".replace("-", "\u2212")


def size(count: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{number(count)} {unit}"
        count /= 1000
    raise AssertionError


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
