"""The library for C programs: it is built, the example runs, and its results are those of the
package, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qllm

ROOT = Path(__file__).resolve().parent.parent
CC = os.environ.get("CC", "cc")

pytestmark = pytest.mark.skipif(
    shutil.which(CC.split()[0]) is None or not (ROOT / "csrc").is_dir(),
    reason="needs a C compiler and the sources",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    words = [sys.executable, "setup.py", "-q", "static_library", "--folder", str(folder)]
    quick = {"QLLM_CFLAGS": "-O0"}  # a quarter of the time, and no other results
    subprocess.run(words, cwd=ROOT, check=True, timeout=600, env=os.environ | quick)
    return folder


def compiled(library: Path, source: Path, *options: str) -> Path:
    """A program or, with -shared, a library, linked with the static library."""
    out = library / source.stem
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    words = [*CC.split(), *strict, *options, str(source), f"-I{library / 'include'}"]
    tail = [f"-L{library}", "-lqllm", "-lm", "-lpthread", "-o", str(out)]
    subprocess.run([*words, *tail], check=True, timeout=300)
    return out


def test_the_example_runs(library: Path) -> None:
    program = compiled(library, ROOT / "docs" / "example.c", "-std=c11")
    assert len((ROOT / "docs" / "example.c").read_text().splitlines()) <= 62
    run = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert "nf4" in run.stdout and "token " in run.stdout
    needs = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    assert "python" not in needs


def test_the_header_is_that_of_the_package_and_is_cplusplus(library: Path, tmp_path: Path) -> None:
    header = Path(qllm.get_include()) / "qllm.h"
    assert header.read_bytes() == (library / "include" / "qllm.h").read_bytes()
    source = tmp_path / "program.cc"
    source.write_text('#include <qllm.h>\nint main() { return qllm_draw_defaults().top_k != 0; }\n')
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    words = [compiler, "-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", str(source)]
    out = tmp_path / "program"
    where = [f"-I{library / 'include'}", f"-L{library}", "-lqllm", "-lm", "-lpthread"]
    subprocess.run([*words, *where, "-o", str(out)], check=True, timeout=300)
    assert subprocess.run([out], timeout=60).returncode == 0


PROGRAM = r"""
#include <stdio.h>
#include <string.h>

#include <qllm.h>

enum { ROWS = 70, COLS = 192, N = 3 };
static float weights[ROWS * COLS], x[N * COLS], bias[ROWS], back[ROWS * COLS], y[N * ROWS];

static void put(const void *values, size_t size)
{
    fwrite(values, size, 1, stdout);
}

int main(int count, char **words)
{
    char text[QLLM_TEXT];
    qllm_engine_options options = qllm_engine_defaults();
    qllm_draw_options drawing = {0.8, 20, 0.9, 0.01, 1.2, 7, 11};
    const int64_t history[] = {3, 60};
    qllm_engine *engine;
    qllm_matrix *matrix;
    qllm_drawn drawn;
    qllm_comparison compared;
    if (count != 4 || fread(weights, sizeof weights, 1, stdin) != 1 ||
        fread(x, sizeof x, 1, stdin) != 1 || fread(bias, sizeof bias, 1, stdin) != 1)
        return 10;
    options.compute = words[2];
    options.threads = words[3][0] - '0';
    if (qllm_engine_create(&options, &engine, text) != QLLM_DONE ||
        qllm_matrix_quantize(engine, weights, "float32", ROWS, COLS, words[1], 0, &matrix, text) ||
        qllm_matrix_dequantize(engine, matrix, back, text) ||
        qllm_matrix_multiply(engine, matrix, x, N, bias, y, text) ||
        qllm_draw_token(engine, y, ROWS, &drawing, history, 2, 5, &drawn, text) ||
        qllm_compare_logits(engine, y, y + ROWS, ROWS, 0.7, &compared, text)) {
        fprintf(stderr, "%s", text);
        return 1;
    }
    put(back, sizeof back);
    put(y, sizeof y);
    put(&drawn, sizeof drawn);
    put(&compared, sizeof compared);
    qllm_matrix_free(matrix);
    qllm_engine_free(engine);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(library: Path) -> Path:
    source = library / "results.c"
    source.write_text(PROGRAM)
    return compiled(library, source, "-std=c11")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compute", ["exact", "auto", "int8"])
@pytest.mark.parametrize("format", ["nf4", "fp4-dq", "int8", "bf16", "f16", "f32"])
def test_results_are_those_of_the_package(
    program: Path, format: str, compute: str, threads: int
) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((70, 192)).astype(np.float32)
    x = rng.standard_normal((3, 192)).astype(np.float32) * 3
    bias = rng.standard_normal(70).astype(np.float32)
    data = weights.tobytes() + x.tobytes() + bias.tobytes()
    words = [program, format, compute, str(threads)]
    run = subprocess.run(words, input=data, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr
    ours = qllm.quantize(weights, format)
    y = ours.matmul(x, bias, compute=compute)
    sampled = qllm.sample(
        y[:1], temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=7,
        prompt=11, step=5, history=[[3, 60]],
    )
    stats = qllm.logit_stats(y[:1], y[1:2], [0.7])
    expected = ours.dequantize().tobytes() + y.tobytes()
    expected += np.int64(sampled.tokens[0]).tobytes()
    expected += np.float32([sampled.logprobs[0], sampled.sampling_logprobs[0]]).tobytes()
    for name in ("kl", "kl_reverse", "tv", "disagreement", "entropy_ref", "entropy_test"):
        expected += np.float64(getattr(stats, name)[0, 0]).tobytes()
    assert run.stdout == expected


ERRORS = r"""
#include <math.h>
#include <stdio.h>

#include <qllm.h>

static char text[QLLM_TEXT];

static void say(int code)
{
    printf("%d %s\n", code, text);
}

int main(void)
{
    float values[64] = {0}, logits[2] = {NAN, 0};
    qllm_engine_options options = qllm_engine_defaults();
    qllm_draw_options drawing = qllm_draw_defaults();
    qllm_engine *engine, *none;
    qllm_matrix *matrix;
    qllm_drawn drawn;
    qllm_comparison compared;
    if (qllm_engine_create(NULL, &engine, NULL))
        return 1;
    options.isa = "mmx";
    say(qllm_engine_create(&options, &none, text));
    options.isa = NULL;
    options.threads = -2;
    say(qllm_engine_create(&options, &none, text));
    say(qllm_matrix_quantize(engine, values, "float8", 1, 64, "nf4", 0, &matrix, text));
    say(qllm_matrix_quantize(engine, values, "float32", 1, 64, "nf5", 0, &matrix, text));
    say(qllm_matrix_quantize(engine, values, "float32", 1, 64, "nf4", 48, &matrix, text));
    say(qllm_matrix_quantize(engine, values, "float32", INT64_MAX, 64, "nf4", 0, &matrix, text));
    values[5] = INFINITY;
    say(qllm_matrix_quantize(engine, values, "float32", 1, 64, "nf4", 0, &matrix, text));
    say(qllm_draw_token(engine, logits, 2, NULL, NULL, 0, 0, &drawn, text));
    say(qllm_draw_token(engine, logits, 0, NULL, NULL, 0, 0, &drawn, text));
    drawing.temperature = -1;
    say(qllm_draw_token(engine, values, 4, &drawing, NULL, 0, 0, &drawn, text));
    say(qllm_compare_logits(engine, logits, logits, -1, 1, &compared, text));
    qllm_engine_free(engine);
    qllm_engine_free(NULL);
    qllm_matrix_free(NULL);
    return matrix != NULL;
}
"""


def test_what_cannot_be_used_ends_in_one_sentence(library: Path) -> None:
    source = library / "errors.c"
    source.write_text(ERRORS)
    program = compiled(library, source, "-std=c11", "-Wno-maybe-uninitialized")
    run = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    found = run.stdout.splitlines()
    expected = ["mmx", "threads: -2", "float8", "nf5", "48", "9223372036854775807",
                "column 5", "NaN", "tokens, found 0", "temperature", "-1 tokens"]
    assert len(found) == len(expected)
    for line, words in zip(found, expected):
        assert words in line and line[0] in "13" and len(line) > 20, line
