"""quantize_: the linear layers of any torch module, swapped in place with a report; adapters of
peft on top of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

import qllm

torch = pytest.importorskip("torch", reason="its modules are what is tested")

from qllm.integrations.torch import Linear, quantize_  # noqa: E402

torch.set_num_threads(2)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.relu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(32, 64)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(64, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("format", ["nf4", "fp4-dq", "int8"])
def test_every_layer_is_swapped_or_accounted_for(format: str) -> None:
    model = Model().eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize_(model, format, skip="blocks.1.*", compute="exact")
    rows = {row.module: row for row in report}
    assert list(rows) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert report.changed == 2 and rows["blocks.1.up"].reason == "skip has 'blocks.1.*'"
    assert rows["head"].reason == "output embedding; quantize_head=True includes it"
    assert rows["head"].format == "f32" and rows["head"].bits_per_weight == 32
    assert rows["head"].rmse == 0 and rows["head"].sqnr_db == math.inf
    for name in ("blocks.0.up", "blocks.0.down"):
        layer, row = model.get_submodule(name), rows[name]
        source = qllm.quantize(weights[name + ".weight"], format)
        assert type(layer) is Linear and not layer.training and layer.compute == "exact"
        assert np.array_equal(layer.quantized().packed, source.packed)
        error = source.error(weights[name + ".weight"].numpy())
        assert (row.bytes, row.shape) == (source.nbytes, source.shape) and row.changed
        assert (row.rmse, row.sqnr_db) == (error["rmse"], error["sqnr_db"])
    assert type(model.blocks[1].up) is type(model.head) is torch.nn.Linear
    assert "5 linear layers, 2 changed" in str(report) and len(report.to_frame()) == 5
    with torch.no_grad():
        reference = Model().eval()
        for name in ("up", "down"):
            layer = getattr(model.blocks[0], name)
            getattr(reference.blocks[0], name).weight.copy_(layer.dequantize())
        error = (model(IDS) - reference(IDS)).abs().max() / reference(IDS).abs().max()
        assert error < (0.02 if format == "int8" else 1e-5)
    again = quantize_(model, format)
    assert again.changed == 2 and {r.module: r.reason for r in again}["blocks.0.up"] == (
        f"already {format}")
    other = "fp4" if format == "nf4" else "nf4"
    with pytest.raises(qllm.QllmUnsupportedError, match=f"only as {format}; take the original"):
        quantize_(model, other)


def test_heads_are_found_and_shared_layers_stay_shared() -> None:
    tied = Model(tied=True)
    tied.get_output_embeddings = None  # type: ignore[assignment,method-assign]
    assert {r.module: r.changed for r in quantize_(tied, "nf4")}["head"] is False
    embedding = tied.embed.weight.clone()
    report = quantize_(tied, "nf4", include="head", quantize_head=True)
    assert report.changed == 1 and isinstance(tied.head, Linear)
    assert torch.equal(tied.embed.weight, embedding)
    shared = torch.nn.Sequential(block := torch.nn.Linear(64, 64), torch.nn.ReLU(), block)
    report = quantize_(shared, "int8")
    assert shared[0] is shared[2] and isinstance(shared[0], Linear)
    assert [row.module for row in report] == ["0", "2"] and report.changed == 2


def test_layers_that_are_more_than_a_product_are_left_alone() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    class Renamed(torch.nn.Linear):
        pass

    model = torch.nn.ModuleDict({
        "scaled": Scaled(64, 64), "renamed": Renamed(64, 64), "wide": torch.nn.Linear(64, 4),
        "attention": torch.nn.MultiheadAttention(64, 2),
        "norm": torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 8)),
    })
    model["wide"].double()
    report = {row.module: row for row in quantize_(model, "nf4")}
    assert {name: row.reason for name, row in report.items()} == {
        "scaled": "Scaled has a forward of its own", "renamed": "",
        "wide": "its weight is torch.float64",
        "attention.out_proj": "torch.nn.MultiheadAttention reads the weight itself",
        "norm": "its weight is parametrized",
    }
    assert report["wide"].format == "float64" and isinstance(model["renamed"], Linear)
    x = torch.randn(3, 1, 64)
    assert model["attention"](x, x, x)[0].shape == (3, 1, 64)


def test_calls_that_select_nothing_raise() -> None:
    model = Model()
    for options, words in (
        ({"include": "layers.*"}, "the pattern 'layers.*' in include matches no linear layer"),
        ({"skip": "*"}, "no linear layer is selected: .*head: skip has"),
        ({"format": "q4_0"}, "there is no format"),
        ({"format": "bf16"}, "a layer cannot become bf16; it can become nf4, fp4"),
        ({"format": qllm.QuantConfig("nf4"), "skip": "*"}, "in the QuantConfig alone"),
        ({"blocksize": 3}, "blocksize is '3'"),
    ):
        with pytest.raises(qllm.QllmValueError, match=words):
            quantize_(model, **({"format": "nf4"} | options))
    with pytest.raises(qllm.QllmUnsupportedError, match="Linear.from_linear makes"):
        quantize_(torch.nn.Linear(4, 4), "nf4")
    model.blocks[1].up.weight.data[2, 3] = float("inf")
    with pytest.raises(qllm.QllmValueError, match="blocks.1.up.*row 2.*column 3"):
        quantize_(model, qllm.QuantConfig("nf4"))
    assert isinstance(model.blocks[0].down, Linear) and type(model.blocks[1].up) is torch.nn.Linear


def test_a_module_on_the_meta_device_is_swapped_and_then_loaded() -> None:
    model = Model()
    with torch.device("meta"):
        empty = Model()
    quantize_(model, "nf4-dq")
    report = quantize_(empty, "nf4-dq")
    assert empty.blocks[0].up.weight.is_meta and report.bytes > 0
    assert {row.rmse for row in report if row.changed} == {None}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(IDS), model(IDS))


@pytest.mark.parametrize("kind", ["llama", "falcon", "gpt2"])
def test_models_of_transformers(kind: str) -> None:
    """Falcon's own linear class, and GPT-2's transposed one, are swapped as well; the tokens are
    those of the dequantized model."""
    transformers = pytest.importorskip("transformers", reason="its models are what is tested")
    small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**small, intermediate_size=128),
        "falcon": lambda: transformers.FalconConfig(**small, bias=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    }[kind]()
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference = copy.deepcopy(model)
    report = quantize_(model, "nf4", compute="exact")
    left = [row.module for row in report if not row.changed]
    assert left == ["lm_head"] and report.changed == {"llama": 14, "falcon": 8, "gpt2": 8}[kind]
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            weight = layer.dequantize()
            other = reference.get_submodule(name).weight.data
            other.copy_(weight.T if kind == "gpt2" else weight)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        difference = (model(ids).logits - reference(ids).logits).abs().max()
        assert difference < 1e-4 * reference(ids).logits.abs().max()
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0,
               "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(ids, **options), model.generate(ids, **options))
    fresh = transformers.AutoModelForCausalLM.from_config(config).eval()
    quantize_(fresh, "nf4", compute="exact")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_layers_of_bitsandbytes_are_taken_as_they_are() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="its layers are taken over")
    weight = torch.randn(64, 128)

    def layer(nested: bool) -> Any:
        made = bnb.nn.Linear4bit(128, 64, bias=False)
        made.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested)
        return made.to("cpu")

    eight = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    model = torch.nn.ModuleDict({"a": layer(True), "b": layer(False), "c": eight.to("cpu")})
    before = {name: dict(module.state_dict()) for name, module in model.items()}
    report = quantize_(model, "nf4-dq", include="a")
    assert [row.format for row in report] == ["nf4-dq", "nf4", "int8"] and report.changed == 1
    quantize_(model, "int8", include="c")
    for name in ("a", "c"):
        after = model[name].state_dict()
        assert all(torch.equal(after[key], value) for key, value in before[name].items())
    with pytest.raises(qllm.QllmUnsupportedError, match="b is quantized already, to nf4 of block"):
        quantize_(model, "fp4", include="b")


def test_adapters_of_peft_train_on_top() -> None:
    """One step of LoRA: gradients reach the adapters of every layer, the weights stay."""
    peft = pytest.importorskip("peft", reason="its adapters are what is tested")
    transformers = pytest.importorskip("transformers", reason="peft adapts its models")
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config)
    quantize_(model, "nf4")
    images = {name: layer.weight.clone() for name, layer in model.named_modules()
              if isinstance(layer, Linear)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(3, 19)[None]
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        grads = {n: p.grad for n, p in adapted.named_parameters() if n in trainable}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
        optimizer.step()
    assert losses[2] < losses[0]
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, Linear):
            assert torch.equal(layer.weight, images[name.removesuffix(".base_layer")])
    with adapted.disable_adapter(), torch.no_grad():
        plain = adapted(input_ids=ids).logits
    assert not torch.equal(plain, adapted(input_ids=ids).logits)


def test_adapters_are_not_quantized() -> None:
    peft = pytest.importorskip("peft", reason="its adapters are what is tested")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    reasons = {row.module: row.reason for row in quantize_(adapted, "int8")}
    base = "base_model.model.0"
    assert reasons == {
        f"{base}.base_layer": "", f"{base}.lora_A.default": "an adapter of peft",
        f"{base}.lora_B.default": "an adapter of peft", "base_model.model.2": "",
    }
    assert adapted(torch.randn(2, 64)).shape == (2, 4)
