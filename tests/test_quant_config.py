"""QuantConfig from the options of bitsandbytes: what has a counterpart is taken, what has none is
refused with one sentence."""

from __future__ import annotations

from typing import Any

import pytest

import qllm
from qllm.bnb import quantization_config


def test_a_config_of_bitsandbytes_is_understood() -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert qllm.QuantConfig.from_bnb(four).format == "nf4-dq"
    assert qllm.QuantConfig.from_bnb({"load_in_4bit": True}).format == "fp4"
    eight = qllm.QuantConfig.from_bnb({"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]})
    assert eight.format == "int8" and eight.skip == ("*q_proj", "*q_proj.*")
    for format in ("nf4", "fp4-dq", "int8"):
        written = quantization_config(format, compute_dtype="bfloat16", skip_modules=["lm_head"])
        assert qllm.QuantConfig.from_bnb(written) == qllm.QuantConfig(
            format, skip=("*lm_head", "*lm_head.*")
        )
    with pytest.raises(qllm.QllmValueError, match="load_in_4bit is False"):
        qllm.QuantConfig.from_bnb({})


@pytest.mark.parametrize(("config", "words"), [
    (None, "the config is a NoneType; the dict that to_dict"),
    ({}, "load_in_4bit is False and load_in_8bit is False"),
    ({"load_in_4bit": "no"}, "load_in_4bit is 'no'; True or False"),
    ({"load_in_4bit": True, "bnb_4bit_use_double_quant": 1}, "double_quant is '1'; True or False"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": [4]}, "no format"),
    ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "'lm_head'; a list of names"),
    ({"load_in_8bit": True, "llm_int8_skip_modules": [3]}, "a list of names"),
    ({"load_in_4bit": True, "quant_method": "gptq"}, "quant_method is 'gptq'; the config of bits"),
    ({"load_in_4bit": True, "bits": 4}, "the option 'bits', which is not known; known are load_in"),
    ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "storage is 'bfloat16'; packed"),
    ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "compute_dtype is 'int8'; float32"),
    ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "no part of a model is off"),
    ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "weights stay int8 here"),
    ({"load_in_8bit": True, "llm_int8_threshold": 4.0}, "threshold is '4.0'; it belongs to the mo"),
    ({"load_in_8bit": True, "_load_in_8bit": False}, "_load_in_8bit is 'False'; they must be equal"),
])
def test_a_config_of_bitsandbytes_is_not_guessed_at(config: Any, words: str) -> None:
    """A name that was no list skipped layers by its letters."""
    with pytest.raises(qllm.QllmValueError, match=words):
        qllm.QuantConfig.from_bnb(config)
