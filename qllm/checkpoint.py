"""A model's folder in the layout of Hugging Face: configuration, weights in safetensors, tokenizer.

Nothing in a folder is executed: pickles are refused, `auto_map` code and templates are not looked
at. File names that come from inside the folder are bare names, and what they name must lie in the
folder; only the hub cache's own links from `snapshots/<revision>/` to its blobs may lead out.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_left
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

from .errors import QllmFileError, QllmValueError
from .safetensors import MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsFile, TensorEntry
from .strict_json import quoted, read_object

DEMO_NAMES = ("llama", "falcon")
"""The built-in models, named demo:llama and demo:falcon."""

MAX_CONFIG_BYTES = 10_000_000
"""Longest config.json or generation_config.json that is read."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
]
_HUB_IGNORED = ["*/*", "consolidated*"]  # files in subfolders, and a second copy in another layout


class Checkpoint:
    """An open folder: `folder`, `config` (the parsed config.json) and the tensors of its weights.

    All headers and the index are read and checked when it is opened, so that a checkpoint which
    opens is complete: each tensor lies in exactly one file, and files and index agree. Raises
    `QllmFileError`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))
        config = _member(self.folder, "config.json")
        if config is None:
            raise QllmFileError(
                f"{self.folder} has no config.json; a model's folder holds config.json and "
                "safetensors weights"
            )
        self.config: dict[str, Any] = read_object(config, MAX_CONFIG_BYTES)
        names, weight_map = _weight_files(self.folder)
        self._files: list[SafetensorsFile] = []
        try:
            for name in names:
                self._files.append(SafetensorsFile(_required(self.folder, name)))
            self._owner = _owners(self._files)
            if weight_map is not None:
                _check_index(weight_map, self._owner, self.folder / _INDEX)
        except BaseException:
            self.close()
            raise
        self._names = sorted(self._owner)

    @classmethod
    def open(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Opens a folder, a built-in model (`demo:llama`, `demo:falcon`) or a model of the hub.

        A name `organisation/model` that is no folder here is fetched by huggingface_hub, which
        obeys `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN`; `revision`, `cache_dir`,
        `token` and `local_files_only` are handed to it. A `revision` of anything else raises
        `QllmValueError`; all other failures are `QllmFileError`.
        """
        if not isinstance(name_or_folder, (str, os.PathLike)):
            raise QllmValueError(
                f"the model is a {type(name_or_folder).__name__}; a folder or a name was expected"
            )
        name = os.fsdecode(name_or_folder)
        if revision is not None and (name.startswith("demo:") or os.path.isdir(name)):
            raise QllmValueError(
                f"revision={quoted(revision)} has no meaning for {quoted(name)}; only models"
                " of the hub have revisions"
            )
        if name.startswith("demo:"):
            return cls(_demo_folder(name))
        if os.path.isdir(name):
            return cls(name)
        if os.path.exists(name):
            raise QllmFileError(
                f"{name} is a file; name the folder which holds config.json and the weights"
            )
        if isinstance(name_or_folder, str) and _HUB_NAME.fullmatch(name):
            return cls(_download(name, revision, cache_dir, token, local_files_only))
        raise QllmFileError(
            f"there is no folder {quoted(name)}, and it is no name on the Hugging Face hub, "
            "which has the form organisation/model"
        )

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return [file.path for file in self._files]

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """The parsed generation_config.json, or None where there is none."""
        path = _member(self.folder, "generation_config.json")
        return None if path is None else read_object(path, MAX_CONFIG_BYTES)

    @cached_property
    def tokenizer_file(self) -> Path | None:
        """The path of tokenizer.json, or None where there is none."""
        return _member(self.folder, "tokenizer.json")

    def member(self, name: str) -> Path | None:
        """The path of the file `name` of the folder, or None where there is none. Raises
        `QllmFileError` for a name that is no bare file name, or a link out of the folder."""
        return _member(self.folder, name)

    def names(self, prefix: str = "") -> list[str]:
        """The names of the tensors that begin with `prefix`, sorted."""
        start = bisect_left(self._names, prefix)
        stop = start
        while stop < len(self._names) and self._names[stop].startswith(prefix):
            stop += 1
        return self._names[start:stop]

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def entry(self, name: str) -> TensorEntry:
        """The tensor `name`. Raises `QllmFileError` when there is none, or when its file has
        changed since the checkpoint was opened."""
        file = self._owner.get(name)
        if file is None:
            raise QllmFileError(f"{self.folder} has no tensor {quoted(name)}")
        return file.entry(name)

    def release(self, entry: TensorEntry) -> None:
        """Says that the bytes of `entry` are not needed for now; see `SafetensorsFile.release`."""
        self._owner[entry.name].release(entry.name)

    def unchanged(self) -> bool:
        """Whether all weight files are still those which were opened."""
        return all(file.unchanged() for file in self._files)

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 (hexadecimal) of every weight file, read in pieces of 1 MiB."""
        digests = {}
        for file in self._files:
            file.require_unchanged()
            digest = hashlib.sha256()
            with open(file.path, "rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
            file.require_unchanged()
            digests[file.path.name] = digest.hexdigest()
        return digests

    def close(self) -> None:
        """Closes the weight files; entries that are still held stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _member(folder: Path, name: str) -> Path | None:
    """The path of the file `name` of `folder`, or None where there is none; refused when `name` is
    no bare file name, or a link that leads nowhere or out of the folder."""
    bare = PurePosixPath(name).name == name == PureWindowsPath(name).name and "\0" not in name
    if not bare or name == "..":
        raise QllmFileError(
            f"{folder} refers to the file {quoted(name)}; only bare file names in the same "
            "folder are followed"
        )
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise QllmFileError(
            f"{path} is a link to a file that does not exist; fetch the model again"
        ) from None
    if target.is_relative_to(home) or any(
        target.is_relative_to(blobs) for blobs in _hub_blobs(home)
    ):
        return path
    raise QllmFileError(
        f"{path} is a link out of its folder, to {target}; copy the file into the folder"
    )


def _hub_blobs(home: Path) -> list[Path]:
    """Where links may lead from `home`, a snapshot in the hub cache; nowhere from other folders.

    <cache>/models--org--name/snapshots/<revision>/x links to <cache>/models--org--name/blobs/,
    which may itself link to the store <cache>/blobs/ that models share (huggingface_hub 2).
    """
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    return [repository / "blobs", repository.parent / "blobs"]


def _required(folder: Path, name: str) -> Path:
    """The path of a weight file of `folder`."""
    path = _member(folder, name)
    if path is None:
        raise QllmFileError(
            f"{folder / name}, which {_INDEX} names, is missing; fetch the model again"
        )
    return path


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and tensor -> file where an index says so. The order of preference
    is that of transformers: the single file, then the index; else the only safetensors file there
    is."""
    if _member(folder, _SINGLE) is not None:
        return [_SINGLE], None
    index = _member(folder, _INDEX)
    if index is not None:
        weight_map = _read_index(index)
        return sorted(set(weight_map.values())), weight_map
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise QllmFileError(f"{folder} cannot be listed: {error.strerror}") from None
    weights = [name for name in found if name.endswith(".safetensors")]
    if len(weights) == 1:
        return weights, None
    if weights:
        raise QllmFileError(
            f"{folder} has {len(weights)} safetensors files ({quoted(', '.join(weights))}) "
            f"but neither {_SINGLE} nor {_INDEX}, which would say how they belong together"
        )
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        raise QllmFileError(
            f"{folder} has its weights as a pickle ({quoted(pickles[0])}), which can run code and"
            " is not read; if you trust it, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained("
            f"{str(folder)!r}).save_pretrained({str(folder) + '-safetensors'!r})"
        )
    gguf = [name for name in found if name.endswith(".gguf")]
    if gguf:
        raise QllmFileError(
            f"{folder} has its weights as GGUF ({quoted(gguf[0])}), which is not read; get "
            "the model's safetensors files"
        )
    raise QllmFileError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    """weight_map of the index: tensor -> bare name of a safetensors file."""
    weight_map = read_object(path, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QllmFileError(
            f"{path} must have a weight_map from tensors to files, which is not empty"
        )
    if len(weight_map) > MAX_TENSORS:
        raise QllmFileError(
            f"{path} names {len(weight_map)} tensors, more than the {MAX_TENSORS} that are "
            "read at most"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise QllmFileError(
                f"{path} puts tensor {quoted(name)} in {quoted(shard)}; the name of a "
                "safetensors file was expected"
            )
    return weight_map


def _owners(files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Tensor -> its file; no file and no tensor may be there twice."""
    seen: dict[tuple[int, int], Path] = {}
    owners: dict[str, SafetensorsFile] = {}
    for file in files:
        twin = seen.setdefault(file.identity[:2], file.path)
        if twin is not file.path:
            raise QllmFileError(
                f"{twin} and {file.path} are the same file under two names; the index lists "
                "it twice"
            )
        for name in file.names:
            twin_file = owners.setdefault(name, file)
            if twin_file is not file:
                raise QllmFileError(
                    f"tensor {quoted(name)} is in two files, {twin_file.path} and {file.path}"
                )
    return owners


def _check_index(
    weight_map: dict[str, str], owners: dict[str, SafetensorsFile], index: Path
) -> None:
    """The index and the headers of the shards name the same tensors in the same files."""
    for name, shard in weight_map.items():
        owner = owners.get(name)
        if owner is None or owner.path.name != shard:
            where = "it is in no file" if owner is None else f"it is in {quoted(owner.path.name)}"
            raise QllmFileError(
                f"{index} puts tensor {quoted(name)} in {quoted(shard)}, but {where}"
            )
    for name, owner in owners.items():
        if name not in weight_map:
            raise QllmFileError(
                f"{owner.path} has the tensor {quoted(name)}, which {index.name} does not name"
            )


def _demo_folder(name: str) -> Path:
    """The folder of a built-in model, from `demo:llama` or `demo:falcon`."""
    model = name.removeprefix("demo:")
    if model not in DEMO_NAMES:
        raise QllmFileError(
            f"there is no built-in model {quoted(name)}; there are "
            + " and ".join(f"demo:{known}" for known in DEMO_NAMES)
        )
    from . import demo

    return Path(demo.path(model))


def _download(
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """The folder in the hub cache with the files of model `name`, fetched when not there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise QllmFileError(
            f"there is no folder {quoted(name)}, and to fetch it from the Hugging Face hub "
            "the package huggingface_hub is needed: pip install qllm[hub]"
        ) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                token=token,
                local_files_only=local_files_only,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_IGNORED,
            )
        )
    # The hub client raises errors of its own, of its HTTP library and of the operating system.
    except Exception as error:
        raise QllmFileError(
            f"there is no folder {quoted(name)}, and the Hugging Face hub did not give a "
            f"model of that name: {_hub_reason(error)}"
        ) from error


def _hub_reason(error: Exception) -> str:
    """One clause for what went wrong at the hub, by the most derived class that is known here."""
    known = {
        "GatedRepoError": (
            "it is gated; accept its terms on its page and pass token= or set HF_TOKEN"
        ),
        "RepositoryNotFoundError": (
            "no such repository, or a private one (pass token= or set HF_TOKEN)"
        ),
        "RevisionNotFoundError": "the repository has no such revision",
        "HFValidationError": "the name has not the form organisation/model",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the cache does not hold it",
        "IncompleteSnapshotError": (
            "the cache holds only a part of it and the hub was not asked or not reached"
        ),
        "LocalEntryNotFoundError": (
            "the cache does not hold it and the hub was not asked or not reached"
        ),
    }
    for kind in type(error).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    first_line = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first_line}"
