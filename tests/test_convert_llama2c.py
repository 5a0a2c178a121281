"""scripts/convert_llama2c.py: the folder it writes is the model and the tokenizer that it was
given.

The data, a trained model of 260,032 parameters with measured outputs, is no part of the repository:
it is looked up in the folder that QLLM_DATA names, else in ../shared/data beside the checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qllm.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("QLLM_DATA", ROOT.parent / "shared" / "data")) / "stories260K"
SCRIPT = ROOT / "scripts" / "convert_llama2c.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="runs from a checkout with scripts/")
needs_data = pytest.mark.skipif(
    not (DATA / "stories260K.bin").exists(),
    reason=f"needs the model stories260K, found neither in QLLM_DATA nor in {DATA}",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_llama2c", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers", reason="the script writes tokenizer.json with it")
    path = tmp_path_factory.mktemp("stories260K")
    script.convert(DATA / "stories260K.bin", DATA / "tok512.bin", path)
    return path


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((DATA / "reference.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return pytest.importorskip("tokenizers", reason="reads tokenizer.json").Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )


@needs_data
def test_transformers_computes_the_reference_logits_and_text(
    folder: Path, tokenizer: Any, reference: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="transformers is the oracle of this test")
    transformers = pytest.importorskip("transformers", reason="it is the oracle of this test")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.tensor([reference["prompt_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1].numpy()
        greedy = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    assert np.abs(logits - np.array(reference["last_logits"])).max() < 1e-4
    assert greedy == reference["greedy_prompt_64"]["ids"]
    assert (
        tokenizer.decode(reference["prompt_ids"] + greedy) == reference["greedy_prompt_64"]["text"]
    )


@needs_data
def test_the_prompt_has_the_reference_ids(tokenizer: Any, reference: dict[str, Any]) -> None:
    assert tokenizer.encode(reference["prompt"]).ids == [1, 403, 407, 261, 378]
    assert reference["prompt_ids"] == [1, 403, 407, 261, 378]


TEXTS = [
    "a",
    "Hello, world! 123",
    "line\n\nline\ttab",
    "h\u00e9llo \u4e16\u754c \U0001f642",
    "\n",
    "</",
    'don\'t "quote" (it)',
    "\u2581x",
    "A" * 50,
]


@needs_data
def test_ids_are_those_of_sentencepiece(tokenizer: Any) -> None:
    """SentencePiece reads tok512.model, the source of tok512.bin. It removes extra spaces, which
    llama2.c does not, so the texts have none."""
    library = pytest.importorskip("sentencepiece", reason="it is the oracle of this test")
    oracle = library.SentencePieceProcessor(model_file=str(DATA / "tok512.model"))
    stories = DATA.parent / "tinystories-valid" / "tinystories_val.txt"
    texts = stories.read_text(encoding="utf-8")[:100_000].split("\n\n") if stories.exists() else []
    for text in [re.sub(" +", " ", text).strip(" ") for text in texts] + TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *oracle.encode(text)]
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@needs_data
def test_the_folder_opens_as_a_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tokenizer_file == folder / "tokenizer.json"
        assert len(checkpoint.names()) == 2 + 9 * 5 and "lm_head.weight" not in checkpoint
        assert {checkpoint.entry(name).dtype for name in checkpoint.names()} == {"F32"}
        count = sum(checkpoint.entry(name).numpy().size for name in checkpoint.names())
        assert count == 260_032 and checkpoint.config["tie_word_embeddings"] is True


# ------------------------------------------------------------------------ a small model made here

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = 8, 12, 2, 2, 1, 5, 3


def model_bytes(vocab: int = VOCAB, theta: float = 10000.0) -> bytes:
    """A model file of counting numbers; a negative `vocab` gives it a matrix for the output."""
    kv = DIM // HEADS * KV_HEADS
    size = VOCAB * DIM + LAYERS * (2 * DIM + 2 * DIM * DIM + 2 * kv * DIM + 3 * HIDDEN * DIM) + DIM
    angles = np.outer(np.arange(LENGTH), theta ** (-np.arange(0, DIM // HEADS, 2) / (DIM // HEADS)))
    parts = [np.arange(size), np.cos(angles), np.sin(angles)]
    if vocab < 0:
        parts.append(-np.arange(VOCAB * DIM))
    return struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, LENGTH) + b"".join(
        part.astype("<f4").tobytes() for part in parts
    )


def read(script: ModuleType, folder: Path, content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    (folder / "model.bin").write_bytes(content)
    return script.read_model(folder / "model.bin")


def test_the_order_of_the_tensors_in_the_file(script: ModuleType, tmp_path: Path) -> None:
    config, tensors = read(script, tmp_path, model_bytes())
    assert config["num_key_value_heads"] == KV_HEADS and config["tie_word_embeddings"] is True
    first = {name: int(array.flat[0]) for name, array in tensors.items()}
    start, expected = VOCAB * DIM, {"model.embed_tokens.weight": 0}
    for name, size in [
        ("input_layernorm", DIM),
        ("self_attn.q_proj", DIM * DIM),
        ("self_attn.k_proj", 4 * DIM),
        ("self_attn.v_proj", 4 * DIM),
        ("self_attn.o_proj", DIM * DIM),
        ("post_attention_layernorm", DIM),
        ("mlp.gate_proj", HIDDEN * DIM),
        ("mlp.down_proj", HIDDEN * DIM),
        ("mlp.up_proj", HIDDEN * DIM),
    ]:
        for layer in range(LAYERS):
            expected[f"model.layers.{layer}.{name}.weight"] = start + layer * size
        start += LAYERS * size
    assert first == expected | {"model.norm.weight": start}
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (DIM, HIDDEN)


def test_rows_of_queries_and_keys_go_from_pairs_to_halves(script: ModuleType) -> None:
    rows = np.arange(8.0)[:, None] * np.ones(3)
    assert script.halves_first(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert script.halves_first(rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_separate_output_matrix_is_kept(script: ModuleType, tmp_path: Path) -> None:
    config, tensors = read(script, tmp_path, model_bytes(-VOCAB))
    assert config["tie_word_embeddings"] is False and config["vocab_size"] == VOCAB
    assert tensors["lm_head.weight"].flat[1] == -1.0


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "fewer than the header"),
        (model_bytes()[:-4], "but its header asks for"),
        (model_bytes() + b"1234", "but its header asks for"),
        (b"\xff" * 64, "is no llama2.c model"),
        (model_bytes(theta=500000.0), "rotary tables .* differ"),
    ],
)
def test_a_file_that_is_no_such_model_is_refused(
    script: ModuleType, tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        read(script, tmp_path, content)


def test_merges_are_all_pairs_in_the_order_of_scores(script: ModuleType) -> None:
    pieces = [("", 0.0)] * 259 + [
        ("ab", -1.0),
        ("abc", -0.0),
        ("a", -9.0),
        ("b", -9.0),
        ("c", -9.0),
        ("bc", -2.0),
    ]
    assert script.merges(pieces) == [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "c")]


@pytest.mark.parametrize(
    "content, words",
    [
        (struct.pack("<i", 1), "has 0 pieces"),
        (struct.pack("<ifi", 1, 0.0, 5) + b"ab", "ends inside piece 0"),
        (
            struct.pack("<i", 1) + 260 * struct.pack("<fi1s", 0.0, 1, b"x"),
            "piece 3 .* is 'x', not a byte",
        ),
    ],
)
def test_a_file_that_is_no_such_tokenizer_is_refused(
    script: ModuleType, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "tok.bin").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        script.read_pieces(tmp_path / "tok.bin", 260)
