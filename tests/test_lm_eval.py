"""The harness lm-eval on a task of local files: our log-likelihoods are those of its own model class
over the same dequantized weights, whatever the batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qllm

torch = pytest.importorskip("torch", reason="lm-eval's own models need it")
transformers = pytest.importorskip("transformers", reason="lm-eval's own models need it")
pytest.importorskip("lm_eval", reason="it is what this module is for")
pytest.importorskip("tokenizers", reason="tasks are texts")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from qllm.integrations.lm_eval import QllmLM  # noqa: E402

FOLDER = Path(qllm.__file__).parent / "demo" / "llama"
TASK = """
task: little_stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
num_fewshot: 2
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def request(*values: Any) -> SimpleNamespace:
    return SimpleNamespace(args=values)


@pytest.fixture(scope="module")
def nf4() -> qllm.Model:
    return qllm.Model.from_pretrained("demo:llama", "nf4", compute="exact", threads=1)


@pytest.fixture(scope="module")
def ours(nf4: qllm.Model) -> QllmLM:
    return QllmLM(nf4, progress=False)


@pytest.fixture(scope="module")
def theirs(nf4: qllm.Model) -> Any:
    """Their model class over float32 weights with the values that nf4 left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for linear in nf4.architecture.linears:
            if nf4.formats[linear.module] == "nf4":
                values = nf4.decoder.linear(linear.slot).dequantize()
                weights[linear.module + ".weight"].copy_(torch.from_numpy(values))
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 questions with 4 answers of one to several tokens."""
    folder = tmp_path_factory.mktemp("task")
    rng = random.Random(3)
    people = ["Tom", "Lily", "Sue", "Ben", "Mia"]
    things = ["a big red ball", "a cake", "the old tree in the park", "his dog", "rain", "a boat"]
    lines = []
    for i in range(50):
        start = f"{rng.choice(people)} went to the park with {rng.choice(people)}. They saw"
        choices = rng.sample(things, 4)
        lines.append(json.dumps({"start": start, "choices": choices, "answer": i % 4}))
    data = folder / "stories.jsonl"
    data.write_text("\n".join(lines) + "\n")
    (folder / "little_stories.yaml").write_text(TASK.format(data=data))
    return folder


def evaluated(model: Any, task: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    manager = TaskManager(include_path=str(task), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=["little_stories"], task_manager=manager, log_samples=True,
        bootstrap_iters=0,
    )


def answers(results: Any) -> np.ndarray:
    """(items, choices, 2): log-likelihood and whether it is the greedy text."""
    samples = sorted(results["samples"]["little_stories"], key=lambda sample: sample["doc_id"])
    return np.array([[resp[0] for resp in s["resps"]] for s in samples], float)


def test_a_task_has_the_log_likelihoods_of_their_model(
    nf4: qllm.Model, theirs: Any, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for size in (1, 16):
        model = QllmLM(nf4, batch_size=size, progress=False)
        found[size] = evaluated(model, task, monkeypatch)
    expected = evaluated(theirs, task, monkeypatch)
    assert answers(found[1]).shape == (50, 4, 2)
    np.testing.assert_array_equal(answers(found[1]), answers(found[16]))
    np.testing.assert_allclose(answers(found[16])[..., 0], answers(expected)[..., 0], atol=1e-4)
    np.testing.assert_array_equal(answers(found[16])[..., 1], answers(expected)[..., 1])
    ours, other = (r["results"]["little_stories"] for r in (found[16], expected))
    assert ours["acc,none"] == other["acc,none"] and ours["acc_norm,none"] == other["acc_norm,none"]
    assert 0 < ours["acc,none"] < 1


def test_pairs(ours: QllmLM, theirs: Any) -> None:
    pairs = [
        ("Once upon a time", " there was a little girl"),
        ("Once upon a time ", "there was"),
        ("", "Tom had a dog."),
        ("Once", " upon"),
        ("Lily went home. " * 60, "She was happy."),
        ("Tom had a dog. " * 30, " It ran " * 100),
    ]
    requests = [request(*pair) for pair in pairs]
    mine, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in expected], atol=5e-4, rtol=1e-6)
    assert [b for _, b in mine] == [b for _, b in expected]
    greedy = ours.generate_until([request("Once upon a time", {"max_gen_toks": 5})])[0]
    assert ours.loglikelihood([request("Once upon a time", greedy)])[0][1]


def test_whole_texts_longer_than_the_model(nf4: qllm.Model, theirs: Any) -> None:
    texts = ["Tom had a dog. It was big. ", "One day, Lily saw a bird. " * 40, "The end."]
    ours = QllmLM(nf4, max_length=100, progress=False)
    theirs._max_length = 100
    try:
        expected = theirs.loglikelihood_rolling([request(text) for text in texts])
    finally:
        theirs._max_length = None
    found = ours.loglikelihood_rolling([request(text) for text in texts])
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-6)


def test_greedy_texts(ours: QllmLM, theirs: Any) -> None:
    asked = [
        request("Once upon a time", {"until": ["."], "max_gen_toks": 30}),
        request("Tom and Lily went to the", {"until": "\n", "max_gen_toks": 12, "do_sample": False}),
        request("One day", {"until": [], "max_gen_toks": 8, "temperature": 0.0}),
    ]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_draws_are_those_of_the_model(ours: QllmLM, nf4: qllm.Model) -> None:
    words = {"temperature": 0.8, "top_k": 20, "seed": 5, "max_gen_toks": 10, "do_sample": True}
    [text] = ours.generate_until([request("Once upon a time", words)])
    expected = nf4.generate(
        "Once upon a time", temperature=0.8, top_k=20, seed=5, max_new_tokens=10
    )
    assert text == str(expected)


def test_what_has_no_meaning_is_refused(nf4: qllm.Model, ours: QllmLM) -> None:
    with pytest.raises(qllm.QllmValueError, match="generation_kwargs have 'num_beams'"):
        ours.generate_until([request("a", {"num_beams": 4})])
    with pytest.raises(qllm.QllmValueError, match="the options threads are for a model that is"):
        QllmLM(nf4, threads=1)
    with pytest.raises(qllm.QllmValueError, match="batch_size is 'auto'; an integer from 1"):
        QllmLM(nf4, batch_size="auto")
    with pytest.raises(qllm.QllmValueError, match="max_length is '100000'; an integer from 2 to 512"):
        QllmLM(nf4, max_length=100000)
    with pytest.raises(qllm.QllmValueError, match="a continuation of 0 tokens"):
        ours._loglikelihood_tokens([(None, [1], [])])


def test_from_a_command_line(task: Path) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("qllm") is QllmLM
    words = "pretrained=demo:llama,quantization=nf4,compute=exact,threads=1,progress=False"
    model = QllmLM.create_from_arg_string(words, {"batch_size": "8", "device": "cpu"})
    assert model.batch_size == 8 and "nf4" in model.get_model_info()["formats"].values()
    assert model.tokenizer_name.startswith("llama__")


# chats ------------------------------------------------------------------------------------------

CHAT = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif -%}
<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TALK = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Hi! {{ 7 * 7 }}"},
    {"role": "assistant", "content": " Hello"},
]


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = tmp_path / "chatty"
    folder.mkdir()
    for path in FOLDER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def chat_of(folder: Path, template: Any, **more: Any) -> QllmLM:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template} | more
    path.write_text(json.dumps(config))
    return QllmLM(str(folder), progress=False)


def test_conversations_are_written_as_transformers_writes_them(chatty: Path) -> None:
    model = chat_of(chatty, CHAT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    assert model.chat_template(True) == CHAT and model.chat_template(False) is None
    for talk in (TALK[:2], TALK[1:2], TALK):
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert model.apply_chat_template(talk) == expected
    open_end = tokenizer.apply_chat_template(TALK, tokenize=False, continue_final_message=True)
    assert model.apply_chat_template(TALK, add_generation_prompt=False) == open_end
    begins = model.apply_chat_template(TALK[:2])
    assert model.tok_encode(begins).count(model.prefix_token_id) == 1


def test_templates_by_name_and_in_a_file(chatty: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    model = chat_of(chatty, named, bos_token={"content": "<s>"})
    assert model.chat_template(True) == "D" and model.chat_template("tools") == "T"
    assert model.apply_chat_template(TALK) == "T"
    with pytest.raises(qllm.QllmValueError, match="no chat template 'rag' .* default, tools"):
        model.chat_template("rag")
    (chatty / "chat_template.jinja").write_text("F{{ bos_token }}")
    model = QllmLM(str(chatty), progress=False)
    model.chat_template(True)
    assert model.apply_chat_template(TALK) == "F<s>"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('no') }}", "the chat template refuses: 'no'"),
        ("{% for %}", "the chat template is not a template"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses: .*unsafe"),
        ("{{ ''.__class__.__subclasses__() }}", "the chat template refuses: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template refuses: .*unsafe"),
        ("{{ 1 / 0 }}", "the chat template fails"),
        ("{{ range(999999999) | list }}", "the chat template fails: .*too big"),
        ("{{ 'a' + 1 }}", "the chat template fails"),
        (7, "a chat_template that is neither a text nor a list"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_are_refused(chatty: Path, template: Any, words: str) -> None:
    model = chat_of(chatty, template)
    with pytest.raises(qllm.QllmError, match=words):
        model.apply_chat_template(TALK)
