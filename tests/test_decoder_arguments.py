"""What a decoder is told: weights by slot, its config, its options, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from qllm import _core
from reference_decoder import (CONFIGS, SIZES, Reference, Weights, falcon, inv_freq, isas, llama,
                               prefill, tokens)

VOCAB = SIZES["vocab"]
TOLERANCE = 1e-4
ISAS = isas()


@pytest.fixture(scope="module")
def small() -> Weights:
    return Weights(llama(), "f32", seed=5)


# ---------------------------------------------------------------------------------------- weights


def test_weights_are_swapped_between_steps(small: Weights) -> None:
    decoder = small.decoder(threads=2)
    ids = tokens(12)
    original = prefill(decoder, ids)
    swapped = {}
    for slot, array in small.arrays.items():
        if array.ndim == 2 and slot not in ("embedding", "head"):
            swapped[slot] = _core.quantize(array, "nf4")
            decoder.set_linear(slot, swapped[slot], small.biases[slot])
    quantized = Weights(llama(), "f32", seed=5)
    quantized.arrays |= {slot: q.dequantize() for slot, q in swapped.items()}
    expected = Reference(quantized).logits(ids)
    found = prefill(decoder, ids)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert not np.array_equal(found, original)
    for slot in swapped:
        decoder.set_linear(slot, _core.quantize(small.arrays[slot], "f32"), small.biases[slot])
    assert np.array_equal(prefill(decoder, ids), original)


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_linear_gives_back_the_bytes_that_were_set(fmt: str) -> None:
    rng = np.random.default_rng(0)
    for config in (llama(), CONFIGS["odd sizes"]):
        decoder = _core.Decoder(config, threads=1)
        for slot in ("layers.1.up", "head"):
            shape = decoder.slots()[slot]
            weight = _core.quantize(rng.normal(size=shape).astype(np.float32), fmt)
            decoder.set_linear(slot, weight)
            back = decoder.linear(slot)
            assert (back.format, back.shape, back.blocksize) == (fmt, shape, weight.blocksize)
            for part in ("packed", "absmax", "absmax_codes", "nested_absmax", "scb", "quant_map",
                         "nested_quant_map", "offset"):
                a, b = getattr(back, part), getattr(weight, part)
                assert (a is None) == (b is None)
                assert a is None or np.asarray(a).tobytes() == np.asarray(b).tobytes()
        if fmt in ("f32", "f16", "bf16"):
            weight = _core.quantize(rng.normal(size=decoder.slots()["embedding"])
                                    .astype(np.float32), fmt)
            decoder.set_embedding(weight)
            assert decoder.linear("embedding").packed.tobytes() == weight.packed.tobytes()


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_load_linear_is_quantize_and_set_linear(fmt: str) -> None:
    """Bytes, size, bias and error; on one thread and on several."""
    rng = np.random.default_rng(1)
    for config, threads in ((llama(), 1), (CONFIGS["odd sizes"], 3)):
        decoder = _core.Decoder(config, threads=threads)
        for slot in ("layers.1.up", "head"):
            values = rng.normal(size=decoder.slots()[slot]).astype(np.float32)
            weight = _core.quantize(values, fmt, 128, isa="reference")
            assert decoder.load_linear(slot, values, fmt, 128, None) == weight.nbytes
            back = decoder.linear(slot)
            assert (back.format, back.blocksize) == (fmt, weight.blocksize)
            assert back.packed.tobytes() == weight.packed.tobytes()
            assert back.dequantize().tobytes() == weight.dequantize().tobytes()
            assert decoder.linear_error(slot, values) == weight.error(values)


def test_load_linear_takes_a_bias(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    bias = np.arange(48, dtype=np.float32)
    decoder.set_linear("layers.0.o", _core.quantize(small.arrays["layers.0.o"], "f32"), bias)
    expected = prefill(decoder, tokens(6))
    decoder.load_linear("layers.0.o", small.arrays["layers.0.o"], "f32")
    assert not np.array_equal(prefill(decoder, tokens(6)), expected)
    decoder.load_linear("layers.0.o", small.arrays["layers.0.o"], "f32", bias=bias)
    assert np.array_equal(prefill(decoder, tokens(6)), expected)


def test_the_embedding_can_be_the_heads_weight(small: Weights) -> None:
    """Whatever replaces one of the two leaves it to the other, in any order."""
    head, other = small.arrays["head"], small.arrays["embedding"]
    for fmt in ("f32", "f16", "bf16"):
        decoder = small.decoder(threads=2)
        decoder.load_embedding(head, fmt)
        decoder.load_linear("head", head, fmt)
        expected, alone = prefill(decoder, tokens(6)), decoder.nbytes()
        decoder.tie_embedding()
        assert decoder.nbytes() == alone | {"embedding": 0}
        assert np.array_equal(prefill(decoder, tokens(6)), expected)
        decoder.tie_embedding()
        decoder.load_linear("head", other, "nf4")
        assert decoder.nbytes()["embedding"] == alone["embedding"]
        assert decoder.linear("embedding").packed.tobytes() == \
            _core.quantize(head, fmt).packed.tobytes()
        with pytest.raises(NotImplementedError, match="head's weight, which has format nf4"):
            decoder.tie_embedding()
        decoder.load_linear("head", head, fmt)
        assert np.array_equal(prefill(decoder, tokens(6)), expected)
        decoder.tie_embedding()
        decoder.set_embedding(_core.quantize(other, fmt))
        assert decoder.linear("head").packed.tobytes() == _core.quantize(head, fmt).packed.tobytes()
        assert not np.array_equal(prefill(decoder, tokens(6)), expected)
        decoder.tie_embedding()
        assert np.array_equal(prefill(decoder, tokens(6)), expected)
        assert decoder.nbytes()["embedding"] == 0
    with pytest.raises(ValueError, match="slot 'head': no weight has been set yet"):
        _core.Decoder(llama(), threads=1).tie_embedding()


def test_slots_of_every_kind_of_decoder() -> None:
    assert _core.Decoder(llama(layers=1), threads=1).slots() == {
        "embedding": (37, 48), "layers.0.attention_norm.weight": (48,),
        "layers.0.mlp_norm.weight": (48,), "layers.0.q": (64, 48), "layers.0.k": (32, 48),
        "layers.0.v": (32, 48), "layers.0.o": (48, 64), "layers.0.gate": (80, 48),
        "layers.0.up": (80, 48), "layers.0.down": (48, 80), "final_norm.weight": (48,),
        "head": (37, 48)}
    assert list(_core.Decoder(falcon(layers=1), threads=1).slots()) == [
        "embedding", "layers.0.attention_norm.weight", "layers.0.attention_norm.bias",
        "layers.0.qkv", "layers.0.o", "layers.0.up", "layers.0.down", "final_norm.weight",
        "final_norm.bias", "head"]
    qwen = _core.Decoder(CONFIGS["qwen3"], threads=1).slots()
    assert qwen["layers.1.q_norm.weight"] == qwen["layers.1.k_norm.weight"] == (16,)
    two = _core.Decoder(CONFIGS["falcon 40b"], threads=1)
    assert "layers.1.mlp_norm.bias" in two.slots() and two.slots()["layers.1.qkv"] == (128, 48)
    assert list(two.slots()) == list(two.slots())
    assert two.missing() == [s for s in two.slots() if not s.endswith(".bias")]


def test_missing_slots_are_named(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    assert decoder.missing() == []
    fresh = _core.Decoder(llama(), threads=1)
    fresh.set_embedding(_core.quantize(small.arrays["embedding"], "f32"))
    assert "embedding" not in fresh.missing()
    with pytest.raises(ValueError, match="slot 'layers.0.attention_norm.weight': no weight"):
        fresh.step([fresh.sequence()], tokens(1))
    with pytest.raises(ValueError, match="slot 'head': no weight has been set yet"):
        fresh.linear("head")


def test_bad_weights_are_refused_and_the_old_ones_stay(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    expected = prefill(decoder, tokens(6))
    matrix = _core.quantize(np.zeros((48, 64), np.float32), "f32")
    square = _core.quantize(np.zeros((37, 48), np.float32), "nf4")
    vector = np.zeros(48, np.float32)
    cases = [
        (lambda: decoder.set_linear("layers.0.q", matrix),
         r"slot 'layers.0.q': the weight has shape \(48, 64\), expected \(64, 48\)"),
        (lambda: decoder.set_linear("layers.2.o", matrix), "slot 'layers.2.o': .* no such slot"),
        (lambda: decoder.set_linear("layers.01.o", matrix), "slot 'layers.01.o': .* no such slot"),
        (lambda: decoder.set_linear("layers.9999999999999999999999.o", matrix), "no such slot"),
        (lambda: decoder.set_linear("layers.0.qkv", matrix), "no such slot"),
        (lambda: decoder.set_linear("", matrix), "no such slot"),
        (lambda: decoder.set_linear("embedding", square), "set with set_embedding, not with set_"),
        (lambda: decoder.set_vector("head", vector), "set with set_linear, not with set_vector"),
        (lambda: decoder.set_linear("final_norm.weight", matrix), "set with set_vector"),
        (lambda: decoder.set_linear("layers.0.o", matrix, np.zeros(47, np.float32)),
         "slot 'layers.0.o': the bias has 47 values, expected 48"),
        (lambda: decoder.set_linear("layers.0.o", matrix, np.zeros(48)), "bias: expected dtype"),
        (lambda: decoder.set_vector("final_norm.weight", vector[:-1]),
         "slot 'final_norm.weight': 47 values, expected 48"),
        (lambda: decoder.set_vector("final_norm.weight", np.zeros(48)), "final_norm.weight: exp"),
        (lambda: decoder.set_vector("final_norm.bias", vector), "no such slot"),
        (lambda: decoder.set_embedding(matrix), r"'embedding': the weight has shape \(48, 64\)"),
        (lambda: decoder.load_linear("layers.0.q", np.zeros((48, 64), np.float32), "nf4"),
         r"slot 'layers.0.q': the weight has shape \(48, 64\), expected \(64, 48\)"),
        (lambda: decoder.load_linear("layers.0.o", np.full((48, 64), np.nan, np.float32), "nf4",
                                     name="a name"), "a name: the value at row 0, column 0 is nan"),
        (lambda: decoder.load_linear("layers.0.o", np.zeros((48, 64), np.float32), "nf4", 48),
         "array: blocksize 48 was given for nf4"),
        (lambda: decoder.load_linear("layers.0.o", np.zeros((48, 64), np.float32), "nf5"),
         "format: 'nf5' is unknown"),
        (lambda: decoder.load_linear("layers.0.o", np.zeros((48, 64)), "nf4"), "array: expected"),
        (lambda: decoder.load_linear("layers.0.o", np.zeros((48, 64), np.float32), "nf4",
                                     bias=np.zeros(47, np.float32)), "47 values, expected 48"),
        (lambda: decoder.load_embedding(np.zeros((48, 64), np.float32), "f32"),
         r"'embedding': the weight has shape \(48, 64\)"),
        (lambda: decoder.linear_error("layers.0.o", np.zeros((64, 48), np.float32)),
         r"array: shape \(64, 48\) does not match the quantized weight's \(48, 64\)"),
        (lambda: decoder.linear_error("layers.0.qkv", np.zeros((64, 48), np.float32)), "no such"),
        (lambda: decoder.linear("final_norm.weight"), "set with set_vector"),
        (lambda: decoder.linear("layers.0.qkv"), "no such slot"),
    ]
    for action, words in cases:
        with pytest.raises(ValueError, match=words):
            action()
    with pytest.raises(NotImplementedError, match="format nf4 is not offered for the embedding"):
        decoder.set_embedding(square)
    with pytest.raises(NotImplementedError, match="format int8 is not offered for the embedding"):
        decoder.load_embedding(np.zeros((37, 48), np.float32), "int8")
    for action in (lambda: decoder.set_linear("layers.0.o", vector), lambda: decoder.linear(3),
                   lambda: decoder.set_embedding(None), lambda: decoder.set_linear(3, matrix)):
        with pytest.raises(TypeError):
            action()
    assert np.array_equal(prefill(decoder, tokens(6)), expected)


# ----------------------------------------------------------------------------- config and options


@pytest.mark.parametrize("changes, words", [
    ({"vocab": 0}, "config: vocab is 0, expected 1 to"),
    ({"hidden": -3}, "config: hidden is -3"),
    ({"layers": 2**40}, "config: layers is 1099511627776"),
    ({"layers": 2**70}, "layers"),
    ({"kv_heads": 3}, r"heads \(4\) is no multiple of kv_heads \(3\)"),
    ({"heads": 1.5}, "heads: expected an integer"),
    ({"heads": True}, "heads"),
    ({"head_dim": None}, "'head_dim' is missing"),
    ({"max_positions": 0}, "max_positions is 0"),
    ({"block": "sideways"}, "'block' is 'sideways', expected 'serial', 'parallel' or 'parallel2'"),
    ({"norm": 1}, "'norm' is 1, expected 'rms' or 'layer'"),
    ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ({"norm_eps": "small"}, "norm_eps: expected a number"),
    ({"activation": "relu"}, "'activation' is 'relu'"),
    ({"gated": 1}, "'gated' is 1, expected True or False"),
    ({"attention_scale": 0}, "attention_scale is 0"),
    ({"attention_scale": float("inf")}, "attention_scale is inf"),
    ({"position": "learned"}, "'position' is 'learned'"),
    ({"rotary_dim": 7, "rope_inv_freq": inv_freq(6)}, "rotary_dim is 7, expected an even number"),
    ({"rotary_dim": 18, "rope_inv_freq": inv_freq(18)}, r"rotary_dim is 18, .* to head_dim \(16"),
    ({"rotary_dim": -2, "rope_inv_freq": inv_freq(16)}, "rope_inv_freq' has 8 values, expected -1"),
    ({"rope_inv_freq": inv_freq(14)}, "'rope_inv_freq' has 7 values, expected 8"),
    ({"rope_inv_freq": np.full(8, np.nan, np.float32)}, r"rope_inv_freq\[0\] is nan"),
    ({"rope_inv_freq": np.zeros(8)}, "rope_inv_freq: expected dtype float32"),
    ({"rope_inv_freq": None}, "'rope_inv_freq' is missing"),
    ({"rope_scale": 0.0}, "rope_scale is 0"),
    ({"rope_dynamic_factor": -1.0}, "rope_base"),
    ({"rope_dynamic_factor": 2.0}, "'rope_base' is missing"),
    ({"rope_dynamic_factor": 2.0, "rope_base": 0.0, "rope_original_positions": 8},
     "rope_base is 0"),
    ({"rope_dynamic_factor": 2.0, "rope_base": 1e4, "rope_original_positions": 0},
     "rope_original_positions is 0"),
    ({"alibi_slopes": np.ones(4, np.float32)}, "'alibi_slopes' is given, but has no meaning"),
    ({"sliding_window": np.zeros(3, np.int64)}, "'sliding_window' has 3 values, expected 2"),
    ({"sliding_window": np.array([4, -1])}, r"sliding_window\[1\] is -1"),
    ({"rope_theta": 1e4}, "unknown key 'rope_theta'"),
    ({3: 4}, "unknown key 3"),
])
def test_configs_that_cannot_be_are_refused(changes: dict, words: str) -> None:
    config = dict(CONFIGS["llama"])
    config.update(changes)
    with pytest.raises(ValueError, match=words):
        _core.Decoder(config, threads=1)


def test_configs_with_alibi() -> None:
    config = CONFIGS["falcon rw"]
    for changes, words in [({"alibi_slopes": None}, "'alibi_slopes' is missing"),
                           ({"alibi_slopes": np.ones(3, np.float32)}, "has 3 values, expected 4"),
                           ({"alibi_slopes": np.full(4, np.inf, np.float32)}, r"pes\[0\] is inf"),
                           ({"rope_inv_freq": inv_freq(16)}, "'rope_inv_freq' is given")]:
        with pytest.raises(ValueError, match=words):
            _core.Decoder({**config, **changes}, threads=1)
    for missing in ("vocab", "block", "norm_eps", "position"):
        with pytest.raises(ValueError, match=f"'{missing}' is missing"):
            _core.Decoder({k: v for k, v in config.items() if k != missing}, threads=1)
    with pytest.raises(TypeError, match="config: expected a dict, found list"):
        _core.Decoder([], threads=1)


def test_the_config_is_copied(small: Weights) -> None:
    config = {**llama(), "rope_inv_freq": inv_freq(16), "sliding_window": np.array([0, 0])}
    weights = Weights(config, seed=5)
    decoder = weights.decoder(threads=1)
    config["rope_inv_freq"][:] = 7
    config["sliding_window"][:] = 1
    expected = prefill(small.decoder(threads=1), tokens(30))
    assert np.array_equal(prefill(decoder, tokens(30)), expected)


def test_devices_and_options(monkeypatch) -> None:
    with pytest.raises(NotImplementedError, match="device 'tpu' is not offered .* one of: cpu"):
        _core.Decoder(llama(), device="tpu")
    for threads in (0, -1, 2**40, 1.5, "2"):
        with pytest.raises(ValueError, match="threads"):
            _core.Decoder(llama(), threads=threads)
    with pytest.raises(ValueError, match="int8_outliers: 'column', expected 'row' or 'batch'"):
        _core.Decoder(llama(), int8_outliers="column")
    for threshold in (float("nan"), float("inf"), "6"):
        with pytest.raises(ValueError, match="int8_threshold"):
            _core.Decoder(llama(), int8_threshold=threshold)
    with pytest.raises(ValueError, match="sse9"):
        _core.Decoder(llama(), isa="sse9")
    monkeypatch.setenv("QLLM_CPU", "scalar")
    assert _core.Decoder(llama()).info()["isa"] == "scalar"
    monkeypatch.setenv("QLLM_CPU", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        _core.Decoder(llama())
    assert _core.Decoder(llama(), isa="scalar").info()["isa"] == "scalar"


def test_info_names_what_runs(small: Weights) -> None:
    decoder = small.decoder(threads=1)
    decoder.set_linear("head", _core.quantize(small.arrays["head"], "nf4"))
    info = decoder.info()
    assert info["device"] == "cpu" and info["threads"] == 1 and info["compute"] == "exact"
    assert info["isa"] in ISAS and isinstance(info["cpu_model"], str)
    assert set(info["kernels"]) == {"f32", "nf4"} and info["attention"].startswith("float32")
    assert all(name for names in info["kernels"].values() for name in names)
    assert (info["int8_threshold"], info["int8_outliers"]) == (6.0, "row")

