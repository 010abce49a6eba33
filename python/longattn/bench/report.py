"""What a benchmark leaves behind: a markdown table, a JSON file, a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of the printed table: its head, the row's key, and how to write a number."""

    head: str
    key: str
    form: str = ""

    def cell(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return ""
        return format(value, self.form)


@dataclass(frozen=True)
class Panel:
    """One set of axes: named series of (x, y)."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    log_y: bool = True


def as_text(result: dict[str, Any], columns: Sequence[Column]) -> str:
    """Markdown: the table, the limits, notes."""
    used = [column for column in columns if any(row.get(column.key) is not None for row in result["rows"])]
    lines = [_line(column.head for column in used), "|" + "---|" * len(used)]
    lines += [_line(column.cell(row) for column in used) for row in result["rows"]]
    cpu = result["machine"]["cpu"]["model"]
    lines += ["", f"{cpu}, {result['threads']} threads, {result['machine']['isa']['used']}"]
    units = {"read_gb_s": ("memory read", "GB/s"), "fma_gflop_s": ("multiply-add", "GFLOP/s")}
    for name, limit in result["limits"].items():
        what, unit = units[name]
        lines.append(f"{what} in between: {limit['median']:.1f} {unit} [{limit['min']:.1f}-{limit['max']:.1f}]")
    ours = {name: value for name, value in result["slopes"].items() if name.startswith("longattn")}
    lines += [f"time grows as length^{value:.2f}: {name}" for name, value in ours.items()]
    lines += [f"failed: {row['method']}: {row['failure']}" for row in result["rows"] if row.get("failure")]
    return "\n".join(["", *lines, *result["notes"]])


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def need_matplotlib() -> None:
    """Checks for what `plot` needs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'longattn[plot]'", name="matplotlib")


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Draws the panels side by side, x logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.series.items():
            x, y = zip(*sorted(points), strict=True)
            ours = name.startswith("longattn")
            axes.plot(x, y, "o-" if ours else "s--", label=name, linewidth=2.2 if ours else 1.2, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if panel.log_y else "linear")
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def series(rows: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Points by method, of the rows that have a figure."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(y) is not None:
            found.setdefault(row["method"], []).append((row[x], row[y]))
    return found


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
