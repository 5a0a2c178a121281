"""Decoders of compute="auto" on a GPU, or its kernels run on the processor: within the roundings that
kernels/skinny.h and kernels/attention.h state, and the same bits however rows are put together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
from numpy.typing import NDArray

import qllm
import reference_decoder
from qllm import _core
from reference_decoder import Reference, Weights, falcon, falcon_rw, llama, prefill, tokens

Array = NDArray[Any]
F32, F64 = np.float32, np.float64
BF16_RMS = 8e-4  # of the relative error of a number rounded to bf16, whose mantissas are uniform


def set_order(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """In which lanes and blocks take their turns."""
    monkeypatch.setenv("QLLM_EMULATE_ORDER", order)


def decoder_of(weights: Weights, **options: Any) -> _core.Decoder:
    return weights.decoder(device=emulated.name(), compute="auto", **options)


def same_bits(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape and np.isfinite(expected).all()
    np.testing.assert_array_equal(np.ascontiguousarray(found, F32).view(np.uint32),
                                  np.ascontiguousarray(expected, F32).view(np.uint32))


# --------------------------------------------------------------- against a model with its roundings


def bf16(values: Array) -> Array:
    """Rounded to float32, then to bf16, to nearest, ties to even; as float64."""
    bits = np.ascontiguousarray(np.asarray(values, F32)).view(np.uint32).astype(np.uint64)
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return bits.astype(np.uint32).view(F32).astype(F64)


def with_rounded_codes(array: Array, fmt: str) -> Array:
    """What the tensor cores multiply with: codes of the table in bf16 times their absmax."""
    q = _core.quantize(array, fmt)
    if fmt == "bf16":
        return q.dequantize().astype(F64)
    codes = np.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)
    return (bf16(q.quant_map)[codes] * np.repeat(q.absmax, q.blocksize)).reshape(array.shape)


class RoundedReference(Reference):
    """The reference in float64, with the rounding of what goes into linear layers and of keys and
    values to bf16."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        for slot, array in weights.arrays.items():
            if array.ndim == 2 and slot != "embedding":
                self.arrays[slot] = with_rounded_codes(array, weights.format)

    def linear(self, slot: str, x: Array) -> Array:
        return self.arrays[slot] @ bf16(x) + self.biases.get(slot, 0.0)

    def heads(self, layer: int, x: Array) -> tuple[list[Array], list[Array], list[Array]]:
        q, k, v = super().heads(layer, x)
        return q, k, [bf16(head) for head in v]

    def attention(self, layer: int, x: Array, position: int) -> Array:
        keys = self.keys[layer]
        self.keys[layer] = RoundedKeys(keys)
        try:
            return super().attention(layer, x, position)
        finally:
            self.keys[layer] = list(self.keys[layer])


class RoundedKeys(list):  # type: ignore[type-arg]
    """A list of the keys of each position, which are rounded where they are put in."""

    def append(self, heads: list[Array]) -> None:
        super().append([bf16(head) for head in heads])


# A GPU's tensor cores cut off what lies below the last place of the largest number that they add,
# where the emulation rounds; so more numbers fall to the other side.
CLOSE, MOST = (1e-5, 0.3) if emulated.ON_A_GPU else (1e-6, 0.6)
FUSED = {"hidden": 64, "head_dim": 32, "rotary_dim": 32, "intermediate": 128}
TIGHT = {
    "llama": llama(**FUSED),
    "llama, heads apart": llama(hidden=64, intermediate=128, qk_norm=True),
    "falcon": falcon(**FUSED),
    "falcon-rw": falcon_rw(**FUSED | {"rotary_dim": None}),
}


@pytest.mark.parametrize("order", ["", "reversed"])
@pytest.mark.parametrize("fmt", ["bf16", "nf4"])
@pytest.mark.parametrize("config", TIGHT)
def test_logits_are_those_of_a_model_with_the_same_roundings(
    monkeypatch: pytest.MonkeyPatch, config: str, fmt: str, order: str
) -> None:
    """To CLOSE of their size, in most rows.  A number that lies between two of bf16 may fall to the
    other side, since the device computes in float32 what the reference does in float64; then its row
    and those after it differ by what a place of bf16 makes, so each text is short."""
    set_order(monkeypatch, order)
    weights, close = Weights(TIGHT[config], fmt, seed=3), []
    decoder = decoder_of(weights)
    for seed in range(8):
        ids = tokens(3, seed)
        expected = RoundedReference(weights).logits(ids)
        error = np.abs(prefill(decoder, ids) - expected).max(1) / expected.std()
        assert (error < 0.05).all()
        close += list(error < CLOSE)
    assert np.mean(close) > MOST


# ------------------------------------------------------------------- all families, against exact


models = pytest.importorskip("architecture_models", reason="transformers makes these models")


def perturbed(model: Any, folder: Path) -> qllm.Model:
    """A model of transformers with relative errors of the size of bf16's in all its matrices.

    An activation that is rounded is, in each product it goes into, as good as a weight with the
    same relative error: so this shows how far roundings of activations move the logits, by the
    processor's exact mode alone."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = rng.normal(0, BF16_RMS, tuple(parameter.shape)).astype(F32)
                parameter.mul_(1 + torch.from_numpy(noise))
    model.save_pretrained(folder)
    return qllm.Model.from_pretrained(folder, compute="exact")


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_every_family_is_as_far_from_exact_as_its_roundings_reach(
    variant: str, tmp_path: Path
) -> None:
    """Three times as far as the perturbed model on the average, four times at the most: keys, values
    and the rounded codes of 4-bit tables add to the errors of activations, and both sides are
    samples.  A greedy token is the same where no such error can change it."""
    ids = np.random.default_rng(5).integers(0, models.VOCAB, 48).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = models.build(models.VARIANTS[variant], tmp_path)
        plain = qllm.Model.from_pretrained(tmp_path, compute="exact").logits(ids)
        moved = perturbed(theirs, tmp_path / "perturbed").logits(ids) - plain
    average, limit = 3 * np.sqrt(np.mean(moved**2)), 4 * np.abs(moved).max()
    for fmt in ["bf16", "nf4"] if variant in ("llama", "falcon-40b", "qwen3") else ["bf16"]:
        exact, auto = (
            qllm.Model.from_pretrained(tmp_path, quantization=fmt, device=device, compute=compute)
            .logits(ids) for device, compute in (("cpu", "exact"), (emulated.name(), "auto")))
        error = auto - exact
        assert np.sqrt(np.mean(error**2)) < average and np.abs(error).max() < limit, fmt
        first, second = np.sort(exact, 1)[:, [-1, -2]].T
        sure = first - second > 2 * limit
        np.testing.assert_array_equal(auto.argmax(1)[sure], exact.argmax(1)[sure])


@pytest.mark.parametrize("fmt", ["fp4", "nf4-dq", "fp4-dq", "int8", "f16", "f32"])
def test_every_format(fmt: str) -> None:
    """Closer to the exact mode than the format is to what it was made from; the float formats, whose
    linear layers run the exact kernels, within the rounding of keys and values."""
    config = llama(**FUSED)
    ids = tokens(24)
    weights, original = Weights(config, fmt), Weights(config, "f32")
    exact = prefill(weights.decoder(compute="exact"), ids)
    error = prefill(decoder_of(weights), ids) - exact
    own = prefill(original.decoder(compute="exact"), ids) - exact
    limit = 0.01 * exact.std() if fmt in ("f16", "f32") else own.std()
    assert 0 < error.std() < limit


# -------------------------------------------------------------------- rows and their company


class MixedWeights(Weights):
    """Layers of one model in different formats, so that nothing fits together."""

    FORMATS = {"q": "nf4", "k": "bf16", "v": "int8", "gate": "nf4-dq", "up": "fp4", "o": "f32",
               "down": "f16", "head": "f32"}

    def decoder(self, **options: Any) -> _core.Decoder:
        decoder = super().decoder(**options)
        for slot, array in self.arrays.items():
            fmt = self.FORMATS.get(slot.rsplit(".")[-1])
            if array.ndim == 2 and fmt is not None:
                decoder.set_linear(slot, _core.quantize(array, fmt), self.biases.get(slot))
        return decoder


LONG = {"max_positions": 400, "layers": 1}
TWO = {"max_positions": 400, "layers": 2}
COMPANY: dict[str, Weights] = {
    "llama, nf4": Weights(llama(**FUSED, **TWO), "nf4"),
    "llama, int8": Weights(llama(**FUSED, **LONG), "int8"),
    "llama, each layer its own": MixedWeights(llama(**FUSED, **LONG), "bf16"),
    "qwen3 with a window, nf4-dq": Weights(
        llama(hidden=64, intermediate=128, qk_norm=True, **TWO,
              sliding_window=np.array([40, 0], np.int64)), "nf4-dq"),
    "falcon, bf16": Weights(falcon(**FUSED, **LONG), "bf16"),
    "falcon-40b, fp4": Weights(falcon(**FUSED, **LONG, block="parallel2", kv_heads=2), "fp4"),
    "falcon-rw, bf16": Weights(falcon_rw(**FUSED | {"rotary_dim": None}, **LONG), "bf16"),
    "odd sizes, bf16": Weights(
        llama(hidden=35, head_dim=10, rotary_dim=10, intermediate=57, heads=6, kv_heads=3,
              **LONG), "bf16"),
}


@pytest.mark.parametrize(("weights", "order"), [
    *[(weights, "") for weights in COMPANY], ("llama, nf4", "reversed"),
    ("qwen3 with a window, nf4-dq", "reversed")])
def test_rows_have_the_same_bits_in_any_company(
    monkeypatch: pytest.MonkeyPatch, weights: str, order: str
) -> None:
    """A prompt at once, in chunks, token by token; 1, 5 and 64 forks of it side by side."""
    set_order(monkeypatch, order)
    made = COMPANY[weights]
    decoder, ids = decoder_of(made), tokens(284)
    sequence = decoder.sequence()
    whole = prefill(decoder, ids, sequence)
    same_bits(prefill(decoder, ids[:70], chunk=29), whole[:70])
    sequence.truncate(250)  # within a page that the tail has written
    for i in range(250, 262):  # into the second split of attention
        same_bits(decoder.step([sequence], ids[i:i + 1])[0], whole[i])
    forks = [sequence.fork() for _ in range(64)]
    others = np.random.default_rng(1).integers(0, made.config["vocab"], 64)
    others[[0, 4, 31, 63]] = ids[262]
    together = decoder.step(forks, others)
    for row in (0, 4, 31, 63):
        same_bits(together[row], whole[262])
    few = [sequence.fork() for _ in range(5)]
    same_bits(decoder.step(few, others[29:34]), together[29:34])
    rows = decoder.step([few[0]] + [forks[31]] * 3 + [few[4]], [3, *ids[263:266], 5])
    same_bits(rows[1:4], whole[263:266])
    same_bits(decoder.step([forks[29]], [3])[0], rows[0])


def test_a_batch_of_more_rows_than_a_chunk() -> None:
    weights = COMPANY["llama, int8"]
    decoder, ids = decoder_of(weights), tokens(9)
    sequence = decoder.sequence()
    whole = prefill(decoder, ids, sequence)
    sequence.truncate(8)
    rows = decoder.step([sequence.fork() for _ in range(515)], np.full(515, ids[8]))
    for row in rows:
        same_bits(row, whole[8])


# ---------------------------------------------------------------------------- recorded steps


def steps(weights: Weights) -> Array:
    """Logits of steps of few shapes, which come often: two prompts, then tokens after them, beyond
    the ends of pages and position tables, with other sequences and weights in between."""
    decoder, out = decoder_of(weights), []
    a, b = decoder.sequence(), decoder.sequence()
    prefill(decoder, tokens(61), a)
    prefill(decoder, tokens(253, 2), b)
    for i in range(6):
        out.append(decoder.step([a, b], [i, i + 1]))
        out.append(decoder.step([a], [2 * i]))
        if i % 3 == 1:
            other = decoder.sequence()
            out.append(decoder.step([other] * 2 + [b], [i, 3, 4]))
            decoder.set_linear("layers.0.o", _core.quantize(
                weights.arrays["layers.0.o"] * F32(1 + i / 10), weights.format))
    return np.concatenate(out)


@pytest.mark.parametrize("weights", ["llama, each layer its own", "falcon-rw, bf16"])
def test_recorded_steps_do_what_they_were_recorded_from(
    monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    recorded = steps(COMPANY[weights])
    monkeypatch.setenv("QLLM_EMULATE_STREAMS", "late")
    same_bits(steps(COMPANY[weights]), recorded)
    monkeypatch.setenv("QLLM_EMULATE_GRAPHS", "0")
    same_bits(steps(COMPANY[weights]), recorded)


def test_hidden_rows_go_through_the_layers_alone() -> None:
    """The three parts of a step have its bits, also where rows fill up a chunk."""
    decoder, ids = decoder_of(COMPANY["llama, int8"]), tokens(5)
    whole = prefill(decoder, ids)
    for _ in range(3):
        sequence = decoder.sequence()
        hidden = decoder.blocks([sequence] * 5, decoder.embed(ids))
        same_bits(decoder.head(hidden), whole)


@pytest.mark.parametrize("batch", [False, True])
def test_both_forms_of_int8_outliers(batch: bool) -> None:
    """The per-batch form has the rows of its batch alone to look at."""
    weights, ids = COMPANY["llama, int8"], tokens(5)
    options: dict[str, Any] = {"int8_threshold": 2.0,
                               "int8_outliers": "batch" if batch else "row"}
    found = prefill(decoder_of(weights, **options), ids)
    exact = prefill(weights.decoder(compute="exact", **options), ids)
    assert np.abs(found - exact).std() < 0.03 * exact.std()


def test_what_the_reference_models_vary() -> None:
    """Rotated parts of heads, heads of odd width, many heads on one key and more."""
    for config in reference_decoder.CONFIGS.values():
        weights, ids = Weights(config, "bf16"), tokens(24, vocab=config["vocab"])
        exact = prefill(weights.decoder(compute="exact"), ids)
        assert np.abs(prefill(decoder_of(weights), ids) - exact).std() < 0.03 * exact.std()
