"""Folders go both ways between qllm and transformers with bitsandbytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm.checkpoint import Checkpoint

torch = pytest.importorskip("torch", reason="transformers and bitsandbytes are the oracle")
transformers = pytest.importorskip("transformers", reason="it is the oracle")
bnb = pytest.importorskip("bitsandbytes", reason="it is the oracle")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes with it")

import tiny_models  # noqa: E402

torch.set_num_threads(1)  # for models this small, torch's threads take longer than the work

IDS = np.random.default_rng(7).integers(0, 131, 40).tolist()
# rows of 64, 128 and 256 elements: bitsandbytes' CPU kernels are wrong for some other widths
CONFIGS = {
    "llama": tiny_models.LLAMA | {"intermediate_size": 128, "dtype": "float32"},
    "falcon": tiny_models.FALCON | {"dtype": "float32"},
}
LAYERS = {"llama": 14, "falcon": 8}
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
CASES = [("llama", format) for format in OPTIONS] + [
    ("falcon", format) for format in ("nf4", "nf4-dq", "int8")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bnb")
    return {
        name: tiny_models.write(root / name, config, tiny_models.tensors(config))
        for name, config in CONFIGS.items()
    }


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture(autouse=True)
def _falcon_of_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 quantizes layers of the class torch.nn.Linear alone and leaves out those of
    Falcon, whose class computes the same."""
    from transformers.models.falcon import modeling_falcon

    monkeypatch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Name -> dtype, shape and bytes of every tensor of a folder."""
    with Checkpoint.open(folder) as checkpoint:
        entries = [checkpoint.entry(name) for name in checkpoint.names()]
        return {e.name: f"{e.dtype} {e.shape} ".encode() + bytes(e.data) for e in entries}


def logits_of(theirs: Any, training: bool = True) -> np.ndarray:
    """In training mode, in which bitsandbytes neither rounds the scales of 4-bit weights to
    bfloat16 nor the inputs of int8 layers."""
    with torch.no_grad():
        return theirs.train(training)(torch.tensor([IDS])).logits[0].float().numpy()


def compare(ours: qllm.Model, theirs: Any, source: Path, format: str) -> None:
    """The logits agree as far as those of bitsandbytes are sure: 4-bit weights to float32; int8,
    where a code of an input may fall to either side, closer than theirs of the model at `source`
    are to themselves in bfloat16."""
    if format != "int8":
        assert distance(ours.logits(IDS), logits_of(theirs)) < 1e-5
        return
    options = transformers.BitsAndBytesConfig(load_in_8bit=True)
    fine, coarse = (
        logits_of(load_theirs(source, quantization_config=options, dtype=dtype), False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert distance(ours.logits(IDS), logits_of(theirs, False)) < distance(coarse, fine)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def dequantized_logits(ours: qllm.Model, folder: Path) -> np.ndarray:
    """What transformers computes in float32 with the values of our weights."""
    plain = load_theirs(folder, dtype=torch.float32)
    for linear in ours.architecture.modules:
        if linear is not ours.architecture.head:
            weight = ours.decoder.linear(linear.slot).dequantize()
            with torch.no_grad():
                plain.get_submodule(linear.module).weight.copy_(torch.from_numpy(weight))
    return logits_of(plain)


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


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_transformers_loads_what_qllm_saves(
    folders: dict[str, Path], tmp_path: Path, kind: str, format: str
) -> None:
    """Some layers left out; the tensors that bitsandbytes holds and would save are ours, byte for
    byte, and the logits those of the same values."""
    folder = folders[kind]
    skip = {"llama": "*.0.self_attn.q_proj", "falcon": "*.0.mlp.dense_h_to_4h"}[kind]
    ours = qllm.Model.from_pretrained(folder, format, skip=skip, compute="exact")
    ours.save(tmp_path / "saved")
    theirs = load_theirs(tmp_path / "saved")
    modules = quantized_modules(theirs)
    assert set(modules) == {name for name, kind in ours.formats.items() if kind == format}
    assert len(modules) == LAYERS[kind] - 1
    slots = {linear.module: linear.slot for linear in ours.architecture.modules}
    saved = tensors_of(tmp_path / "saved")
    for name, module in modules.items():
        weight = ours.decoder.linear(slots[name]).dequantize()
        if format == "int8":
            np.testing.assert_allclose(dequantized(module), weight, rtol=3e-7)
        else:
            assert np.array_equal(dequantized(module), weight)
        for key, tensor in module.state_dict().items():
            assert saved[f"{name}.{key}"].endswith(tensor.reshape(-1).view(torch.uint8).numpy(
                ).tobytes()), key
    assert distance(logits_of(theirs), dequantized_logits(ours, folder)) < 1e-5
    compare(ours, theirs, folder, format)


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_qllm_loads_what_transformers_saves(
    folders: dict[str, Path], tmp_path: Path, kind: str, format: str
) -> None:
    """In several files; saved again, every tensor is the one of their folder, byte for byte."""
    options = transformers.BitsAndBytesConfig(**OPTIONS[format])
    theirs = load_theirs(folders[kind], quantization_config=options, dtype=torch.float32)
    modules = quantized_modules(theirs)
    assert len(modules) == LAYERS[kind]
    expected = {name: dequantized(module) for name, module in modules.items()}
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours = qllm.Model.from_pretrained(tmp_path / "theirs", compute="exact")
    assert ours.formats == {
        name: "f32" if name == "lm_head" else format for name in ours.formats
    }
    slots = {linear.module: linear.slot for linear in ours.architecture.modules}
    for name, values in expected.items():
        held = ours.decoder.linear(slots[name])
        if format == "int8":
            np.testing.assert_allclose(held.dequantize(), values, rtol=3e-7)
        else:
            assert np.array_equal(held.dequantize(), values)
    compare(ours, theirs, folders[kind], format)
    with pytest.raises(qllm.QllmUnsupportedError, match=f"only as {format}"):
        ours.quantize_("bf16")
    ours.save(tmp_path / "ours")
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
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
