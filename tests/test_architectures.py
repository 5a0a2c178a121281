"""Every supported architecture and variant against transformers, on small random models.

transformers computes in float32; so does compute mode "exact", with its own order of summation.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import _core
from qllm.architectures import Architecture, describe

torch = pytest.importorskip("torch", reason="transformers is the oracle of these tests")
transformers = pytest.importorskip("transformers", reason="it is the oracle of these tests")

import architecture_models as models  # noqa: E402

# the name of the cache's argument that transformers 4 knows as well
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")

ISAS = _core.cpu_info()["isas"]
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a variant -> (the model of transformers, its folder), made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = models.build(models.VARIANTS[name], folder), folder
        return made[name]

    return get


def text_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, models.VOCAB, length).tolist()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_every_compiled_instruction_set_is_tried() -> None:
    assert "scalar" in ISAS and len(set(ISAS)) == len(ISAS)


@pytest.mark.parametrize("name", models.VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(saved: Any, name: str) -> None:
    variant = models.VARIANTS[name]
    theirs, folder = saved(name)
    ids = text_of(variant.length)
    assert len(ids) >= 48
    compute = models.step_by_step if variant.one_by_one else models.one_pass
    logits = compute(theirs, ids).numpy()
    tokens = models.greedy(theirs, ids, 32, variant.one_by_one)
    for isa in ISAS:
        model = qllm.Model.from_pretrained(folder, compute="exact", isa=isa)
        assert model.info().isa == isa
        assert relative(model.logits(ids), logits) < TOLERANCE, isa
        new = model.generate(ids, do_sample=False, max_new_tokens=32, ignore_eos=True)
        assert new.ids == tokens, isa


@pytest.mark.parametrize(
    ("name", "short"),
    [("llama-linear", 96), ("llama-llama3", 120), ("llama-yarn", 120), ("mistral-window", 80)],
)
def test_the_variant_matters_at_these_lengths(saved: Any, name: str, short: int) -> None:
    """Without the scaling or the window the same weights give other logits: the comparison above
    can fail."""
    _, folder = saved(name)
    ids = text_of(models.VARIANTS[name].length)
    assert len(ids) == short
    config = json.loads((folder / "config.json").read_text())
    model = qllm.Model.from_pretrained(folder)
    before = model.logits(ids)
    plain = {"rope_parameters": None, "sliding_window": None} if "mistral" in name else {}
    plain = plain or {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    (folder / "config.json").write_text(json.dumps(config | plain))
    try:
        after = qllm.Model.from_pretrained(folder).logits(ids)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert relative(after, before) > 100 * TOLERANCE


def test_positions_beyond_the_trained_ones_are_reached(saved: Any) -> None:
    for name, positions in {
        "llama-dynamic": 160,
        "llama-linear": 1024,
        "llama-yarn": 256,
        "llama-llama3": 256,
    }.items():
        model = qllm.Model.from_pretrained(saved(name)[1])
        assert model.info().max_positions == positions
    with pytest.raises(qllm.QllmValueError, match="257 positions, but the model has 256"):
        model.generate([1] * 7, max_new_tokens=250)


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_a_part_of_each_head_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers' Llama has no partial rotation (5.24 passes over partial_rotary_factor); with
    the leading elements of each head rotated by hand, as in its GPT-NeoX, it computes ours."""
    from transformers.models.llama import modeling_llama

    whole = modeling_llama.apply_rotary_pos_emb

    def leading(q: Any, k: Any, cos: Any, sin: Any, **options: Any) -> Any:
        dim = cos.shape[-1]
        a, b = whole(q[..., :dim], k[..., :dim], cos, sin, **options)
        return torch.cat((a, q[..., dim:]), -1), torch.cat((b, k[..., dim:]), -1)

    parameters = {"rope_type": "linear", "factor": 1.0 if kind == "default" else 2.0}
    variant = models.Variant(
        "LlamaConfig",
        models._llama(**models._rope(**parameters, partial_rotary_factor=0.5)),
    )
    theirs = models.build(variant, tmp_path)
    assert theirs.model.rotary_emb.inv_freq.shape == (4,)  # of heads of 16 elements
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", leading)
    ids = text_of(56)
    logits = models.one_pass(theirs, ids).numpy()
    if kind == "default":
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_parameters"] = None
        config |= {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = qllm.Model.from_pretrained(tmp_path)
    assert model.architecture.decoder["rotary_dim"] == 8
    assert relative(model.logits(ids), logits) < TOLERANCE


# -------------------------------------------------------------------------- spellings of a config


def same(a: Architecture, b: Architecture) -> bool:
    """Whether two architectures are the same but for the name of the model type."""
    keys = a.decoder.keys() | b.decoder.keys()
    return (
        all(np.array_equal(a.decoder.get(key), b.decoder.get(key)) for key in keys)
        and a.linears == b.linears
        and a.vectors == b.vectors
        and a.tied == b.tied
    )


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 wrote it."""
    old = dict(config)
    old["torch_dtype"] = old.pop("dtype")
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    return old


@pytest.mark.parametrize("name", models.VARIANTS)
def test_old_and_new_spellings_are_one_model(saved: Any, name: str) -> None:
    _, folder = saved(name)
    new = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in new and "rope_scaling" not in new and "dtype" in new
    old = old_spelling(new)
    assert same(describe(old), describe(new))
    if old["rope_scaling"]:
        old["rope_scaling"]["rope_type"] = old["rope_scaling"].pop("type")
        assert same(describe(old), describe(new))
        other = dict(old, rope_scaling=dict(old["rope_scaling"], factor=7.5))
        assert not same(describe(other), describe(new))


@pytest.mark.parametrize("name", [name for name in models.VARIANTS if name.startswith("falcon")])
def test_the_first_names_of_falcon_are_one_model(saved: Any, name: str) -> None:
    _, folder = saved(name)
    new = json.loads((folder / "config.json").read_text())
    old = dict(new)
    for first, now in {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
    }.items():
        old[first] = old.pop(now)
    for gone in ("ffn_hidden_size", "rope_parameters", "max_position_embeddings"):
        old.pop(gone)
    if new["new_decoder_architecture"]:
        old["model_type"] = "RefinedWeb"
        for gone in ("new_decoder_architecture", "multi_query"):
            old.pop(gone)
        if new["num_ln_in_parallel_attn"] != 1:
            old.pop("num_ln_in_parallel_attn")
    else:
        old["model_type"] = "RefinedWebModel"
    old["architectures"] = ["RWForCausalLM"]
    expected = new | {"max_position_embeddings": 2048}
    if new["ffn_hidden_size"] != 4 * new["hidden_size"]:
        old["ffn_hidden_size"] = new["ffn_hidden_size"]
    assert same(describe(old), describe(expected))


@pytest.mark.parametrize("name", ["llama-yarn", "falcon-7b", "llama-tied"])
def test_old_spellings_and_bare_names_load_and_compute_the_same(
    saved: Any, tmp_path: Path, name: str
) -> None:
    """Also a checkpoint saved without the prefix "model." or "transformer."."""
    from safetensors.numpy import load_file, save_file

    _, folder = saved(name)
    ids = text_of(60)
    expected = qllm.Model.from_pretrained(folder).logits(ids)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old_spelling(config)))
    weights = load_file(folder / "model.safetensors")
    prefix = "transformer." if name.startswith("falcon") else "model."
    assert any(key.startswith(prefix) for key in weights)
    save_file(
        {key.removeprefix(prefix): array for key, array in weights.items()},
        tmp_path / "model.safetensors",
    )
    model = qllm.Model.from_pretrained(tmp_path)
    assert np.array_equal(model.logits(ids), expected)
    assert all(module.startswith((prefix, "lm_head")) for module in model.formats)


def test_a_sharded_checkpoint_in_bfloat16_computes_like_transformers(
    saved: Any, tmp_path: Path
) -> None:
    """The weights are rounded to bfloat16, the computation is in float32 in both."""
    _, folder = saved("llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    rounded = load(tmp_path, dtype=torch.float32)
    ids = text_of(56)
    model = qllm.Model.from_pretrained(tmp_path, compute="exact")
    assert set(model.formats.values()) == {"bf16"}
    logits = models.one_pass(rounded, ids).numpy()
    assert relative(model.logits(ids), logits) < TOLERANCE
