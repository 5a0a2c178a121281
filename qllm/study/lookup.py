"""Finding things in a study: rows of its tables, its arms, the names that a reader sees."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .design import Arm, Design

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from .result import Study


def rows(frame: DataFrame, **equal: Any) -> DataFrame:
    """The rows in which every named column has the given value."""
    kept = np.ones(len(frame), bool)
    for name, value in equal.items():
        kept &= (frame[name] == value).to_numpy(bool)
    return frame[kept]


def one(frame: DataFrame, **equal: Any) -> Series | None:
    """The first such row; None when there is none."""
    found = rows(frame, **equal)
    return found.iloc[0] if len(found) else None


def label(model: str) -> str:
    """A model's name as it stands in pictures and headings."""
    return os.path.basename(model.rstrip("/")).replace("demo:", "demo ") or model


def ordinary(design: Design) -> list[Arm]:
    """The arms that the study is about: neither the reference nor a null arm, control, ceiling."""
    return [arm for arm in design.arms if arm.role == "arm"]


def compared(design: Design) -> list[Arm]:
    """All arms that may differ from the reference: the ordinary ones, control and ceiling."""
    return [arm for arm in design.others if arm.role != "null"]


def preferred(frame: DataFrame, column: str, wanted: Iterable[str], most: int) -> list[str]:
    """Of the values `wanted`, in their order, the first `most` which the column has."""
    there = set(frame[column])
    return [value for value in dict.fromkeys(wanted) if value in there][:most]


def source_of(frame: DataFrame) -> str:
    """The value of `source` to show: all texts together, else the first there is."""
    found = list(dict.fromkeys(frame["source"]))
    return "all" if "all" in found or not found else str(found[0])


def nearest(values: Iterable[float], wanted: Iterable[float]) -> list[float]:
    """Those of `values` that lie nearest to the wanted ones, rising, each once."""
    known = list(values)
    return sorted({min(known, key=lambda value: abs(value - near)) for near in wanted})


def shown_temperatures(design: Design) -> list[float]:
    """Up to four temperatures of generation at which single things are shown."""
    return nearest(design.temperatures, (0.0, 0.5, 0.8, 1.0))


def missing(study: Study, needs: dict[str, tuple[str, ...]]) -> str | None:
    """Why something that needs these tables and columns cannot be shown, in a clause; None when
    it can."""
    for name, columns in needs.items():
        frame = study.tables.get(name)
        if frame is None:
            return f"the study has no table {name}"
        if len(frame) == 0:
            return f"the table {name} has no rows"
        for column in columns:
            if column not in frame.columns:
                return f"the table {name} has no column {column}"
    return None
