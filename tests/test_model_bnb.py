"""Folders go both ways between qllm and transformers with bitsandbytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm

torch = pytest.importorskip("torch", reason="transformers and bitsandbytes are the oracle")
transformers = pytest.importorskip("transformers", reason="it is the oracle")
bnb = pytest.importorskip("bitsandbytes", reason="it is the oracle")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes with it")

import tiny_models  # noqa: E402

torch.set_num_threads(1)  # for models this small, torch's threads take longer than the work

IDS = np.random.default_rng(7).integers(0, 131, 40).tolist()
# rows of 64 and 128 elements: bitsandbytes' CPU kernels are wrong for some other widths
CONFIG = tiny_models.LLAMA | {"intermediate_size": 128, "dtype": "float32"}
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = tiny_models.tensors(CONFIG)
    return tiny_models.write(tmp_path_factory.mktemp("bnb") / "llama", CONFIG, weights)


def load_theirs(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def dequantized(module: Any) -> np.ndarray:
    """The weight of a quantized layer of bitsandbytes: table value times absmax, float32."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        codes = module.state.CB if module.state.CB is not None else weight.data
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        return codes.float().numpy() * (scales.float()[:, None].numpy() / np.float32(127))
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(
            state.state2.blocksize
        )[: absmax.numel()]
        absmax = absmax + state.offset
    packed = weight.data.reshape(-1).view(torch.uint8).long()
    codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)
    values = state.code[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return values.reshape(state.shape).numpy()


def quantized_modules(model: Any) -> dict[str, Any]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("format", OPTIONS)
def test_transformers_loads_what_qllm_saves(folder: Path, tmp_path: Path, format: str) -> None:
    ours = qllm.Model.from_pretrained(folder, format, skip="*.0.self_attn.q_proj", compute="exact")
    ours.save(tmp_path / "saved")
    theirs = load_theirs(tmp_path / "saved")
    modules = quantized_modules(theirs)
    assert set(modules) == {name for name, kind in ours.formats.items() if kind == format}
    assert len(modules) == 13
    slots = {linear.module: linear.slot for linear in ours.architecture.modules}
    for name, module in modules.items():
        weight = ours.decoder.linear(slots[name]).dequantize()
        if format == "int8":
            np.testing.assert_allclose(dequantized(module), weight, rtol=3e-7)
        else:
            assert np.array_equal(dequantized(module), weight)
    if format == "int8":
        return  # its products are rounded to float16 there
    logits = theirs(torch.tensor([IDS])).logits[0].float().detach().numpy()
    difference = np.abs(logits - ours.logits(IDS)).max() / np.abs(logits).max()
    assert difference < 1e-5


@pytest.mark.parametrize("format", OPTIONS)
def test_qllm_loads_what_transformers_saves(folder: Path, tmp_path: Path, format: str) -> None:
    options = transformers.BitsAndBytesConfig(**OPTIONS[format])
    theirs = load_theirs(folder, quantization_config=options, dtype=torch.bfloat16)
    modules = quantized_modules(theirs)
    assert len(modules) == 14
    expected = {name: dequantized(module) for name, module in modules.items()}
    theirs.save_pretrained(tmp_path / "theirs")
    ours = qllm.Model.from_pretrained(tmp_path / "theirs", compute="exact")
    assert ours.formats == {
        name: "bf16" if name == "lm_head" else format for name in ours.formats
    }
    slots = {linear.module: linear.slot for linear in ours.architecture.modules}
    for name, values in expected.items():
        held = ours.decoder.linear(slots[name])
        if format == "int8":
            np.testing.assert_allclose(held.dequantize(), values, rtol=3e-7)
        else:
            assert np.array_equal(held.dequantize(), values)
    with pytest.raises(qllm.QllmUnsupportedError, match=f"only as {format}"):
        ours.quantize_("bf16")
    ours.save(tmp_path / "ours")
    again = qllm.Model.from_pretrained(tmp_path / "ours", compute="exact")
    assert np.array_equal(again.logits(IDS), ours.logits(IDS))


def test_a_mixture_of_4bit_formats_is_loaded_by_transformers(folder: Path, tmp_path: Path) -> None:
    ours = qllm.Model.from_pretrained(folder, compute="exact")
    ours.quantize_("nf4", include="*.mlp.*")
    ours.quantize_("fp4-dq", include="*.self_attn.*", blocksize=128)
    ours.save(tmp_path / "saved")
    modules = quantized_modules(load_theirs(tmp_path / "saved"))
    assert len(modules) == 14
    slots = {linear.module: linear.slot for linear in ours.architecture.modules}
    for name, module in modules.items():
        assert module.weight.quant_state.nested == ("self_attn" in name)
        weight = ours.decoder.linear(slots[name]).dequantize()
        assert np.array_equal(dequantized(module), weight)
