"""What the modules of this package offer, found by what they hold.

A module with `SUMMARY` and `measure` is a routine, one with `SUMMARY` and `run` a tool; `SECTIONS` of any module are
parts of the report, `TARGETS` thresholds. Nothing else lists them: a new module is all that a new benchmark needs.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, get_args

from longattn.bench.harness import Bench
from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result
from longattn.bench.sections import Chapter, Section
from longattn.bench.tables import Column
from longattn.bench.targets import Target


class Routine(Protocol):
    """A module with one benchmark."""

    SUMMARY: str
    COLUMNS: tuple[Column, ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's own options."""
        ...

    def measure(self, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
        """Runs it: `rows` (a table), `slopes`, and whatever else belongs into the result."""
        ...

    def panels(self, result: Result) -> Sequence[Panel | Bars | Scatter]:
        """What to draw of the result."""
        ...


class Tool(Protocol):
    """A module that runs routines or presents what they found."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Runs it; exit status."""
        ...


@cache
def _modules() -> tuple[ModuleType, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(importlib.import_module(f"{__package__}.{name}") for name in names)


def routines() -> dict[str, Routine]:
    """Benchmarks by the names that the command line knows them by."""
    return {_spoken(module): cast(Routine, module) for module in _commands("measure")}


def tools() -> dict[str, Tool]:
    """Commands beside the routines."""
    return {_spoken(module): cast(Tool, module) for module in _commands("run")}


def summary(routine: Routine, result: Result) -> list[str]:
    """Lines of a routine's own `summary(result)`, further tables say, where its module has one."""
    make = getattr(routine, "summary", None)
    return [] if make is None else list(make(result))


def sections() -> list[Section]:
    """Sections of the report, by chapter and title."""
    found = [section for module in _modules() for section in getattr(module, "SECTIONS", ())]
    chapters = get_args(Chapter)
    return sorted(found, key=lambda section: (chapters.index(section.chapter), section.title))


def targets() -> list[Target]:
    """Every threshold, in the order of the sections' chapters as far as a module has a section."""
    order = {section.name: place for place, section in enumerate(sections())}
    holders = [module for module in _modules() if hasattr(module, "TARGETS")]
    holders.sort(key=lambda module: order[module.SECTIONS[0].name])
    return [target for module in holders for target in module.TARGETS]


def _commands(verb: str) -> list[ModuleType]:
    return [module for module in _modules() if hasattr(module, "SUMMARY") and hasattr(module, verb)]


def _spoken(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].replace("_", "-")
