"""qllm.integrations.transformers: quantizing while transformers loads, saving, loading again; the
newest transformers in this process, the last of version 4 in one of its own."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm

torch = pytest.importorskip("torch", reason="its modules are what is tested")
transformers = pytest.importorskip("transformers", reason="its models are what is tested")

from qllm.integrations.torch import Linear, quantize_  # noqa: E402
from qllm.integrations.transformers import QllmConfig, bnb_config  # noqa: E402
from qllm.integrations.transformers_layers import Swap  # noqa: E402

transformers.utils.logging.disable_progress_bar()

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
IDS = torch.arange(2, 10)[None]
OTHER = Path(__file__).resolve().parent.parent / ".venv" / "transformers-4.57"
"""The last transformers of version 4, and what it needs in other versions than the newest."""

IS_4 = transformers.__version__.startswith("4.")
AutoModel = transformers.AutoModelForCausalLM


def config_of(kind: str) -> Any:
    small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama": lambda: transformers.LlamaConfig(**small, intermediate_size=96),
        "tied": lambda: transformers.LlamaConfig(
            **small, intermediate_size=96, tie_word_embeddings=True),
        "falcon": lambda: transformers.FalconConfig(**small, bias=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2),
    }[kind]()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers are slower in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def other_run() -> Iterator[subprocess.Popen[str] | None]:
    """This file in a process of its own, which finds transformers 4 first, beside the tests here;
    None where it is not there, or is what runs here."""
    if IS_4 or not OTHER.is_dir():
        yield None
        return
    path = os.pathsep.join([str(OTHER), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = ("import transformers, pytest, sys; assert transformers.__version__[:5] == '4.57.'; "
            "sys.exit(pytest.main(sys.argv[1:]))")
    run = subprocess.Popen(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True)
    yield run
    run.kill()
    run.communicate()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unquantized models by kind, in bfloat16 and in two files each."""
    made = {}
    for kind in ("llama", "tied", "falcon", "gpt2"):
        torch.manual_seed(3)
        model = AutoModel.from_config(config_of(kind)).to(torch.bfloat16)
        for name, tensor in model.named_parameters():
            tensor.data += 0.1 * torch.randn(tensor.shape) if "norm" not in name else 0
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(made[kind], max_shard_size="100KB")
    return made


def load(folder: Path, format: str | None = None, **options: Any) -> Any:
    quantization = {} if format is None else {"quantization_config": QllmConfig(format, **options)}
    return AutoModel.from_pretrained(folder, dtype="auto", **quantization)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits[0].float()


def tokens(model: Any) -> list[int]:
    ids: list[int] = model.generate(IDS, do_sample=False, max_new_tokens=6, pad_token_id=0,
                                    attention_mask=torch.ones_like(IDS))[0].tolist()
    return ids


def same_state(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


CASES = [("llama", format) for format in FORMATS] + [
    ("falcon", "nf4"), ("falcon", "int8"), ("tied", "nf4-dq"), ("gpt2", "fp4")]


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_loading_saving_and_loading_again(
    kind: str, format: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders[kind], format)
    reference = load(folders[kind])
    rows = list(quantize_(reference, format))
    assert list(model.hf_quantizer.report) == rows
    assert [row.module for row in rows if not row.changed] == ["lm_head"]
    assert same_state(model, reference) and torch.equal(logits(model), logits(reference))
    expected = tokens(reference)
    assert tokens(model) == expected and len(expected) > IDS.numel()

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "qllm", "format": format, "include": None, "skip": None, "blocksize": 64,
        "quantize_head": False, "compute": "auto", "int8_threshold": 6.0}
    again = load(tmp_path)
    assert same_state(again, model) and tokens(again) == expected
    assert type(again.config.quantization_config) is QllmConfig
    assert again.hf_quantizer.report.changed == len(rows) - 1
    again.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), model)

    if kind != "gpt2":
        read = qllm.Model.from_pretrained(tmp_path)
        found = read.logits(IDS[0].numpy())
        direct = qllm.Model.from_pretrained(folders[kind], format).logits(IDS[0].numpy())
        assert read.formats["lm_head"] == "bf16" and set(read.formats.values()) == {"bf16", format}
        assert np.array_equal(found, direct)
        difference = np.abs(found - logits(model).numpy()).max()
        assert difference < 0.05 * np.abs(found).max()


def test_one_weight_at_a_time(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is quantized, those before it are freed, and those behind it not read."""
    arrived: list[tuple[str, Any]] = []
    quantize = Swap.quantize

    def watched(swap: Any, name: str, weight: Any) -> Any:
        assert [other for other, tensor in arrived if tensor() is not None] == []
        arrived.append((name, weakref.ref(weight)))
        names = {name for name, _ in arrived}
        assert all(layer.weight.is_meta for other, layer in swap.model.named_modules()
                   if type(layer) is torch.nn.Linear and swap.selects(other) and other not in names)
        return quantize(swap, name, weight)

    monkeypatch.setattr(Swap, "quantize", watched)
    load(folders["llama"], "nf4")
    assert len(arrived) == 14


def test_options(folders: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(
        folders["llama"], dtype=torch.float16, device_map="cpu", quantization_config=QllmConfig(
            "nf4", include="model.layers.*", skip=["*.down_proj", "*.0.mlp.*"], blocksize=128,
            compute="exact"))
    reasons = {row.module: row.reason for row in model.hf_quantizer.report}
    assert {name for name, reason in reasons.items() if not reason} == {
        f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"
    } | {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert reasons["model.layers.1.mlp.down_proj"] == "skip has '*.down_proj'"
    layer = model.model.layers[1].mlp.up_proj
    assert (layer.blocksize, layer.compute, layer.weight_dtype) == (128, "exact", torch.float16)
    assert model.lm_head.weight.dtype == model.dtype == torch.float16
    assert '"skip": [' in repr(model.config.quantization_config)
    whole = load(folders["llama"], "int8", quantize_head=True, int8_threshold=3)
    assert isinstance(whole.lm_head, Linear) and whole.lm_head.int8_threshold == 3
    assert whole.hf_quantizer.is_trainable and whole.hf_quantizer.is_serializable()


def test_tied_embeddings_copies_and_dequantizing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(
        folders["tied"], dtype=torch.float32, quantization_config=QllmConfig("nf4"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for one in (model, again):
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert not one.lm_head.weight.is_meta and type(one.lm_head) is torch.nn.Linear
    copied = copy.deepcopy(again)
    assert same_state(copied, model) and tokens(copied) == tokens(model)
    linear = copied.dequantize()
    assert not any(isinstance(layer, Linear) for layer in linear.modules())
    assert not hasattr(linear.config, "quantization_config")
    weight = model.model.layers[0].mlp.up_proj.dequantize(linear.dtype)
    assert torch.equal(linear.model.layers[0].mlp.up_proj.weight, weight)
    assert (logits(linear) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()


@pytest.mark.parametrize(("options", "words"), [
    ({"format": "q4_0"}, "there is no format 'q4_0'"),
    ({"format": "bf16"}, "a layer cannot become bf16; it can become nf4"),
    ({"bits": 4}, "QllmConfig has no option 'bits'; there are format, include"),
    ({"blocksize": 48}, "blocksize is '48'; a power of two"),
    ({"skip": 3}, "skip has '3'; a pattern over names"),
    ({"compute": "fast"}, "compute is 'fast'; supported are exact"),
    ({"int8_threshold": "6"}, "int8_threshold is '6'; a number"),
    ({"quant_method": "gptq"}, "quant_method is 'gptq'; qllm was expected"),
])
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(qllm.QllmValueError, match=words):
        QllmConfig.from_dict({"format": "nf4"} | options)


def test_loads_that_cannot_be_done(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, options, words in (
        ("llama", {"include": "layers.*"}, "'layers.\\*' in include matches no linear layer"),
        ("llama", {"skip": "*"}, "no linear layer is selected: .*lm_head: skip has"),
        ("tied", {"quantize_head": True}, "lm_head shares its weight with the embedding"),
    ):
        with pytest.raises(qllm.QllmValueError, match=words):
            load(folders[kind], "nf4", **options)
    with pytest.raises(qllm.QllmUnsupportedError, match="device_map has 'cuda:0'; qllm loads on"):
        AutoModel.from_pretrained(
            folders["llama"], device_map={"": "cuda:0"}, quantization_config=QllmConfig("nf4"))
    model = load(folders["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(qllm.QllmValueError, match="layers.1.mlp.up_proj.*row 2.*column 3"):
        load(tmp_path, "nf4")


def rewrite(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a folder of one file, with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_folders_that_are_damaged(folders: dict[str, Path], tmp_path: Path) -> None:
    load(folders["llama"], "nf4-dq").save_pretrained(tmp_path / "whole")
    name = "model.layers.1.mlp.up_proj"

    def shorter(state: Any) -> None:
        state[f"{name}.weight.absmax"] = state[f"{name}.weight.absmax"][1:].clone()

    def elsewhere(state: Any) -> None:
        for key in [key for key in state if key.startswith(name)]:
            state["model.norm" + key.removeprefix(name)] = state.pop(key)

    for i, (change, words) in enumerate((
        (lambda state: state.pop(f"{name}.weight.quant_map"), f"{name}.* lacks its part 'quant_m"),
        (lambda state: state.pop(f"{name}.weight"), f"{name}.*no tensor|no {name}.weight"),
        (shorter, f"{name}.*absmax.* of shape"),
        (elsewhere, "model.norm is quantized in the folder.*the module is a LlamaRMSNorm"),
    )):
        folder = rewrite(tmp_path / "whole", tmp_path / str(i), change)
        with pytest.raises(qllm.QllmError, match=words):
            load(folder)
    text = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "0" / "config.json").write_text(text.replace('"compute"', '"computes"'))
    with pytest.raises(qllm.QllmValueError, match="QllmConfig has no option 'computes'"):
        load(tmp_path / "0")


def test_layers_without_a_weight_in_the_folder_stay_new(folders: dict[str, Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders["llama"], num_labels=3, quantization_config=QllmConfig("nf4"))
    rows = {row.module: row for row in model.hf_quantizer.report}
    assert rows["score"].reason == "the folder has no weight for it" and len(rows) == 15
    assert type(model.score) is torch.nn.Linear and model.score.weight.requires_grad
    assert torch.isfinite(model.score.weight).all() and not model.score.weight.is_meta
    assert sum(isinstance(layer, Linear) for layer in model.modules()) == 14


def test_a_model_and_its_body_load_each_other(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Their folders differ in the prefix of names, and in the output embedding."""
    whole = load(folders["llama"], "int8", quantize_head=True)
    whole.save_pretrained(tmp_path / "whole")
    body = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype="auto")
    assert same_state(body, whole.model)
    body.save_pretrained(tmp_path / "body")
    again = load(tmp_path / "body")
    assert same_state(again.model, whole.model) and type(again.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_folders_go_to_bitsandbytes_and_come_from_there(
    format: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="it reads and writes the folders")
    model = load(folders["llama"], format)
    stored = bnb_config(model)
    assert stored["llm_int8_skip_modules"] == ["lm_head"]
    model.config.quantization_config = stored
    model.save_pretrained(tmp_path / "ours")
    theirs = load(tmp_path / "ours")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes.")
    found, expected = theirs.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].cpu(), tensor), key

    quantized = AutoModel.from_pretrained(
        folders["llama"], dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=format != "int8", load_in_8bit=format == "int8",
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
    expected = {key: value.clone() for key, value in quantized.state_dict().items()}
    quantized.save_pretrained(tmp_path / "theirs")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    config.quantization_config = QllmConfig.from_bnb(config.quantization_config).to_dict()
    ours = AutoModel.from_pretrained(tmp_path / "theirs", config=config, dtype=torch.bfloat16)
    assert isinstance(ours.model.layers[0].mlp.up_proj, Linear)
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.cpu()), key
    assert ours.hf_quantizer.report.changed == 14


def test_adapters_train_on_top(folders: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft", reason="its adapters are what is tested")
    model = load(folders["llama"], "nf4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0] and len(trained) == 8
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("module", ["torch", "transformers.quantizers"])
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qllm.integrations.transformers")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs torch and transformers.*{module}"):
        importlib.import_module("qllm.integrations.transformers")


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.5.4"])
def test_a_version_that_it_does_not_work_with_is_named(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "qllm.integrations.transformers")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=f"needs transformers 4.57, or 5.6.* not {version}"):
        importlib.import_module("qllm.integrations.transformers")


@pytest.mark.skipif(IS_4, reason="this is transformers 4")
def test_the_same_with_transformers_4(other_run: subprocess.Popen[str] | None) -> None:
    if other_run is None:
        pytest.skip("there is no .venv/transformers-4.57; .ci/transformers makes it")
    output, _ = other_run.communicate(timeout=300)
    assert other_run.returncode == 0 and " passed" in output, output[-6000:]
