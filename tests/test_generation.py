"""Generation: what is drawn depends on (seed, prompt, step, token) and on nothing else."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import GenerationConfig, Request
from qllm.generation import prompt_key_of
from qllm.tokenizer import TextStream

pytest.importorskip("safetensors", reason="writes the checkpoints")
pytest.importorskip("tokenizers", reason="text goes through it")

import tiny_models  # noqa: E402

VOCAB = 259  # <unk> <s> </s> and 256 bytes
CONFIG = tiny_models.LLAMA | {"vocab_size": VOCAB, "dtype": "float32", "eos_token_id": 2}
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.write(path, CONFIG, tiny_models.tensors(CONFIG))
    tiny_models.write_tokenizer(path, VOCAB)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> qllm.Model:
    return qllm.Model.from_pretrained(folder)


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


# ------------------------------------------------------------------------- what a draw depends on


def test_the_same_seed_gives_the_same_text(model: qllm.Model, folder: Path) -> None:
    first = model.generate("abc", seed=5, **OPTIONS)
    assert model.generate("abc", seed=5, **OPTIONS) == first
    assert qllm.Model.from_pretrained(folder).generate("abc", seed=5, **OPTIONS) == first
    assert model.generate("abc", seed=6, **OPTIONS).ids != first.ids
    assert len(first.ids) == len(first.logprobs) == len(first.sampling_logprobs) == 12
    assert first.prompt_ids == [1, *ids_of("abc")] and first.finish_reason == "length"
    assert str(first) == first.text and first.config.seed == 5


def test_text_and_ids_are_one_prompt(model: qllm.Model) -> None:
    by_text = model.generate("abc", **OPTIONS)
    for ids in ([1, *ids_of("abc")], tuple([1, *ids_of("abc")]), np.array([1, *ids_of("abc")])):
        assert model.generate(ids, **OPTIONS) == by_text


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_results_do_not_depend_on_the_batch(model: qllm.Model, batch_size: int) -> None:
    """Rows of several lengths, prompts and options; they come in, finish and leave at different
    times."""
    rng = np.random.default_rng(3)
    requests = [
        Request(
            ["ab", "hello world", [5, 6, 7], "ab"][i % 4],
            GenerationConfig(
                temperature=[0.0, 0.5, 1.0, 2.0][i % 3],
                top_k=[0, 1, 5, 50][i % 4],
                top_p=[1.0, 0.8][i % 2],
                min_p=[0.0, 0.05][i // 2 % 2],
                repetition_penalty=[1.0, 1.3][i // 3 % 2],
                max_new_tokens=int(rng.integers(1, 20)),
                seed=i,
            ),
        )
        for i in range(17)
    ]
    alone = [model.generate(r.prompt, config=r.config) for r in requests]
    seen: list[tuple[int, int]] = []
    together = model.generate_batch(
        requests, batch_size=batch_size, progress=lambda done, of: seen.append((done, of))
    )
    assert together == alone
    assert seen == [(i + 1, 17) for i in range(17)]
    backwards = model.generate_batch(requests[::-1], batch_size=batch_size)
    assert backwards[::-1] == alone


def test_equal_prompts_are_computed_once_and_freed(
    model: qllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model.decoder
    steps: list[tuple[int, int]] = []

    class Watched:
        """The decoder, its calls of step written down."""

        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def step_draw(self, sequences: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
            steps.append((len(tokens), decoder.nbytes()["kv_cache"]))
            return decoder.step_draw(sequences, tokens, *rest, **options)

    monkeypatch.setattr(model, "decoder", Watched())
    prompt = list(range(3, 60))
    options = {"max_new_tokens": 3, "ignore_eos": True}
    results = model.generate([prompt] * 6 + [[4, 5]], seed=[*range(6), 0], batch_size=4, **options)
    assert len({tuple(result.ids) for result in results}) > 1
    # the prompt, two rounds for four rows, then the last two of it and the other prompt
    assert [count for count, _ in steps] == [57, 4, 4, 2, 3, 3]
    assert steps[2][1] < 0.6 * 4 * steps[1][1]  # four rows hold most of the prompt together
    gc.collect()
    assert decoder.nbytes()["kv_cache"] == 0


def test_keys_and_values_are_freed_when_rows_finish(
    model: qllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long row beside many short ones: what is held goes down to the long row's."""
    decoder, held = model.decoder, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def step_draw(self, *rows: Any, **options: Any) -> Any:
            drawn = decoder.step_draw(*rows, **options)
            held.append(decoder.nbytes()["kv_cache"])
            return drawn

    monkeypatch.setattr(model, "decoder", Watched())
    requests = [Request([i + 3] * 40, GenerationConfig(max_new_tokens=2)) for i in range(8)]
    requests.append(Request([99] * 40, GenerationConfig(max_new_tokens=30, ignore_eos=True)))
    model.generate_batch(requests)
    assert len(held) == 30 and held[1] > 4 * held[2] and held[2] > 0
    gc.collect()
    assert model.decoder.nbytes()["kv_cache"] == 0


def test_per_prompt_options(model: qllm.Model) -> None:
    prompts = ["ab", "cd", "ef"]
    together = model.generate(
        prompts,
        temperature=[0.0, 1.0, 2.0],
        seed=np.array([1, 2, 3]),
        max_new_tokens=[4, 5, 6],
        top_k=5,
        stop=[[], ["z"], None],
        ignore_eos=True,
    )
    for i, prompt in enumerate(prompts):
        alone = model.generate(
            prompt,
            temperature=[0.0, 1.0, 2.0][i],
            seed=i + 1,
            max_new_tokens=4 + i,
            top_k=5,
            stop=[(), ("z",), ()][i],
            ignore_eos=True,
        )
        assert together[i] == alone
    assert [len(result.ids) for result in together if result.finish_reason == "length"]


def test_the_prompt_key_names_the_noise(model: qllm.Model) -> None:
    import hashlib

    ids = [1, *ids_of("abc")]
    digest = hashlib.blake2b(np.array(ids, "<i8").tobytes(), digest_size=8).digest()
    assert prompt_key_of(ids) == int.from_bytes(digest, "little")
    plain = model.generate("abc", **OPTIONS)
    assert plain.prompt_key == prompt_key_of(ids)
    assert model.generate("abc", prompt_key=plain.prompt_key, **OPTIONS) == plain
    other = model.generate("abc", prompt_key=2**64 - 1, **OPTIONS)
    assert other.ids != plain.ids and other.prompt_key == 2**64 - 1
    keyed = model.generate(["abc", "abd"], prompt_key=[7, None], **OPTIONS)
    assert [result.prompt_key for result in keyed] == [7, prompt_key_of([1, *ids_of("abd")])]


def test_each_draw_is_that_of_sample(model: qllm.Model) -> None:
    """Token by token against qllm.sample on teacher-forced logits."""
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    result = model.generate(
        "hello", seed=11, repetition_penalty=1.2, max_new_tokens=15, ignore_eos=True, **options
    )
    ids = result.prompt_ids + result.ids
    logits = model.logits(ids)
    for step, token in enumerate(result.ids):
        position = len(result.prompt_ids) + step
        drawn = qllm.sample(
            logits[position - 1],
            seed=11,
            prompt=result.prompt_key,
            step=step,
            repetition_penalty=1.2,
            history=ids[:position],
            **options,
        )
        assert drawn.tokens == token
        assert result.logprobs[step] == drawn.logprobs
        assert result.sampling_logprobs[step] == drawn.sampling_logprobs


def test_logprobs_are_those_of_score(model: qllm.Model) -> None:
    result = model.generate("hello", temperature=1.5, top_k=3, max_new_tokens=20, ignore_eos=True)
    score = model.score(result.prompt_ids + result.ids)
    np.testing.assert_allclose(result.logprobs, score.logprobs[-20:], rtol=1e-6)
    exact = model.logits(result.prompt_ids + result.ids).astype(np.float64)
    peak = exact.max(1, keepdims=True)
    logs = exact - peak - np.log(np.exp(exact - peak).sum(1, keepdims=True))
    expected = logs[np.arange(len(score.logprobs)), score.ids[1:]]
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-9)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"do_sample": False, "temperature": 3.0}])
def test_greedy_takes_the_most_probable_token(model: qllm.Model, greedy: dict) -> None:
    result = model.generate("hello", max_new_tokens=20, ignore_eos=True, **greedy)
    logits = model.logits(result.prompt_ids + result.ids)
    assert result.ids == logits[len(result.prompt_ids) - 1 : -1].argmax(1).tolist()
    assert result.sampling_logprobs == [0.0] * 20 and max(result.logprobs) < 0
    assert model.generate("hello", max_new_tokens=20, seed=9, ignore_eos=True, **greedy).ids == (
        result.ids
    )


@pytest.mark.parametrize("penalty", [1.0, 1.15, 2.0])
def test_greedy_with_a_penalty_is_that_of_transformers(folder: Path, penalty: float) -> None:
    torch = pytest.importorskip("torch", reason="transformers is the oracle")
    transformers = pytest.importorskip("transformers", reason="it is the oracle")
    torch.set_num_threads(1)  # for models this small, threads take longer than the work
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    ours = qllm.Model.from_pretrained(folder)
    prompt = [1, *ids_of("hello world")]
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=32, repetition_penalty=penalty
    )[0, len(prompt) :].tolist()
    result = ours.generate(
        prompt, do_sample=False, max_new_tokens=32, repetition_penalty=penalty, ignore_eos=True
    )
    assert result.ids == expected


# ----------------------------------------------------------------------------------- where it ends


def first_greedy(model: qllm.Model, count: int = 12) -> qllm.Generation:
    return model.generate("hello", temperature=0, max_new_tokens=count, ignore_eos=True)


def test_an_eos_ends_it_and_is_counted(model: qllm.Model) -> None:
    whole = first_greedy(model)
    eos = whole.ids[5]
    place = whole.ids.index(eos)
    for given in (eos, [eos], (eos, 1), np.array([eos])):
        result = model.generate("hello", temperature=0, max_new_tokens=12, eos_token_id=given)
        assert result.ids == whole.ids[: place + 1] and result.finish_reason == "eos"
        assert result.text == model.tokenizer.continuation(result.prompt_ids, result.ids[:-1])
    ignored = model.generate(
        "hello", temperature=0, max_new_tokens=12, eos_token_id=eos, ignore_eos=True
    )
    assert ignored.ids == whole.ids and ignored.finish_reason == "length"
    none = model.generate("hello", temperature=0, max_new_tokens=12, eos_token_id=())
    assert none.ids == whole.ids


def test_the_eos_of_the_folder_is_the_default(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    whole = first_greedy(qllm.Model.from_pretrained(folder))
    place = whole.ids.index(whole.ids[4])
    for name in ("config.json", "generation_config.json"):
        target = tmp_path / name
        shutil.copytree(folder, target)
        members = CONFIG if name == "config.json" else {}
        (target / name).write_text(json.dumps(members | {"eos_token_id": [whole.ids[4], 0]}))
        model = qllm.Model.from_pretrained(target)
        assert model.eos_token_id == (whole.ids[4], 0)
        result = model.generate("hello", temperature=0, max_new_tokens=12)
        assert result.ids == whole.ids[: place + 1]


def forced(model: qllm.Model, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Makes the model draw `ids`, one after the other, whatever its logits."""

    decoder = model.decoder

    class Forced:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def step_draw(self, *rows: Any, **options: Any) -> Any:
            *drawn, logits = decoder.step_draw(*rows, **options)
            drawn[0] = np.array([ids[step] for step in options["step"]])
            return *drawn, logits

    monkeypatch.setattr(model, "decoder", Forced())


@pytest.mark.parametrize(
    ("text", "stop", "shown", "count"),
    [
        ("one two three four", ["two"], "one ", 7),
        ("one two three four", "two", "one ", 7),
        ("one two three four", ["three", "wo t"], "one t", 9),
        ("one two three four", ["four!"], "one two three fo", 16),
        ("abababac, done.....", ["abac"], "abab", 8),
        ("aaaaaaaaaaaaaaaaab", ["aaab"], "aaaaaaaaaaaaaa", 18),
        ("x", ["xyz"], "x", 1),
        ("gr\u00fc\u00dfe \u65e5\u672c\u8a9e!", ["\u672c"], "gr\u00fc\u00dfe \u65e5", 14),
        ("\U0001f600\U0001f601", ["\U0001f601"], "\U0001f600", 8),
        ("first", ["first", "f"], "", 1),
    ],
)
def test_stop_strings(
    model: qllm.Model,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    stop: Any,
    shown: str,
    count: int,
) -> None:
    """Every token is one byte here, so strings and characters span tokens."""
    forced(model, monkeypatch, ids_of(text))
    limit = min(len(ids_of(text)), 16 if stop == ["four!"] else 99)
    options = {"stop": stop, "max_new_tokens": limit, "ignore_eos": True}
    result = model.generate("say: ", **options)
    assert result.text == shown and len(result.ids) == count
    stopped = "length" if stop in (["four!"], ["xyz"]) else "stop"
    assert result.finish_reason == stopped
    assert result.ids == ids_of(text)[:count]
    pieces = list(model.stream("say: ", **options))
    assert "".join(pieces) == shown and "" not in pieces


def test_streams_hold_back_unfinished_characters(
    model: qllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u00fc\u65e5\U0001f600b"
    forced(model, monkeypatch, ids_of(text))
    count = len(ids_of(text))
    pieces = list(model.stream("x", max_new_tokens=count, ignore_eos=True))
    assert pieces == list(text)
    # cut inside the last character but one: what is there is shown as U+FFFD at the end
    cut = list(model.stream("x", max_new_tokens=count - 2, ignore_eos=True))
    assert "".join(cut) == text[:3] + "\ufffd"
    assert cut == [*text[:3], "\ufffd"]
    assert model.generate("x", max_new_tokens=count - 2, ignore_eos=True).text == "".join(cut)


def test_a_character_may_begin_in_the_prompt(
    model: qllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of("\u65e5!")
    forced(model, monkeypatch, ids[1:])
    prompt = [1, *ids_of("so "), ids[0]]
    options = {"max_new_tokens": 3, "ignore_eos": True}
    assert model.generate(prompt, **options).text == "\u65e5!"
    assert "".join(model.stream(prompt, **options)) == "\u65e5!"


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_is_the_text_of_generate(model: qllm.Model, seed: int) -> None:
    """Random bytes: broken characters of every kind."""
    options = {"seed": seed, "temperature": 1.5, "top_k": 0, "max_new_tokens": 60}
    result = model.generate("hello", **options)
    pieces = list(model.stream("hello", **options))
    assert "".join(pieces) == result.text
    assert all(pieces)


def test_streamers_of_hugging_face(model: qllm.Model) -> None:
    calls: list[Any] = []

    class Streamer:
        def put(self, value: Any) -> None:
            assert value.dtype == np.int64
            calls.append(value.tolist())

        def end(self) -> None:
            calls.append("end")

    pieces = model.stream("hi", streamer=Streamer(), **OPTIONS)
    assert calls[-1] == "end"  # at once, before anyone reads the pieces
    result = model.generate("hi", **OPTIONS)
    assert calls == [[result.prompt_ids], *([token] for token in result.ids), "end"]
    assert "".join(pieces) == result.text


def test_the_streamer_of_transformers(model: qllm.Model, folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="its streamer is used")
    pytest.importorskip("torch", reason="its streamer needs it")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    shown: list[str] = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown.append(text)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.stream("hi", streamer=streamer, max_new_tokens=20, seed=4, ignore_eos=True)
    assert "".join(shown) == tokenizer.decode(
        model.generate("hi", max_new_tokens=20, seed=4, ignore_eos=True).ids,
        skip_special_tokens=True,
    )


def test_a_stream_may_be_left(model: qllm.Model) -> None:
    expected = model.generate("hello", **OPTIONS)
    stream = model.stream("hello", **OPTIONS)
    next(stream)
    stream.close()
    del stream
    gc.collect()
    assert model.decoder.nbytes()["kv_cache"] == 0
    assert model.generate("hello", **OPTIONS) == expected


def test_an_interrupt_leaves_the_model_usable(
    model: qllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(["ab", "cd"], **OPTIONS)

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    requests = [Request("ab", GenerationConfig(max_new_tokens=n + 1)) for n in range(5)]
    with pytest.raises(KeyboardInterrupt):
        model.generate_batch(requests, progress=interrupt)
    gc.collect()
    assert model.decoder.nbytes()["kv_cache"] == 0
    assert model.generate(["ab", "cd"], **OPTIONS) == expected


# ------------------------------------------------------------------------------------- text pieces


def test_text_streams_of_plain_texts(model: qllm.Model) -> None:
    rng = np.random.default_rng(5)
    letters = "ab \u00e9\u65e5\U0001f600"
    for _ in range(50):
        text = "".join(rng.choice(list(letters), 12))
        ids = ids_of(text)
        stop = ("".join(rng.choice(list(letters), int(rng.integers(1, 4)))),)
        stream = TextStream(model.tokenizer, [1, 2, 3], stop)
        pieces = []
        for token in ids:
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        pieces.append(stream.finish())
        place = text.find(stop[0])
        assert stream.stopped == (place >= 0)
        assert "".join(pieces) == (text if place < 0 else text[:place])


# ---------------------------------------------------------------------------------------- measures


def test_logits_of_several_sequences(model: qllm.Model) -> None:
    sequences = [[5, 6, 7], [8], list(range(3, 40))]
    together = model.logits(sequences)
    for ids, logits in zip(sequences, together):
        assert logits.shape == (len(ids), VOCAB) and logits.dtype == np.float32
        assert np.array_equal(logits, model.logits(ids))
    assert np.array_equal(model.logits("abc"), model.logits(model.encode("abc")))


def test_scores(model: qllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "gr\u00fc\u00dfe"
    score = model.score(text)
    assert score.ids == [1, *ids_of(text)] and score.logprobs.dtype == np.float64
    assert score.nll == pytest.approx(-score.logprobs.sum())
    assert score.perplexity == pytest.approx(np.exp(score.nll / 7))
    assert score.nll_per_byte == pytest.approx(score.nll / 7)
    without_bos = model.score(ids_of("abcd"))
    assert without_bos.nll_per_byte == pytest.approx(without_bos.nll / 3)
    monkeypatch.setattr(qllm.model, "_LOGITS_PER_PIECE", 3 * VOCAB)
    assert np.array_equal(model.score(text).logprobs, score.logprobs)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, ["temperature", "-0.1", "at least 0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"temperature": "hot"}, ["temperature", "'hot'"]),
        ({"temperature": True}, ["temperature", "True"]),
        ({"temperature": None}, ["temperature", "None"]),
        ({"top_k": -1}, ["top_k", "-1"]),
        ({"top_k": 2.0}, ["top_k", "2.0", "integer"]),
        ({"top_k": True}, ["top_k", "True"]),
        ({"keep_ties": 1}, ["keep_ties", "1", "True or False"]),
        ({"logits_dtype": "float16"}, ["logits_dtype", "float16", "float32 or bfloat16"]),
        ({"top_p": 0}, ["top_p", "above 0"]),
        ({"top_p": 1.01}, ["top_p", "1.01", "at most 1"]),
        ({"min_p": -0.1}, ["min_p", "from 0 to 1"]),
        ({"min_p": 1.1}, ["min_p", "1.1"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "above 0"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "from 1"]),
        ({"max_new_tokens": 5.0}, ["max_new_tokens", "5.0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**64}, ["seed", "18446744073709551616"]),
        ({"seed": None}, ["seed", "None"]),
        ({"do_sample": 1}, ["do_sample", "True or False"]),
        ({"ignore_eos": "no"}, ["ignore_eos"]),
        ({"stop": [""]}, ["stop", "at least one character"]),
        ({"stop": [3]}, ["stop", "3"]),
        ({"stop": 3}, ["stop", "3"]),
        ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"eos_token_id": [1.5]}, ["eos_token_id", "1.5"]),
        ({"temprature": 1}, ["temprature", "temperature, top_k"]),
        ({"seed": [1, 2]}, ["seed has 2 values", "one prompt"]),
        ({"prompt_key": -1}, ["prompt_key", "-1"]),
        ({"prompt_key": 1.5}, ["prompt_key", "1.5"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"config": {"seed": 1}}, ["config", "GenerationConfig"]),
        ({"max_new_tokens": 125}, ["4 tokens", "125", "129 positions", "128"]),
    ],
)
def test_options_that_have_no_meaning(model: qllm.Model, options: dict, words: list[str]) -> None:
    with pytest.raises(qllm.QllmValueError) as caught:
        model.generate("abc", **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], ["empty"]),
        (np.array([], np.int64), ["empty"]),
        ([3, VOCAB], ["259", "position 1", "from 0 to 258"]),
        ([-1], ["-1", "position 0"]),
        ([1.5], ["1.5", "token id"]),
        ([True], ["True"]),
        (7, ["int", "text"]),
        (None, ["NoneType", "text"]),
        (iter([1, 2]), ["iterator", "text"]),
        (["a", 3], ["int", "token ids"]),
        ([[1, 2], []], ["empty"]),
    ],
)
def test_prompts_that_are_none(model: qllm.Model, prompt: Any, words: list[str]) -> None:
    with pytest.raises(qllm.QllmValueError) as caught:
        model.generate(prompt)
    assert all(word in str(caught.value) for word in words)


def test_lists_of_options_must_fit(model: qllm.Model) -> None:
    with pytest.raises(qllm.QllmValueError, match="seed has 3 values, but there is a list of 2"):
        model.generate(["a", "b"], seed=[1, 2, 3])
    with pytest.raises(qllm.QllmValueError, match="one prompt, not a list"):
        model.stream(["a", "b"])
    with pytest.raises(qllm.QllmValueError, match="Request was expected"):
        model.generate_batch(["a"])


def test_the_largest_texts_that_fit(model: qllm.Model) -> None:
    assert len(model.generate([5] * 124, max_new_tokens=4, ignore_eos=True).ids) == 4
    assert model.logits([5] * 128).shape == (128, VOCAB)
    for call in (model.logits, model.score):
        with pytest.raises(qllm.QllmValueError, match="129 tokens .* 128"):
            call([5] * 129)
    with pytest.raises(qllm.QllmValueError, match="at least 2"):
        model.score([5])


def test_numpy_numbers_are_numbers() -> None:
    config = GenerationConfig(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1), top_p=1
    )
    assert config == GenerationConfig(temperature=0.5, top_k=3, seed=2**64 - 1)
    assert type(config.top_p) is float and type(config.top_k) is int
    assert GenerationConfig(stop="x").stop == ("x",)
    assert config.replace(seed=4).seed == 4


def test_ids_work_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = qllm.Model.from_pretrained(tmp_path)
    result = model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    assert result.text is None and len(result.ids) == 4 and str(result) == ""
    assert model.score([1, 2, 3]).nll_per_byte is None
    for call in (
        lambda: model.generate("abc"),
        lambda: model.generate([1, 2], stop="x"),
        lambda: next(model.stream([1, 2])),
        lambda: model.encode("abc"),
        lambda: model.decode([1]),
    ):
        with pytest.raises(qllm.QllmFileError, match="no tokenizer.json.*ids"):
            call()


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    model = qllm.Model.from_pretrained(folder)
    with pytest.raises(qllm.QllmUnsupportedError, match=r'pip install "qllm\[text\]".*ids work'):
        model.generate("abc")
    assert model.generate([1, 2], max_new_tokens=2, ignore_eos=True).text is None


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": {"type": "BPE"}}', "\x00\xff"])
def test_a_broken_tokenizer_is_a_clear_error(folder: Path, tmp_path: Path, content: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    model = qllm.Model.from_pretrained(tmp_path)
    with pytest.raises(qllm.QllmFileError, match="tokenizer.json is no tokenizer"):
        model.encode("abc")


def test_a_tokenizer_larger_than_the_model_is_noticed(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 90}
    tiny_models.write(tmp_path, config, tiny_models.tensors(config))
    tiny_models.write_tokenizer(tmp_path, VOCAB)
    model = qllm.Model.from_pretrained(tmp_path)
    assert model.encode("A") == [1, ord("A") + 3]
    with pytest.raises(qllm.QllmFileError, match="token id 125, but the model has 90 tokens"):
        model.encode("z")


def test_a_length_limit_in_the_tokenizer_does_not_cut_texts(folder: Path, tmp_path: Path) -> None:
    import json

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(qllm.Model.from_pretrained(tmp_path).encode("abcdefgh")) == 9
