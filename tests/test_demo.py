"""The built-in models: complete, small, in bf16, trained, and readable by transformers; and the
script that trains them, on a tiny text."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from qllm import demo
from qllm.checkpoint import DEMO_NAMES, Checkpoint
from qllm.errors import QllmFileError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_demo.py"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
STORY = (
    "Once upon a time, there was a little girl named Lucy. She had a small red boat. One day, "
    "Lucy and her dad went to the lake. She put the boat in the water, but the wind was strong "
    "and the boat went far away. Lucy was sad.\n\n"
    'A big duck saw her. "Why are you sad?" asked the duck. "My boat is gone," said Lucy. The '
    "duck was kind. It went to the boat and pushed it back to her. Lucy was very happy. She said, "
    '"Thank you, duck!" and gave it some bread. From that day on, they were good friends.'
)
"""Written for this test, so no part of any training text."""

BOUND = 0.8
"""Nats per byte of STORY. Guessing evenly among the tokens costs more than 2."""

both = pytest.mark.parametrize("name", demo.NAMES)


@pytest.fixture(scope="module", params=demo.NAMES)
def opened(request: pytest.FixtureRequest) -> tuple:
    """Name, model in float32, tokenizer, and what transformers says about loading it."""
    folder = demo.path(request.param)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return request.param, model.eval(), AutoTokenizer.from_pretrained(folder), info


def nats_per_byte(model: torch.nn.Module, tokenizer: object, text: str) -> float:
    """Mean negative log-probability of `text` after the token that begins a text."""
    ids = [model.config.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    row = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=row, labels=row).loss.item() * (len(ids) - 1) / len(text.encode())


def test_names_are_those_of_checkpoint() -> None:
    assert demo.NAMES == DEMO_NAMES
    with pytest.raises(QllmFileError, match="no built-in model 'gpt'; there are llama and falcon"):
        demo.path("gpt")


def test_import_is_light() -> None:
    code = "import sys, qllm.demo; print(*{'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@both
def test_folder_holds_these_files_and_no_others(name: str) -> None:
    assert sorted(path.name for path in demo.path(name).iterdir()) == FILES


def test_both_are_at_most_10_megabytes() -> None:
    files = [path for name in demo.NAMES for path in demo.path(name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


@both
def test_opens_with_the_right_sizes(name: str) -> None:
    with Checkpoint.open(f"demo:{name}") as checkpoint:
        entries = [checkpoint.entry(tensor) for tensor in checkpoint.names()]
        assert {entry.dtype for entry in entries} == {"BF16"}
        assert 1_000_000 <= sum(math.prod(entry.shape) for entry in entries) <= 2_000_000
        config = checkpoint.config
        assert config["model_type"] == name
        assert config["hidden_size"] >= 192 and config["hidden_size"] % 64 == 0
        assert config["num_hidden_layers"] >= 4
        assert checkpoint.tokenizer_file is not None
        assert checkpoint.generation_config["eos_token_id"] == config["eos_token_id"]


def test_one_output_matrix_is_tied_and_one_is_not() -> None:
    tied = {}
    for name in demo.NAMES:
        with Checkpoint.open(f"demo:{name}") as checkpoint:
            tied[name] = checkpoint.config["tie_word_embeddings"]
            assert ("lm_head.weight" in checkpoint) is not tied[name]
    assert tied == {"llama": False, "falcon": True}


def test_transformers_loads_all_weights(opened: tuple) -> None:
    _, _, _, info = opened
    assert {key: list(found) for key, found in info.items() if found} == {}


def test_weights_are_finite(opened: tuple) -> None:
    _, model, _, _ = opened
    for name, weight in model.named_parameters():
        assert np.isfinite(weight.detach().numpy()).all(), name


def test_loss_shows_training(opened: tuple) -> None:
    _, model, tokenizer, _ = opened
    assert nats_per_byte(model, tokenizer, STORY) < BOUND


def test_loss_of_random_weights_does_not(opened: tuple) -> None:
    _, model, tokenizer, _ = opened
    torch.manual_seed(0)
    assert nats_per_byte(type(model)(model.config).eval(), tokenizer, STORY) > 2 * BOUND


def test_goes_on_like_a_story(opened: tuple) -> None:
    _, model, tokenizer, _ = opened
    ids = [model.config.bos_token_id, *tokenizer.encode("Once upon", add_special_tokens=False)]
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little")


def test_family_s_own_first_token(opened: tuple) -> None:
    name, model, tokenizer, _ = opened
    first = tokenizer.encode("The cat")[0]
    assert (first == model.config.bos_token_id) is (name == "llama")
    assert (tokenizer.bos_token == tokenizer.eos_token) is (name == "falcon")
    assert len(tokenizer) == model.config.vocab_size


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_tokenizer_gives_any_text_back(opened: tuple, text: str) -> None:
    _, _, tokenizer, _ = opened
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def train_demo() -> Iterator[ModuleType]:
    """The script as a module. It sets torch's threads and seed, which are put back."""
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # where its dataclass looks its annotations up
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        spec.loader.exec_module(module)
        yield module
    torch.set_num_threads(threads)
    del sys.modules["train_demo"]


@both
def test_script_writes_a_folder_that_opens(
    train_demo: ModuleType, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / name
    text.write_text("\n\n".join([STORY] * 3), encoding="utf-8")
    size = "--vocab 272 --hidden 64 --intermediate 64 --layers 1 --heads 2 --kv-heads 1"
    run = "--context 32 --piece 16 --batch 64 --steps 4 --every 2 --held-out 0.3 --bpe-dropout 0.1"
    words = [str(text), "--family", name, "--out", str(out), *size.split(), *run.split()]
    train_demo.main(words)
    assert "saved in bf16" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == FILES
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    assert model.config.model_type == name
    assert model.dtype == torch.bfloat16
    assert math.isfinite(nats_per_byte(model, AutoTokenizer.from_pretrained(out), STORY[:80]))


def test_script_cuts_a_text_into_stories(train_demo: ModuleType, tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text(
        "Once upon a time it rained.\n\nOne day, a fox said â€œhiâ€.\n\nThe end.\n\n"
        "Tom and Ann are friends.\n\nTom and Ann go home.\n",
        encoding="utf-8",
    )
    marked.write_text("A.\n\nB.\n<|endoftext|>\nC.\n<|endoftext|>\n", encoding="utf-8")
    stories = train_demo.read_stories([plain, marked])
    assert stories == [
        'Once upon a time it rained.\n\nOne day, a fox said "hi".\n\nThe end.',
        "Tom and Ann are friends.\n\nTom and Ann go home.",
        "A.\n\nB.",
        "C.",
    ]
    assert train_demo.split(stories, 0.01) == (stories[:3], stories[3:])


def test_script_draws_every_token_in_its_order(train_demo: ModuleType) -> None:
    stories = [STORY, STORY.upper()]
    tokenizer = train_demo.build_tokenizer(stories, "llama", 272)
    corpus = train_demo.Corpus(stories, stories, tokenizer, 0, 1)
    ids = corpus.encode(stories)
    options = train_demo.argparse.Namespace(seed=1, bpe_dropout=0.0)
    source = train_demo.Batches(corpus, options)
    joined = [[*ids[0], *ids[1]], [*ids[1], *ids[0]]]
    places = [story[at : at + 9] for story in joined for at in range(len(story))]
    assert all(piece in places for piece in source.draw(20, 8).tolist())
    assert source.draw(3, 16).shape == (3, 17)


def test_script_says_when_the_text_is_too_short(train_demo: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one story", encoding="utf-8")
    with pytest.raises(SystemExit, match="fewer than two stories"):
        train_demo.main([str(text), "--family", "llama", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_script_goes_on_from_a_folder(
    train_demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, first, second = tmp_path / "text.txt", tmp_path / "first", tmp_path / "second"
    text.write_text("\n\n".join([STORY] * 3), encoding="utf-8")
    words = f"{text} --family falcon --context 32 --piece 16 --batch 64 --every 1 --held-out 0.3"
    size = "--vocab 272 --hidden 64 --layers 1 --heads 2"
    train_demo.main([*words.split(), *size.split(), "--out", str(first), "--until", "2"])
    steps = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1] == " "]
    assert steps == ["step", "1", "2"]
    more = ["--start", str(first), "--out", str(second), "--steps", "1", "--lr", "0"]
    train_demo.main([*words.split(), *more])
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (first, second))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new)
