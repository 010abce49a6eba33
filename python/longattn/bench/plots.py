"""Plots of results; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longattn.bench.results import Row

COLOURS = 128
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: named series of (x, y) over a logarithmic x."""

    title: str
    x: str
    y: str
    series: dict[str, Points]
    log_y: bool = True
    limit: float | None = None  # a horizontal line


@dataclass(frozen=True)
class Bars:
    """One set of axes: a group of bars per label, a bar per series."""

    title: str
    y: str
    labels: tuple[str, ...]
    series: dict[str, tuple[float | None, ...]]
    limit: float | None = None
    log_y: bool = False


@dataclass(frozen=True)
class Scatter:
    """One set of axes: a named point each, both axes logarithmic, and the front of those that no other beats."""

    title: str
    x: str
    y: str
    points: dict[str, tuple[float, float]]
    limit: float | None = None
    log_y: bool = True


def need_matplotlib(what: str) -> None:
    """Checks for what drawing needs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"{what} needs matplotlib: pip install 'longattn[plot]'", name="matplotlib")


def draw(panels: Sequence[Panel | Bars | Scatter], path: Path) -> None:
    """Draws the panels in rows of three (four in two rows), in a file of some ten kilobytes per panel."""
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib depends on it

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        if isinstance(panel, Panel):
            _lines(axes, panel)
        elif isinstance(panel, Scatter):
            _scatter(axes, panel)
        else:
            _bars(axes, panel)
        if panel.limit is not None:
            axes.axhline(panel.limit, color="0.35", linewidth=1, linestyle=":")
        axes.set_yscale("log" if panel.log_y else "linear")
        if not panel.log_y:
            axes.set_ylim(bottom=0)
        axes.set_title(panel.title, fontsize=9)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.3, axis="y" if isinstance(panel, Bars) else "both")
        if not isinstance(panel, Scatter):
            axes.legend(fontsize=6.5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    # Few colours: the files are kept with the documentation.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def _lines(axes: Any, panel: Panel) -> None:
    for name, points in panel.series.items():
        x, y = zip(*sorted(points), strict=True)
        peer = name.startswith("torch")
        axes.plot(x, y, "s--" if peer else "o-", label=name, linewidth=1 if peer else 1.8, markersize=3.5)
    ticks = sorted({x for points in panel.series.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(panel.x, fontsize=8)


def _scatter(axes: Any, panel: Scatter) -> None:
    axes.set_xscale("log")
    front = pareto_front(panel.points)
    axes.plot(*zip(*(panel.points[name] for name in front), strict=True), "-", color="0.6", linewidth=1)
    for name, (x, y) in panel.points.items():
        axes.plot(x, y, "o" if name in front else "x", markersize=4)
        axes.annotate(name, (x, y), fontsize=5.5, xytext=(3, 2), textcoords="offset points")
    axes.set_xlabel(panel.x, fontsize=8)


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is below in both coordinates, by x."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1]:
            front.append(name)
    return front


def _bars(axes: Any, panel: Bars) -> None:
    width = 0.8 / len(panel.series)
    for i, (name, heights) in enumerate(panel.series.items()):
        places = [at + (i - (len(panel.series) - 1) / 2) * width for at in range(len(panel.labels))]
        shown = [(place, height) for place, height in zip(places, heights, strict=True) if height is not None]
        if shown:
            axes.bar(*zip(*shown, strict=True), width=width, label=name)
    axes.set_xticks(range(len(panel.labels)), panel.labels)


def series(rows: Sequence[Row], x: str, y: str, by: str = "method") -> dict[str, Points]:
    """Points by the value of `by`, of the rows that have a figure."""
    found: dict[str, Points] = {}
    for row in rows:
        if row.get(y) is not None:
            found.setdefault(str(row[by]), []).append((row[x], row[y]))
    return found
