"""What a caller can do wrong with a model, or do at a bad moment: each is refused in one sentence,
or leaves everything as it was."""

from __future__ import annotations

import _thread
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import qllm
from qllm import GenerationConfig, Request, _core, layers
from qllm.checkpoint import Checkpoint

pytest.importorskip("safetensors", reason="writes the checkpoints")
pytest.importorskip("tokenizers", reason="text goes through it")

import tiny_models  # noqa: E402

VOCAB = 259  # <unk> <s> </s> and 256 bytes
CONFIG = tiny_models.LLAMA | {"vocab_size": VOCAB, "dtype": "float32"}
IDS = list(range(3, 40))
FEW: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def shared(folder: Path) -> qllm.Model:
    """For tests that leave a model as it is."""
    return qllm.Model.from_pretrained(folder)


def written(folder: Path) -> Path:
    tiny_models.write(folder, CONFIG, tiny_models.tensors(CONFIG))
    tiny_models.write_tokenizer(folder, VOCAB)
    return folder


def refused(words: list[str], call: Callable[[], Any], error: type = qllm.QllmValueError) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    sentence = str(caught.value)
    assert [word for word in words if word not in sentence] == [], sentence
    assert "\n" not in sentence and len(sentence) < 600


def consistent(model: qllm.Model) -> bool:
    """Whether the model knows what its decoder has."""
    held = {linear.module: model.decoder.linear(linear.slot).format
            for linear in model.architecture.modules}
    return held == model.formats


# ------------------------------------------------------------------------------ prompts and options


@pytest.mark.parametrize(("prompt", "words"), [
    (b"abc", ["bytes", "decode it"]),
    (bytearray(b"abc"), ["bytearray", "decode it"]),
    (memoryview(b"abc"), ["memoryview", "list of token ids"]),
    ({1: 2}, ["dict", "sequence of token ids"]),
    ({5, 6}, ["set", "sequence of token ids"]),
    ([10**5000], ["int of thousands of digits", "position 0"]),
    ([3, "\ud800"], ["'\\ud800'", "position 1"]),
    (np.array([1.0, 2.0]), ["1.0", "token id"]),
    (np.array([True]), ["True", "position 0"]),
    (np.ma.masked_array([3, 4], [False, True]), ["None", "position 1"]),
    (np.array([2**64 - 1], np.uint64), ["18446744073709551615", "0 to 258"]),
    ("a\ud800b", ["lone surrogate U+D800", "position 1"]),
])
def test_prompts_that_nobody_can_mean(
    shared: qllm.Model, prompt: Any, words: list[str]
) -> None:
    """Bytes, sets and mappings were taken for token ids once."""
    for call in (shared.generate, shared.score, shared.logits, shared.stream):
        refused(words, lambda: call(prompt))


def test_a_prompt_of_a_million_characters(shared: qllm.Model) -> None:
    refused(["1000001 tokens", "128"], lambda: shared.generate("a" * 10**6))


def test_odd_prompts_that_have_a_meaning(shared: qllm.Model) -> None:
    expected = shared.generate([5, 6], **FEW).ids
    for ids in ((np.int64(5), np.uint8(6)), range(5, 7), np.array([5, 6], ">i4"),
                np.array([0, 5, 0, 6])[1::2]):
        assert shared.generate(ids, **FEW).ids == expected
    for text in ("\0", "\u202ea", "\U0001f469\u200d\U0001f467", " ", "\r\n"):
        assert shared.generate(text, **FEW).prompt_ids == [1, *(b + 3 for b in text.encode())]
    assert shared.generate("", **FEW).prompt_ids == [1]  # the BOS that the tokenizer adds


@pytest.mark.parametrize(("options", "words"), [
    ({"stop": "a\udcff"}, ["stop", "lone surrogate U+DCFF", "position 1"]),
    ({"eos_token_id": VOCAB}, ["eos_token_id has 259", "0 to 258"]),
    ({"eos_token_id": [2, 10**30]}, ["eos_token_id has 1000", "0 to 258"]),
    ({"seed": 10**5000}, ["seed", "thousands of digits"]),
    ({"temperature": np.array([1.0, 2.0])}, ["temperature has 2 values", "one prompt"]),
])
def test_options_without_effect_are_refused(
    shared: qllm.Model, options: dict[str, Any], words: list[str]
) -> None:
    refused(words, lambda: shared.generate("a", **options))


def test_numbers_of_numpy_are_options(shared: qllm.Model) -> None:
    expected = shared.generate("a", temperature=0.5, top_k=3, seed=7, **FEW)
    found = shared.generate("a", temperature=np.float32(0.5), top_k=np.int8(3),
                            seed=np.array(7), **FEW)
    assert found == expected


def test_callbacks_and_requests_are_checked_before_any_work(shared: qllm.Model) -> None:
    requests = [Request("a", GenerationConfig(max_new_tokens=2))]
    refused(["progress is a int"], lambda: shared.generate_batch(requests, progress=3))
    refused(["requests are a NoneType"], lambda: shared.generate_batch(None))
    refused(["Request is a dict", "GenerationConfig"],
            lambda: shared.generate_batch([Request("a", {"seed": 1})]))
    refused(["streamer is a int", "put and end"], lambda: shared.stream("a", streamer=3))
    refused(["skip_special_tokens is 'no'"], lambda: shared.decode([3], "no"))
    refused(["ids has the token id '-1'"], lambda: shared.decode([-1]))
    refused(["ids is a bytes"], lambda: shared.decode(b"a"))


# -------------------------------------------------------------------------- loading, saving, copies


@pytest.mark.parametrize(("options", "words"), [
    ({"isa": 3}, ["isa is '3'"]),
    ({"isa": "avx2\0"}, ["isa is 'avx2\\x00'"]),
    ({"device": None}, ["device is 'None'"]),
    ({"device": "\ud800"}, ["device is '\\ud800'"]),
    ({"int8_outliers": "row\0"}, ["int8_outliers is"]),
    ({"threads": True}, ["threads", "bool"]),
    ({"threads": 10**30}, ["threads", "64 bits"]),
    ({"quantization": "nf4", "blocksize": 64.0}, ["blocksize is '64.0'"]),
    ({"quantization": "nf4", "blocksize": np.array([64, 64])}, ["blocksize is '[64 64]'"]),
])
def test_options_of_loading_are_one_sentence(
    folder: Path, options: dict[str, Any], words: list[str]
) -> None:
    refused(words, lambda: qllm.Model.from_pretrained(folder, **options))


def test_a_compute_mode_that_is_an_array(folder: Path) -> None:
    refused(["compute is", "exact, auto and int8"],
            lambda: qllm.Model.from_pretrained(folder, compute=np.array(["exact", "auto"])),
            qllm.QllmUnsupportedError)


def test_names_of_models_are_text_or_paths(folder: Path) -> None:
    for name in (None, 3, [str(folder)], b"demo:llama"):
        for call in (qllm.Model.from_pretrained, Checkpoint.open):
            refused([f"the model is a {type(name).__name__}", "folder or a name"],
                    lambda: call(name))
    for name in ("", "a\0b", "\ud800", "~", "x" * 5000):
        refused(["there is no folder"], lambda: qllm.Model.from_pretrained(name),
                qllm.QllmFileError)


@pytest.mark.parametrize("target", [None, 3, "", "a\0b", "a\ud800", b"out"])
def test_folders_to_save_in_are_paths(shared: qllm.Model, target: Any) -> None:
    refused(["the folder is", "path of a folder"], lambda: shared.save(target))


def test_a_lone_surrogate_in_the_config_is_no_text(tmp_path: Path) -> None:
    """It was met first when the config was written again."""
    config = written(tmp_path / "m") / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"dtype"', '"_name_or_path": "\\ud83d\\ude00", "dtype"'))
    model = qllm.Model.from_pretrained(tmp_path / "m")
    assert model.checkpoint.config["_name_or_path"] == "\U0001f600"
    for escape in ("\\ud800", "\\uDfff"):
        config.write_text(text.replace('"dtype"', f'"_name_or_path": "{escape}", "dtype"'))
        refused(["config.json is not valid JSON", "surrogates not allowed"],
                lambda: qllm.Model.from_pretrained(tmp_path / "m"), qllm.QllmFileError)


def test_a_model_is_neither_pickled_nor_copied(shared: qllm.Model, folder: Path) -> None:
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        refused(["cannot be pickled or copied", folder.name, "load"], lambda: call(shared),
                qllm.QllmUnsupportedError)
    for part in (shared.decoder, shared.decoder.sequence()):
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(part)


# ------------------------------------------------------------------- the folder behind a live model


@pytest.mark.parametrize("change", [
    pytest.param(lambda path: path.open("ab").write(b"x"), id="longer"),
    pytest.param(lambda path: os.truncate(path, path.stat().st_size - 1), id="truncated"),
    pytest.param(lambda path: os.utime(path, (1, 1)), id="other time"),
    pytest.param(lambda path: path.rename(path.with_name("away")), id="moved away"),
])
def test_a_swap_from_a_file_that_changed_is_refused(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    folder = written(tmp_path / "m")
    model = qllm.Model.from_pretrained(folder)
    model.quantize_("nf4", include="*up_proj")
    before, formats = model.logits(IDS), model.formats
    change(folder / "model.safetensors")
    for format in ("int8", "original"):
        refused(["model.safetensors", "changed, replaced or removed", "open the checkpoint again"],
                lambda: model.quantize_(format), qllm.QllmFileError)
    assert model.formats == formats and consistent(model)
    assert np.array_equal(model.logits(IDS), before)


def test_a_closed_checkpoint_ends_swaps_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    model = qllm.Model.from_pretrained(folder)
    before = model.logits(IDS)
    model.checkpoint.close()
    refused(["was closed", "open it again"], lambda: model.quantize_("int8"))
    refused(["was closed", "open it again"], lambda: model.save(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert np.array_equal(model.logits(IDS), before) and consistent(model)


def test_sequences_and_streams_outlive_the_model(folder: Path) -> None:
    model = qllm.Model.from_pretrained(folder)
    expected = "".join(model.stream("abc", max_new_tokens=20, ignore_eos=True))
    logits = model.logits(IDS)
    stream = model.stream("abc", max_new_tokens=20, ignore_eos=True)
    first, sequence, decoder = next(stream), model.decoder.sequence(), model.decoder
    del model
    gc.collect()
    assert first + "".join(stream) == expected
    assert np.array_equal(decoder.step([sequence] * len(IDS), np.array(IDS)), logits)


# ------------------------------------------------------------------------------------- interrupts


class InterruptedAfter:
    """A decoder whose n-th load_linear is followed by Ctrl-C, which arrived while it worked."""

    def __init__(self, decoder: Any, n: int) -> None:
        self._decoder, self._left = decoder, n

    def load_linear(self, *arguments: Any, **named: Any) -> int:
        size = self._decoder.load_linear(*arguments, **named)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_interrupt_just_after_a_layer_was_set_is_undone_too(folder: Path, n: int) -> None:
    """The layer was set but not noted, and stayed in the new format."""
    model = qllm.Model.from_pretrained(folder)
    model.quantize_("fp4", include="*.0.mlp.*")
    before, formats = model.logits(IDS), model.formats
    model._layers._decoder = InterruptedAfter(model.decoder, n)
    with pytest.raises(KeyboardInterrupt):
        model.quantize_("nf4")
    assert model.formats == formats and consistent(model)
    assert np.array_equal(model.logits(IDS), before)


def test_an_interrupt_while_the_report_is_made_undoes_the_swap(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report came after the swap, which then stood in spite of the interrupt."""
    model = qllm.Model.from_pretrained(folder)
    before, formats = model.logits(IDS), model.formats

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(layers.Layers, "_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.quantize_("nf4")
    assert model.formats == formats and consistent(model)
    assert np.array_equal(model.logits(IDS), before)


def test_a_layer_whose_error_cannot_be_measured_is_put_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was set but not noted, and stayed in the new format."""
    model = qllm.Model.from_pretrained(folder)
    before, formats = model.logits(IDS), model.formats

    def failing(*arguments: Any) -> Any:
        raise qllm.QllmMemoryError("no memory for the figures")

    monkeypatch.setattr(layers.Layers, "_with_error", failing)
    with pytest.raises(qllm.QllmMemoryError, match="for the figures"):
        model.quantize_("nf4")
    monkeypatch.undo()
    assert model.formats == formats and consistent(model)
    assert np.array_equal(model.logits(IDS), before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no interval timers here")
def test_signals_at_any_moment_leave_a_model_whole() -> None:
    """A timer interrupts swaps and generations later and later, until one finishes."""
    model = qllm.Model.from_pretrained("demo:llama")
    before, formats = model.logits(IDS), model.formats
    text = model.generate("Once", max_new_tokens=30, ignore_eos=True)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for call in (lambda: model.quantize_("nf4"),
                     lambda: model.generate("Once", max_new_tokens=30, ignore_eos=True)):
            delay = 0.0005
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    call()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except KeyboardInterrupt:
                    interrupted += 1
                assert model.decoder.nbytes()["kv_cache"] == 0 and consistent(model)
                if model.formats != formats:  # it came when all was done
                    assert set(model.formats.values()) == {"bf16", "nf4"}
                    break
                delay *= 1.5
            model.quantize_("original")
            assert np.array_equal(model.logits(IDS), before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted >= 2
    assert model.generate("Once", max_new_tokens=30, ignore_eos=True) == text


def test_ctrl_c_in_a_long_step_ends_it_with_an_interrupt() -> None:
    """The step is finished first; the sequence it worked on is freed."""
    model = qllm.Model.from_pretrained("demo:llama")
    prompts = [[5 + i % 7] * 500 for i in range(6)]
    timer = threading.Timer(0.05, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        model.logits(prompts)
        timer.join()
    assert model.decoder.nbytes()["kv_cache"] == 0
    assert model.logits(IDS).shape[0] == len(IDS)


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("call", [
    pytest.param(lambda model: model.quantize_("nf4-dq", include="*.1.mlp.*"), id="swap"),
    pytest.param(lambda model: model.generate(IDS, **FEW), id="generate"),
    pytest.param(lambda model: model.score(IDS), id="score"),
])
def test_any_allocation_may_fail(folder: Path, call: Callable[[qllm.Model], Any]) -> None:
    model = qllm.Model.from_pretrained(folder)
    before, formats = model.logits(IDS), model.formats
    for n in range(1, 300):
        _core._alloc_fail_at(n)
        try:
            call(model)
        except qllm.QllmMemoryError as error:
            assert "could not allocate" in str(error)
        else:
            break
        finally:
            _core._alloc_fail_at(0)
        assert model.formats == formats and consistent(model)
        assert model.decoder.nbytes()["kv_cache"] == 0
        assert np.array_equal(model.logits(IDS), before)
    assert 5 < n < 299


# ---------------------------------------------------------------------------------------- threads


def in_threads(*calls: Callable[[], Any]) -> None:
    """Runs the calls at the same time; an exception in one fails the test."""
    failures: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_threads_generate_on_one_model_as_if_alone(shared: qllm.Model) -> None:
    options = {"max_new_tokens": 15, "ignore_eos": True}
    expected = [shared.generate([5 + i, 6], **options) for i in range(3)]
    found: dict[int, list[Any]] = {i: [] for i in range(3)}

    def work(i: int) -> Callable[[], None]:
        return lambda: found[i].extend(shared.generate([5 + i, 6], **options) for _ in range(4))

    in_threads(*(work(i) for i in range(3)))
    assert all(found[i] == [expected[i]] * 4 for i in range(3))


def test_swaps_of_two_threads_come_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once left formats that the decoder did not have."""
    model, real = qllm.Model.from_pretrained(folder), layers.Layers._set

    def slow(self: Any, linear: Any, format: str, blocksize: int) -> Any:
        state = real(self, linear, format, blocksize)
        time.sleep(0.002 if format == "nf4" else 0)
        return state

    monkeypatch.setattr(layers.Layers, "_set", slow)
    in_threads(lambda: model.quantize_("nf4"), lambda: model.quantize_("int8"))
    assert consistent(model) and len(set(model.formats.values()) - {"f32"}) == 1


# ---------------------------------------------------------------------------------------- process


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=60)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.strip()


START = """
import threading, time
import numpy as np, qllm
w = np.random.default_rng(0).standard_normal((4000, 2048)).astype(np.float32)
q = qllm.quantize(w[:400], "nf4")
x = np.ones((512, 2048), np.float32)
started = threading.Event()
"""


@pytest.mark.parametrize("work", [
    "q.matmul(x, threads=2)", "q.matmul_reference(x)", "qllm.quantize(w, 'nf4-dq')",
    "qllm.logit_stats(x, x, [0.5, 1.0, 1.5])",
])
def test_the_program_ends_while_a_kernel_runs(work: str) -> None:
    code = START + f"""
def busy():
    while True:
        started.set()
        {work}
for _ in range(2):
    threading.Thread(target=busy, daemon=True).start()
started.wait()
time.sleep(0.03)
print("end")
"""
    assert run_python(code) == "end"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_generates_with_the_model_of_its_parent(folder: Path) -> None:
    code = f"""
import os, qllm
model = qllm.Model.from_pretrained({str(folder)!r}, threads=2)
options = dict(max_new_tokens=10, ignore_eos=True)
expected = model.generate([5, 6, 7], **options).ids
pid = os.fork()
if pid == 0:
    model.quantize_("int8")
    model.quantize_("original")
    os._exit(0 if model.generate([5, 6, 7], **options).ids == expected else 3)
assert model.generate([5, 6, 7], **options).ids == expected
print(os.waitpid(pid, 0)[1])
"""
    assert run_python(code) == "0"


INTERPRETERS = """
import importlib
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        interpreters = None
WORK = '''
import warnings
warnings.simplefilter("ignore")  # NumPy warns of subinterpreters
import numpy as np, qllm
w = qllm.quantize(np.ones((3, 64), np.float32), "nf4")
assert (w.matmul(np.ones((1, 64), np.float32)) == 64).all()
print("right")
'''
def run_in_another():
    if interpreters is None:
        return print("there are none")
    one = interpreters.create()
    interpreters.run_string(one, "try:\\n    exec(" + repr(WORK) + ")\\nexcept ImportError:"
                            "\\n    print('refused')")
    interpreters.destroy(one)
"""


@pytest.mark.parametrize("order", ["run_in_another()", "exec(WORK); run_in_another(); exec(WORK)"])
def test_a_subinterpreter_computes_or_refuses_the_import(order: str) -> None:
    """NumPy may load once per process only; qllm loads wherever NumPy does."""
    lines = run_python(INTERPRETERS + order).splitlines()
    assert lines[len(lines) // 2] in ("right", "refused", "there are none")
    assert len(lines) == 1 or lines[0] == lines[2] == "right"
