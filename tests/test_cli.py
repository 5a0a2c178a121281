"""The command line without a model: its grammar, its errors, its exit codes."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qllm
from qllm.cli import entry, main
from qllm.cli.files import read_text, shown
from qllm.cli.grammar import parse
from qllm.cli.parser import did_you_mean
from qllm.errors import QllmFileError, QllmMemoryError, QllmValueError

COMMANDS = ("info", "quantize", "generate", "score", "bench", "study")


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_error(err: str) -> str:
    """The sentence on stderr, which must be all there is."""
    assert err.startswith("qllm: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix("qllm: error: ").strip()


# ---------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(("line", "words"), [
    ("", ["command is missing", "info, quantize, generate", "qllm --help"]),
    ("generat demo:llama", ["no command 'generat'", "did you mean generate?"]),
    ("Info", ["no command 'Info'", "did you mean info?"]),
    ("frobnicate", ["no command 'frobnicate'", "there are info, quantize"]),
    ("--versoin", ["no option --versoin", "did you mean --version?"]),
    ("generate demo:llama --promt hi", ["qllm generate has no option --promt",
                                        "did you mean --prompt?"]),
    ("generate --promt=hi", ["did you mean --prompt?"]),
    ("generate demo:llama --prom hi", ["has no option --prom;"]),  # no abbreviations
    ("generate demo:llama --zzz 1", ["has no option --zzz", "see qllm generate --help"]),
    ("generate --prompt x", ["required: MODEL"]),
    ("generate demo:llama", ["--prompt", "--prompt-file", "required"]),
    ("generate demo:llama --prompt a --prompt-file b", ["not allowed with"]),
    ("generate demo:llama --prompt", ["--prompt", "expected one argument"]),
    ("generate demo:llama --prompt a --top-k few", ["--top-k", "'few'", "whole number"]),
    ("generate demo:llama --prompt a --top-k -1", ["--top-k", "'-1'", "at least 0"]),
    ("generate demo:llama --prompt a --seed 1.5", ["--seed", "'1.5'", "whole number"]),
    ("generate demo:llama --prompt a --samples 0", ["--samples", "at least 1"]),
    ("generate demo:llama --prompt a --temperature warm", ["--temperature", "a number"]),
    ("generate demo:llama --prompt a --temperature -1", ["temperature", "at least 0"]),
    ("generate demo:llama --prompt a --temperature nan", ["temperature", "finite"]),
    ("generate demo:llama --prompt a --top-p 1.5", ["top_p", "at most 1"]),
    ("generate demo:llama --prompt a --repetition-penalty 0", ["repetition_penalty", "above 0"]),
    ("generate demo:llama --prompt a --stop ''", ["stop", "at least one character"]),
    ("generate demo:llama --prompt a --seed 18446744073709551615 -n 2", ["seed"]),
    ("generate demo:llama --prompt a -x", ["does not take '-x'"]),
    ("generate demo:llama more --prompt a", ["does not take 'more'"]),
    ("generate demo:llama --prompt a --quantization int4", ["no format 'int4'",
                                                            "did you mean int8?"]),
    ("generate demo:llama --prompt a --device gpu", ["no device 'gpu'", "cpu, cuda"]),
    ("generate demo:llama --prompt a --threads 0", ["--threads", "at least 1"]),
    ("quantize demo:llama --to nf5 --out x", ["no format 'nf5'", "did you mean nf4?"]),
    ("quantize demo:llama --to ternary --out x", ["no format 'ternary'", "nf4-dq"]),
    ("quantize demo:llama --to nf4", ["required: --out"]),
    ("quantize --too nf4", ["has no option --too", "did you mean --to?"]),
    ("score demo:llama", ["required: --text"]),
    ("score demo:llama --text x --window 1", ["--window", "at least 2"]),
    ("score demo:llama --text - --window 8 --stride 8", ["--stride 8", "no context"]),
    ("bench --formats bf16,nf", ["no format 'nf'", "did you mean nf4?"]),
    ("bench --formats original", ["no format 'original'"]),
    ("study demo:llama", ["qllm study needs --out"]),
    ("info --quantization nf4", ["--quantization needs a MODEL"]),
    ("info --device cuda", ["--device needs a MODEL"]),
    ("info --threads 2", ["--threads needs a MODEL"]),
])
def test_usage_errors(line: str, words: list[str], capsys: pytest.CaptureFixture[str],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qllm.cli.texts.read_text", lambda name: "text")
    code, out, err = run(*shlex.split(line), capsys=capsys)
    sentence = one_error(err)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in sentence] == []


def test_bytes_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("generate", "demo:llama", "--prompt", "caf\udce9", capsys=capsys)
    assert (code, "not valid UTF-8" in one_error(err)) == (2, True)


def test_did_you_mean_is_silent_about_strangers() -> None:
    assert did_you_mean("nf", ["nf4", "int8"]) == "; did you mean nf4?"
    assert did_you_mean("xyz", ["nf4", "int8"]) == ""


def test_texts_with_dashes_are_no_options() -> None:
    arguments = parse(["generate", "m", "--prompt", "--hello there", "--stop=--x"])
    assert not isinstance(arguments, str)
    assert (arguments.prompt, arguments.stop) == ("--hello there", ["--x"])


# ----------------------------------------------------------------------------------------- help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys) == (0, f"qllm {qllm.__version__}\n", "")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--help", capsys=capsys)
    assert (code, err) == (0, "")
    assert [name for name in COMMANDS if f"    {name} " not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_means_something(
        command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(command, "--help", capsys=capsys)
    assert (code, err) == (0, "")
    example = out[out.index("example:\n"):].splitlines()[1].strip()
    assert example.startswith(f"qllm {command} ")
    assert parse(shlex.split(example)[1:]).command == command  # type: ignore[union-attr]


def test_help_of_a_command_wins_over_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "demo:llama", "-h", capsys=capsys)[0] == 0


@pytest.mark.parametrize("launcher", [["-m", "qllm"],
                                      ["-c", "import sys; from qllm.cli import main;"
                                             "sys.exit(main())"]])
def test_exit_codes_reach_the_shell(launcher: list[str]) -> None:
    ran = subprocess.run([sys.executable, *launcher, "generat"], capture_output=True, text=True,
                         timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "did you mean generate?" in one_error(ran.stderr)
    ran = subprocess.run([sys.executable, *launcher, "--version"], capture_output=True, text=True,
                         timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"qllm {qllm.__version__}\n", "")


# --------------------------------------------------------------------------------------- errors


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes `qllm info` raise what it is given."""

    def arm(error: BaseException) -> None:
        def fail(arguments: object) -> None:
            raise error

        monkeypatch.setattr("qllm.cli.models.info", fail)

    return arm


@pytest.mark.parametrize(("error", "sentence"), [
    (QllmValueError("a thing is wrong\n  on two lines"), "a thing is wrong on two lines"),
    (QllmFileError("x is no folder"), "x is no folder"),
    (QllmMemoryError("layer q: could not allocate 8 bytes"), "layer q: could not allocate 8 bytes"),
    (MemoryError(), "there is not enough memory"),
    (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (ModuleNotFoundError("No module named 'pandas'", name="pandas"),
     "the Python package pandas is missing: pip install 'qllm[study]'"),
    (KeyError("x"), "KeyError: 'x' (qllm did not expect this; with QLLM_DEBUG=1 it shows where it"
                    " happened)"),
])
def test_failures_are_one_line(error: Exception, sentence: str, failing,
                               capsys: pytest.CaptureFixture[str]) -> None:
    failing(error)
    code, out, err = run("info", capsys=capsys)
    assert (code, out, one_error(err)) == (1, "", sentence)


@pytest.mark.parametrize("error", [QllmValueError("x"), KeyError("x"), KeyboardInterrupt()])
def test_debug_shows_the_traceback(error: BaseException, failing,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    failing(error)
    monkeypatch.setenv("QLLM_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["info"])


def test_ctrl_c(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert run("info", capsys=capsys) == (130, "", "qllm: interrupted\n")
    failing(KeyboardInterrupt("more to say"))
    assert run("info", capsys=capsys) == (130, "", "qllm: interrupted; more to say\n")


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qllm.cli.models.info", lambda _: warnings.warn("this\nis odd"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info", capsys=capsys) == (0, "", "qllm: warning: this is odd\n")


def test_a_reader_that_leaves_is_met_in_silence() -> None:
    process = subprocess.Popen([sys.executable, "-m", "qllm", "generate", "--help"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == entry.READER_LEFT
    process.stderr.close()


def test_an_encoding_that_lacks_a_letter_is_no_failure() -> None:
    code = ("import qllm.cli.models as m, sys; m.info = lambda _: print('caf\\u00e9');"
            "from qllm.cli import main; sys.exit(main(['info']))")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                         env={"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "caf\\xe9\n", "")


# ---------------------------------------------------------------------------------------- files


def test_read_text_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffa\r\nb \u00e9\n".encode())
    assert read_text(str(path)) == "\ufeffa\r\nb \u00e9\n"


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: None, ["x.txt", "cannot be read", "No such file"]),
    (lambda path: path.mkdir(), ["x.txt is a folder", "text file was expected"]),
    (lambda path: path.write_bytes(b"caf\xe9"), ["is not UTF-8 text", "0xe9", "offset 3"]),
    (lambda path: path.write_bytes(b""), ["is empty"]),
])
@pytest.mark.parametrize("command", ["score demo:llama --text", "generate demo:llama --prompt-file"])
def test_texts_that_cannot_be_read(make, words: list[str], command: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.txt"
    make(path)
    code, out, err = run(*command.split(), str(path), capsys=capsys)
    sentence = one_error(err)
    assert (code, out) == (1, "")
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize("name", ["x.txt", "-"])
def test_a_text_that_does_not_end_is_not_read_to_its_end(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/zero filled the memory."""
    monkeypatch.setattr("qllm.cli.files.MAX_TEXT_BYTES", 100)
    data = io.BytesIO(b"a" * 1000)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data))
    (tmp_path / "x.txt").write_bytes(data.getvalue())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QllmFileError, match="has more than the 100 bytes that are read at most"):
        read_text(name)
    assert name != "-" or data.tell() <= 101
    (tmp_path / "x.txt").write_bytes(b"a" * 100)
    assert len(read_text("x.txt")) == 100


def test_long_words_are_cut_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--seed", "--temperature"):
        code, _, err = run("generate", "demo:llama", "--prompt", "a", option, "9" * 5000 + "x",
                           capsys=capsys)
        assert code == 2 and len(one_error(err)) < 300 and option in err


def test_names_that_no_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("score", "demo:llama", "--text", "a\0b", capsys=capsys)
    assert (code, "cannot be read" in one_error(err)) == (1, True)


def test_a_terminal_is_not_commanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("a\x1b[2J\n") == "a\x1b[2J\n"  # a file gets what was drawn
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert shown("a\x1b[2J\t\u00e9\n") == "a\ufffd[2J\t\u00e9\n"
