"""What a design is made of: arms, texts, timing, claims; and how each is read from plain values.

Every converter takes what a caller or a file may give, returns the one spelling that a design
keeps, and raises `QllmValueError` with one sentence for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..errors import QllmValueError
from ..strict_json import quoted

ROLES = ("reference", "arm", "null", "control", "ceiling")
"""Of an arm: what the others are compared with; an ordinary arm; the reference computed anew, which
must not differ; one that is bad on purpose, which must be seen to differ; one that computes more
exactly than the reference."""

SOURCES = ("qllm", "transformers", "gguf", "live")
"""What loads an arm's model and computes its logits; "live": an object that is given to `run`."""

CODES = ("own", "uniform")
"""The sixteen levels of a 4-bit format: its own, or equally spaced from -1 to 1."""

TESTS = ("equivalence", "greater", "permutation", "interaction")
"""How a claim is tested: two things differ by less than a margin; a quantity exceeds one; curves of
arms differ from each other; an arm's change differs from the reference's own."""


@dataclass(frozen=True)
class Arm:
    """One way to hold and compute the weights.

    `format` and `blocksize` are those of `Model.quantize_`; `codes` "uniform" replaces the levels
    of a 4-bit format by equally spaced ones. `quantize_head`, `compute` and `device` replace the
    design's where they are not None. `batch_size` and `threads` replace those of the design; they
    change how an arm is computed and, if all is well, nothing in what comes out: the null arms are
    there to show it.

    `source` other than "qllm" takes the logits from elsewhere: `path` names what to load (None: the
    study's model), `options` go to its loader, and `format` is a word that says what it holds.
    """

    name: str
    format: str
    role: str = "arm"
    blocksize: int = 64
    quantize_head: bool | None = None
    compute: str | None = None
    device: str | None = None
    codes: str = "own"
    batch_size: int | None = None
    threads: int | None = None
    source: str = "qllm"
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _built_in() -> Iterable[Arm]:
    quantized = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
    yield Arm("bf16", "bf16", role="reference")
    yield from (Arm(name, name) for name in quantized)
    yield Arm("null", "bf16", role="null")
    yield Arm("null-batch", "bf16", role="null", batch_size=5, threads=2)
    yield Arm("control", "nf4", role="control", blocksize=4096, codes="uniform")
    yield Arm("ceiling", "bf16", role="ceiling", compute="exact")
    yield from (Arm(f"{name}+head", name, quantize_head=True) for name in quantized)


ARMS = {arm.name: arm for arm in _built_in()}
"""The arms that a design may give by name alone: the reference; the formats; the reference again,
plainly and in other batches on other threads; a 4-bit format that is bad on purpose; bfloat16
weights computed in float32; the formats with the output embedding quantized too."""

DEFAULT_ARMS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq", "null-batch")


@dataclass(frozen=True)
class Text:
    """A prompt or a passage: a name, what kind of text it is, and the text."""

    id: str
    kind: str
    text: str


@dataclass(frozen=True)
class Speed:
    """Timing: in each of `rounds`, every arm in turn reads `prompt_tokens` and writes
    `decode_tokens`, alone and in batches of the sizes `batches`, after `warmups` untimed
    repetitions."""

    rounds: int = 12
    warmups: int = 1
    prompt_tokens: int = 64
    decode_tokens: int = 32
    batches: tuple[int, ...] = (8,)


@dataclass(frozen=True)
class Claim:
    """How a claim is tested, fixed before anything is measured: one of `TESTS`, for every endpoint
    its margin (what still counts as equal, or the smallest effect that would count as one; bytes
    and tokens per second relative, the rest absolute), and whether it belongs to the primary list,
    whose p-values are corrected together."""

    test: str
    endpoints: Mapping[str, float]
    primary: bool = True


T = TypeVar("T")


def sequence(values: Any, name: str, convert: Callable[[Any], T]) -> tuple[T, ...]:
    """`values`, a list or another iterable that is no text, with each entry converted."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise QllmValueError(f"{name} must be a list, not {quoted(values)}")
    try:
        return tuple(convert(value) for value in values)
    except TypeError as error:
        raise QllmValueError(f"{name} has an entry of a wrong kind: {error}") from None


def number(name: str) -> Callable[[Any], float]:
    """A converter to finite floats."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise QllmValueError(f"{name} must be numbers, but {quoted(value)} is none")
        found = float(value)
        if not math.isfinite(found):
            raise QllmValueError(f"{name} must be finite, but {found} is not")
        return found + 0.0  # -0.0 becomes 0.0

    return convert


def integer(name: str, low: int, high: int) -> Callable[[Any], int]:
    """A converter to whole numbers from `low` to `high`."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise QllmValueError(f"{name} must be whole numbers, but {quoted(value)} is none")
        found = int(value.__index__())
        if not low <= found <= high:
            raise QllmValueError(f"{name} must be from {low} to {high}, but one is {found}")
        return found

    return convert


def integers(values: Any, name: str, low: int, high: int) -> tuple[int, ...]:
    """Whole numbers from `low` to `high`, or one for a list of one."""
    if hasattr(values, "__index__") and not isinstance(values, bool):
        values = (values,)
    return sequence(values, name, integer(name, low, high))


def from_mapping(kind: Callable[..., T], data: Mapping[str, Any], what: str) -> T:
    """The data class `kind` with the entries of `data`."""
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise QllmValueError(f"{what} has no entry {quoted(key)}; it has {', '.join(known)}")
    try:
        return kind(**dict(data))
    except TypeError as error:
        raise QllmValueError(f"{what} is incomplete: {error}") from None


def as_arm(value: Any) -> Arm:
    """An arm from an `Arm`, a mapping of its entries or a name of `ARMS`."""
    if isinstance(value, Mapping):
        value = from_mapping(Arm, value, "an arm")
    if isinstance(value, Arm):
        if not isinstance(value.options, Mapping):
            raise QllmValueError(
                f"options of arm {quoted(value.name)} must be a mapping, not"
                f" {quoted(value.options)}"
            )
        return value
    if isinstance(value, str) and value in ARMS:
        return ARMS[value]
    raise QllmValueError(f"there is no arm {quoted(value)}; there are {', '.join(ARMS)}")


def as_text(value: Any, name: str, index: int) -> Text:
    """Entry `index` of the texts `name`, from a `Text`, a mapping of its entries or a string."""
    if isinstance(value, str):
        return Text(f"{name.removesuffix('s')}-{index + 1}", "text", value)
    if isinstance(value, Mapping):
        value = from_mapping(Text, value, f"an entry of {name}")
    if not isinstance(value, Text):
        raise QllmValueError(f"{name} must be texts, but {quoted(value)} is none")
    return value


def as_speed(value: Any) -> Speed:
    """Timing from a `Speed` or a mapping of its entries."""
    if isinstance(value, Mapping):
        value = from_mapping(Speed, value, "speed")
    if not isinstance(value, Speed):
        raise QllmValueError(f"speed must be a Speed or None, not {quoted(value)}")
    found: dict[str, Any] = {}
    for item in fields(Speed):
        low = 0 if item.name == "warmups" else 2 if item.name in ("rounds", "batches") else 1
        given, what = getattr(value, item.name), f"speed.{item.name}"
        if item.name == "batches":
            found[item.name] = integers(given, what, low, 65536)
        else:
            found[item.name] = integer(what, low, 1_000_000)(given)
    return Speed(**found)


def as_claims(values: Any, defaults: Mapping[str, Claim]) -> dict[str, Claim]:
    """`defaults`, changed by a mapping from names of claims to a `Claim` or to what differs of it:
    {"C1c": {"endpoints": {"ln_ppl": 0.02}}}."""
    if not isinstance(values, Mapping):
        raise QllmValueError(f"claims must be a mapping from names to claims, not {quoted(values)}")
    claims = dict(defaults)
    for name, value in values.items():
        if name not in defaults:
            raise QllmValueError(
                f"there is no claim {quoted(name)}; there are {', '.join(defaults)}"
            )
        claims[name] = _as_claim(name, value, defaults[name])
    return claims


def _as_claim(name: str, value: Any, default: Claim) -> Claim:
    what = f"claims.{name}"
    if isinstance(value, Mapping):
        start = {item.name: getattr(default, item.name) for item in fields(Claim)}
        value = from_mapping(Claim, {**start, **value}, what)
    if not isinstance(value, Claim):
        raise QllmValueError(f"{what} must be a Claim or a mapping, not {quoted(value)}")
    if value.test != default.test:
        raise QllmValueError(
            f"{what}.test is {quoted(value.test)}; this claim is tested by {default.test}"
        )
    if not isinstance(value.primary, bool):
        raise QllmValueError(f"{what}.primary must be true or false")
    if not isinstance(value.endpoints, Mapping):
        raise QllmValueError(f"{what}.endpoints must be a mapping from endpoints to margins")
    margins = dict(default.endpoints)
    for endpoint, margin in value.endpoints.items():
        if endpoint not in margins:
            raise QllmValueError(
                f"{what} has no endpoint {quoted(endpoint)}; it has {', '.join(margins)}"
            )
        margins[endpoint] = number(f"{what}.endpoints.{endpoint}")(margin)
        if margins[endpoint] < 0:
            raise QllmValueError(
                f"the margin {endpoint} of {what} must be 0 or more, not {margins[endpoint]}"
            )
    return Claim(value.test, margins, value.primary)
