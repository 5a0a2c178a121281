"""Configurations and checkpoints that must be refused, each with one sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm
from qllm.architectures import bind, describe
from qllm.checkpoint import Checkpoint
from qllm.errors import QllmError, QllmFileError, QllmUnsupportedError

pytest.importorskip("safetensors", reason="writes the checkpoints")

from tiny_models import tensors, write  # noqa: E402

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def refuse(error: type[QllmError], words: list[str], call: Any) -> None:
    """`call()` raises exactly `error`, in one sentence with all `words`."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_models_that_the_cases_start_from_are_accepted(tmp_path: Path) -> None:
    for config in (LLAMA, FALCON, QWEN2):
        folder = write(tmp_path / config["model_type"], config, tensors(config))
        with Checkpoint(folder) as checkpoint:
            assert bind(describe(checkpoint.config), checkpoint).decoder["hidden"] == 8


# ------------------------------------------------------------------------------------ the config

WRONG: list[tuple[dict, dict, list[str]]] = [
    (LLAMA, {"model_type": None}, ["no model_type"]),
    (LLAMA, {"model_type": 3}, ["model_type", "int", "text"]),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
    (LLAMA, {"vocab_size": None}, ["no vocab_size"]),
    (LLAMA, {"hidden_size": None}, ["no hidden_size"]),
    (LLAMA, {"intermediate_size": None}, ["no intermediate_size"]),
    (LLAMA, {"num_hidden_layers": None}, ["no num_hidden_layers"]),
    (LLAMA, {"num_attention_heads": None}, ["no num_attention_heads"]),
    (LLAMA, {"num_attention_heads": 0}, ["num_attention_heads 0", "from 1 to"]),
    (LLAMA, {"num_attention_heads": -2}, ["num_attention_heads -2"]),
    (LLAMA, {"num_attention_heads": 2**40}, ["num_attention_heads 1099511627776", "65536"]),
    (LLAMA, {"num_attention_heads": True}, ["num_attention_heads", "True", "bool", "integer"]),
    (LLAMA, {"num_attention_heads": 2.0}, ["num_attention_heads", "2.0", "float", "integer"]),
    (LLAMA, {"num_attention_heads": "2"}, ["num_attention_heads", "str", "integer"]),
    (LLAMA, {"num_attention_heads": [2]}, ["num_attention_heads", "list"]),
    (LLAMA, {"num_attention_heads": 3}, ["hidden_size 8", "multiple", "3"]),
    (LLAMA, {"num_key_value_heads": 0}, ["num_key_value_heads 0"]),
    (LLAMA, {"num_key_value_heads": 3}, ["num_attention_heads 2", "multiple", "3"]),
    (LLAMA, {"hidden_size": 2**30}, ["hidden_size 1073741824", "16777216"]),
    (LLAMA, {"vocab_size": 2**63 - 1}, ["vocab_size"]),
    (LLAMA, {"vocab_size": 0}, ["vocab_size 0"]),
    (LLAMA, {"intermediate_size": 0}, ["intermediate_size 0"]),
    (LLAMA, {"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "10000"]),
    (LLAMA, {"num_hidden_layers": 0}, ["num_hidden_layers 0"]),
    (LLAMA, {"head_dim": 0}, ["head_dim 0"]),
    (LLAMA, {"head_dim": 5}, ["5", "even"]),
    (LLAMA, {"max_position_embeddings": 0}, ["max_position_embeddings 0"]),
    (LLAMA, {"max_position_embeddings": 64.0}, ["max_position_embeddings", "float"]),
    (LLAMA, {"max_position_embeddings": 2**40}, ["max_position_embeddings"]),
    (LLAMA, {"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "str", "number"]),
    (LLAMA, {"rms_norm_eps": -1e-6}, ["rms_norm_eps", "-1e-06"]),
    (LLAMA, {"rms_norm_eps": True}, ["rms_norm_eps", "bool"]),
    (LLAMA, {"tie_word_embeddings": 1}, ["tie_word_embeddings", "int", "true or false"]),
    (LLAMA, {"attention_bias": "false"}, ["attention_bias", "str"]),
    (LLAMA, {"rope_theta": 0}, ["rope_theta 0"]),
    (LLAMA, {"rope_theta": "10000"}, ["rope_theta", "str"]),
    (LLAMA, {"partial_rotary_factor": 0.3}, ["partial_rotary_factor 0.3", "even"]),
    (LLAMA, {"partial_rotary_factor": 2.0}, ["partial_rotary_factor 2"]),
    (LLAMA, {"rope_scaling": "linear"}, ["rope_scaling", "object"]),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, ["no factor", "rope_scaling"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor 0.5", "from 1"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "str"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": True}}, ["factor", "bool"]),
    (
        LLAMA,
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        ["rope_type", "type", "agree"],
    ),
    (
        LLAMA,
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default"},
        },
        ["rope_scaling", "rope_parameters", "agree"],
    ),
    (
        LLAMA,
        {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}},
        ["rope_theta 10000", "500000", "agree"],
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        ["no low_freq_factor"],
    ),
    (
        LLAMA,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        ["high_freq_factor 4", "above"],
    ),
    (
        LLAMA,
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
        ["original_max_position_embeddings 0"],
    ),
    (LLAMA, {"quantization_config": "nf4"}, ["quantization_config", "object"]),
    (QWEN2, {"layer_types": "full_attention"}, ["layer_types", "list of 1"]),
    (QWEN2, {"layer_types": ["full_attention"] * 2}, ["layer_types", "list of 1"]),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, ["0"]),
    (FALCON, {"hidden_size": 9}, ["hidden_size 9", "multiple", "2"]),
    (FALCON, {"n_head": 4}, ["num_attention_heads", "n_head", "agree"]),
    (FALCON, {"multi_query": False, "num_kv_heads": 1}, ["num_kv_heads 1", "multi_query"]),
    (FALCON, {"new_decoder_architecture": True, "num_kv_heads": 3}, ["multiple", "num_kv_heads 3"]),
    (FALCON, {"num_ln_in_parallel_attn": 3}, ["num_ln_in_parallel_attn 3", "from 1 to 2"]),
    (FALCON, {"alibi": "yes"}, ["alibi", "str"]),
]

UNSUPPORTED: list[tuple[dict, dict, list[str]]] = [
    (LLAMA, {"model_type": "gpt2"}, ["'gpt2'", "llama", "falcon"]),
    (LLAMA, {"model_type": "mixtral"}, ["'mixtral'"]),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, ["Classification", "causal"]),
    (LLAMA, {"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
    (FALCON, {"activation": "relu"}, ["activation", "relu"]),
    (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["longrope", "yarn"]),
    (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, ["'su'"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 3}}, ["'beta'", "linear"]),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        ["mrope_section", "default"],
    ),
    (
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["full_attention", "one rotary embedding"],
    ),
    (
        LLAMA,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
        ["original_max_position_embeddings 9", "64"],
    ),
    (LLAMA, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0", "llama"]),
    (LLAMA, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    (LLAMA, {"num_local_experts": 8}, ["num_local_experts", "8"]),
    (LLAMA, {"embedding_multiplier": 12.0}, ["embedding_multiplier"]),
    (LLAMA, {"logit_scale": 0.0625}, ["logit_scale"]),
    (LLAMA, {"sliding_window": 16}, ["sliding_window", "llama"]),
    (LLAMA, {"use_qk_norm": True}, ["use_qk_norm"]),
    (LLAMA, {"attention_chunk_size": 8192}, ["attention_chunk_size"]),
    (QWEN2, {"layer_types": ["linear_attention"]}, ["linear_attention", "sliding_attention"]),
    (QWEN2, {"layer_types": ["sliding_attention"]}, ["layer_types", "1 of 1", "0 layers"]),
    (LLAMA, {"layer_types": ["sliding_attention"]}, ["layer_types", "llama"]),
    (FALCON, {"apply_residual_connection_post_layernorm": True}, ["post_layernorm"]),
    (FALCON, {"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn 2"]),
    (
        FALCON,
        {"new_decoder_architecture": True, "parallel_attn": False},
        ["new_decoder_architecture", "parallel"],
    ),
    (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["'gptq'"]),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, ["'awq'", "bitsandbytes"]),
    (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, ["'fp8'"]),
    (LLAMA, {"quantization_config": {"bits": 4}}, ["quant_method"]),
    (LLAMA, {"compression_config": {"format": "pack"}}, ["compression_config"]),
]


@pytest.mark.parametrize(("start", "changes", "words"), WRONG)
def test_a_wrong_config_is_refused(start: dict, changes: dict, words: list[str]) -> None:
    refuse(QllmFileError, ["config.json", *words], lambda: describe(start | changes))


@pytest.mark.parametrize(("start", "changes", "words"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(
    start: dict, changes: dict, words: list[str]
) -> None:
    refuse(QllmUnsupportedError, words, lambda: describe(start | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1},
        {"attn_logit_softcapping": None},
        {"use_sliding_window": False},
        {"logit_scale": 1.0},
        {"_attn_implementation": "sdpa"},
        {"transformers_version": "5.0.0", "use_cache": True, "pretraining_tp": 2},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default", "factor": None}},
        {"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}},
    ],
)
def test_keys_that_change_nothing_are_passed_over(changes: dict) -> None:
    plain, other = describe(LLAMA), describe(LLAMA | changes)
    assert {k: str(v) for k, v in plain.decoder.items()} == {
        k: str(v) for k, v in other.decoder.items()
    }
    assert plain.linears == other.linears and plain.vectors == other.vectors


KEYS = sorted(
    {key for start, changes, _ in WRONG + UNSUPPORTED for key in [*start, *changes]}
    | {"mlp_bias", "sliding_window", "max_window_layers", "layer_norm_epsilon", "ffn_hidden_size"}
)
ROPE_KEYS = [
    "type", "rope_type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "original_max_position_embeddings", "partial_rotary_factor",
]
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-2, 70), st.floats(allow_nan=False)
)
WORDS = st.sampled_from(["yarn", "llama3", "dynamic", "linear", "default", "gelu", "", "\n", "1"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=2)
    ),
    max_leaves=4,
)
ROPES = st.builds(
    lambda kind, rest: {"rope_type": kind} | rest,
    st.sampled_from(["linear", "dynamic", "llama3", "yarn"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS), st.one_of(NUMBERS, VALUES), max_size=5),
)


@settings(max_examples=400, deadline=None)
@given(
    start=st.sampled_from([LLAMA, FALCON, QWEN2]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    rope=st.one_of(st.none(), ROPES),
)
def test_any_config_is_understood_or_refused(start: dict, changes: dict, rope: Any) -> None:
    """No other exception, no figure that is not finite, and no more than a bounded table."""
    config = start | changes | ({"rope_scaling": rope} if rope else {})
    if isinstance(config.get("num_hidden_layers"), int) and config["num_hidden_layers"] > 64:
        config["num_hidden_layers"] = 64  # up to 10,000 are allowed, and would only take time
    try:
        decoder = describe(config).decoder
    except QllmError as error:
        assert "config.json" in str(error)
        return
    if decoder["position"] == "rope":
        assert np.isfinite(decoder["rope_inv_freq"]).all() and np.isfinite(decoder["rope_scale"])
        assert len(decoder["rope_inv_freq"]) == decoder["rotary_dim"] // 2 > 0


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    config = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    write(tmp_path, config, tensors(LLAMA))
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    model = qllm.Model.from_pretrained(tmp_path)
    assert model.logits([1, 2]).shape == (2, 11)
    assert not marker.exists()


# -------------------------------------------------------------------------------- the checkpoint


def load(folder: Path) -> Any:
    return lambda: qllm.Model.from_pretrained(folder)


def test_the_vocabulary_must_match_the_embedding(tmp_path: Path) -> None:
    write(tmp_path, LLAMA | {"vocab_size": 12}, tensors(LLAMA))
    refuse(QllmFileError, ["model.embed_tokens.weight", "[11, 8]", "[12, 8]"], load(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        weights = tensors(LLAMA)
        del weights[name]
        write(tmp_path, LLAMA, weights)
        refuse(QllmFileError, [name, "no tensor"], load(tmp_path))


def test_a_missing_embedding_is_named(tmp_path: Path) -> None:
    weights = tensors(LLAMA)
    del weights["model.embed_tokens.weight"]
    write(tmp_path, LLAMA, weights)
    refuse(QllmFileError, ["model.embed_tokens.weight", "'embed_tokens.weight'"], load(tmp_path))


def test_a_missing_output_embedding_is_an_error_unless_it_is_tied(tmp_path: Path) -> None:
    weights = tensors(LLAMA)
    del weights["lm_head.weight"]
    write(tmp_path, LLAMA, weights)
    refuse(QllmFileError, ["lm_head.weight", "tie_word_embeddings"], load(tmp_path))
    write(tmp_path, LLAMA | {"tie_word_embeddings": True}, weights)
    assert load(tmp_path)().architecture.tied


def test_a_tied_output_embedding_must_be_the_embedding(tmp_path: Path) -> None:
    config, weights = LLAMA | {"tie_word_embeddings": True}, tensors(LLAMA)
    write(tmp_path, config, weights)
    refuse(QllmFileError, ["lm_head.weight", "differs", "tie_word_embeddings"], load(tmp_path))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write(tmp_path, config, weights)
    assert load(tmp_path)().architecture.tied


def test_tensors_that_nobody_needs_are_refused(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.experts.0.weight": np.zeros((2, 2), "f")}
    write(tmp_path, LLAMA, tensors(LLAMA) | extra)
    refuse(QllmFileError, ["1 tensors", "model.layers.0.mlp.experts.0.weight"], load(tmp_path))


def test_a_bias_that_the_config_does_not_have_is_refused(tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(8, "f")}
    write(tmp_path, LLAMA, tensors(LLAMA) | bias)
    refuse(QllmFileError, ["self_attn.q_proj.bias"], load(tmp_path))


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    config = LLAMA | {"attention_bias": True}
    weights = tensors(config)
    del weights["model.layers.0.self_attn.v_proj.bias"]
    write(tmp_path, config, weights)
    refuse(QllmFileError, ["self_attn.v_proj.bias"], load(tmp_path))


def test_buffers_of_old_versions_are_passed_over(tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f"),
        "model.layers.0.self_attn.masked_bias": np.zeros((), "f"),
    }
    write(tmp_path, LLAMA, tensors(LLAMA) | buffers)
    assert load(tmp_path)().architecture.decoder["layers"] == 1


def test_a_layer_of_another_shape_is_named(tmp_path: Path) -> None:
    weights = tensors(LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].T.copy()
    write(tmp_path, LLAMA, weights)
    refuse(QllmFileError, [name, "[12, 8]", "[8, 12]"], load(tmp_path))


@pytest.mark.parametrize("dtype", ["f8", "i4", "i8", "?"])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights = tensors(LLAMA)
    weights[name] = weights[name].astype(dtype)
    write(tmp_path, LLAMA, weights)
    stored = {"f8": "F64", "i4": "I32", "i8": "I64", "?": "BOOL"}[dtype]
    refuse(QllmUnsupportedError, [name, f"stored as {stored}", "BF16"], load(tmp_path))


def test_float8_weights_are_refused_by_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writes float8")
    from safetensors.torch import save_file as save_torch

    weights = {name: torch.from_numpy(array) for name, array in tensors(LLAMA).items()}
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_torch(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    refuse(QllmUnsupportedError, [name, "F8_E4M3"], load(tmp_path))


def test_weights_marked_as_quantized_without_state_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights = tensors(LLAMA)
    weights[name] = np.zeros((48, 1), np.uint8)
    write(tmp_path, LLAMA, weights)
    refuse(QllmUnsupportedError, [name, "stored as U8"], load(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_cannot_be_quantized(tmp_path: Path, value: float) -> None:
    name = "model.layers.0.mlp.down_proj"
    weights = tensors(LLAMA)
    weights[name + ".weight"][3, 4] = value
    write(tmp_path, LLAMA, weights)
    with pytest.raises(qllm.QllmValueError) as caught:
        qllm.Model.from_pretrained(tmp_path, "nf4")
    assert name in str(caught.value) and str(abs(value)) in str(caught.value)


@pytest.mark.parametrize("eos", ["</s>", True, -1, 2.0, [1, "2"]])
def test_a_wrong_eos_is_refused(tmp_path: Path, eos: Any) -> None:
    write(tmp_path, LLAMA | {"eos_token_id": eos}, tensors(LLAMA))
    refuse(QllmFileError, ["eos_token_id", "token ids"], load(tmp_path))


@pytest.mark.parametrize("threshold", ["6", True, -1.0, {}])
def test_a_wrong_int8_threshold_is_refused(tmp_path: Path, threshold: Any) -> None:
    config = LLAMA | {
        "quantization_config": {"load_in_8bit": True, "llm_int8_threshold": threshold}
    }
    write(tmp_path, config, tensors(LLAMA))
    refuse(QllmFileError, ["llm_int8_threshold"], load(tmp_path))
