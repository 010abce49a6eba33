"""What a benchmark should show: a threshold, and how it is judged, from the JSON alone.

A target holds if every figure that it speaks of reaches the bound; the worst one is reported with its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longattn.bench.results import Result, Row
from longattn.bench.tables import count

PASS, MISS, ABSENT = "PASS", "MISS", "not measured"
LONG = 32768
GQA, MHA = ("32/8", "64/8"), ("32/32",)
HALF = ("bfloat16", "float16")
VNNI = ("avx512vnni", "avxvnni")


@dataclass(frozen=True)
class Target:
    """A bound on some figures.

    Attributes:
        text: what should hold, without the bound.
        routine: whose results speak of it.
        figure: the row's key.
        bound: least value, or greatest where `at_most`.
        command: what measures it.
        where: keys of a row to the values that count; a row without the figure does not count.
        within: keys of a row to the least and greatest number that count, both inclusive.
        table: list of the result that holds the rows.
        needs: CPU features of which the machine must have one.
        form: how to write the figure.
    """

    text: str
    routine: str
    figure: str
    bound: float
    command: str
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    within: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    table: str = "rows"
    at_most: bool = False
    needs: Sequence[str] = ()
    form: str = ".2f"

    def written(self, value: float) -> str:
        return format(value, self.form) + ("×" if self.form == ".2f" and not self.at_most else "")

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def counts(self, row: Row) -> bool:
        """Whether the target speaks of this row."""
        return (
            row.get(self.figure) is not None
            and all(row.get(key) in values for key, values in self.where.items())
            and all(least <= row.get(key, least) <= most for key, (least, most) in self.within.items())
        )


@dataclass(frozen=True)
class Verdict:
    """A target, the worst figure found, where, and how many of how many figures reach the bound."""

    target: Target
    status: str
    worst: float | None = None
    place: str = ""
    reached: int = 0
    of: int = 0

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table: target, bound, worst figure and its place, how many reach it, verdict, command."""
        target = self.target
        bound = f"{'≤' if target.at_most else '≥'} {target.written(target.bound)}"
        worst = "" if self.worst is None else f"{target.written(self.worst)} ({self.place})"
        reached = f"{self.reached} of {self.of}" if self.of else ""
        return target.text, bound, worst, reached, self.status, f"`{target.command}`"


def judge(results: Sequence[Result], targets: Iterable[Target]) -> list[Verdict]:
    """Every target against the results, in their order."""
    return [_judge(target, results) for target in targets]


def counted(verdicts: Sequence[Verdict]) -> list[str]:
    """`12 PASS`, `3 MISS`, ..."""
    found = Counter(verdict.status for verdict in verdicts)
    return [f"{found[status]} {status}" for status in (PASS, MISS, ABSENT) if found[status]]


def _judge(target: Target, results: Sequence[Result]) -> Verdict:
    rows = [
        row
        for result in results
        if result["routine"] == target.routine and _able(target, result)
        for row in result.get(target.table, ())
        if target.counts(row)
    ]
    if not rows:
        return Verdict(target, ABSENT)
    worst = (max if target.at_most else min)(rows, key=lambda row: float(row[target.figure]))
    reached = sum(target.holds(row[target.figure]) for row in rows)
    status = PASS if reached == len(rows) else MISS
    return Verdict(target, status, worst[target.figure], _place(worst), reached, len(rows))


def _able(target: Target, result: Result) -> bool:
    return not target.needs or bool(set(target.needs) & set(result["machine"]["cpu"]["features"]))


def _place(row: Row) -> str:
    """The shape of a row, in a few words."""
    parts = [
        row.get("vectors"),
        f"{row['level']:.0%} of the mass" if "level" in row else None,
        row.get("heads"),
        f"D {row['head_dim']}" if "head_dim" in row else None,
        f"N {row['keys']}" if "keys" in row else None,
        row.get("dtype"),
        count(row["threads"]) if "threads" in row else None,
    ]
    return ", ".join(part for part in parts if part)
