"""What a study does, as data: models, arms, temperatures, texts, seeds, claims.

A `Design` is complete (every default is written out in it), checked when it is made, and equal to
what `to_json` writes and `from_json` reads. The same design on the same model files gives the same
tables, byte for byte.

In a file, TOML or JSON, the entries have the names of the fields. What is off is `false` where it
is None here: `own_temperature`, `speed`, `threads`. `prompts` and `texts` are lists of texts, or
the name of a set that comes with qllm (`prompts.PROMPT_SETS`, `prompts.TEXT_SETS`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import QllmFileError, QllmUnsupportedError, QllmValueError
from ..strict_json import quoted, read_object
from .checks import check, names_of
from .parts import (
    ARMS,
    DEFAULT_ARMS,
    ROLES,
    Arm,
    Claim,
    Speed,
    Text,
    as_arm,
    as_claims,
    as_speed,
    as_text,
    integer,
    integers,
    number,
    sequence,
)
from .prompts import OPENINGS, PASSAGES, PROMPT_SETS, TEXT_SETS

MAX_DESIGN_BYTES = 10_000_000
"""Longest design file that is read."""

PROFILES = ("smoke", "lite", "full", "paper")
"""Designs that come with qllm, each a TOML file in `profiles/`."""


def _default_claims() -> dict[str, Claim]:
    from .claims import DEFAULT_CLAIMS

    return dict(DEFAULT_CLAIMS)


@dataclass(frozen=True)
class Design:
    """A whole study. Lists are taken for tuples, names of `ARMS` for arms, plain strings for
    prompts and texts. Raises `QllmValueError` with one sentence for what cannot be."""

    name: str = "custom"
    models: tuple[str, ...] = ("demo:llama", "demo:falcon")
    arms: tuple[Arm, ...] = tuple(ARMS[name] for name in DEFAULT_ARMS)
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0, 1.5)
    seeds: tuple[int, ...] = (1, 2)
    prompts: tuple[Text, ...] = tuple(Text(*opening) for opening in OPENINGS)
    lengths: tuple[int, ...] = (32,)
    """Tokens to generate, rising; texts of the longest are drawn, and the shorter ones are their
    beginnings, as no draw depends on how many follow."""
    top_k: tuple[int, ...] = (0,)
    """Of generation; 0 is off. All measures are about the first, with which the others are
    compared."""
    keep_ties: bool = False
    """Whether top_k keeps every token whose logit equals the k-th largest."""
    logits_dtype: str = "float32"
    """To what logits are rounded before they are drawn from or compared; "bfloat16" too."""
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
    device: str = "cpu"
    """Where the models compute; "cuda" for a GPU."""
    batch_size: int = 32
    threads: int | None = 1
    """Of every model; one is best for small models and for many cells at a time, None means all."""
    lockstep: bool = False
    """Whether reference and arm are read layer by layer, so that neither is ever held whole."""
    speed: Speed | None = field(default_factory=Speed)
    play: int = 3
    """Prompts in the report's interactive figure; 0: there is none."""
    play_positions: int = 8
    """Positions of each of them, along the reference's most probable text."""
    confidence: float = 0.95
    bootstrap_draws: int = 2000
    bootstrap_seed: int = 20230911
    claims: Mapping[str, Claim] = field(default_factory=_default_claims)

    def __post_init__(self) -> None:
        _normalise(self)
        check(self)

    @property
    def reference(self) -> Arm:
        """The arm that all others are compared with."""
        return next(arm for arm in self.arms if arm.role == "reference")

    @property
    def others(self) -> tuple[Arm, ...]:
        """All arms but the reference, in the order of the design."""
        return tuple(arm for arm in self.arms if arm.role != "reference")

    @property
    def timed(self) -> tuple[Arm, ...]:
        """The arms whose speed is taken: the reference and the formats that this package
        computes."""
        return tuple(
            arm
            for arm in self.arms
            if arm.role in ("reference", "arm") and arm.source == "qllm" and arm.codes == "own"
        )

    @property
    def max_new_tokens(self) -> int:
        """How many tokens are generated: the longest of `lengths`."""
        return self.lengths[-1]

    def arm(self, name: str) -> Arm:
        """The arm `name`. Raises `QllmValueError` when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise QllmValueError(f"the design has no arm {quoted(name)}; it has {names_of(self.arms)}")

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

    @classmethod
    def from_toml(cls, text: str, what: str = "the design") -> Design:
        """The design that a TOML text describes; `what` names it in errors."""
        return cls.from_dict(_parse_toml(text, what))

    def prompt_hash(self) -> str:
        """SHA-256 (hexadecimal) of the prompts and texts."""
        texts = [asdict(text) for text in (*self.prompts, *self.texts)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def resolve(
    design: Design | str | Mapping[str, Any] | os.PathLike[str] = "smoke",
    models: str | os.PathLike[str] | Iterable[str] | None = None,
) -> Design:
    """A complete design from a design, the name of a profile, a mapping of entries, or the path of
    a TOML or JSON file; `models` replaces its models."""
    if isinstance(design, Design):
        found = design
    elif isinstance(design, Mapping):
        found = Design.from_dict(design)
    elif isinstance(design, str) and design in PROFILES:
        found = _profile(design)
    elif isinstance(design, (str, os.PathLike)):
        found = _read(Path(design), design)
    else:
        raise QllmValueError(
            f"a design is a Design, the name of a profile, a mapping or a path, not a"
            f" {type(design).__name__}"
        )
    if models is None:
        return found
    named: Any = (models,) if isinstance(models, (str, os.PathLike)) else models
    return replace(found, models=named)


def _profile(name: str) -> Design:
    text = files(__package__).joinpath("profiles", f"{name}.toml").read_text("utf-8")
    return Design.from_toml(text, f"the profile {name}")


def _read(path: Path, given: str | os.PathLike[str]) -> Design:
    """The design in a file."""
    if path.suffix not in (".toml", ".json"):
        raise QllmValueError(
            f"there is no profile {quoted(given)}; there are {', '.join(PROFILES)}, and a design in"
            " a file ends in .toml or .json"
        )
    if not path.is_file():
        raise QllmFileError(f"there is no design file {path}")
    if path.suffix == ".json":
        return Design.from_dict(read_object(path, MAX_DESIGN_BYTES))
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_DESIGN_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise QllmFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise QllmFileError(f"{path} is not UTF-8") from None
    if len(data) > MAX_DESIGN_BYTES:
        raise QllmFileError(f"{path} has more than {MAX_DESIGN_BYTES} bytes")
    try:
        return Design.from_toml(text, str(path))
    except RecursionError:
        raise QllmFileError(f"{path} is nested too deeply") from None


def _parse_toml(text: str, what: str) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError:
        raise QllmUnsupportedError(
            "a design in TOML needs the package tomli on this Python: pip install 'qllm[study]'"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QllmFileError(f"{what} is not TOML: {error}") from None


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
    for name in ("own_temperature", "speed", "threads"):
        if getattr(design, name) is False:  # TOML has no null
            _set(design, name, None)
    _set(design, "models", sequence(design.models, "models", os.fspath))
    _set(design, "arms", sequence(design.arms, "arms", as_arm))
    for name, sets in (("prompts", PROMPT_SETS), ("texts", TEXT_SETS)):
        given = _known_set(getattr(design, name), name, sets)
        texts = sequence(given, name, lambda item: item)
        _set(design, name, tuple(as_text(text, name, i) for i, text in enumerate(texts)))
    for name in ("temperatures", "logit_temperatures", "band", "surroundings"):
        _set(design, name, sequence(getattr(design, name), name, number(name)))
    _set(design, "seeds", sequence(design.seeds, "seeds", integer("seeds", 0, 2**64 - 1)))
    _set(design, "lengths", integers(design.lengths, "lengths", 1, 1_000_000))
    _set(design, "top_k", integers(design.top_k, "top_k", 0, 2**31))
    if design.own_temperature is not None:
        _set(design, "own_temperature", number("own_temperature")(design.own_temperature))
    for name in ("confidence", "int8_threshold"):
        _set(design, name, number(name)(getattr(design, name)))
    if design.speed is not None:
        _set(design, "speed", as_speed(design.speed))
    _set(design, "claims", as_claims(design.claims, _default_claims()))


def _known_set(given: Any, name: str, sets: Mapping[str, Any]) -> Any:
    """The texts of a built-in set where `given` is its name, else what was given."""
    if not isinstance(given, str):
        return given
    if given not in sets:
        raise QllmValueError(
            f"{name} has no set {quoted(given)}; there are {', '.join(sets)}, and own texts stand"
            " in a list"
        )
    return [Text(*entry) for entry in sets[given]]


def _set(design: Design, name: str, value: object) -> None:
    object.__setattr__(design, name, value)


__all__ = [
    "ARMS",
    "MAX_DESIGN_BYTES",
    "PROFILES",
    "ROLES",
    "Arm",
    "Claim",
    "Design",
    "Speed",
    "Text",
    "differences",
    "resolve",
]
