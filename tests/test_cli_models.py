"""The command line with a model: what it prints is what the library says."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qllm
from qllm import _core
from qllm.cli import main
from qllm.cli.texts import score_text, windows
from qllm.errors import QllmValueError

MODEL = "demo:llama"
PROMPT = "Once upon a time"
TEXT = ("One day a boy found a box in the garden. He opened it and saw a small bird. The bird was"
        " cold, so he took it home and gave it some bread.\n")


@pytest.fixture(scope="module")
def model() -> qllm.Model:
    return qllm.Model.from_pretrained(MODEL)


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    code = main(words)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    return captured.out


def error(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    code = main(words)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (1, "", 1), captured.err
    assert captured.err.startswith("qllm: error: ")
    return captured.err


# ----------------------------------------------------------------------------------------- info


def test_info_of_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run("info", "--json", capsys=capsys))
    cpu = _core.cpu_info()
    assert facts["qllm"] == qllm.__version__
    assert facts["numpy"] == np.__version__
    assert facts["processor"] == cpu["model"]
    assert facts["instruction_sets_compiled"] == cpu["compiled"]
    assert facts["instruction_sets_usable"] == cpu["isas"]
    assert facts["instruction_set_used"] == cpu["default"]
    assert facts["threads"] == cpu["threads_default"]
    assert (facts["cores"], facts["logical_processors"]) == (cpu["cores"], cpu["logical"])
    assert facts["processor_quota"] == (cpu["quota"] or "none")
    text = run("info", capsys=capsys)
    assert re.search(rf"^instruction set used +{cpu['default']}$", text, re.MULTILINE)


def test_info_says_why_there_is_no_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    says = json.loads(run("info", "--json", capsys=capsys))["cuda"]
    if says.startswith("yes: "):
        qllm.Model.from_pretrained(MODEL, device="cuda")
    else:
        with pytest.raises(qllm.QllmUnsupportedError) as refused:
            qllm.Model.from_pretrained(MODEL, device="cuda")
        assert says == f"no: {refused.value}"


def test_info_obeys_the_environment(capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLM_CPU", "scalar")
    assert json.loads(run("info", "--json", capsys=capsys))["instruction_set_used"] == "scalar"


def test_info_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["info", MODEL, "--quantization", "int8", "--threads", "1", "--isa", "scalar"]
    facts = json.loads(run(*words, "--json", capsys=capsys))
    expected = qllm.Model.from_pretrained(MODEL, "int8", threads=1, isa="scalar").info().to_dict()
    assert facts == expected
    assert (facts["isa"], facts["threads"]) == ("scalar", 1)
    text = run(*words, capsys=capsys)
    assert [key for key in ("int8: ", "processor", "kernels", "1 threads") if key not in text] == []


def test_what_a_model_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no-such-folder" in error("info", str(tmp_path / "no-such-folder"), capsys=capsys)
    assert "demo:lama" in error("info", "demo:lama", capsys=capsys)
    (tmp_path / "file").write_text("x")
    assert "file" in error("info", str(tmp_path / "file"), capsys=capsys)
    assert "avx9" in error("info", MODEL, "--isa", "avx9", capsys=capsys)


# ------------------------------------------------------------------------------------- quantize


def test_quantize(model: qllm.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    text = run("quantize", MODEL, "--to", "nf4-dq", "--out", str(folder), "--include",
               "*.mlp.*", "--include", "*.q_proj", "--skip", "*.down_proj", "--blocksize", "128",
               capsys=capsys)
    wanted = qllm.Model.from_pretrained(MODEL)
    report = wanted.quantize_("nf4-dq", ["*.mlp.*", "*.q_proj"], "*.down_proj", blocksize=128)
    assert text == f"{report}\nsaved in {folder}\n"
    saved = qllm.Model.from_pretrained(folder)
    assert saved.formats == wanted.formats
    assert set(saved.formats.values()) == {"nf4-dq", "bf16"}
    ids = model.encode(TEXT)
    assert np.array_equal(saved.logits(ids), wanted.logits(ids))


def test_quantize_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    run("quantize", MODEL, "--to", "int8", "--out", str(folder), "--quantize-head", capsys=capsys)
    assert set(qllm.Model.from_pretrained(folder).formats.values()) == {"int8"}


def test_quantize_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    kept = tmp_path / "full" / "kept"
    kept.write_text("x")
    for taken in (tmp_path / "full", kept):
        words = ("quantize", "no:model", "--to", "nf4", "--out", str(taken))
        assert "nothing is overwritten" in error(*words, capsys=capsys)  # before it opens a model
    assert kept.read_text() == "x"


def test_quantize_without_safetensors_says_so_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    words = ("quantize", "no:model", "--to", "nf4", "--out", str(tmp_path / "out"))
    assert "qllm[save]" in error(*words, capsys=capsys)  # before it opens a model


def test_quantize_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("quantize", MODEL, "--out", str(tmp_path / "out"), "--to", "nf4")
    assert "*.nothing" in error(*words, "--include", "*.nothing", capsys=capsys)
    assert "blocksize" in error(*words, "--blocksize", "48", capsys=capsys)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- generate


def test_generate(model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = model.generate(PROMPT, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01,
                              repetition_penalty=1.2, max_new_tokens=12, seed=7)
    words = ["generate", MODEL, "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9",
             "--min-p", "0.01", "--repetition-penalty", "1.2", "--max-new-tokens", "12", "--seed",
             "7", "--prompt", PROMPT]
    assert run(*words, capsys=capsys) == f"{expected}\n"
    assert run(*words, "--echo", capsys=capsys) == f"{PROMPT}{expected}\n"
    other = run(*[*words, "--seed", "8"], capsys=capsys)
    assert other != f"{expected}\n"


def test_generate_quantized(model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "0"]
    quantized = qllm.Model.from_pretrained(MODEL, "fp4")
    assert run(*words, "--quantization", "fp4", capsys=capsys) == (
        f"{quantized.generate(PROMPT, max_new_tokens=8, temperature=0.0)}\n")


def test_generate_from_files(model: qllm.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "A cat\nand a dog"
    expected = f"{model.generate(prompt, max_new_tokens=5)}\n"
    (tmp_path / "prompt.txt").write_text(prompt + "\n")
    words = ["generate", MODEL, "--max-new-tokens", "5"]
    path = str(tmp_path / "prompt.txt")
    assert run(*words, "--prompt-file", path, capsys=capsys) == expected
    for flag in ("--prompt", "--prompt-file"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode() + b"\n")))
        assert run(*words, flag, "-", capsys=capsys) == expected


def test_generate_samples(model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("generate", MODEL, "--prompt", PROMPT, "-n", "3", "--seed", "5", "--max-new-tokens",
              "6", "--json", capsys=capsys)
    results = [json.loads(line) for line in out.splitlines()]
    expected = [model.generate(PROMPT, seed=seed, max_new_tokens=6) for seed in (5, 6, 7)]
    assert [r["text"] for r in results] == [g.text for g in expected]
    assert [r["ids"] for r in results] == [g.ids for g in expected]
    assert [r["logprobs"] for r in results] == [g.logprobs for g in expected]
    assert [r["options"]["seed"] for r in results] == [5, 6, 7]
    assert all(r["formats"] == ["bf16"] and r["prompt"] == PROMPT for r in results)


def test_generate_as_other_programs_draw(
        model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("generate", MODEL, "--prompt", PROMPT, "--top-k", "3", "--keep-ties",
              "--logits-dtype", "bfloat16", "--temperature", "1.5", "--max-new-tokens", "8",
              "--json", capsys=capsys)
    record = json.loads(out)
    expected = model.generate(PROMPT, top_k=3, keep_ties=True, logits_dtype="bfloat16",
                              temperature=1.5, max_new_tokens=8)
    assert record["ids"] == expected.ids
    assert record["options"]["keep_ties"] and record["options"]["logits_dtype"] == "bfloat16"


def test_generate_logprobs(model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("generate", MODEL, "--prompt", PROMPT, "--logprobs", "--max-new-tokens", "4", "-n",
              "2", capsys=capsys)
    assert re.findall(r"^--- seed (\d)", out, re.MULTILINE) == ["1", "2"]
    first = model.generate(PROMPT, max_new_tokens=4)
    rows = re.findall(r"^(\d+) .*?(-?\d+\.\d{4}) +(-?\d+\.\d{4})$", out, re.MULTILINE)
    assert len(rows) == 8
    assert rows[:4] == [(str(token), f"{raw:.4f}", f"{drawn:.4f}") for token, raw, drawn
                        in zip(first.ids, first.logprobs, first.sampling_logprobs)]


def test_generate_stops(model: qllm.Model, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", "30", "--temperature", "0"]
    whole = run(*words, capsys=capsys)
    stop = whole[10:13]
    assert run(*words, "--stop", stop, "--stop", "zzz", capsys=capsys) == (
        whole[:whole.index(stop)] + "\n")


def test_generate_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert "positions" in error("generate", MODEL, "--prompt", PROMPT, "--max-new-tokens",
                                "100000", capsys=capsys)


# Reports each write to stdout with the number of decoder steps before it, on stderr.
STREAMING = """
import sys
from qllm import generation
from qllm.cli import main
steps = 0
step = generation._step
def counted(*arguments):
    global steps
    steps += 1
    return step(*arguments)
generation._step = counted
class Watched:
    def __getattr__(self, name):
        return getattr(sys.__stdout__, name)
    def write(self, text):
        if text:
            print(steps, file=sys.stderr)
        return sys.__stdout__.write(text)
sys.stdout = Watched()
sys.exit(main(sys.argv[1:]))
"""


def test_generate_streams() -> None:
    """Text is written while later tokens are still to come, not all at the end."""
    ran = subprocess.run([sys.executable, "-c", STREAMING, "generate", MODEL, "--prompt", PROMPT,
                          "--max-new-tokens", "10"], capture_output=True, text=True, timeout=120)
    steps = [int(line) for line in ran.stderr.split()]
    assert ran.returncode == 0
    assert len(set(steps)) >= 5 and steps == sorted(steps) and steps[0] <= 3


def interrupt(words: list[str], ready: str, stream: str) -> tuple[int, str, str]:
    """Runs a command and sends Ctrl-C when `ready` has appeared on a stream: exit code, stdout and
    stderr."""
    process = subprocess.Popen([sys.executable, "-u", "-m", "qllm", *words], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watched = getattr(process, stream)
    seen = ""
    while ready not in seen:
        letter = watched.read(1)
        assert letter, f"ended too early: {seen}{process.communicate()}"
        seen += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return process.returncode, *((seen + out, err) if stream == "stdout" else (out, seen + err))


def test_generate_is_interrupted() -> None:
    code, out, err = interrupt(["generate", MODEL, "--prompt", PROMPT, "--echo", "--stop", "zzzzz",
                                "--max-new-tokens", "400", "--temperature", "1.5"], PROMPT, "stdout")
    assert (code, err) == (130, "qllm: interrupted\n")
    assert out.startswith(PROMPT) and out.endswith("\n")


# ---------------------------------------------------------------------------------------- score


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_windows_score_every_token_once(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    found = list(windows(count, window, stride))
    assert [token for _, first, end in found for token in range(first, end)] == list(range(1, count))
    for number, (begin, first, end) in enumerate(found):
        assert begin == number * stride and begin < first < end <= min(begin + window, count)


def test_score_of_a_short_text(model: qllm.Model, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    facts = json.loads(run("score", MODEL, "--text", str(path), "--json", capsys=capsys))
    expected = model.score(TEXT)
    assert facts["tokens"] == len(expected.ids) == facts["scored"] + 1
    assert facts["windows"] == 1
    assert facts["nll"] == expected.nll
    assert facts["perplexity"] == expected.perplexity
    assert facts["nll_per_byte"] == expected.nll_per_byte
    assert facts["bits_per_byte"] == pytest.approx(expected.nll_per_byte / math.log(2))
    text = run("score", MODEL, "--text", str(path), capsys=capsys)
    assert f"perplexity  {expected.perplexity:.6g}\n" in text


def test_score_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    facts = json.loads(run("score", MODEL, "--text", str(path), "--json", "--quantization", "fp4",
                           capsys=capsys))
    assert facts["nll"] == qllm.Model.from_pretrained(MODEL, "fp4").score(TEXT).nll
    assert facts["formats"] == ["bf16", "fp4"]


def test_score_in_windows(model: qllm.Model) -> None:
    """Against log-softmax of the logits of each window, in NumPy."""
    ids = model.encode(TEXT)
    window, stride = 16, 5
    total, scored, begin, seen = 0.0, 0, 0, 1
    while seen < len(ids):
        part = ids[begin:begin + window]
        logits = model.logits(part).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for token in range(seen, begin + len(part)):
            total -= logprobs[token - begin - 1, ids[token]]
            scored += 1
        seen, begin = begin + len(part), begin + stride
    facts = score_text(model, TEXT, window, stride)
    assert (facts["scored"], scored) == (len(ids) - 1, len(ids) - 1)
    assert facts["nll"] == pytest.approx(total, rel=1e-6)
    assert facts["nll"] != model.score(TEXT).nll
    assert facts["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-6)


def test_score_of_a_text_longer_than_the_model(model: qllm.Model, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    positions = model.info().max_positions
    path.write_text(TEXT * (positions // len(model.encode(TEXT)) + 2))
    facts = json.loads(run("score", MODEL, "--text", str(path), "--json", capsys=capsys))
    assert facts["tokens"] > positions and facts["scored"] == facts["tokens"] - 1
    assert (facts["window"], facts["stride"]) == (positions, positions // 2)
    assert facts["windows"] == len(list(windows(facts["tokens"], positions, positions // 2))) > 1


def test_score_refuses(model: qllm.Model, tmp_path: Path,
                       capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert "positions" in error("score", MODEL, "--text", str(path), "--window", "1000000",
                                capsys=capsys)
    with pytest.raises(QllmValueError, match="no context"):
        score_text(model, TEXT, 8, 8)
    path.write_text("a")
    assert "at least 2" in error("score", "demo:falcon", "--text", str(path), capsys=capsys)


# ---------------------------------------------------------------------------------------- bench


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", MODEL, "--formats", "bf16,nf4,bf16", "--rounds", "3", "--prompt-tokens", "5",
             "--new-tokens", "4", "--batch", "2", "--threads", "1"]
    facts = json.loads(run(*words, "--json", capsys=capsys))
    model = qllm.Model.from_pretrained(MODEL, "nf4")
    assert (facts["threads"], facts["batch"], facts["rounds"]) == (1, 2, 3)
    assert facts["processor"] == _core.cpu_info()["model"]
    assert [entry["format"] for entry in facts["formats"]] == ["bf16", "nf4"]
    for entry in facts["formats"]:
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            assert 0 < entry[key]["min"] <= entry[key]["median"] <= entry[key]["max"]
        assert entry["kernels"] and all(entry["format"] in name for name in entry["kernels"])
    nf4 = facts["formats"][1]
    assert (nf4["bytes_per_token"], nf4["kernels"]) == (model.decoder.nbytes()["weights"],
                                                        model.info().kernels["nf4"])
    assert facts["formats"][0]["bytes_per_token"] > nf4["bytes_per_token"]
    assert 0 < facts["limits"]["read_bytes_per_second"]["median"]
    units = facts["limits"]["operations_per_second"]
    assert {unit: entry["instruction"] for unit, entry in units.items()} == _core.multiply_units()
    text = run(*words, capsys=capsys)
    assert re.search(r"^nf4 .* \d+\.\d +\d+\.\d +\d+ % +nf4 ", text, re.MULTILINE)


@pytest.mark.parametrize("compute", ["exact", "auto", "int8"])
def test_bench_of_random_weights(compute: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--shape", "tiny", "--formats", "bf16,nf4", "--rounds", "1", "--threads", "1",
             "--prompt-tokens", "3", "--new-tokens", "2", "--compute", compute, "--json"]
    facts = json.loads(run(*words, capsys=capsys))
    assert (facts["compute"], facts["prompt_tokens"]) == (compute, 3)
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    assert facts["parameters"] == weights + 2 * 512 * 128 + 5 * 128
    head = 2 * 512 * 128
    least = [2 * weights + head, weights * 9 // 16 + head]
    for entry, bytes_ in zip(facts["formats"], least, strict=True):
        assert bytes_ <= entry["bytes_per_token"] < 1.1 * bytes_
        assert 0 < entry["share_of_read"]["median"]
    assert facts["formats"][1]["bits_per_weight"] == pytest.approx(4.5)


def test_bench_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("bench", "--shape", "tiny")
    assert "positions" in error(*tiny, "--prompt-tokens", "100000", capsys=capsys)
    for words, reason in (((MODEL, "--shape", "tiny"), "not both"),
                          (("--revision", "main"), "needs a MODEL"),):
        assert main(["bench", *words]) == 2
        assert reason in capsys.readouterr().err
