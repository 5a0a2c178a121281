"""Small random models of transformers, one for each variant that qllm supports.

Weights are random in every place, norms and biases too, so that a part which is left out or mixed
up shows in the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 131

torch.set_num_threads(1)  # for models this small, torch's threads take longer than the work


@dataclass(frozen=True)
class Variant:
    """A configuration, and how long a text must be to show what is special in it."""

    config_class: str
    options: dict[str, Any]
    length: int = 56
    one_by_one: bool = False  # compare with a decode loop, not with one pass over the text
    saved_as: dict[str, Any] = field(default_factory=dict)  # changes of config.json


def _llama(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    } | options


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0} | parameters}


def _falcon(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "alibi": False,
        "bias": False,
    } | options


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, Variant] = {
    "llama": Variant("LlamaConfig", _llama(rms_norm_eps=1e-5)),
    "llama-no-gqa-odd-width": Variant(
        "LlamaConfig", _llama(num_key_value_heads=4, intermediate_size=75, num_hidden_layers=3)
    ),
    "llama-multi-query": Variant("LlamaConfig", _llama(num_key_value_heads=1)),
    "llama-head-dim": Variant("LlamaConfig", _llama(head_dim=24)),
    "llama-tied": Variant("LlamaConfig", _llama(tie_word_embeddings=True)),
    "llama-biases": Variant("LlamaConfig", _llama(attention_bias=True, mlp_bias=True)),
    "llama-gelu-tanh": Variant("LlamaConfig", _llama(hidden_act="gelu_pytorch_tanh")),
    "llama-gelu": Variant("LlamaConfig", _llama(hidden_act="gelu")),
    "llama-theta": Variant("LlamaConfig", _llama(**_rope(rope_type="default", rope_theta=5e5))),
    "llama-linear": Variant("LlamaConfig", _llama(**_rope(rope_type="linear", factor=4.0)), 96),
    "llama-dynamic": Variant(
        "LlamaConfig",
        _llama(**_rope(rope_type="dynamic", factor=4.0), max_position_embeddings=40),
        72,
        one_by_one=True,
    ),
    "llama-llama3": Variant(
        "LlamaConfig",
        _llama(
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
        120,
    ),
    "llama-yarn": Variant("LlamaConfig", _llama(**_rope(**_YARN)), 120),
    "llama-yarn-attention-factor": Variant(
        "LlamaConfig",
        _llama(**_rope(**_YARN, attention_factor=0.8, beta_fast=16.0, beta_slow=2.0)),
        120,
    ),
    "llama-yarn-mscale": Variant(
        "LlamaConfig",
        _llama(**_rope(**_YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False)),
        120,
    ),
    "llama-yarn-no-factor": Variant(
        "LlamaConfig",
        _llama(**_rope(rope_type="yarn", factor=None, original_max_position_embeddings=64)),
        120,
    ),
    "mistral": Variant("MistralConfig", _llama(sliding_window=None)),
    "mistral-window": Variant("MistralConfig", _llama(sliding_window=20, head_dim=32), 80),
    "qwen2": Variant("Qwen2Config", _llama(tie_word_embeddings=True)),
    "qwen2-window": Variant(
        "Qwen2Config",
        _llama(
            num_hidden_layers=3, use_sliding_window=True, sliding_window=17, max_window_layers=1
        ),
        80,
    ),
    "qwen2-layer-types": Variant(
        "Qwen2Config",
        _llama(
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=17,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        80,
    ),
    "qwen2-yarn": Variant("Qwen2Config", _llama(**_rope(**_YARN)), 120),
    "qwen3": Variant("Qwen3Config", _llama(head_dim=24)),
    "qwen3-bias-tied": Variant(
        "Qwen3Config", _llama(head_dim=16, attention_bias=True, tie_word_embeddings=True)
    ),
    "falcon-7b": Variant("FalconConfig", _falcon(multi_query=True, parallel_attn=True)),
    "falcon-7b-bias": Variant(
        "FalconConfig", _falcon(multi_query=True, parallel_attn=True, bias=True)
    ),
    "falcon-7b-untied": Variant(
        "FalconConfig", _falcon(multi_query=True, parallel_attn=True, tie_word_embeddings=False)
    ),
    "falcon-11b": Variant(
        "FalconConfig",
        _falcon(
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=1,
            num_kv_heads=2,
            ffn_hidden_size=120,
        ),
    ),
    "falcon-40b": Variant(
        "FalconConfig", _falcon(new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-40b-bias": Variant(
        "FalconConfig",
        _falcon(
            new_decoder_architecture=True, num_ln_in_parallel_attn=2, num_kv_heads=4, bias=True
        ),
    ),
    "falcon-rw": Variant(
        "FalconConfig",
        _falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True),
    ),
    "falcon-rw-odd-heads": Variant(
        "FalconConfig",
        _falcon(
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
            hidden_size=96,
            num_attention_heads=6,
        ),
    ),
    "falcon-alibi-multi-query": Variant(
        "FalconConfig", _falcon(multi_query=True, parallel_attn=True, alibi=True)
    ),
    "falcon-serial-rope": Variant(
        "FalconConfig", _falcon(multi_query=False, parallel_attn=False, activation="gelu_new")
    ),
}


def build(variant: Variant, folder: Path) -> Any:
    """The variant's model with random weights, float32, saved in `folder`."""
    config_class = getattr(transformers, variant.config_class)
    config = config_class(
        **variant.options, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa"
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                centre = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def one_pass(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocab) of one pass over the text."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def step_by_step(model: Any, ids: list[int]) -> torch.Tensor:
    """The same by a decode loop with a cache."""
    cache, rows = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for token in ids:
            rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


def greedy(model: Any, ids: list[int], count: int, one_by_one: bool) -> list[int]:
    """The `count` most probable tokens after the text, one after the other, by a decode loop."""
    cache, new = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in [[token] for token in ids] if one_by_one else [ids]:
            logits = model(torch.tensor([part]), past_key_values=cache).logits[0, -1]
        while True:
            new.append(int(logits.argmax()))
            if len(new) == count:
                return new
            logits = model(torch.tensor([[new[-1]]]), past_key_values=cache).logits[0, -1]
