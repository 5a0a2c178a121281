"""What a study does, as data: models, arms, temperatures, texts, seeds, margins.

A `Design` is complete (every default is written out in it), checked when it is made, and equal to
what `to_json` writes and `from_json` reads. The same design on the same model files gives the same
tables, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import COMPUTES
from ..errors import QllmFileError, QllmValueError
from ..quantize import BLOCKSIZES, FORMATS
from ..strict_json import quoted, read_object
from .prompts import OPENINGS, PASSAGES

ROLES = ("reference", "arm", "null")
"""Of an arm: what the others are compared with; an ordinary arm; the reference computed anew."""

MAX_DESIGN_BYTES = 10_000_000
"""Longest design file that is read."""


@dataclass(frozen=True)
class Arm:
    """One way to hold and compute the weights.

    `batch_size` and `threads` replace those of the design; they change how an arm is computed and,
    if all is well, nothing in what comes out: the null arm is there to show it.
    """

    name: str
    format: str
    role: str = "arm"
    blocksize: int = 64
    batch_size: int | None = None
    threads: int | None = None


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", "bf16", role="reference"),
        Arm("int8", "int8"),
        Arm("nf4", "nf4"),
        Arm("nf4-dq", "nf4-dq"),
        Arm("fp4", "fp4"),
        Arm("fp4-dq", "fp4-dq"),
        Arm("null", "bf16", role="null", batch_size=5, threads=2),
    )
}
"""The arms that a design may give by name alone."""


@dataclass(frozen=True)
class Text:
    """A prompt or a passage: a name, what kind of text it is, and the text."""

    id: str
    kind: str
    text: str


@dataclass(frozen=True)
class Speed:
    """Timing: in each of `rounds`, every arm in turn reads `prompt_tokens` and writes
    `decode_tokens`, after `warmups` untimed repetitions."""

    rounds: int = 12
    warmups: int = 1
    prompt_tokens: int = 64
    decode_tokens: int = 32


MARGINS = {
    "bytes": 0.02,
    "tokens_per_second": 0.05,
    "ln_ppl": 0.01,
    "rep_4": 0.01,
    "contrast_disagreement": 0.002,
    "interaction_nll": 0.1,
    "interaction_rep_4": 0.05,
}
"""What still counts as equal (bytes and tokens per second relative, the rest absolute), and for the
last three the smallest effect that would count as one; fixed before anything is measured."""


@dataclass(frozen=True)
class Design:
    """A whole study. Lists are taken for tuples, names of `ARMS` for arms, plain strings for
    prompts and texts. Raises `QllmValueError` with one sentence for what cannot be."""

    name: str = "custom"
    models: tuple[str, ...] = ("demo:llama", "demo:falcon")
    arms: tuple[Arm, ...] = tuple(ARMS.values())
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0, 1.5)
    seeds: tuple[int, ...] = (1, 2)
    prompts: tuple[Text, ...] = tuple(Text(*opening) for opening in OPENINGS)
    max_new_tokens: int = 32
    top_k: int = 0
    ignore_eos: bool = False
    texts: tuple[Text, ...] = tuple(Text(*passage) for passage in PASSAGES)
    own_temperature: float | None = 1.0
    """The reference's own samples at this temperature are read by all arms, too; None: they are
    not. It must be one of `temperatures`."""
    logit_temperatures: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 41))
    band: tuple[float, float] = (0.5, 0.8)
    surroundings: tuple[float, float] = (0.1, 1.0)
    quantize_head: bool = False
    int8_threshold: float = 6.0
    compute: str = "exact"
    batch_size: int = 32
    threads: int | None = 1
    """Of every model; one is best for small models and for many cells at a time, None means all."""
    speed: Speed | None = field(default_factory=Speed)
    confidence: float = 0.95
    bootstrap_draws: int = 2000
    bootstrap_seed: int = 20230911
    margins: Mapping[str, float] = field(default_factory=lambda: dict(MARGINS))

    def __post_init__(self) -> None:
        _normalise(self)
        _check(self)

    @property
    def reference(self) -> Arm:
        """The arm that all others are compared with."""
        return next(arm for arm in self.arms if arm.role == "reference")

    @property
    def others(self) -> tuple[Arm, ...]:
        """All arms but the reference, in the order of the design."""
        return tuple(arm for arm in self.arms if arm.role != "reference")

    def arm(self, name: str) -> Arm:
        """The arm `name`. Raises `QllmValueError` when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise QllmValueError(f"the design has no arm {quoted(name)}; it has {_list(self.arms)}")

    def to_dict(self) -> dict[str, Any]:
        """The design as plain lists, numbers and strings, every default written out."""
        plain = json.loads(json.dumps(asdict(self)))
        assert isinstance(plain, dict)
        return plain

    def to_json(self) -> str:
        """The design as a text that `from_json` reads back to an equal design."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Design:
        """The design of `to_dict`; what is absent has its default, what is unknown is refused."""
        known = [item.name for item in fields(cls)]
        for key in data:
            if key not in known:
                raise QllmValueError(
                    f"a design has no entry {quoted(key)}; it has {', '.join(known)}"
                )
        return cls(**dict(data))

    @classmethod
    def from_json(cls, text: str) -> Design:
        """The design of `to_json`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise QllmValueError(f"the design is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise QllmValueError("the design must be a JSON object")
        return cls.from_dict(data)

    def prompt_hash(self) -> str:
        """SHA-256 (hexadecimal) of the prompts and texts."""
        texts = [asdict(text) for text in (*self.prompts, *self.texts)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


PROFILES: dict[str, dict[str, Any]] = {"smoke": {"name": "smoke"}}
"""Built-in designs by name, as what they change of the defaults."""


def resolve(
    design: Design | str | Mapping[str, Any] | os.PathLike[str] = "smoke",
    models: str | os.PathLike[str] | Iterable[str] | None = None,
) -> Design:
    """A complete design from a design, the name of a profile, a mapping of entries, or the path of
    a JSON file; `models` replaces its models."""
    if isinstance(design, Design):
        found = design
    elif isinstance(design, Mapping):
        found = Design.from_dict(design)
    elif isinstance(design, str) and design in PROFILES:
        found = Design.from_dict(PROFILES[design])
    elif isinstance(design, (str, os.PathLike)):
        path = Path(design)
        if path.suffix != ".json":
            raise QllmValueError(
                f"there is no profile {quoted(design)}; there are "
                f"{', '.join(PROFILES)}, and a design in a file ends in .json"
            )
        if not path.is_file():
            raise QllmFileError(f"there is no design file {path}")
        found = Design.from_dict(read_object(path, MAX_DESIGN_BYTES))
    else:
        raise QllmValueError(
            f"a design is a Design, the name of a profile, a mapping or a path, not a"
            f" {type(design).__name__}"
        )
    if models is None:
        return found
    named: Any = (models,) if isinstance(models, (str, os.PathLike)) else models
    return replace(found, models=named)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One clause for every entry of two `to_dict` that is not the same."""
    clauses = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            clauses.append(f"{key} ({_short(before)} there, {_short(after)} here)")
    return clauses


def _short(value: Any) -> str:
    """A value of a design in a few words, for an error sentence."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [item.get("name") or item.get("id") for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _normalise(design: Design) -> None:
    """Gives every field its one type, whatever equal spelling it came in."""
    _set(design, "models", _sequence(design.models, "models", os.fspath))
    _set(design, "arms", _sequence(design.arms, "arms", _arm))
    for name in ("prompts", "texts"):
        texts = _sequence(getattr(design, name), name, lambda item: item)
        _set(design, name, tuple(_text(text, name, i) for i, text in enumerate(texts)))
    for name in ("temperatures", "logit_temperatures", "band", "surroundings"):
        _set(design, name, _sequence(getattr(design, name), name, _number(name)))
    _set(design, "seeds", _sequence(design.seeds, "seeds", _integer("seeds", 0, 2**64 - 1)))
    if design.own_temperature is not None:
        _set(design, "own_temperature", _number("own_temperature")(design.own_temperature))
    for name in ("confidence", "int8_threshold"):
        _set(design, name, _number(name)(getattr(design, name)))
    if isinstance(design.speed, Mapping):
        _set(design, "speed", _from_mapping(Speed, design.speed, "speed"))
    if not isinstance(design.margins, Mapping):
        raise QllmValueError("margins must be a mapping from endpoints to numbers")
    margins = dict(MARGINS)
    for key, value in design.margins.items():
        if key not in MARGINS:
            raise QllmValueError(
                f"there is no margin {quoted(key)}; there are {', '.join(MARGINS)}"
            )
        margins[key] = _number(f"margins[{key!r}]")(value)
    _set(design, "margins", margins)


def _set(design: Design, name: str, value: object) -> None:
    object.__setattr__(design, name, value)


def _sequence(values: Any, name: str, convert: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise QllmValueError(f"{name} must be a list, not {quoted(values)}")
    try:
        return tuple(convert(value) for value in values)
    except TypeError as error:
        raise QllmValueError(f"{name} has an entry of a wrong kind: {error}") from None


def _number(name: str) -> Any:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise QllmValueError(f"{name} must be numbers, but {quoted(value)} is none")
        number = float(value)
        if not math.isfinite(number):
            raise QllmValueError(f"{name} must be finite, but {number} is not")
        return number + 0.0  # -0.0 becomes 0.0

    return convert


def _integer(name: str, low: int, high: int) -> Any:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise QllmValueError(f"{name} must be whole numbers, but {quoted(value)} is none")
        number = int(value.__index__())
        if not low <= number <= high:
            raise QllmValueError(f"{name} must be from {low} to {high}, but one is {number}")
        return number

    return convert


def _from_mapping(kind: Any, data: Mapping[str, Any], what: str) -> Any:
    known = [item.name for item in fields(kind)]
    for key in data:
        if key not in known:
            raise QllmValueError(f"{what} has no entry {quoted(key)}; it has {', '.join(known)}")
    try:
        return kind(**dict(data))
    except TypeError as error:
        raise QllmValueError(f"{what} is incomplete: {error}") from None


def _arm(value: Any) -> Arm:
    if isinstance(value, Arm):
        return value
    if isinstance(value, Mapping):
        arm = _from_mapping(Arm, value, "an arm")
        assert isinstance(arm, Arm)
        return arm
    if isinstance(value, str) and value in ARMS:
        return ARMS[value]
    raise QllmValueError(f"there is no arm {quoted(value)}; there are {', '.join(ARMS)}")


def _text(value: Any, name: str, index: int) -> Text:
    if isinstance(value, str):
        return Text(f"{name.removesuffix('s')}-{index + 1}", "text", value)
    if isinstance(value, Mapping):
        value = _from_mapping(Text, value, f"an entry of {name}")
    if not isinstance(value, Text):
        raise QllmValueError(f"{name} must be texts, but {quoted(value)} is none")
    return value


def _list(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.name for arm in arms)


def _check(design: Design) -> None:
    _check_models_and_arms(design)
    _check_grid(design)
    _check_texts(design)
    _check_rest(design)


def _distinct(values: Sequence[object], name: str) -> None:
    if not values:
        raise QllmValueError(f"{name} is empty; a study needs at least one entry")
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise QllmValueError(f"{name} has {quoted(value)} twice")
        seen.add(value)


def _check_models_and_arms(design: Design) -> None:
    _distinct(design.models, "models")
    for model in design.models:
        if not isinstance(model, str) or not model:
            raise QllmValueError(f"models must be names or folders, but {quoted(model)} is none")
    _distinct([arm.name for arm in design.arms], "arms")
    for arm in design.arms:
        if not isinstance(arm.name, str) or not arm.name.isprintable() or not arm.name:
            raise QllmValueError(f"the name of an arm must be a word, not {quoted(arm.name)}")
        if arm.format not in FORMATS:
            raise QllmValueError(
                f"arm {quoted(arm.name)} has the unknown format {quoted(arm.format)}; there are "
                + ", ".join(FORMATS)
            )
        if arm.role not in ROLES:
            raise QllmValueError(
                f"arm {quoted(arm.name)} has the unknown role {quoted(arm.role)}; there are "
                + ", ".join(ROLES)
            )
        what = f"of arm {quoted(arm.name)}"
        if arm.blocksize not in BLOCKSIZES:
            raise QllmValueError(
                f"blocksize {what} must be a power of two from {BLOCKSIZES[0]} to"
                f" {BLOCKSIZES[-1]}, not {quoted(arm.blocksize)}"
            )
        for name in ("batch_size", "threads"):
            if getattr(arm, name) is not None:
                _integer(f"{name} {what}", 1, 65536)(getattr(arm, name))
    references = [arm for arm in design.arms if arm.role == "reference"]
    if len(references) != 1:
        raise QllmValueError(
            f"exactly one arm must be the reference, but {len(references)} of"
            f" {_list(design.arms)} are; the arm bf16 is one"
        )
    if len(design.arms) == 1:
        raise QllmValueError(
            f"arms has only the reference, {references[0].name}; a study needs another arm that is"
            " compared with it"
        )
    for arm in design.arms:
        if arm.role == "null" and arm.format != references[0].format:
            raise QllmValueError(
                f"the null arm {quoted(arm.name)} must have the format of the reference,"
                f" {references[0].format}, not {arm.format}"
            )


def _check_grid(design: Design) -> None:
    for name in ("temperatures", "logit_temperatures"):
        values = getattr(design, name)
        _distinct(values, name)
        for value in values:
            if value < 0:
                raise QllmValueError(f"{name} must be 0 or more, but one is {value}")
            if value == 0 and name == "logit_temperatures":
                raise QllmValueError(
                    "logit_temperatures must be above 0: at 0 a distribution is one token, and"
                    " the KL divergence infinite; same_top says how often that token changes"
                )
        if list(values) != sorted(values):
            raise QllmValueError(f"{name} must be in rising order")
    own = design.own_temperature
    if own is not None and own not in design.temperatures:
        raise QllmValueError(f"own_temperature is {own}, which is not one of temperatures")
    _distinct(design.seeds, "seeds")
    for name in ("band", "surroundings"):
        values = getattr(design, name)
        if len(values) != 2 or not 0 <= values[0] < values[1]:
            raise QllmValueError(f"{name} must be two rising temperatures, not {list(values)}")
    inside, around = design.band, design.surroundings
    if inside[0] < around[0] or inside[1] > around[1] or inside == around:
        raise QllmValueError(
            f"the band {list(inside)} must lie inside its surroundings {list(around)}"
        )


def _check_texts(design: Design) -> None:
    _distinct([prompt.id for prompt in design.prompts], "prompts")
    for name in ("prompts", "texts"):
        for text in getattr(design, name):
            for part in ("id", "kind", "text"):
                value = getattr(text, part)
                if not isinstance(value, str) or not value.strip():
                    raise QllmValueError(
                        f"{name} has an entry whose {part} is {quoted(value)}; it must be a text"
                        " that is not empty"
                    )
    if design.texts:
        _distinct([text.id for text in design.texts], "texts")
    elif design.own_temperature is None:
        raise QllmValueError(
            "texts is empty and own_temperature is off, so there is nothing to compare logits on"
        )


def _check_rest(design: Design) -> None:
    if not isinstance(design.name, str) or not design.name:
        raise QllmValueError(f"the name of a design must be a word, not {quoted(design.name)}")
    _integer("max_new_tokens", 1, 1_000_000)(design.max_new_tokens)
    _integer("top_k", 0, 2**31)(design.top_k)
    _integer("batch_size", 1, 65536)(design.batch_size)
    if design.threads is not None:
        _integer("threads", 1, 65536)(design.threads)
    _integer("bootstrap_draws", 100, 1_000_000)(design.bootstrap_draws)
    _integer("bootstrap_seed", 0, 2**64 - 1)(design.bootstrap_seed)
    for name in ("quantize_head", "ignore_eos"):
        if not isinstance(getattr(design, name), bool):
            raise QllmValueError(f"{name} must be true or false")
    if design.compute not in COMPUTES:
        raise QllmValueError(
            f"compute must be exact, auto or int8, not {quoted(design.compute)}")
    if design.int8_threshold < 0:
        raise QllmValueError(f"int8_threshold must be 0 or more, not {design.int8_threshold}")
    if not 0.5 <= design.confidence < 1:
        raise QllmValueError(f"confidence must be from 0.5 to below 1, not {design.confidence}")
    for name, value in design.margins.items():
        if value <= 0:
            raise QllmValueError(f"the margin {name} must be above 0, not {value}")
    if design.speed is not None:
        if not isinstance(design.speed, Speed):
            raise QllmValueError(f"speed must be a Speed or None, not {quoted(design.speed)}")
        for item in fields(Speed):
            low = 0 if item.name == "warmups" else 2 if item.name == "rounds" else 1
            _integer(f"speed.{item.name}", low, 1_000_000)(getattr(design.speed, item.name))
