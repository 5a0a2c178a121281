"""The commands of qllm and their options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..config import COMPUTES, DEVICES, FORMATS
from ..sampling import LOGITS_DTYPES
from .parser import (
    Answer,
    Parser,
    Show,
    UsageError,
    names,
    number,
    one_of,
    suggestion,
    text,
    whole,
    with_number,
)

MODEL = ("demo:llama, demo:falcon, a folder with config.json and safetensors files, or a name on"
         " the Hugging Face hub")
BENCH_FORMATS = tuple(name for name in FORMATS if name != "original")
BENCH_SHAPES = ("tiny", "small", "1.1b", "7b", "13b", "70b", "falcon-7b", "falcon-40b")


def parse(words: Sequence[str]) -> argparse.Namespace | str:
    """The arguments of a command, the place of its function in `run`; or the text of a help page.
    Raises `UsageError`."""
    parser, commands = _build()
    if not words:
        raise UsageError(f"a command is missing; there are {', '.join(commands)} (see qllm --help)")
    word = words[0]
    if not word.startswith("-") and word not in commands:
        raise UsageError(suggestion(word, "command", list(commands)))
    try:
        if word in commands:
            commands[word].refuse_unknown_options(words[1:])
        else:
            parser.refuse_unknown_options(words[:1])
        arguments, rest = parser.parse_known_args(words)
    except Answer as answer:
        return str(answer)
    if rest:
        raise UsageError(f"qllm {word} does not take {rest[0]!r} (see qllm {word} --help)")
    return arguments


def _build() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="qllm", usage="qllm COMMAND ... (qllm COMMAND --help explains each)",
        description="Asks what quantization does to a language model.",
        epilog="example:\n"
        "  qllm generate demo:llama --prompt 'Once upon a time' --quantization nf4")
    parser.add_argument("--version", action=Show, const=f"qllm {__version__}",
                        help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True,
                                     parser_class=Parser)
    _info(commands)
    _quantize(commands)
    _generate(commands)
    _score(commands)
    _bench(commands)
    _study(commands)
    return parser, dict(commands.choices)


def _command(commands: Any, name: str, run: str, summary: str, example: str) -> Parser:
    parser: Parser = commands.add_parser(name, prog=f"qllm {name}", help=summary,
                                         description=summary[0].upper() + summary[1:] + ".",
                                         epilog=f"example:\n  qllm {name} {example}")
    parser.set_defaults(run=run)
    return parser


def _model_options(parser: Parser) -> None:
    """What every command takes that loads one model."""
    parser.add_argument("--revision", type=text, metavar="REV",
                        help="branch, tag or commit of a model on the hub")
    parser.add_argument("--device", type=with_number("device", DEVICES), default="cpu",
                        metavar="DEVICE", help="cpu (default), cuda, or cuda:1 and so on")
    parser.add_argument("--threads", type=whole(1), metavar="N",
                        help="threads of the C core (default: one per core)")
    parser.add_argument("--isa", type=text, metavar="NAME",
                        help="instruction set: one that `qllm info` lists (default: the best)")
    parser.add_argument("--compute", type=one_of("mode", COMPUTES), default="auto", metavar="MODE",
                        help="auto (default), exact (float32 activations) or int8")


def _quantization_option(parser: Parser) -> None:
    parser.add_argument("--quantization", type=one_of("format", FORMATS), metavar="FORMAT",
                        help="swap the linear layers to this format after loading; one of "
                        + ", ".join(FORMATS))


def _json_option(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _info(commands: Any) -> None:
    parser = _command(commands, "info", ".models:info",
                      "show the build and the machine, or a model's sizes, formats and kernels",
                      "demo:llama --quantization nf4")
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    _quantization_option(parser)
    _json_option(parser)
    _model_options(parser)


def _quantize(commands: Any) -> None:
    parser = _command(commands, "quantize", ".models:quantize",
                      "quantize a model and save it in the layout of bitsandbytes",
                      "demo:llama --to nf4 --out llama-nf4")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--to", required=True, type=one_of("format", FORMATS), metavar="FORMAT",
                        help="one of " + ", ".join(FORMATS))
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--include", action="append", metavar="GLOB",
                        help="only linear layers whose name matches; may be repeated"
                        " (example: 'model.layers.*.mlp.*')")
    parser.add_argument("--skip", action="append", metavar="GLOB",
                        help="leave layers alone whose name matches; may be repeated")
    parser.add_argument("--blocksize", type=whole(1), default=64, metavar="N",
                        help="weights per scale in the 4-bit formats: 32, 64, ... 4096"
                        " (default: 64)")
    parser.add_argument("--quantize-head", action="store_true",
                        help="quantize the output embedding too")
    _model_options(parser)


def _generate(commands: Any) -> None:
    parser = _command(commands, "generate", ".texts:generate", "continue a prompt",
                      "demo:llama --prompt 'Once upon a time' --temperature 0.7 --seed 3")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    source = parser.add_mutually_exclusive_group(required=True)
    for flag, help in (("--prompt", "the text to continue; - reads it from standard input"),
                       ("--prompt-file", "a UTF-8 file with the text; - is standard input")):
        parser.option_names.append(flag)
        source.add_argument(flag, type=text, help=help,
                            metavar="FILE" if flag.endswith("file") else "TEXT")
    _quantization_option(parser)
    parser.add_argument("--temperature", type=number, metavar="T",
                        help="0 takes the most probable token (default: 0.7)")
    parser.add_argument("--top-k", type=whole(0), metavar="K",
                        help="draw from the K most probable tokens; 0 is off (default: 200)")
    parser.add_argument("--keep-ties", action="store_true", default=None,
                        help="let --top-k keep all tokens that equal the last of them")
    parser.add_argument("--top-p", type=number, metavar="P",
                        help="draw from the smallest set with probability P; 1 is off (default)")
    parser.add_argument("--min-p", type=number, metavar="P",
                        help="draw from tokens with at least P times the greatest probability;"
                        " 0 is off (default)")
    parser.add_argument("--repetition-penalty", type=number, metavar="R",
                        help="make tokens that have occurred less likely; 1 is off (default)")
    parser.add_argument("--logits-dtype", type=one_of("dtype", LOGITS_DTYPES), metavar="DTYPE",
                        help="round logits to float32 (default: as they are) or bfloat16 before"
                        " drawing")
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N",
                        help="end after N tokens (default: 50)")
    parser.add_argument("--seed", type=whole(0), metavar="N",
                        help="names the noise: the same seed draws the same text (default: 1)")
    parser.add_argument("--stop", action="append", type=text, metavar="TEXT",
                        help="end where the continuation holds this text; may be repeated")
    parser.add_argument("-n", "--samples", type=whole(1), default=1, metavar="N",
                        help="N continuations with seeds counting up, as one batch")
    parser.add_argument("--echo", action="store_true", help="print the prompt in front")
    parser.add_argument("--logprobs", action="store_true",
                        help="print the log-probability of every token drawn")
    _json_option(parser)
    _model_options(parser)


def _score(commands: Any) -> None:
    parser = _command(commands, "score", ".texts:score",
                      "measure how well a model predicts a text: perplexity",
                      "demo:llama --text story.txt --quantization nf4")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--text", required=True, metavar="FILE",
                        help="a UTF-8 file; - is standard input")
    _quantization_option(parser)
    parser.add_argument("--window", type=whole(2), metavar="N",
                        help="tokens that the model sees at once (default: all it can, at most"
                        " 2048)")
    parser.add_argument("--stride", type=whole(1), metavar="N",
                        help="tokens from one window to the next (default: half a window); every"
                        " token is scored once, with the longest context that its window gives")
    _json_option(parser)
    _model_options(parser)


def _bench(commands: Any) -> None:
    parser = _command(commands, "bench", ".bench:bench",
                      "measure this machine's limits and each format's tokens per second",
                      "--formats bf16,int8,nf4 --rounds 7")
    parser.add_argument("model", nargs="?", metavar="MODEL",
                        help=MODEL + " (default: random weights of a Llama's shape)")
    parser.add_argument("--shape", type=one_of("shape", BENCH_SHAPES), metavar="SHAPE",
                        help="the shape of random weights, out of " + ", ".join(BENCH_SHAPES)
                        + " (default: small); 1.1b needs 7 GB of memory for all formats, 7b 35 GB")
    parser.add_argument("--formats", type=names("format", BENCH_FORMATS), metavar="LIST",
                        default=["bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"],
                        help="separated by commas, out of " + ", ".join(BENCH_FORMATS)
                        + " (default: bf16,int8,nf4,nf4-dq,fp4,fp4-dq)")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N",
                        help="rounds over all formats; medians are shown (default: 5)")
    parser.add_argument("--prompt-tokens", type=whole(1), default=128, metavar="N",
                        help="length of the prompt of the prefill (default: 128)")
    parser.add_argument("--new-tokens", type=whole(1), default=64, metavar="N",
                        help="tokens of the decode (default: 64)")
    parser.add_argument("--batch", type=whole(1), default=1, metavar="N",
                        help="sequences that decode together (default: 1)")
    _json_option(parser)
    _model_options(parser)


def _study(commands: Any) -> None:
    parser = _command(commands, "study", ".study:study",
                      "compare formats over temperatures: tables, pictures, one HTML report",
                      "demo:llama demo:falcon --profile smoke --out study-out")
    parser.add_argument("models", nargs="*", metavar="MODEL",
                        help=MODEL + " (default: those of the profile)")
    parser.add_argument("--models", nargs="+", dest="more_models", default=[], metavar="MODEL",
                        help="the same, as an option")
    parser.add_argument("--profile", default="smoke", type=text, metavar="NAME",
                        help="smoke (default), lite, full, paper, or the path of a design in TOML"
                        " or JSON")
    parser.add_argument("--out", metavar="DIR",
                        help="the folder for the results, needed unless --dry-run; a study that was"
                        " interrupted there goes on")
    parser.add_argument("--lockstep", action="store_true",
                        help="read texts layer by layer, for models that do not fit into memory:"
                        " nothing is generated or timed")
    parser.add_argument("--dry-run", action="store_true",
                        help="print cells, tokens, time and memory, and compute nothing")
    parser.add_argument("--workers", type=whole(1), metavar="N",
                        help="compute cells in N processes of this machine (needs"
                        " qllm[dask])")
    parser.add_argument("--dask", type=text, metavar="ADDRESS",
                        help="compute cells on the Dask cluster whose scheduler is there, as in"
                        " tcp://10.0.0.1:8786")
    parser.add_argument("--fresh", action="store_true",
                        help="begin anew where the folder holds a study")
    parser.add_argument("--device", type=with_number("device", DEVICES), metavar="DEVICE",
                        help="where the models compute: cpu or cuda (default: as the profile says)")
    parser.add_argument("--threads", type=whole(1), metavar="N",
                        help="threads of the C core (default: those of the profile)")
