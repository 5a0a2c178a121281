"""What a study found: its tables as data frames, its pictures, its report."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QllmFileError, QllmValueError
from ..saving import folder_path
from ..strict_json import quoted, read_object
from .design import MAX_DESIGN_BYTES, Design
from .play_file import MAX_PLAY_BYTES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Study:
    """The results of a study, from `run` or `load`.

    `folder` (where the files are), `design`, `manifest` (versions, hashes, machine), `tables` (name
    -> pandas data frame; `docs/study.md` and the report say what stands in them).
    """

    def __init__(
        self,
        folder: Path,
        design: Design,
        manifest: Mapping[str, Any],
        tables: Mapping[str, DataFrame],
    ) -> None:
        self.folder = folder
        self.design = design
        self.manifest = dict(manifest)
        self.tables = dict(tables)

    @cached_property
    def play(self) -> dict[str, Any]:
        """What the interactive figure and the shaded texts show, in the shape that `play_file.py`
        says; empty when the study has none."""
        path = self.folder / "play.json"
        return read_object(path, MAX_PLAY_BYTES) if path.is_file() else {}

    @property
    def report(self) -> Path:
        """The report: one HTML file that needs nothing else."""
        return self.folder / "report.html"

    @property
    def claims(self) -> DataFrame:
        """Every comparison behind the verdicts, with intervals: the tables `claims` and
        `speed_claims` together."""
        return self._together("claims", "speed_claims")

    @property
    def verdicts(self) -> DataFrame:
        """What the study says about each claim of arXiv 2309.05210 for each model, and why: the
        tables `verdicts` and `speed_verdicts` together."""
        return self._together("verdicts", "speed_verdicts")

    def _together(self, *names: str) -> DataFrame:
        import pandas as pd

        frame = pd.concat([part for name in names if len(part := self.tables[name])])
        return frame.sort_values("claim", kind="stable", ignore_index=True)

    @property
    def plots(self) -> tuple[str, ...]:
        """The names that `plot` knows, of the pictures that this study has."""
        from .plots import PICTURES, absent

        return tuple(name for name in PICTURES if absent(self, name) is None)

    def plot(self, name: str = "divergence", narrow: bool = False) -> Figure:
        """A new matplotlib figure of one of `plots`, to be shown, changed or saved; `narrow` for
        the width of a phone. Raises `QllmValueError` for another name, or with the reason why this
        study has not that picture."""
        from .plots import PICTURES, absent

        if name not in PICTURES:
            raise QllmValueError(
                f"there is no plot {quoted(name)}; there are {', '.join(self.plots)}"
            )
        if (why := absent(self, name)) is not None:
            raise QllmValueError(f"this study has no plot {quoted(name)}: {why}")
        return PICTURES[name].draw(self, narrow=narrow)

    def __repr__(self) -> str:
        design = self.design
        return (
            f"<Study {design.name}: {len(design.models)} models, {len(design.arms)} arms,"
            f" in {self.folder}>"
        )

    def _repr_html_(self) -> str:
        from .verdict_table import verdict_table

        name = html.escape(self.design.name)
        return (
            f"<h3>Study {name}</h3>{verdict_table(self)}"
            f"<p>Report: <code>{html.escape(os.fspath(self.report))}</code></p>"
        )


def load(folder: str | os.PathLike[str]) -> Study:
    """The results that `run` has left in `folder`. Raises `QllmFileError` when it is not there or
    not finished."""
    from .runner import require_packages

    require_packages()
    from .tables import TABLES, UNTIMED, read_table

    path = folder_path(folder)
    if not (path / "design.json").is_file():
        raise QllmFileError(f"{path} holds no study: it has no design.json")
    design = Design.from_dict(read_object(path / "design.json", MAX_DESIGN_BYTES))
    if not (path / "manifest.json").is_file():
        raise QllmFileError(f"{path} holds a study that has only begun; run it again to finish it")
    manifest = read_object(path / "manifest.json", MAX_DESIGN_BYTES)
    tables = {}
    for name in TABLES:
        file = path / "tables" / f"{name}.parquet"
        if not file.is_file():
            if name in UNTIMED and design.speed is None:
                continue
            raise QllmFileError(
                f"{path} holds a study that is not finished: {name}.parquet is missing; run it"
                " again to finish it"
            )
        tables[name] = read_table(file)
    return Study(path, design, manifest, tables)
