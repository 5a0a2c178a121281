"""The options of quantization and generation, checked when they are made."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .bnb import FORMATS as QUANTIZED_FORMATS
from .errors import QllmUnsupportedError, QllmValueError
from .quantize import BLOCKSIZES
from .sampling import LOGITS_DTYPES
from .strict_json import lone_surrogate, quoted

FLOAT_FORMATS = ("bf16", "f16", "f32")
ORIGINAL = "original"
"""As a target of `quantize_`: the format in which the folder has the layer."""

FORMATS = (*QUANTIZED_FORMATS, *FLOAT_FORMATS, ORIGINAL)

_ALIASES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "fp16": "f16", "fp32": "f32"}


def check_format(name: Any) -> str:
    """The format `name`, in the one spelling that qllm writes. Raises `QllmValueError`."""
    if isinstance(name, str):
        known = _ALIASES.get(name, name)
        if known in FORMATS:
            return known
    raise QllmValueError(f"there is no format {quoted(name)}; there are " + ", ".join(FORMATS))


def patterns(value: str | Sequence[str] | None, name: str) -> tuple[str, ...] | None:
    """One glob pattern or several as a tuple; None stays None. Raises `QllmValueError`."""
    if value is None:
        return None
    found: tuple[Any, ...]
    try:
        found = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        found = (value,)
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise QllmValueError(
                f"{name} has {quoted(pattern)}; a pattern over names of layers, as "
                "'model.layers.*.mlp.down_proj', was expected"
            )
    return found


@dataclass(frozen=True)
class QuantConfig:
    """What `Model.from_pretrained` and `Model.quantize_` do to the linear layers.

    `format`: nf4, fp4, nf4-dq, fp4-dq, int8, bf16, f16, f32 or original. `include` and `skip` are
    glob patterns over the names of the layers (None: all, none); the output embedding is left alone
    unless `quantize_head`. `blocksize` is that of the 4-bit formats.
    """

    format: str
    include: Sequence[str] | None = None
    skip: Sequence[str] | None = None
    blocksize: int = 64
    quantize_head: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "format", check_format(self.format))
        set_(self, "include", patterns(self.include, "include"))
        set_(self, "skip", patterns(self.skip, "skip"))
        if not isinstance(self.blocksize, (int, np.integer)) or self.blocksize not in BLOCKSIZES:
            raise QllmValueError(
                f"blocksize is {quoted(self.blocksize)}; a power of two from {BLOCKSIZES[0]} to "
                f"{BLOCKSIZES[-1]} was expected"
            )
        set_(self, "blocksize", int(self.blocksize))
        if type(self.quantize_head) is not bool:
            raise QllmValueError(
                f"quantize_head is {quoted(self.quantize_head)}; True or False was expected"
            )

    def require_matches(self, modules: Collection[str]) -> None:
        """Raises `QllmValueError` for a pattern that matches none of the modules."""
        for name, found in (("include", self.include), ("skip", self.skip)):
            for pattern in found or ():
                if not any(fnmatchcase(module, pattern) for module in modules):
                    raise QllmValueError(
                        f"the pattern {quoted(pattern)} in {name} matches no linear layer; there "
                        f"are {quoted(', '.join(modules))}"
                    )

    def why_not(self, module: str, is_head: bool) -> str | None:
        """Why the linear layer `module` is not selected; None where it is. `is_head`: it is the
        output embedding."""
        if self.include is not None and not any(fnmatchcase(module, p) for p in self.include):
            return "not in include"
        skip = next((p for p in self.skip or () if fnmatchcase(module, p)), None)
        if skip is not None:
            return f"skip has {skip!r}"
        if is_head and not self.quantize_head:
            return "output embedding; quantize_head=True includes it"
        return None

    @classmethod
    def from_bnb(cls, config: Mapping[str, Any]) -> QuantConfig:
        """From the members of a `BitsAndBytesConfig` (its `to_dict()`).

        `llm_int8_skip_modules` replaces there the default skip of the output embedding, which here
        always holds; names in it stand for themselves and for everything below them.
        `bnb_4bit_compute_dtype` needs no counterpart: sums are float32, and `compute` says how
        activations are rounded. An option that would change something there and cannot here raises
        `QllmUnsupportedError`.
        """
        if not isinstance(config, Mapping):
            raise QllmValueError(
                f"the config is a {type(config).__name__}; the dict that to_dict() of a "
                "BitsAndBytesConfig gives was expected"
            )
        four, eight, double = (
            _flag(config, name)
            for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant")
        )
        if four == eight:
            raise QllmValueError(
                f"load_in_4bit is {four} and load_in_8bit is {eight}; one of them must be set"
            )
        _refuse_meaningless(config, eight)
        if eight:
            format = "int8"
        else:
            format = config.get("bnb_4bit_quant_type", "fp4")
            if double:
                format = f"{format}-dq"
        names = config.get("llm_int8_skip_modules") or ()
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise QllmValueError(
                f"llm_int8_skip_modules is {quoted(names)}; a list of names was expected"
            )
        skip = [pattern for name in names for pattern in (f"*{name}", f"*{name}.*")]
        return cls(format, skip=tuple(skip) or None)


@dataclass(frozen=True)
class GenerationConfig:
    """How text is drawn; names, meaning and order of Hugging Face transformers.

    The logits of seen tokens are changed by `repetition_penalty` (1: off), divided by `temperature`
    (0: greedy), then cut to the `top_k` most probable (0: off), to the smallest set with
    probability `top_p` (1: off), and to those with at least `min_p` of the greatest probability
    (0: off). `do_sample=False` is greedy, as temperature 0. With `keep_ties` top_k keeps every
    token whose logit equals the k-th largest, as transformers does. `logits_dtype` "bfloat16"
    rounds the logits before all of this, as models do that return them in bfloat16.

    A draw depends on (`seed`, prompt, step, token id) alone. Generation ends after `max_new_tokens`
    tokens, at an id of `eos_token_id` (None: the model's) unless `ignore_eos`, or when the text
    holds one of the strings `stop`. Raises `QllmValueError` for values that have no meaning.
    """

    temperature: float = 0.7
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = True
    max_new_tokens: int = 50
    seed: int = 1
    stop: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    ignore_eos: bool = False
    keep_ties: bool = False
    logits_dtype: str = "float32"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "temperature", _number(self, "temperature", low=0.0))
        set_(self, "top_k", _integer(self, "top_k", 0, 2**63 - 1))
        set_(self, "top_p", _number(self, "top_p", low=0.0, high=1.0, above=True))
        set_(self, "min_p", _number(self, "min_p", low=0.0, high=1.0))
        set_(self, "repetition_penalty", _number(self, "repetition_penalty", low=0.0, above=True))
        set_(self, "max_new_tokens", _integer(self, "max_new_tokens", 1, 2**31 - 1))
        set_(self, "seed", _integer(self, "seed", 0, 2**64 - 1))
        for name in ("do_sample", "ignore_eos", "keep_ties"):
            if type(getattr(self, name)) is not bool:
                raise QllmValueError(
                    f"{name} is {quoted(getattr(self, name))}; True or False was expected"
                )
        if self.logits_dtype not in LOGITS_DTYPES:
            raise QllmValueError(
                f"logits_dtype is {quoted(self.logits_dtype)}; float32 or bfloat16 was expected"
            )
        set_(self, "stop", _stop(self.stop))
        set_(self, "eos_token_id", _eos(self.eos_token_id))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, with no draw."""
        return not self.do_sample or self.temperature == 0

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with the given values. Raises `QllmValueError` for a name that it has not."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise QllmValueError(
                    f"there is no option {quoted(name)} of generation; there are "
                    + ", ".join(known)
                )
        return replace(self, **changes)


_BNB_DTYPES = ("float32", "bfloat16", "float16")
_BNB_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_4bit": ((), ""),
    "load_in_8bit": ((), ""),
    "bnb_4bit_use_double_quant": ((), ""),
    "bnb_4bit_quant_type": ((), ""),
    "llm_int8_skip_modules": ((), ""),
    "_load_in_4bit": ((), ""),
    "_load_in_8bit": ((), ""),
    "llm_int8_threshold": ((), ""),
    "quant_method": (("bitsandbytes",), "the config of bitsandbytes was expected"),
    "bnb_4bit_compute_dtype": (_BNB_DTYPES, "float32, bfloat16 or float16 was expected"),
    "bnb_4bit_quant_storage": (
        ("uint8",), "packed weights have no other dtype here: leave it out, or say uint8"
    ),
    "llm_int8_enable_fp32_cpu_offload": (
        (False,), "no part of a model is offloaded to another device here: leave it out"
    ),
    "llm_int8_has_fp16_weight": (
        (False,), "weights stay int8 here, there is no training of them: leave it out"
    ),
}
"""Members of a `BitsAndBytesConfig`; for those that have no counterpart the values that change
nothing, and what to do about others."""


def _refuse_meaningless(config: Mapping[str, Any], eight: bool) -> None:
    """Raises for options of bitsandbytes that cannot be honoured."""
    for name, value in config.items():
        if name not in _BNB_OPTIONS:
            raise QllmUnsupportedError(
                f"the config has the option {quoted(name)}, which is not known; known are "
                + ", ".join(key for key in _BNB_OPTIONS if not key.startswith("_"))
            )
        allowed, advice = _BNB_OPTIONS[name]
        if allowed and value is not None and not any(value == one for one in allowed):
            raise QllmUnsupportedError(f"{name} is {quoted(value)}; {advice}")
    for name in ("load_in_4bit", "load_in_8bit"):
        if config.get("_" + name) not in (None, _flag(config, name)):
            raise QllmValueError(
                f"{name} is {quoted(config.get(name))} and _{name} is "
                f"{quoted(config['_' + name])}; they must be equal"
            )
    threshold = config.get("llm_int8_threshold", 6.0)
    if eight and threshold != 6.0:
        raise QllmUnsupportedError(
            f"llm_int8_threshold is {quoted(threshold)}; it belongs to the model here: give "
            "int8_threshold to Model.from_pretrained, and leave it out of the config"
        )


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise QllmValueError(f"{name} is {quoted(value)}; True or False was expected")
    return bool(value)


def _number(
    config: Any, name: str, low: float, high: float = math.inf, above: bool = False
) -> float:
    value = getattr(config, name)
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < low or number > high or (above and number == low):
        bounds = f"{'above' if above else 'from'} {low:g}" + (
            f" {'and at most' if above else 'to'} {high:g}" if high < math.inf else ""
        )
        if not above and high == math.inf:
            bounds = f"of at least {low:g}"
        raise QllmValueError(f"{name} is {quoted(value)}; a finite number {bounds} was expected")
    return number


def _integer(config: Any, name: str, low: int, high: int) -> int:
    value = getattr(config, name)
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise QllmValueError(
            f"{name} is {quoted(value)}; an integer from {low} to {high} was expected"
        )
    return number


def as_integer(value: Any) -> int | None:
    """`value` as an int when it is an integer of Python or NumPy, and no bool; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _stop(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    try:
        strings = tuple(strings)
    except TypeError:
        strings = (value,)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise QllmValueError(
                f"stop has {quoted(string)}; strings of at least one character were expected"
            )
        surrogate = lone_surrogate(string)
        if surrogate:
            raise QllmValueError(f"stop has {quoted(string)}, which has {surrogate}")
    return strings


def _eos(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        raise QllmValueError(f"eos_token_id is {quoted(value)}; token ids were expected")
    try:
        ids = tuple(value)
    except TypeError:
        ids = (value,)
    found = []
    for token in ids:
        number = as_integer(token)
        if number is None or number < 0:
            raise QllmValueError(f"eos_token_id has {quoted(token)}; token ids were expected")
        found.append(number)
    return tuple(found)


DEVICES = ("cpu", "cuda")
"""Where a model can compute: the processor, or an NVIDIA GPU where `qllm info` names one; of
several GPUs the first, unless a number is given ("cuda:1" is the second)."""

COMPUTES = ("exact", "auto", "int8")
"""float32 activations; the fastest rounding of activations that is no coarser than bfloat16; int8
activations for 4-bit weights, else as auto."""


def check_compute(compute: Any) -> None:
    """Accepts the compute modes that there are (`COMPUTES`)."""
    if not isinstance(compute, str) or compute not in COMPUTES:
        raise QllmUnsupportedError(
            f"compute is {quoted(compute)}; supported are exact, auto and int8"
        )
