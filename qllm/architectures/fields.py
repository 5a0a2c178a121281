"""Typed reading of a config.json: each key has one meaning, and a key that nobody understands is
not passed over when it may change what the model computes."""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import QllmFileError, QllmUnsupportedError
from ..strict_json import quoted

MAX_SIZE = 2**24
"""Largest width or vocabulary that is read; no public model comes near."""

MAX_HEADS = 2**16
"""Most heads, and the largest head."""

MAX_LAYERS = 10_000
MAX_POSITIONS = 2**30

_REQUIRED: Any = object()

# An unknown key is refused when its name has one of these words and its value is not neutral.
_FUNCTION_WORDS = re.compile(
    r"softcap|multiplier|scal|expert|moe|router|window|rope|rotary|norm|bias|attn|attention|logit"
    r"|chunk|residual|clip|alibi|activation|act_fn|hidden_act|head|layer_types|position_embedding"
    r"|mrope|lora|adapter|tie_|share|parallel|sparse|compress|soft"
)
_SCALES = re.compile(r"scale|multiplier|factor")
# Keys with such a word which do not change the logits of a decoder at inference.
_HARMLESS = re.compile(
    r".*(dropout|_pdrop|dropout_prob|_loss_coef)"
    r"|output_attentions|_?attn_implementation(_autoset|_internal)?"
    r"|_?flash_attn_2_enabled|use_flash_(attn|attention)|_experts_implementation"
    r"|gradient_checkpointing|classifier_.*|.*_token_id|problem_type|is_decoder"
    r"|add_cross_attention|cross_attention_hidden_size|chunk_size_feed_forward"
)


class Fields:
    """The members of a config.json, read by name and type; remembers what was asked for.

    Raises `QllmFileError` for a missing or wrong value, with `what` at the start of the sentence.
    A value of null counts as absent. Several names are spellings of one key; when more than one is
    there they must agree.
    """

    def __init__(self, members: dict[str, Any], what: str) -> None:
        self.members = members
        self.what = what
        self._used: set[str] = set()

    def raw(self, *names: str) -> tuple[str, Any]:
        """The name found and its value, (names[0], None) when there is none."""
        self._used.update(names)
        found = [(name, self.members[name]) for name in names if self.members.get(name) is not None]
        if not found:
            return names[0], None
        for name, value in found[1:]:
            if value != found[0][1] or type(value) is not type(found[0][1]):
                raise QllmFileError(
                    f"{self.what} has {found[0][0]} {quoted(found[0][1])} and {name} "
                    f"{quoted(value)}, two spellings of one value which must agree"
                )
        return found[0]

    def integer(
        self, *names: str, default: Any = _REQUIRED, low: int = 1, high: int = MAX_SIZE
    ) -> Any:
        name, value = self.raw(*names)
        if value is None:
            return self._default(name, default)
        if type(value) is not int:
            raise QllmFileError(
                f"{self.what} has {name} {quoted(value)} of type {type(value).__name__}; an "
                "integer was expected"
            )
        if not low <= value <= high:
            raise QllmFileError(
                f"{self.what} has {name} {value}; a number from {low} to {high} was expected"
            )
        return value

    def number(
        self,
        *names: str,
        default: Any = _REQUIRED,
        low: float = 0.0,
        high: float = 1e12,
        above: bool = False,
    ) -> Any:
        """A finite number in [low, high], or in (low, high] with `above`."""
        name, value = self.raw(*names)
        if value is None:
            return self._default(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise QllmFileError(
                f"{self.what} has {name} {quoted(value)} of type {type(value).__name__}; a "
                "finite number was expected"
            )
        if value < low or value > high or (above and value == low):
            raise QllmFileError(
                f"{self.what} has {name} {value}; a number {'above' if above else 'from'} {low:g} "
                f"{'and at most' if above else 'to'} {high:g} was expected"
            )
        return float(value)

    def boolean(self, *names: str, default: Any = _REQUIRED) -> Any:
        name, value = self.raw(*names)
        if value is None:
            return self._default(name, default)
        if type(value) is not bool:
            raise QllmFileError(
                f"{self.what} has {name} {quoted(value)} of type {type(value).__name__}; true or "
                "false was expected"
            )
        return value

    def text(self, *names: str, default: Any = _REQUIRED) -> Any:
        name, value = self.raw(*names)
        if value is None:
            return self._default(name, default)
        if type(value) is not str:
            raise QllmFileError(
                f"{self.what} has {name} {quoted(value)} of type {type(value).__name__}; a text "
                "was expected"
            )
        return value

    def table(self, *names: str) -> dict[str, Any] | None:
        """An object of JSON, or None."""
        name, value = self.raw(*names)
        if value is not None and not isinstance(value, dict):
            raise QllmFileError(
                f"{self.what} has {name} {quoted(value)} of type {type(value).__name__}; an object "
                "was expected"
            )
        return value

    def _default(self, name: str, default: Any) -> Any:
        if default is _REQUIRED:
            raise QllmFileError(f"{self.what} has no {name}, without which the model is unknown")
        return default

    def refuse_unknown(self, model_type: str) -> None:
        """Raises `QllmUnsupportedError` for a key nobody read which may change the function."""
        for name, value in self.members.items():
            if name in self._used or not _FUNCTION_WORDS.search(name.lower()):
                continue
            if _HARMLESS.fullmatch(name) or _is_neutral(name, value):
                continue
            raise QllmUnsupportedError(
                f"{self.what} has {quoted(name)} = {quoted(value)}, which qllm does not know for "
                f"model_type {model_type} and which may change what the model computes"
            )


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or value is False or value in ({}, [], ""):
        return True
    if type(value) in (int, float):
        return value == 0 or (value == 1 and _SCALES.search(name) is not None)
    return False


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Name in config.json -> activation of the decoder; gelu_new and the two others are one formula."""


def activation(fields: Fields, name: str, default: str) -> str:
    """The decoder's name of the activation under the key `name`."""
    value = fields.text(name, default=default)
    if value not in ACTIVATIONS:
        raise QllmUnsupportedError(
            f"{fields.what} has {name} {quoted(value)}; supported are " + ", ".join(ACTIVATIONS)
        )
    return ACTIVATIONS[value]
