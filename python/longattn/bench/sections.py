"""What a section of a report is made of, and what the modules that own one share to make its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result, Row
from longattn.bench.tables import Column, count, table

Chapter = Literal["dense", "sparse", "retrieval", "linear"]
Figures = Mapping[str, Sequence[Panel | Bars | Scatter]]
"""Plots by the names of their files."""


def no_figures(found: Sequence[Result]) -> Figures:
    """For sections without a plot."""
    return {}


@dataclass(frozen=True)
class Section:
    """A part of the page of results.

    Attributes:
        chapter: what it stands beside.
        name: of the section, which the names of its plots begin with.
        title: its heading.
        text: what to know to read it.
        tables: lines of Markdown of the results; none without rows.
        figures: its plots, of all results.
    """

    chapter: Chapter
    name: str
    title: str
    text: str
    tables: Callable[[Sequence[Result]], list[str]]
    figures: Callable[[Sequence[Result]], Figures] = no_figures


def whole(routine: str, panels: Callable[[Result], Sequence[Panel | Bars | Scatter]]) -> Callable[..., Figures]:
    """Figures of a section with one plot: the routine's own, of all of its rows."""

    def figures(found: Sequence[Result]) -> Figures:
        rows = all_rows(found, routine)
        return {routine: panels({"rows": rows})} if rows else {}

    return figures


def all_rows(found: Sequence[Result], routine: str, table: str = "rows") -> list[Row]:
    """Rows of every result of a routine."""
    return [row for result in found if result["routine"] == routine for row in result.get(table, ())]


def values_of(rows: Sequence[Row], key: str) -> list[int]:
    """Values of a key, in order."""
    return sorted({row[key] for row in rows})


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some keys, in the order in which these appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def number(value: float | None, form: str) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else format(value, form)


def slope_of(slopes: Sequence[Row], keys: Sequence[str], line: Row) -> str:
    """Slope of the line, if it was measured."""
    return next((f"{row['slope']:.2f}" for row in slopes if all(row[key] == line[key] for key in keys)), "")


def by_lengths(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[object, ...], dict[int, Row]]:
    """Rows of one line by length."""
    lines: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), {})[row["keys"]] = row
    return lines


def short(length: int) -> str:
    """`16K` for 16384."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def titled(threads: int, lines: list[str]) -> list[str]:
    """Lines below their number of threads."""
    return ["", f"{count(threads)}:", "", *lines]


def by_threads(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """A table for each number of threads."""
    groups = sorted(grouped(rows, "threads").items())
    return [line for (threads,), mine in groups for line in titled(threads, table(mine, columns))]
