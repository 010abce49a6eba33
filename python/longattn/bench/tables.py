"""Markdown tables of result rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longattn.bench.results import Result, Row

UNITS = {"read_gb_s": ("memory read", "GB/s"), "fma_gflop_s": ("multiply-add", "GFLOP/s")}


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, the row's key, and how to write a number."""

    head: str
    key: str
    form: str = ""

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return ""
        return format(value, self.form)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Lines of a table; columns without any figure are left out."""
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return grid([column.head for column in used], ([column.cell(row) for column in used] for row in rows))


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table from its cells."""
    return [_line(heads), "|" + "---|" * len(heads), *(_line(cells) for cells in lines)]


def as_text(result: Result, columns: Sequence[Column], more: Sequence[str] = ()) -> str:
    """What a run prints: the table, the limits, growth, failures, `more`, notes."""
    lines = table(result["rows"], columns)
    lines += ["", f"{result['machine']['cpu']['model']}, {result['machine']['isa']['used']}", *limits(result)]
    lines += [
        f"{what} grows as length^{slope['slope']:.2f}: {slope['of']}"
        for what, kind in (("time", "slopes"), ("memory beyond inputs and outputs", "memory_slopes"))
        for slope in result.get(kind, ())
        if slope["method"].startswith("longattn")
    ]
    lines += [f"failed: {row['method']}: {row['failure']}" for row in result["rows"] if row.get("failure")]
    return "\n".join(["", *lines, *more, *result["notes"]])


def limits(result: Result) -> list[str]:
    """The machine's limits as measured in between, a line each."""
    return [
        f"{UNITS[name][0]} in between, {count(int(threads))}: "
        f"{limit['median']:.1f} {UNITS[name][1]} [{limit['min']:.1f}-{limit['max']:.1f}]"
        for threads, found in result["limits"].items()
        for name, limit in found.items()
    ]


def count(threads: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{threads} thread{'s' * (threads != 1)}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
