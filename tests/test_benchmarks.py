"""The benchmarks run and say what they measured, and the peers compute what is asked of them; how
long anything takes is not looked at."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qllm
from qllm import Model, _core

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import done_when  # noqa: E402
import engines  # noqa: E402
import layer_peers  # noqa: E402
import llama_folder  # noqa: E402
import model as whole_model  # noqa: E402
import run as run_all  # noqa: E402
import to_gguf  # noqa: E402

TINY = llama_folder.SHAPES["tiny"]


def need(*packages: str) -> None:
    """Skips where a package is not installed."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def script(name: str, *words: str) -> str:
    """The output of a benchmark, which runs with the package that is tested."""
    package = str(Path(qllm.__file__).parent.parent)
    result = subprocess.run([sys.executable, str(BENCHMARKS / name), *words],
                            capture_output=True, text=True, timeout=300,
                            env=os.environ | {"PYTHONPATH": package})
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---------------------------------------------------------------------------------------- common


def test_measure_turns_the_order_and_keeps_every_time() -> None:
    called: list[str] = []
    candidates = [common.Candidate(name, lambda name=name: called.append(name), work=2)
                  for name in "abc"]
    times = common.measure(candidates, 4, warmups=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(called) == "cab" + "abc" + "bca" + "cab" + "abc"
    assert all(len(values) == 3 for values in
               common.measure(candidates, 50, warmups=0, seconds=0.0).values())


def test_spread_and_ratios_are_paired() -> None:
    assert common.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0,
                                                        "rounds": 5}
    assert common.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "rounds": 1}


# ----------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("name", list(layer_peers.PEERS))
def test_a_peer_multiplies_by_the_weight(name: str) -> None:
    packages, bits, make = layer_peers.PEERS[name]
    need(*packages)
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 0.02, (64, 256)).astype(np.float32)
    x = rng.normal(0, 1, (3, 256)).astype(np.float32)
    expected = x @ weight.T
    peer = make(weight, x, 2, 1)
    peer.call()
    error = np.linalg.norm(peer.result() - expected) / np.linalg.norm(expected)
    assert error < {4: 0.13, 5: 0.13, 8: 0.02, 16: 0.01, 32: 1e-5}[int(bits)]
    assert 0.9 < 8 * peer.nbytes / weight.size / bits < 1.1


def test_no_two_weights_of_onnxruntime_are_equal() -> None:
    """It kept equal ones once: what was to come from memory came from the cache."""
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    copies = [layer_peers.another(weight, i) for i in range(24)]
    assert len({copy.tobytes() for copy in copies}) == 24
    assert np.array_equal(copies[0], weight)
    assert max(np.count_nonzero(copy != weight) for copy in copies) == 1


def test_linear_times_every_candidate_in_every_round(tmp_path: Path) -> None:
    need("torch", "bitsandbytes")
    out = tmp_path / "linear.json"
    printed = script("linear.py", "--rows", "2", "--out-features", "64", "--in-features", "256",
                     "--threads", "1", "--rounds", "3", "--memory", "0.00003", "--json", str(out),
                     "--only", "qllm *", "torch *", "bitsandbytes *")
    found = json.loads(out.read_text(encoding="utf-8"))
    names = {"read", "torch bf16", "torch f32", "torch int4pack", "bitsandbytes nf4",
             "bitsandbytes fp4", "bitsandbytes int8",
             *(f"qllm {name} exact" for name in ("bf16", "f16", "f32", "int8", "nf4", "nf4-dq",
                                                 "fp4", "fp4-dq"))}
    assert names <= set(found["seconds"]) == set(found["candidates"])
    assert all(len(times) == 3 and min(times) > 0 for times in found["seconds"].values())
    nf4 = found["candidates"]["qllm nf4 exact"]
    assert (nf4["work"], nf4["nbytes"], nf4["operations"]) == (4, 64 * 256 * 9 // 16,
                                                               2 * 2 * 64 * 256)
    pairs = zip(found["seconds"]["read"], found["seconds"]["qllm nf4 exact"], strict=True)
    shares = [nf4["nbytes"] * read / own for read, own in pairs]
    assert nf4["share_of_read"]["median"] == pytest.approx(sorted(shares)[1])
    assert nf4["peak"] == "f32" and 0 < nf4["share_of_peak"]["median"]
    assert found["machine"]["processor"] == _core.cpu_info()["model"]
    assert all(name in printed for name in names)


def test_linear_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import linear

    monkeypatch.setattr(common, "installed", lambda package: package != "onnx")
    rng = np.random.default_rng(3)
    weight, x = rng.normal(size=(64, 64)).astype("f4"), rng.normal(size=(1, 64)).astype("f4")
    found, missing = linear.peers(weight, x, ["onnxruntime MatMulBnb4"], 1, 1)
    assert found == [] and missing == {"onnxruntime MatMulBnb4": "onnx is not installed"}


# ----------------------------------------------------------------------------------- whole model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder.make(tmp_path_factory.mktemp("llama") / "tiny", TINY)


PROMPT = np.random.default_rng(1).integers(3, 512, 21).tolist()


def test_the_folder_is_a_model_that_is_made_once(folder: Path) -> None:
    model = Model.from_pretrained(folder)
    assert model.info().parameters == sum(
        int(np.prod(shape)) for shape in llama_folder.tensor_shapes(TINY).values())
    assert model.encode("ab") and model.decode(model.encode("a b")) == "a b"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert llama_folder.make(folder, TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="another shape"):
        llama_folder.make(folder, TINY | {"layers": 3})


@pytest.mark.parametrize(("kind", "tolerance"), [("BF16", 0.01), ("Q8_0", 0.03), ("Q4_0", 0.5),
                                                 ("IQ4_NL", 0.5), ("Q4_K_M", 0.5)])
def test_llama_cpp_computes_the_converted_model(folder: Path, kind: str, tolerance: float) -> None:
    need("llama-cpp-python", "gguf")
    file = to_gguf.ensure(folder, folder / "gguf", kind, 1)
    reference = Model.from_pretrained(folder).logits(PROMPT)[-1]
    engine = engines.LlamaCpp(file, 1, 256, 3)
    try:
        error = np.abs(engine.prefill(PROMPT) - reference).max() / np.abs(reference).max()
        assert error < tolerance
        alone, together = engine.generate(PROMPT, 6, 1), engine.generate(PROMPT, 6, 3)
        assert together == alone * 3 and len(alone[0]) == 6
        if kind == "BF16":
            assert alone == engines.Ours(folder, "bf16", None, "exact", 1).generate(PROMPT, 6)
    finally:
        engine.close()


@pytest.mark.parametrize("format", ["bf16", "nf4", "fp4", "int8"])
def test_transformers_generates(folder: Path, format: str) -> None:
    need("torch", "transformers", *([] if format == "bf16" else ["bitsandbytes", "accelerate"]))
    engine = engines.Transformers(folder, format, 1)
    found = engine.generate(PROMPT, 4, 2)
    assert found[0] == found[1] and len(found[0]) == 4
    if format == "bf16":
        assert found[:1] == engines.Ours(folder, "bf16", None, "exact", 1).generate(PROMPT, 4)


def test_model_times_every_candidate_in_every_round(folder: Path, tmp_path: Path) -> None:
    need("llama-cpp-python", "gguf")
    out = tmp_path / "model.json"
    printed = script("model.py", "--shape", "tiny", "--folder", str(folder), "--group",
                     "llama.cpp-8bit", "--rounds", "3", "--new-tokens", "3", "--sequences", "2",
                     "--prefill-tokens", "20", "--threads", "1", "--json", str(out))
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    names = whole_model.GROUPS["llama.cpp-8bit"]
    assert list(found["tokens_per_second"]) == names
    for name in names:
        assert name in printed
        for workload in whole_model.WORKLOADS:
            speeds = found["tokens_per_second"][name][workload]
            seconds = found["seconds"][f"{name}|{workload}"]
            assert len(speeds) == 3 and speeds == pytest.approx([1 / t for t in seconds])
    assert found["kernels"]["qllm int8 head int8"].keys() == {"int8"}
    assert found["kernels"]["qllm int8"].keys() == {"int8", "bf16"}


# -------------------------------------------------------------------------------------- sampling


def test_sampling_times_every_candidate_in_every_round(tmp_path: Path) -> None:
    need("torch", "transformers")
    out = tmp_path / "sampling.json"
    printed = script("sampling.py", "--vocab", "900", "--stats-vocab", "300", "--temperatures", "3",
                     "--rounds", "2", "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["seconds"]) == 7 and found["vocab"] == 900
    for job, seconds in found["seconds"].items():
        peers = {"torch"} if job.startswith("logit_stats") else {"torch", "transformers"}
        assert set(seconds) == {"qllm", *peers} and job in printed
        assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


# --------------------------------------------------------------------------------------- loading


def test_loading_measures_time_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "loading.json"
    printed = script("loading.py", "demo:llama", "--formats", "nf4", "bf16", "--threads", "1",
                     "--rounds", "2", "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [(row["format"], row["threads"]) for row in found] == [("nf4", 1), ("bf16", 1)]
    for row in found:
        assert {name: len(times) for name, times in row["seconds"].items()} == {
            "pass": 2, "touch": 2, "load": 2}
        assert 0 < row["share"] < row["share_with_memory"]
        assert row["memory"]["peak"] >= row["memory"]["before"] > 0 and row["format"] in printed
    assert found[0]["memory"]["held"] < found[1]["memory"]["held"]


# -------------------------------------------------------------------------------------- the page


def layer_result(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A result of linear.py whose read loop takes 1 ns a byte; a matrix has 1000 bytes and 10000
    operations, and its unit does one in 0.1 ns."""
    times = {"read": [1e-9] * 3, "peak int16": [1e-10] * 3} | seconds
    entry = {"work": 1, "nbytes": 1000, "operations": 10000, "peak": "int16",
             "seconds": {"median": 1e-6}}
    return {"candidates": dict.fromkeys(times, entry), "seconds": times,
            "machine": common.machine()}


def test_targets_are_medians_of_paired_ratios() -> None:
    results = {"peers 2": layer_result({"qllm nf4 auto": [2e-6, 2e-6, 4e-6],
                                        "ggml Q4_0": [4e-6, 6e-6, 8e-6],
                                        "torch int4pack": [5e-6, 3e-6, 9e-6]})}
    assert done_when.of_read(results, "peers 2", "qllm nf4 auto") == pytest.approx([50, 50, 25])
    assert done_when.of_peak(results, "peers 2", "qllm nf4 auto") == pytest.approx([50, 50, 25])
    assert done_when.best_peer(results, "peers 2") == pytest.approx([2.0, 1.5, 2.0])
    assert done_when.best_peer_bar(results, "peers 2") == 1.3
    near = {"peers 2": layer_result({"qllm nf4 auto": [1.1e-6] * 3, "ggml Q4_0": [2e-6] * 3})}
    assert done_when.best_peer_bar(near, "peers 2") == 1.05


def test_a_target_is_met_from_its_bar_on() -> None:
    def row(values: list[float], bar: float, most: bool) -> dict[str, Any]:
        target = done_when.Target("decode", "x", bar, lambda r: values, most=most)
        return done_when.evaluate(target, {})

    assert row([1.0, 2.0, 3.0], 2.0, False)["met"] is True
    assert row([1.0, 2.0, 3.0], 2.1, False)["met"] is False
    assert row([1.0, 2.0, 3.0], 2.0, True)["met"] is True
    assert row([1.0, 2.0, 3.0], 1.9, True)["met"] is False
    unmeasured = [done_when.evaluate(target, {}) for target in done_when.targets()]
    assert all(entry["figure"] is None and entry["met"] is None for entry in unmeasured)
    assert done_when.table(unmeasured).count("not measured") == len(unmeasured)
    jobs = {job for part in run_all.jobs(Path("x")).values() for job in part}
    assert {"decode 1", "peers 2", "prefill 2", "model ours", "loading", "sampling"} <= jobs


def test_run_keeps_results_and_writes_the_page(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["linear.py", "--threads", "1", "--out-features", "64", "--in-features", "256",
               "--memory", "0.00003", "--rounds", "3", "--in-cache", "--more-rows", "8", "--only",
               "qllm nf4 auto"]
    monkeypatch.setattr(run_all, "jobs", lambda folder: {
        "decode": {"decode 1": command}, "loading": {"loading": ["no_such_file.py"]}})
    words = ["run.py", "--results", str(tmp_path / "results"), "--docs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    run_all.main()
    kept = tmp_path / "results" / "decode-1.json"
    first = kept.stat().st_mtime_ns
    run_all.main()
    assert kept.stat().st_mtime_ns == first
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["targets"]
    measured = {row["what"] for row in rows if row["figure"]}
    assert measured == {"nf4 decode, share of a plain read loop, 1 thread",
                        "nf4 decode, share of its own speed on one matrix over and over, 1 thread",
                        "8 rows at once, nf4 auto: time over 1 row, 1 thread"}
    assert all(f"| {row['what']} |" in page for row in rows)
    assert "qllm nf4 auto, 8 rows" in page and _core.cpu_info()["model"] in page
    assert "## Notes" in page


# ----------------------------------------------------------------------------------------- study


def test_a_grid_is_drawn_once_and_looped_over(tmp_path: Path) -> None:
    need("torch", "transformers", "bitsandbytes", "accelerate")
    out = tmp_path / "study.json"
    printed = script("study.py", "--model", "tiny", "--folder", str(tmp_path / "tiny"),
                     "--threads", "1", "--rounds", "2", "--prompts", "2", "--seeds", "2",
                     "--temperatures", "0", "1", "--top-k", "0", "5", "--lengths", "2", "3",
                     "--sample", "1", "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["cells"], found["cells_tokens"]) == (2 * 2 * 2 * 2 * 2, 16 * 2 + 16 * 3)
    assert (found["texts"], found["tokens"]) == (2 + 2 * 2 * 2, 3 * 10)  # greedy ones serve all
    names = {"qllm nf4", "transformers bf16", "bitsandbytes nf4"}
    assert names == set(found["seconds_per_cell"])
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds_per_cell"].values())
    ours, theirs = (found["seconds_per_cell"][name] for name in ("qllm nf4", "transformers bf16"))
    assert found["ratios"]["transformers bf16"] == [b / a for a, b in zip(ours, theirs)]
    assert "10 texts, 30 tokens" in printed and "times as fast" in printed


def test_a_grid_has_every_cell_and_each_draw_once() -> None:
    import study

    options = study.parser().parse_args(["--prompts", "2", "--seeds", "3", "--temperatures", "0",
                                         "0.5", "--top-k", "0", "7", "--lengths", "4", "2"])
    cells = study.grid(options)
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 3 * 2
    drawn = study.requests(cells, [[1, 2], [3]])
    assert len(drawn) == 2 + 2 * 2 * 3
    assert {request.config.max_new_tokens for request in drawn} == {4}
    assert sorted(cell.length for cell in study.sample(cells, 3, np.random.default_rng(1))) == [
        2, 2, 2, 4, 4, 4]
