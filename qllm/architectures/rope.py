"""Rotary position embedding: from the keys of a config.json to the decoder's frequencies.

Definitions: transformers 5.24, modeling_rope_utils.py; RoPE itself is arXiv 2104.09864, "yarn" is
arXiv 2309.00071. Frequencies are rounded where a float32 computation rounds them; a power is
computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import QllmFileError, QllmUnsupportedError
from ..strict_json import quoted
from .fields import MAX_POSITIONS, Fields

_F32 = np.float32

# rope_type -> the keys that belong to it, besides rope_type, type, rope_theta and
# partial_rotary_factor
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "original_max_position_embeddings",
    ),
}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_config(fields: Fields, head_dim: int, max_positions: int) -> dict[str, Any]:
    """The members of the decoder's config that describe RoPE, `max_positions` among them.

    Understands rope_theta, partial_rotary_factor and rope_scaling beside the other keys
    (transformers 4), and all of them in rope_parameters (transformers 5). The leading
    int(head_dim * partial_rotary_factor) elements of a head are rotated. `max_positions` is the
    config's max_position_embeddings; a scaling which stretches it raises the limit.
    """
    scaling = _scaling(fields)
    kind = scaling.text("rope_type", "type", default="default")
    if kind not in _KEYS:
        raise QllmUnsupportedError(
            f"{scaling.what} has the rope_type {quoted(kind)}; supported are " + ", ".join(_KEYS)
        )
    for name, value in scaling.members.items():
        if value is not None and name not in _COMMON + _KEYS[kind]:
            raise QllmUnsupportedError(
                f"{scaling.what} has the key {quoted(name)} = {quoted(value)}, which rope_type "
                f"{kind} does not have; it has {', '.join(_COMMON + _KEYS[kind])}"
            )
    base = _shared(fields, scaling, "rope_theta", 10000.0, 1e-3, 1e12)
    partial = _shared(fields, scaling, "partial_rotary_factor", 1.0, 0.0, 1.0)
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2 or (kind == "dynamic" and dim < 4):
        raise QllmFileError(
            f"{fields.what} has heads of {head_dim} elements and partial_rotary_factor {partial:g},"
            f" so {dim} would be rotated; an even number of at least "
            f"{4 if kind == 'dynamic' else 2} was expected"
        )
    config: dict[str, Any] = {
        "position": "rope",
        "rotary_dim": dim,
        "rope_scale": 1.0,
        "rope_dynamic_factor": 0.0,
        "rope_base": base,
        "rope_original_positions": max_positions,
        "max_positions": max_positions,
    }
    frequencies = inverse_frequencies(base, dim)
    if kind == "default":
        return config | {"rope_inv_freq": frequencies}
    original = scaling.integer(
        "original_max_position_embeddings", default=max_positions, high=MAX_POSITIONS
    )
    # yarn may leave the factor to the ratio of the two lengths
    stated = max_positions / original if kind == "yarn" else None
    factor = scaling.number(
        "factor", low=1.0, high=1e6, **({} if stated is None else {"default": stated})
    )
    config["max_positions"] = max(max_positions, min(int(original * factor), MAX_POSITIONS))
    if kind == "linear":
        frequencies = frequencies / _F32(factor)
    elif kind == "dynamic":
        if original != max_positions:
            raise QllmUnsupportedError(
                f"{scaling.what} has original_max_position_embeddings {original}, but dynamic "
                f"scaling starts at max_position_embeddings, which is {max_positions}"
            )
        config["rope_dynamic_factor"] = factor
    elif kind == "llama3":
        frequencies = _llama3(scaling, frequencies, factor, original)
    else:
        frequencies, config["rope_scale"] = _yarn(scaling, base, dim, factor, original)
    return config | {"rope_inv_freq": frequencies}


def inverse_frequencies(base: float, dim: int) -> np.ndarray:
    """base^(-2 i / dim) for i < dim / 2, float32."""
    return _F32(1) / _powers(base, dim)


def _powers(base: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=_F32) / _F32(dim)
    return np.power(float(base), exponents.astype(np.float64)).astype(_F32)


def _scaling(fields: Fields) -> Fields:
    """The one table which describes the scaling, whichever spelling; empty without one."""
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    if old and new and old != new:
        raise QllmFileError(
            f"{fields.what} has both rope_scaling {quoted(old)} and rope_parameters {quoted(new)}; "
            "they are two spellings of one table and must agree"
        )
    name = "rope_scaling" if old else "rope_parameters"
    members = old or new or {}
    nested = [key for key, value in members.items() if isinstance(value, dict)]
    if nested:
        raise QllmUnsupportedError(
            f"{fields.what} has {name} with a table of its own for {quoted(nested[0])}; only one "
            "rotary embedding for all layers is supported"
        )
    return Fields(members, f"{name} of {fields.what}")


def _shared(
    fields: Fields, scaling: Fields, name: str, default: float, low: float, high: float
) -> float:
    """A number which stands beside the table (old) or in it (new)."""
    outer = fields.number(name, default=None, low=low, high=high, above=True)
    inner = scaling.number(name, default=None, low=low, high=high, above=True)
    if outer is not None and inner is not None and outer != inner:
        raise QllmFileError(
            f"{fields.what} has {name} {outer:g}, but {scaling.what} has {inner:g}; they must agree"
        )
    return next((value for value in (inner, outer) if value is not None), default)


def _llama3(scaling: Fields, frequencies: np.ndarray, factor: float, original: int) -> np.ndarray:
    """Long waves divided by `factor`, short ones kept, a linear blend between (Llama 3.1)."""
    low = scaling.number("low_freq_factor", above=True)
    high = scaling.number("high_freq_factor", above=True)
    if high <= low:
        raise QllmFileError(
            f"{scaling.what} has high_freq_factor {high:g}, which must be above low_freq_factor "
            f"{low:g}"
        )
    lengths = _F32(2 * math.pi) / frequencies
    slow = np.where(lengths > original / low, frequencies / _F32(factor), frequencies)
    blend = (_F32(original) / lengths - _F32(low)) / _F32(high - low)
    blended = (1 - blend) * slow / _F32(factor) + blend * slow
    between = (lengths >= original / high) & (lengths <= original / low)
    return np.where(between, blended, slow).astype(_F32)


def _yarn(
    scaling: Fields, base: float, dim: int, factor: float, original: int
) -> tuple[np.ndarray, float]:
    """Frequencies between interpolated and kept ones by a ramp over the pairs, and the factor on
    cos and sin."""
    scale = scaling.number("attention_factor", default=None, high=1e6, above=True)
    mscale = scaling.number("mscale", default=None, high=1e6)
    mscale_all = scaling.number("mscale_all_dim", default=None, high=1e6)
    if scale is None:
        if mscale and mscale_all:
            scale = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
        else:
            scale = _magnitude(factor, 1.0)
    fast = scaling.number("beta_fast", default=None, high=1e6) or 32.0
    slow = scaling.number("beta_slow", default=None, high=1e6) or 1.0
    if base == 1.0:
        raise QllmFileError(f"{scaling.what} is yarn, which needs a rope_theta other than 1")

    def pair(rotations: float) -> float:
        """The pair (a real number) which turns so often within the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(fast), pair(slow)
    if scaling.boolean("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=_F32) - _F32(low)) / _F32(high - low)
    kept = 1 - np.clip(ramp, 0, 1).astype(_F32)
    powers = _powers(base, dim)
    stretched = _F32(1) / (_F32(factor) * powers)
    return (stretched * (1 - kept) + (_F32(1) / powers) * kept).astype(_F32), float(scale)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
