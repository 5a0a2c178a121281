"""What a design cannot be: each function raises `QllmValueError` with one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..config import COMPUTES, DEVICES
from ..errors import QllmValueError
from ..quantize import BLOCKSIZES, FORMATS
from ..sampling import LOGITS_DTYPES
from ..strict_json import quoted
from .parts import CODES, ROLES, SOURCES, Arm, integer

if TYPE_CHECKING:
    from .design import Design

def check(design: Design) -> None:
    """Refuses a design that cannot be, whose entries have their types already."""
    _check_models(design)
    _check_arms(design)
    _check_grid(design)
    _check_texts(design)
    _check_rest(design)
    if design.lockstep:
        _check_lockstep(design)


def names_of(arms: Iterable[Arm]) -> str:
    """The names of arms, for a sentence."""
    return ", ".join(arm.name for arm in arms)


def _distinct(values: Sequence[object], name: str) -> None:
    if not values:
        raise QllmValueError(f"{name} is empty; a study needs at least one entry")
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise QllmValueError(f"{name} has {quoted(value)} twice")
        seen.add(value)


def _one_of(value: object, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise QllmValueError(f"{what} {quoted(value)}; there are {', '.join(known)}")


def _check_models(design: Design) -> None:
    _distinct(design.models, "models")
    for model in design.models:
        if not isinstance(model, str) or not model:
            raise QllmValueError(f"models must be names or folders, but {quoted(model)} is none")


def _check_arms(design: Design) -> None:
    _distinct([arm.name for arm in design.arms], "arms")
    for arm in design.arms:
        _check_arm(arm)
    references = [arm for arm in design.arms if arm.role == "reference"]
    if len(references) != 1:
        raise QllmValueError(
            f"exactly one arm must be the reference, but {len(references)} of"
            f" {names_of(design.arms)} are; the arm bf16 is one"
        )
    if len(design.arms) == 1:
        raise QllmValueError(
            f"arms has only the reference, {references[0].name}; a study needs another arm that is"
            " compared with it"
        )
    if references[0].source != "qllm":
        raise QllmValueError(
            f"the reference {quoted(references[0].name)} must have the source qllm: its tokenizer"
            " reads the prompts"
        )
    for arm in design.arms:
        if arm.role == "null":
            _check_null(arm, references[0])


def _check_arm(arm: Arm) -> None:
    if not isinstance(arm.name, str) or not arm.name.isprintable() or not arm.name:
        raise QllmValueError(f"the name of an arm must be a word, not {quoted(arm.name)}")
    what = f"arm {quoted(arm.name)} has the unknown"
    _one_of(arm.role, ROLES, f"{what} role")
    _one_of(arm.source, SOURCES, f"{what} source")
    _one_of(arm.codes, CODES, f"{what} codes")
    if arm.source == "qllm":
        _one_of(arm.format, FORMATS, f"{what} format")
        if arm.options:
            raise QllmValueError(
                f"arm {quoted(arm.name)} has options, which only sources other than qllm take"
            )
    elif not isinstance(arm.format, str) or not arm.format:
        raise QllmValueError(f"the format of arm {quoted(arm.name)} must be a word that says what"
                             f" it holds, not {quoted(arm.format)}")
    if arm.compute is not None:
        _one_of(arm.compute, COMPUTES, f"{what} compute")
    if arm.device is not None:
        _check_device(arm.device, f"the device of arm {quoted(arm.name)}")
    if arm.codes == "uniform" and arm.format not in ("nf4", "fp4"):
        raise QllmValueError(
            f"arm {quoted(arm.name)} has uniform codes, so its format must be nf4 or fp4, whose"
            f" layout they take, not {arm.format}"
        )
    what = f"of arm {quoted(arm.name)}"
    if arm.blocksize not in BLOCKSIZES:
        raise QllmValueError(
            f"blocksize {what} must be a power of two from {BLOCKSIZES[0]} to"
            f" {BLOCKSIZES[-1]}, not {quoted(arm.blocksize)}"
        )
    for name in ("batch_size", "threads"):
        if getattr(arm, name) is not None:
            integer(f"{name} {what}", 1, 65536)(getattr(arm, name))
    if arm.quantize_head is not None and not isinstance(arm.quantize_head, bool):
        raise QllmValueError(f"quantize_head {what} must be true or false")
    if arm.path is not None and (not isinstance(arm.path, str) or not arm.path):
        raise QllmValueError(f"path {what} must be the name of a model, not {quoted(arm.path)}")


def _check_device(device: object, what: str) -> None:
    """Which devices there are is known where the model is loaded."""
    if not isinstance(device, str) or not device or not device.isprintable():
        raise QllmValueError(f"{what} must be {' or '.join(DEVICES)}, not {quoted(device)}")


def _check_null(arm: Arm, reference: Arm) -> None:
    """A null arm is the reference again; it may come from elsewhere."""
    if arm.source != "qllm":
        return
    for name in ("format", "quantize_head", "compute", "path"):
        mine, its = getattr(arm, name), getattr(reference, name)
        if mine != its:
            raise QllmValueError(
                f"the null arm {quoted(arm.name)} must have the {name} of the reference, {its}, not"
                f" {mine}"
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
    for name in ("temperatures", "logit_temperatures", "lengths"):
        values = getattr(design, name)
        if list(values) != sorted(values):
            raise QllmValueError(f"{name} must be in rising order")
    for name in ("lengths", "top_k", "seeds"):
        _distinct(getattr(design, name), name)
    own = design.own_temperature
    if own is not None and own not in design.temperatures:
        raise QllmValueError(f"own_temperature is {own}, which is not one of temperatures")
    for name in ("band", "surroundings"):
        values = getattr(design, name)
        if len(values) != 2 or not 0 <= values[0] < values[1]:
            raise QllmValueError(f"{name} must be two rising temperatures, not {list(values)}")
    inside, around = design.band, design.surroundings
    if inside[0] < around[0] or inside[1] > around[1] or inside == around:
        raise QllmValueError(
            f"the band {list(inside)} must lie inside its surroundings {list(around)}"
        )


def _check_lockstep(design: Design) -> None:
    """Layer by layer, texts are read and nothing else is done."""
    if design.speed is not None:
        raise QllmValueError(
            "in lockstep no model is held whole, so speed cannot be measured: speed must be off"
        )
    if not design.texts:
        raise QllmValueError(
            "texts is empty, and in lockstep they are all that is read, since nothing is generated"
        )
    for arm in design.arms:
        if arm.source != "qllm":
            raise QllmValueError(
                f"arm {quoted(arm.name)} comes from {arm.source}, which cannot be read layer by"
                " layer, as lockstep does"
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
    integer("batch_size", 1, 65536)(design.batch_size)
    integer("play", 0, 1_000_000)(design.play)
    integer("play_positions", 1, 1_000_000)(design.play_positions)
    if design.threads is not None:
        integer("threads", 1, 65536)(design.threads)
    integer("bootstrap_draws", 100, 1_000_000)(design.bootstrap_draws)
    integer("bootstrap_seed", 0, 2**64 - 1)(design.bootstrap_seed)
    for name in ("quantize_head", "ignore_eos", "keep_ties", "lockstep"):
        if not isinstance(getattr(design, name), bool):
            raise QllmValueError(f"{name} must be true or false")
    if design.logits_dtype not in LOGITS_DTYPES:
        raise QllmValueError(
            f"logits_dtype must be float32 or bfloat16, not {quoted(design.logits_dtype)}"
        )
    _check_device(design.device, "device")
    if design.compute not in COMPUTES:
        raise QllmValueError(f"compute must be exact, auto or int8, not {quoted(design.compute)}")
    if design.int8_threshold < 0:
        raise QllmValueError(f"int8_threshold must be 0 or more, not {design.int8_threshold}")
    if not 0.5 <= design.confidence < 1:
        raise QllmValueError(f"confidence must be from 0.5 to below 1, not {design.confidence}")
