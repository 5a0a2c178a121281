"""Folders in the layout of Hugging Face: what is found in them, and that every damaged or hostile
folder ends in one sentence. No test reaches the network."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

from qllm.checkpoint import MAX_CONFIG_BYTES, Checkpoint
from qllm.errors import QllmFileError, QllmValueError

save_file = pytest.importorskip(
    "safetensors.numpy", reason="the library writes the files of these tests"
).save_file

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {"a": ONE, "b": ONE, "c": TWO}


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def single(folder: Path, config: str = '{"model_type": "llama"}') -> Path:
    """A folder with config.json and one weight file of the tensors a (2, 3) and b (4,)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    save_file({"a": ramp(2, 3), "b": ramp(4)}, folder / "model.safetensors")
    return folder


def sharded(folder: Path, weight_map: object = WEIGHT_MAP) -> Path:
    """A folder with two shards, a and b in the first, c in the second, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": ramp(2, 3), "b": ramp(4)}, folder / ONE)
    save_file({"c": ramp(5)}, folder / TWO)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


def refuse(folder: Path | str, words: str, **options: object) -> None:
    with pytest.raises(QllmFileError, match=words) as caught:
        Checkpoint.open(folder, **options)
    assert isinstance(caught.value, OSError) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- good folders


def test_a_single_file_is_read(tmp_path: Path) -> None:
    with Checkpoint.open(single(tmp_path)) as checkpoint:
        assert checkpoint.folder == tmp_path and checkpoint.config == {"model_type": "llama"}
        assert checkpoint.names() == ["a", "b"] and "a" in checkpoint and "c" not in checkpoint
        assert checkpoint.files == [tmp_path / "model.safetensors"]
        assert np.array_equal(checkpoint.entry("a").numpy(), ramp(2, 3))
        assert checkpoint.generation_config is None and checkpoint.tokenizer_file is None


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    with Checkpoint.open(str(sharded(tmp_path))) as checkpoint:
        assert checkpoint.names() == ["a", "b", "c"]
        assert [file.name for file in checkpoint.files] == [ONE, TWO]
        assert np.array_equal(checkpoint.entry("c").numpy(), ramp(5))
        assert checkpoint.entry("c").file == tmp_path / TWO


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path)
    with Checkpoint.open(single(tmp_path)) as checkpoint:
        assert checkpoint.names() == ["a", "b"]


def test_one_weight_file_of_another_name_is_taken(tmp_path: Path) -> None:
    (single(tmp_path) / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.files == [tmp_path / "weights.safetensors"]


def test_generation_config_and_tokenizer_are_found(tmp_path: Path) -> None:
    (single(tmp_path) / "generation_config.json").write_text('{"temperature": 0.6}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.generation_config == {"temperature": 0.6}
        assert checkpoint.tokenizer_file == tmp_path / "tokenizer.json"


def test_names_by_prefix(tmp_path: Path) -> None:
    single(tmp_path)
    save_file(
        {name: ramp(1) for name in ["x.a", "x.a.b", "x.a.c", "x.b", "w"]},
        tmp_path / "model.safetensors",
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names("x.a") == ["x.a", "x.a.b", "x.a.c"]
        assert checkpoint.names("x.a.") == ["x.a.b", "x.a.c"]
        assert checkpoint.names("y") == [] and checkpoint.names("x.b") == ["x.b"]


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    with Checkpoint.open(sharded(tmp_path)) as checkpoint:
        expected = {
            name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in (ONE, TWO)
        }
        assert checkpoint.sha256() == expected and checkpoint.unchanged()


def test_a_folder_that_is_itself_a_link_is_the_users_choice(tmp_path: Path) -> None:
    single(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Checkpoint.open(tmp_path / "link") as checkpoint:
        assert checkpoint.names() == ["a", "b"]


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    (single(tmp_path) / "model.safetensors").rename(tmp_path / "stored")
    (tmp_path / "model.safetensors").symlink_to("stored")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == ["a", "b"]


def test_a_hard_link_out_of_the_folder_is_a_file_of_the_folder(tmp_path: Path) -> None:
    """Nothing tells the two names of a file apart, and nobody made this one by naming a path."""
    outside = single(tmp_path / "outside") / "model.safetensors"
    (single(tmp_path / "model") / "model.safetensors").unlink()
    os.link(outside, tmp_path / "model" / "model.safetensors")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        assert checkpoint.files == [tmp_path / "model" / "model.safetensors"]
        assert np.array_equal(checkpoint.entry("b").numpy(), ramp(4))


def test_code_of_the_folder_is_never_run(tmp_path: Path) -> None:
    single(tmp_path, '{"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}')
    (tmp_path / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config["auto_map"] and not (tmp_path / "ran").exists()


def test_tied_weights_may_be_absent_and_asking_for_them_says_so(tmp_path: Path) -> None:
    with Checkpoint.open(single(tmp_path)) as checkpoint:
        with pytest.raises(QllmFileError, match="has no tensor 'lm_head.weight'"):
            checkpoint.entry("lm_head.weight")


def test_unreferenced_weight_files_beside_an_index_are_left_alone(tmp_path: Path) -> None:
    save_file({"a": ramp(1)}, sharded(tmp_path) / "consolidated.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 2


# ------------------------------------------------------------------------------- hostile folders


def _config(text: str | bytes) -> Callable[[Path], object]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (single(folder) / "config.json").write_bytes(content)


def _index(weight_map: object) -> Callable[[Path], object]:
    return lambda folder: sharded(folder, weight_map)


def _shard_at(name: str) -> Callable[[Path], object]:
    return _index({"a": ONE, "b": ONE, "c": name})


def _linked_out(name: str) -> Callable[[Path], object]:
    """`name` of the folder is a link to a good file outside."""

    def make(folder: Path) -> None:
        outside = sharded(folder.parent / "outside") / name
        (sharded(folder) / name).unlink()
        (folder / name).symlink_to(outside)

    return make


def _linked_pretending(folder: Path) -> None:
    """A link to ../../blobs from a folder that is no snapshot of a hub cache."""
    _blob = folder.parent.parent / "blobs" / "w"
    _blob.parent.mkdir(parents=True)
    (single(folder) / "model.safetensors").rename(_blob)
    (folder / "model.safetensors").symlink_to("../../blobs/w")


def _linked_nowhere(folder: Path) -> None:
    (single(folder) / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../gone")


def _linked_in_a_circle(folder: Path) -> None:
    (single(folder) / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def _same_shard_linked_twice(folder: Path) -> None:
    (sharded(folder, {"a": ONE, "b": ONE, "c": "z.safetensors"}) / "z.safetensors").symlink_to(ONE)


def _tensor_in_two_shards(folder: Path) -> None:
    save_file({"a": ramp(2, 3), "c": ramp(5)}, sharded(folder) / TWO)


def _extra_tensor(folder: Path) -> None:
    save_file({"c": ramp(5), "extra": ramp(1)}, sharded(folder) / TWO)


def _without(name: str, make: Callable[[Path], Path]) -> Callable[[Path], object]:
    return lambda folder: (make(folder) / name).unlink()


def _truncated(folder: Path) -> None:
    os.truncate(sharded(folder) / TWO, (folder / TWO).stat().st_size - 4)


def _only(name: str, content: bytes = b"\x80\x02}.") -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (single(folder) / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return make


def _two_files(folder: Path) -> None:
    save_file({"c": ramp(5)}, single(folder) / "y.safetensors")
    (folder / "model.safetensors").rename(folder / "x.safetensors")


def _index_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (sharded(folder) / INDEX).write_text(text)


def _large_config(folder: Path) -> None:
    os.truncate(single(folder) / "config.json", MAX_CONFIG_BYTES + 1)


def _config_is_folder(folder: Path) -> None:
    (single(folder) / "config.json").unlink()
    (folder / "config.json").mkdir()


HOSTILE_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_without("config.json", single), "has no config.json"),
    "empty": (lambda folder: folder.mkdir(), "has no config.json"),
    "config a list": (_config("[]"), "config.json must be a JSON object, but is a list"),
    "config not JSON": (_config("{'a': 1}"), "config.json is not valid JSON"),
    "config empty": (_config(""), "config.json is not valid JSON"),
    "config with a key twice": (_config('{"a": 1, "a": 2}'), "config.json has the key 'a' twice"),
    "config with a deep key twice": (_config('{"r": {"a": 1, "a": 2}}'), "has the key 'a' twice"),
    "config with NaN": (_config('{"eps": NaN}'), "config.json holds NaN"),
    "config with 1e400": (_config('{"eps": 1e400}'), "config.json holds 1e400"),
    "config not UTF-8": (_config(b'{"a": "\xff"}'), "config.json is not UTF-8"),
    "config with a byte order mark": (_config(b"\xef\xbb\xbf{}"), "byte order mark"),
    "config nested 10^5": (_config("[" * 10**5), "config.json is (nested too deep|not valid JSON)"),
    "config too large": (_large_config, "config.json has 10000001 bytes, more than the 10000000"),
    "config a web page": (_config("<!doctype html><html>"), "config.json is a web page"),
    "config a Git LFS pointer": (
        _config("version https://git-lfs.github.com/spec/v1\n"),
        "config.json is a Git LFS pointer",
    ),
    "config a folder": (_config_is_folder, "config.json is not a regular file"),
    "config a link out": (_linked_out("config.json"), "config.json is a link out of its folder"),
    "no weights": (_without("model.safetensors", single), "has no weights"),
    "only pytorch_model.bin": (
        _only("pytorch_model.bin"),
        "a pickle \\('pytorch_model.bin'\\).*save_pretrained",
    ),
    "only a .pt": (_only("weights.pt"), "a pickle \\('weights.pt'\\).*save_pretrained"),
    "only a .pth": (_only("consolidated.00.pth"), "a pickle.*save_pretrained"),
    "only a .gguf": (_only("q4.gguf", b"GGUF"), "as GGUF \\('q4.gguf'\\)"),
    "pickle named safetensors": (
        _only("model.safetensors", pickle.dumps({"w": [1.0] * 9})),
        "model.safetensors is no safetensors file but a Python pickle",
    ),
    "two files without an index": (_two_files, "2 safetensors files.*model.safetensors.index.json"),
    "index not JSON": (_index_text("weights"), "index.json is not valid JSON"),
    "index without weight_map": (_index_text("{}"), "must have a weight_map"),
    "index with a list": (_index([]), "must have a weight_map"),
    "index of nothing": (_index({}), "must have a weight_map.*not empty"),
    "index with a key twice": (
        _index_text('{"weight_map": {"a": "%s", "a": "%s"}}' % (ONE, TWO)),
        "the key 'a' twice",
    ),
    "index with a number": (_index({"a": 1}), "puts tensor 'a' in '1'; the name of a safetensors"),
    "index with null": (_index({"a": None}), "puts tensor 'a' in 'None'"),
    "shard a pickle": (
        _index({"a": "pytorch_model.bin"}),
        "puts tensor 'a' in 'pytorch_model.bin'",
    ),
    "shard missing": (_without(TWO, sharded), f"{TWO}, which {INDEX} names, is missing"),
    "shard truncated": (
        _truncated,
        f"tensor 'c' of .*{TWO} ends at byte 20.*has 16 bytes.*cut short",
    ),
    "shard ../x": (_shard_at("../x.safetensors"), "'../x.safetensors'; only bare file names"),
    "shard absolute": (_shard_at("/x.safetensors"), "'/x.safetensors'; only bare file names"),
    "shard in a folder": (_shard_at("sub/x.safetensors"), "only bare file names"),
    "shard with a backslash": (_shard_at("..\\x.safetensors"), "only bare file names"),
    "shard on a drive": (_shard_at("C:x.safetensors"), "only bare file names"),
    "shard with a zero byte": (_shard_at("x\0.safetensors"), "only bare file names"),
    "shard listed twice, ./": (_shard_at("./" + ONE), "only bare file names"),
    "shard listed twice, /": (_shard_at(ONE + "/.safetensors"), "only bare file names"),
    "shard listed twice by a link": (_same_shard_linked_twice, "the same file under two names"),
    "shard listed twice by a hard link": (
        lambda folder: os.link(
            sharded(folder, WEIGHT_MAP | {"c": "z.safetensors"}) / ONE, folder / "z.safetensors"
        ),
        "the same file under two names",
    ),
    "shard a link out": (_linked_out(TWO), f"{TWO} is a link out of its folder"),
    "index a link out": (_linked_out(INDEX), "index.json is a link out of its folder"),
    "link to blobs outside a hub cache": (_linked_pretending, "is a link out of its folder"),
    "link to nothing": (_linked_nowhere, "link to a file that does not exist"),
    "link to itself": (_linked_in_a_circle, "link to a file that does not exist"),
    "tensor in two shards": (
        _tensor_in_two_shards,
        f"tensor 'a' is in two files, .*{ONE} and .*{TWO}",
    ),
    "tensor of the index in no shard": (
        _index(WEIGHT_MAP | {"d": TWO}),
        f"puts tensor 'd' in '{TWO}', but it is in no file",
    ),
    "tensor of the index in another shard": (
        _index(WEIGHT_MAP | {"b": TWO}),
        f"puts tensor 'b' in '{TWO}', but it is in '{ONE}'",
    ),
    "extra tensor in a shard": (
        _extra_tensor,
        f"{TWO} has the tensor 'extra', which {INDEX} does not",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_FOLDERS)
def test_hostile_folder_is_refused_with_words(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE_FOLDERS[name]
    folder = tmp_path / "snapshots" / "model"
    folder.parent.mkdir()
    make(folder)
    refuse(folder, words)


def test_a_broken_generation_config_is_refused_when_asked_for(tmp_path: Path) -> None:
    (single(tmp_path) / "generation_config.json").write_text("[]")
    with Checkpoint.open(tmp_path) as checkpoint:
        with pytest.raises(QllmFileError, match="generation_config.json must be a JSON object"):
            checkpoint.generation_config


def test_a_tokenizer_linked_out_is_refused_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (single(tmp_path / "model") / "tokenizer.json").symlink_to("../secret")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        with pytest.raises(QllmFileError, match="link out of its folder"):
            checkpoint.tokenizer_file


def test_a_file_changed_after_opening_is_refused_on_access(tmp_path: Path) -> None:
    with Checkpoint.open(sharded(tmp_path)) as checkpoint:
        os.truncate(tmp_path / TWO, 40)
        assert not checkpoint.unchanged()
        assert np.array_equal(checkpoint.entry("b").numpy(), ramp(4))
        with pytest.raises(QllmFileError, match=f"{TWO} was changed"):
            checkpoint.entry("c")
        with pytest.raises(QllmFileError, match=f"{TWO} was changed"):
            checkpoint.sha256()


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc, of Linux"
)
def test_a_refused_folder_leaves_no_file_open(tmp_path: Path) -> None:
    sharded(tmp_path, WEIGHT_MAP | {"d": TWO})
    opened = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        refuse(tmp_path, "is in no file")
    assert len(os.listdir("/proc/self/fd")) <= opened


# --------------------------------------------------------------------------------- names of models


def test_names_that_are_neither_folder_nor_hub_name(tmp_path: Path) -> None:
    single(tmp_path)
    refuse(
        tmp_path / "absent", "there is no folder '.*absent', and it is no name on the Hugging Face"
    )
    refuse("gpt2", "form organisation/model")
    refuse("", "form organisation/model")
    refuse("a/b/c", "form organisation/model")
    refuse("../outside", "form organisation/model")
    refuse("org/name\n", "form organisation/model")
    refuse(tmp_path / "model.safetensors", "is a file; name the folder")


def test_a_revision_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QllmValueError, match="revision='main' has no meaning for"):
        Checkpoint.open(single(tmp_path), revision="main")


def test_demo_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = types.ModuleType("qllm.demo")
    demo.path = lambda name: single(tmp_path / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qllm.demo", demo)
    monkeypatch.setattr(sys.modules["qllm"], "demo", demo, raising=False)
    with Checkpoint.open("demo:llama") as checkpoint:
        assert checkpoint.folder == tmp_path / "llama"
    with Checkpoint.open("demo:falcon") as checkpoint:
        assert checkpoint.folder == tmp_path / "falcon"
    refuse("demo:gpt", "no built-in model 'demo:gpt'; there are demo:llama and demo:falcon")
    refuse("demo:../llama", "there are demo:llama and demo:falcon")


def test_the_missing_hub_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse("org/name", "pip install qllm\\[hub\\]")


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(cache: Path, shared: bool = False) -> Path:
    """A cache of huggingface_hub with the model org/name: blobs, refs/main, and a snapshot of
    links; with `shared`, the weights lie in the store that all models of the cache share."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    blobs = repository / "blobs"
    for folder in (blobs, repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for file in sorted(single(cache.parent / "source").iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if shared and file.suffix == ".safetensors":
            store = cache / "blobs" / digest[:2]
            store.mkdir(parents=True)
            (store / digest).write_bytes(file.read_bytes())
            (blobs / digest).symlink_to(f"../../blobs/{digest[:2]}/{digest}")
        else:
            (blobs / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path, shared: bool) -> None:
    pytest.importorskip("huggingface_hub", reason="reads the cache by its own rules")
    snapshot = hub_cache(tmp_path / "cache", shared)
    with Checkpoint.open(
        "org/name", cache_dir=tmp_path / "cache", local_files_only=True
    ) as checkpoint:
        assert checkpoint.folder == snapshot
        assert np.array_equal(checkpoint.entry("a").numpy(), ramp(2, 3))
    with Checkpoint.open(
        "org/name", cache_dir=tmp_path / "cache", local_files_only=True, revision=REVISION
    ) as checkpoint:
        assert checkpoint.folder == snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_opens_by_its_path(tmp_path: Path, shared: bool) -> None:
    with Checkpoint.open(hub_cache(tmp_path / "cache", shared)) as checkpoint:
        assert checkpoint.names() == ["a", "b"]
        assert np.array_equal(checkpoint.entry("b").numpy(), ramp(4))


def test_a_link_of_a_snapshot_beyond_the_blobs_is_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "cache")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "source" / "model.safetensors")
    refuse(snapshot, "is a link out of its folder")


def test_what_the_cache_lacks_is_said(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="reads the cache by its own rules")
    snapshot = hub_cache(tmp_path / "cache")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    refuse("org/other", "no folder 'org/other'.*the cache does not hold it", **options)
    refuse("org/name", "the cache does not hold it", **options, revision="absent")
    refuse("org/na--me", "name has not the form", **options)
    (snapshot / "model.safetensors").unlink()
    refuse("org/name", "has no weights", **options)


def test_the_environment_of_the_hub_is_obeyed(tmp_path: Path) -> None:
    """HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported: a process of its
    own."""
    pytest.importorskip("huggingface_hub", reason="reads the cache by its own rules")
    hub_cache(tmp_path / "home" / "hub")
    code = (
        "from qllm.checkpoint import Checkpoint\n"
        "print(Checkpoint.open('org/name').names())\n"
        "try:\n    Checkpoint.open('org/other')\n"
        "except OSError as error:\n    print(error)\n"
    )
    env = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    env.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "['a', 'b']"
    assert "'org/other'" in result.stdout.splitlines()[1]
    assert "the cache does not hold it" in result.stdout.splitlines()[1]


@pytest.mark.parametrize(
    "name, words",
    [
        ("GatedRepoError", "gated; accept its terms.*HF_TOKEN"),
        ("RepositoryNotFoundError", "no such repository, or a private one"),
        ("RevisionNotFoundError", "no such revision"),
    ],
)
def test_refusals_of_the_hub_become_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="its errors are the subject")
    from huggingface_hub import errors

    asked: dict[str, object] = {}

    def answer(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        kind = getattr(errors, name)
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "snapshot_download", answer)
    refuse("org/name", words, revision="v1", token="t")
    assert asked["repository"] == "org/name" and asked["revision"] == "v1" and asked["token"] == "t"
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])


def test_an_error_of_the_network_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="its function is replaced")

    def answer(repository: str, **options: object) -> str:
        raise ConnectionError("name resolution failed\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", answer)
    refuse("org/name", "ConnectionError: name resolution failed$")
