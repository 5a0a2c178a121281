"""What a study will cost, before it starts: cells, tokens, memory and time.

Tokens and memory follow from the design, the configs and the tokenizers; no weights are loaded for
them. Tokens are an upper bound, since texts may end early. Memory is that of the model classes
below: the weights of the reference and of the arm, which are held together, keys and values of a
full batch, and logits. Time is tokens times the pace of a short run of each model; for a model
whose loading would take long, it is reckoned from its size and from how fast this machine reads and
multiplies.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core
from ..architectures import FLOAT_DTYPES, bind, describe
from ..checkpoint import Checkpoint
from ..errors import QllmMemoryError
from ..quantize import bits_per_weight
from ..report import html_table, size_text, text_table
from ..tokenizer import Tokenizer
from .cells import SPEED, Task
from .design import Arm, Design, resolve
from .progress import duration

if TYPE_CHECKING:
    from ..model import Model

PROBED_BYTES = 4 << 30
"""Models with more bytes in their weight files are not loaded to see how fast they are."""

SHARE = 0.9
"""Of the memory that is free when a cell starts, what it may take."""


# -------------------------------------------------------------------------------- a model's size


@dataclass(frozen=True)
class ModelSize:
    """A model as far as its config, its tokenizer and the headers of its weights tell.

    `linears` are (weights, in the output embedding or not) of every linear layer with its stored
    format; `prompts` and `texts` are tokens by id.
    """

    name: str
    parameters: int
    vocab: int
    layers: int
    kv_values: int  # of keys and values, for a position, all layers
    file_bytes: int
    stored: str
    embedding: int  # weights
    tied: bool
    vectors: int
    head: tuple[int, int]
    linears: tuple[tuple[int, int], ...]
    prompts: Mapping[str, int]
    texts: Mapping[str, int]

    @classmethod
    def of(cls, name: str, design: Design) -> ModelSize:
        """Reads what is needed of the model `name`. Raises `QllmFileError` as loading it would."""
        with Checkpoint.open(name) as checkpoint:
            what = str(checkpoint.folder / "config.json")
            architecture = bind(describe(checkpoint.config, what), checkpoint)
            decoder = architecture.decoder
            embedding = architecture.stored(architecture.embedding) + ".weight"
            stored = FLOAT_DTYPES[checkpoint.entry(embedding).dtype]
            tokens: list[dict[str, int]] = [{}, {}]
            if checkpoint.tokenizer_file is not None:
                tokenizer = Tokenizer(checkpoint.tokenizer_file, decoder["vocab"])
                for counts, texts in zip(tokens, (design.prompts, design.texts)):
                    counts.update((text.id, len(tokenizer.encode(text.text))) for text in texts)
            return cls(
                name=name,
                parameters=architecture.parameters,
                vocab=decoder["vocab"],
                layers=decoder["layers"],
                kv_values=2 * decoder["layers"] * decoder["kv_heads"] * decoder["head_dim"],
                file_bytes=sum(path.stat().st_size for path in checkpoint.files),
                stored=stored,
                embedding=math.prod(architecture.embedding_shape),
                tied=architecture.tied,
                vectors=sum(vector.size for vector in architecture.vectors),
                head=architecture.head.shape,
                linears=tuple(linear.shape for linear in architecture.linears),
                prompts=tokens[0],
                texts=tokens[1],
            )

    def weight_bytes(self, format: str, blocksize: int, quantize_head: bool) -> int:
        """Bytes of the weights with the linear layers in `format`."""
        head = format if quantize_head else self.stored
        total = sum(_matrix_bytes(shape, format, blocksize) for shape in self.linears)
        total += _matrix_bytes(self.head, head, blocksize) + 4 * self.vectors
        if not self.tied or head != self.stored:
            total += _matrix_bytes((self.vocab, self.embedding // self.vocab), self.stored, 64)
        return total


def _matrix_bytes(shape: tuple[int, int], format: str, blocksize: int) -> int:
    """Of a packed matrix: whole tiles of 16 rows; int8 has two numbers more for each row."""
    rows = -(-shape[0] // 16) * 16
    size = rows * shape[1] * bits_per_weight(format, blocksize) / 8
    return math.ceil(size) + (8 * rows if format == "int8" else 0)


# ------------------------------------------------------------------------------- a cell's needs


@dataclass(frozen=True)
class Need:
    """Bytes that a cell takes: whatever the batch, and for each of `rows` rows of it."""

    weights: int = 0
    logits: int = 0
    fixed: int = 0
    row_kv: int = 0
    row_logits: int = 0
    rows: int = 1

    @property
    def kv(self) -> int:
        """Keys and values of a full batch, and of the longest text."""
        return self.fixed + self.row_kv * self.rows

    @property
    def all_logits(self) -> int:
        """Logits of a full batch, or of the longest text, whichever is more."""
        return max(self.logits, self.row_logits * self.rows)

    @property
    def bytes(self) -> int:
        """All together."""
        return self.weights + self.kv + self.all_logits

    def rows_in(self, available: int) -> int:
        """The most rows, up to `rows`, with which the cell fits into `available` bytes; 0 when it
        does not even with one."""
        for rows in range(self.rows, 0, -1):
            if replace(self, rows=rows).bytes <= available:
                return rows
        return 0


@dataclass(frozen=True)
class CellPlan:
    """A cell: its tokens and its memory. `generated` tokens are written in batches, `read` ones are
    read as texts by the arm or the reference, `single` ones are written one at a time."""

    model: str
    arm: str
    generated: int
    read: int
    single: int
    need: Need
    seconds: float | None = None

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.generated + self.read + self.single


def grid_rows(design: Design) -> int:
    """Texts that a cell generates: every temperature, top_k, seed and prompt, greedy ones once for
    all seeds."""
    drawn = sum(temperature > 0 for temperature in design.temperatures)
    greedy = len(design.temperatures) - drawn
    each = drawn * len(design.seeds) * len(design.top_k) + greedy
    return each * len(design.prompts)


def cell_plan(design: Design, size: ModelSize, name: str) -> CellPlan:
    """What the cell of the arm `name`, or of `SPEED`, costs for a model of `size`."""
    if name == SPEED:
        return _speed_plan(design, size)
    arm = design.arm(name)
    if design.lockstep:
        return _lockstep_plan(design, size, arm)
    length = design.max_new_tokens
    rows = grid_rows(design)
    prompt_tokens = sum(size.prompts.values())
    mean_prompt = prompt_tokens / max(1, len(size.prompts))
    shown = min(design.play, len(design.prompts))
    generated = (rows + shown) * length
    read = prompt_tokens + round(rows * (mean_prompt + length))
    if arm.role != "reference":
        both = sum(size.texts.values())
        if design.own_temperature is not None:
            both += len(design.seeds) * (prompt_tokens + length * len(design.prompts))
        read += 2 * both
    read += 2 * shown * round(mean_prompt + length)
    return CellPlan(size.name, name, generated, read, 0, _need(design, size, arm, rows))


def _speed_plan(design: Design, size: ModelSize) -> CellPlan:
    speed = design.speed
    assert speed is not None
    times = speed.rounds * len(design.timed) * (speed.warmups + 1)
    rows = max((1, *speed.batches))
    need = Need(
        weights=max(_weights(design, size, arm) for arm in design.timed),
        fixed=_kv_bytes(size, speed.prompt_tokens),
        row_kv=_kv_bytes(size, speed.decode_tokens),
        row_logits=3 * 4 * size.vocab,
        rows=rows,
    )
    return CellPlan(
        size.name,
        SPEED,
        times * sum(speed.batches) * speed.decode_tokens,
        times * speed.prompt_tokens,
        times * speed.decode_tokens,
        need,
    )


def _lockstep_plan(design: Design, size: ModelSize, arm: Arm) -> CellPlan:
    """Texts are read by both, of which a layer, or what stands before or behind the layers, is held
    at a time, beside the hidden states of all texts."""
    both = arm.role != "reference"
    sides = [design.reference, arm] if both else [arm]
    width = size.embedding // size.vocab
    ends = _matrix_bytes((size.vocab, width), size.stored, 64)
    heads = sum(_weights(design, replace(size, linears=()), side) for side in sides)
    layers = max(_weights(design, size, side) for side in sides) // size.layers
    tokens, longest = sum(size.texts.values()), max(size.texts.values())
    need = Need(
        weights=max(ends, heads, layers),
        fixed=_kv_bytes(replace(size, kv_values=size.kv_values // size.layers), longest)
        + (2 * 4 * width * tokens if both else 0),
        logits=3 * 4 * size.vocab * longest if both else 0,
    )
    return CellPlan(size.name, arm.name, 0, 2 * tokens if both else 0, 0, need)


def _weights(design: Design, size: ModelSize, arm: Arm) -> int:
    """Of an arm; of one from elsewhere, what its files hold."""
    if arm.source == "live":  # it is there already
        return 0
    if arm.source != "qllm":
        return _file_bytes(arm.path) if arm.path is not None else size.file_bytes
    head = design.quantize_head if arm.quantize_head is None else arm.quantize_head
    return size.weight_bytes(arm.format, arm.blocksize, head)


def _file_bytes(path: str) -> int:
    """Bytes of a file, or of the weights in a folder; 0 for a name that is neither."""
    place = Path(path)
    if place.is_dir():
        return sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return place.stat().st_size if place.is_file() else 0


def _need(design: Design, size: ModelSize, arm: Arm, rows: int) -> Need:
    weights = _weights(design, size, arm)
    if arm.role != "reference":
        weights += _weights(design, size, design.reference)
    prompt = max(size.prompts.values(), default=0)
    longest = max(prompt + design.max_new_tokens, *size.texts.values(), 0)
    # the logits of both models for the longest text, and what compares them
    logits = (3 if arm.role != "reference" else 1) * 4 * size.vocab * longest
    return Need(
        weights=weights,
        fixed=_kv_bytes(size, longest) + _kv_bytes(size, prompt) * len(size.prompts),
        logits=logits,
        row_kv=_kv_bytes(size, design.max_new_tokens),
        row_logits=3 * 4 * size.vocab,  # a step's, its copy for a prompt, the sampler's
        rows=min(rows, arm.batch_size or design.batch_size),
    )


def _kv_bytes(size: ModelSize, positions: int) -> int:
    """Of a sequence of so many positions: blocks of 16 positions, then twice as many up to 256."""
    held, block = 0, 16
    while held < positions:
        held += block
        block = min(2 * block, 256)
    return 4 * size.kv_values * held


# --------------------------------------------------------------------------- fitting into memory


def memory_for(design: Design, arm: str | None = None) -> int | None:
    """Bytes that are free where a model of the design, or of one of its arms, is held. None where
    nothing tells."""
    own = None if arm in (None, SPEED) else design.arm(arm).device
    found = _core.device_info(own or design.device)
    return available_memory() if found is None else found["free"]


def available_memory() -> int | None:
    """Bytes that a new process of this machine may take now: what the system calls available, less
    where a control group allows less. None where nothing tells."""
    found = [_meminfo(), _group("memory.max", "memory.current")]
    found.append(_group("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    known = [value for value in found if value is not None]
    if known:
        return min(known)
    try:  # where there is no /proc
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _group(limit: str, used: str) -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def limited(task: Task, *, threads: int | None = None, batch_size: int | None = None) -> Task:
    """The task with at most so many threads and rows in a batch, which change nothing in what comes
    out of it. Threads of None, all, become `threads`; an arm that has a number of threads of its
    own, to show that it does not matter, keeps it."""

    def least(value: int | None, limit: int | None) -> int | None:
        return value if limit is None or value is None else min(value, limit)

    design = task.design
    arms = tuple(
        replace(arm, batch_size=least(arm.batch_size, batch_size)) for arm in design.arms
    )
    rows = least(design.batch_size, batch_size)
    assert rows is not None
    default = design.threads if design.threads is not None else threads
    changed = replace(design, arms=arms, batch_size=rows, threads=least(default, threads))
    return replace(task, design=changed)


def fitted(task: Task, need: Need) -> Task:
    """The task with batches small enough for the memory of this machine. Raises `QllmMemoryError`
    when even one row does not fit."""
    available = memory_for(task.design, task.arm)
    if available is None or need.bytes <= SHARE * available:
        return task
    rows = need.rows_in(int(SHARE * available))
    if rows == 0:
        least = replace(need, rows=1)
        raise QllmMemoryError(
            f"{task.model} {task.arm} needs {size_text(least.bytes)} of memory even in batches of"
            f" one ({_parts(least)}), and {size_text(available)} are free; free some, or use a"
            " larger machine"
        )
    return limited(task, batch_size=rows)


def _parts(need: Need) -> str:
    return (
        f"weights {size_text(need.weights)}, keys and values {size_text(need.kv)}, logits"
        f" {size_text(need.all_logits)}"
    )


# ------------------------------------------------------------------------------------- the pace


@dataclass(frozen=True)
class Pace:
    """Seconds to load a model, and per token: written in a full batch, read, written alone."""

    load: float
    generated: float
    read: float
    single: float
    source: str

    def seconds(self, cell: CellPlan, loads: int) -> float:
        """For a cell in which models are loaded so many times."""
        return (
            loads * self.load
            + cell.generated * self.generated
            + cell.read * self.read
            + cell.single * self.single
        )


def probed(design: Design, size: ModelSize) -> Pace:
    """The pace of a short run of the reference."""
    from ..model import Model

    start = time.perf_counter()
    model = Model.from_pretrained(
        size.name,
        device=design.reference.device or design.device,
        compute=design.compute,
        threads=design.reference.threads or design.threads,
        int8_threshold=design.int8_threshold,
    )
    model.quantize_(design.reference.format, blocksize=design.reference.blocksize)
    load = time.perf_counter() - start
    rows = min(grid_rows(design), design.batch_size)
    tokens = min(8, design.max_new_tokens)
    prompts = [text.text for text in design.prompts]
    texts = (prompts * (rows // len(prompts) + 1))[:rows]
    ids = model.encode(max(prompts, key=len))
    return Pace(
        load=load,
        generated=_best(lambda: _generate(model, texts, tokens)) / (rows * tokens),
        read=_best(lambda: model.logits(ids)) / len(ids),
        single=_best(lambda: _generate(model, texts[:1], tokens)) / tokens,
        source="a short run",
    )


def _best(call: Any, times: int = 3) -> float:
    """The shortest of a few runs, in seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _generate(model: Model, texts: list[str], tokens: int) -> None:
    model.generate(
        texts, temperature=1.0, max_new_tokens=tokens, ignore_eos=True, batch_size=len(texts)
    )


def reckoned(design: Design, size: ModelSize) -> Pace:
    """The pace by the model's size: weights are read once for a step, and each is multiplied for
    each row, at half of the rates which this machine reaches in the two alone."""
    threads = design.reference.threads or design.threads
    read, multiply = _limits(threads)
    rows = min(grid_rows(design), design.batch_size)
    held = size.weight_bytes(design.reference.format, design.reference.blocksize, False)
    step = max(held / read, rows * size.parameters / multiply)
    return Pace(
        load=size.file_bytes / read,
        generated=2 * step / rows,
        read=2 * size.parameters / multiply,
        single=2 * max(held / read, size.parameters / multiply),
        source="its size" + ("" if design.device == "cpu" else ", as if on the processor"),
    )


def _limits(threads: int | None) -> tuple[float, float]:
    """Bytes read and multiply-adds done per second, each in about a tenth of one."""
    nbytes = 1 << 27
    buffer = _core.limit_buffer(nbytes)
    read = _best(lambda: _core.read_limit(buffer, 0, nbytes, threads=threads))
    turns = 1 << 20
    work = _core.multiply_limit("f32", 1, threads=threads) * turns
    return nbytes / read, work / _best(
        lambda: _core.multiply_limit("f32", turns, threads=threads)
    )


# ------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """What a study will cost. `available` are the bytes that are free on this machine, `workers`
    the cells that run at a time, `sources` says for each model what its time rests on."""

    design: Design
    cells: tuple[CellPlan, ...]
    workers: int = 1
    available: int | None = None
    sources: Mapping[str, str] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all cells, at most."""
        return sum(cell.tokens for cell in self.cells)

    @property
    def seconds(self) -> float | None:
        """Seconds of all cells on `workers` workers; speed cells run one at a time."""
        together, alone = 0.0, 0.0
        for cell in self.cells:
            if cell.seconds is None:
                return None
            if cell.arm == SPEED:
                alone += cell.seconds
            else:
                together += cell.seconds
        return together / self.workers + alone

    @property
    def bytes(self) -> int:
        """Of the cells that take the most, `workers` at a time."""
        return sum(sorted((cell.need.bytes for cell in self.cells), reverse=True)[: self.workers])

    @property
    def memory(self) -> str:
        """One sentence about memory."""
        largest = max(self.cells, key=lambda cell: cell.need.bytes)
        text = f"memory: {size_text(self.bytes)}"
        if self.workers > 1:
            text += f" for {self.workers} cells at a time"
        text += f", the largest cell {largest.model} {largest.arm} ({_parts(largest.need)})"
        if self.available is not None:
            text += f"; {size_text(self.available)} are free"
        return text

    def to_frame(self) -> Any:
        """A pandas.DataFrame with one row a cell."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "model": cell.model,
                    "arm": cell.arm,
                    "tokens": cell.tokens,
                    "generated": cell.generated,
                    "read": cell.read,
                    "seconds": cell.seconds,
                    "bytes": cell.need.bytes,
                    "weights": cell.need.weights,
                    "kv": cell.need.kv,
                    "logits": cell.need.all_logits,
                }
                for cell in self.cells
            ]
        )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                cell.model,
                cell.arm,
                f"{cell.tokens:,}",
                "" if cell.seconds is None else duration(cell.seconds),
                size_text(cell.need.bytes),
            )
            for cell in self.cells
        ]

    def _summary(self) -> list[str]:
        lines = [f"{len(self.cells)} cells, at most {self.tokens:,} tokens"]
        if self.seconds is not None and self.sources:
            rests: dict[str, list[str]] = {}
            for model, source in self.sources.items():
                rests.setdefault(source, []).append(model)
            why = "; ".join(f"{' and '.join(names)} by {source}" for source, names in rests.items())
            at_a_time = f" on {self.workers} workers" if self.workers > 1 else ""
            lines.append(f"time: about {duration(self.seconds)}{at_a_time} ({why})")
        return [*lines, self.memory]

    def __str__(self) -> str:
        table = text_table(_HEADER, self._rows())
        return "\n".join([table, *self._summary()])

    def _repr_html_(self) -> str:
        import html

        lines = "<br>".join(html.escape(line) for line in self._summary())
        return f"{html_table(_HEADER, self._rows())}<p>{lines}</p>"


_HEADER = ("model", "arm", "tokens", "time", "memory")


def plan(
    design_or_profile: Design | str | Mapping[str, Any] | os.PathLike[str] = "smoke",
    models: str | os.PathLike[str] | Iterable[str] | None = None,
    *,
    workers: int = 1,
) -> Plan:
    """What `run` of the same design would cost, on this machine and with so many cells at a time.

    Weights are loaded only for the short runs which time the models, one model at a time, and only
    of models of at most 4 GiB. Prints as a table. Raises what `run` would raise before any work.
    """
    design = resolve(design_or_profile, models)
    sizes = sizes_of(design)
    return outline(design, sizes, workers=workers, paces=[_pace(design, size) for size in sizes])


def _pace(design: Design, size: ModelSize) -> Pace:
    return (probed if size.file_bytes <= PROBED_BYTES else reckoned)(design, size)


def sizes_of(design: Design) -> list[ModelSize]:
    """The sizes of the design's models, in its order."""
    return [ModelSize.of(name, design) for name in design.models]


def outline(
    design: Design, sizes: list[ModelSize], *, workers: int = 1, paces: list[Pace] | None = None
) -> Plan:
    """The plan of a design for models of these sizes; without paces, without times."""
    cells = []
    for place, size in enumerate(sizes):
        names = [arm.name for arm in design.arms]
        for name in [*names, *([] if design.speed is None else [SPEED])]:
            cell = cell_plan(design, size, name)
            if paces is not None:
                loads = _loads(design, name)
                cell = replace(cell, seconds=paces[place].seconds(cell, loads))
            cells.append(cell)
    sources = (
        None if paces is None else {size.name: p.source for size, p in zip(sizes, paces)}
    )
    return Plan(design, tuple(cells), workers, memory_for(design), sources)


def _loads(design: Design, name: str) -> int:
    """How often a cell reads a model's weights: the speed cell swaps once a turn."""
    if name == SPEED:
        assert design.speed is not None
        return design.speed.rounds * len(design.timed)
    return 1 if name == design.reference.name else 2
