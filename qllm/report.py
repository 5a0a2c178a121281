"""What quantization did to each layer, and what a loaded model is: records that print well."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import QllmUnsupportedError


@dataclass(frozen=True)
class LayerReport:
    """One linear layer after a swap. `rmse` and `sqnr_db` compare its weights with those in the
    folder: root mean square error, and 10 log10(sum w^2 / sum (w - w')^2), inf without error; both
    are None where the folder has the layer only quantized. `reason` says why an unchanged layer was
    left as it is."""

    module: str
    format: str
    shape: tuple[int, int]
    bytes: int
    bits_per_weight: float
    rmse: float | None
    sqnr_db: float | None
    changed: bool
    reason: str = ""


@dataclass(frozen=True)
class QuantReport:
    """Every linear layer of a model, those that were left alone included."""

    rows: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def changed(self) -> int:
        """How many layers the call changed."""
        return sum(row.changed for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all linear layers, biases left out."""
        return sum(row.bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over all linear layers."""
        return 8 * self.bytes / sum(math.prod(row.shape) for row in self.rows)

    def to_frame(self) -> Any:
        """A pandas.DataFrame with one row a layer."""
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            raise QllmUnsupportedError(
                'a data frame needs the package pandas: pip install "qllm[study]"'
            ) from None
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        return text_table(_HEADER, [_cells(row) for row in self.rows]) + "\n" + self._summary()

    def _repr_html_(self) -> str:
        return (
            html_table(_HEADER, [_cells(row) for row in self.rows])
            + f"<p>{html.escape(self._summary())}</p>"
        )

    def _summary(self) -> str:
        return (
            f"{len(self)} linear layers, {self.changed} changed; {size_text(self.bytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight"
        )


_HEADER = ("layer", "format", "shape", "bytes", "bits/w", "rmse", "SQNR dB", "changed")


def _cells(row: LayerReport) -> tuple[str, ...]:
    return (
        row.module,
        row.format,
        f"{row.shape[0]} x {row.shape[1]}",
        str(row.bytes),
        f"{row.bits_per_weight:.3f}",
        "" if row.rmse is None else f"{row.rmse:.3g}",
        "" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
        "yes" if row.changed else f"no: {row.reason}" if row.reason else "no",
    )


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is. `formats` counts its linear layers by format; `bytes` are those that
    the decoder holds now, by class; `compute` is the mode that runs, `attention` how keys and
    values are held and read; `kernels` are the names of the kernels that each format in use runs
    with."""

    name: str
    architecture: str
    parameters: int
    layers: int
    hidden: int
    vocab: int
    max_positions: int
    tied: bool
    formats: dict[str, int]
    bytes: dict[str, int]
    device: str
    compute: str
    attention: str
    isa: str
    threads: int
    cpu: str
    kernels: dict[str, list[str]]
    int8_threshold: float
    int8_outliers: str
    files: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self) | {"files": list(self.files)}

    def __str__(self) -> str:
        return text_table(("", ""), self._lines())

    def _repr_html_(self) -> str:
        return html_table(("", ""), self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        formats = ", ".join(f"{name}: {count} layers" for name, count in self.formats.items())
        held = ", ".join(f"{name} {size_text(size)}" for name, size in self.bytes.items())
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        lines = [
            ("model", self.name),
            ("architecture", f"{self.architecture}, {self.layers} blocks of width {self.hidden}"),
            ("parameters", f"{self.parameters:,}"),
            ("vocabulary", f"{self.vocab}{', tied' if self.tied else ''}"),
            ("positions", str(self.max_positions)),
            ("formats", formats),
            ("memory", held),
            ("device", f"{self.device}, {self.isa}" + threads),
            ("processor" if self.device == "cpu" else "GPU", self.cpu),
            ("compute", self.compute),
            ("attention", self.attention),
        ]
        lines += [("kernels", f"{name}: {', '.join(run)}") for name, run in self.kernels.items()]
        if "int8" in self.formats:
            lines.append(("int8", f"threshold {self.int8_threshold:g}, {self.int8_outliers}"))
        return lines


def size_text(count: int) -> str:
    """`count` bytes in the largest binary unit that leaves a number of at least 1."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to a common width; a header of empty names is left out."""
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def html_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """The same for a notebook."""

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line('th', header)}</thead>" if any(header) else ""
    return f"<table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
