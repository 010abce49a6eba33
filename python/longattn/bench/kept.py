"""Rows that are written as soon as they are there: the same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from longattn.bench import results
from longattn.bench.harness import Bench
from longattn.bench.results import Row


class Kept:
    """The rows of a run, those of an earlier one in the same file among them.

    Args:
        bench: settings of the run.
        args: of the command; with `json`, where rows are written.
        routine: its name.
        same: settings that an earlier run must share for its rows to count.
        figures: what a result holds besides what it says of itself, from the rows.

    Raises:
        ValueError: the file holds something else, or a run with other settings.
    """

    def __init__(
        self,
        bench: Bench,
        args: argparse.Namespace,
        routine: str,
        same: Sequence[str],
        figures: Callable[[Sequence[Row]], dict[str, Any]],
    ) -> None:
        self.bench, self.args, self.routine, self.figures = bench, args, routine, figures
        self.command = shlex.join(["longattn", *sys.argv[1:]])
        self.rows = self._earlier(same)

    def keep(self, *rows: Row) -> None:
        """Adds rows and writes them all."""
        self.rows.extend(rows)
        if self.args.json:
            partly = self.bench.describe(self.routine, self.command, vars(self.args)) | self.figures(self.rows)
            results.write(partly | {"limits": self.bench.limits(), "notes": self.bench.notes}, self.args.json)

    def has(self, **values: Any) -> bool:
        """Whether a row has these values."""
        return any(all(row.get(key) == value for key, value in values.items()) for row in self.rows)

    def _earlier(self, same: Sequence[str]) -> list[Row]:
        path = self.args.json
        if not path or not path.exists():
            return []
        found = results.read(path)
        settings = found.get("settings", {})
        wanted = {name: getattr(self.args, name) for name in same if getattr(self.args, name) is not None}
        if found["routine"] != self.routine or any(settings.get(name) != value for name, value in wanted.items()):
            raise ValueError(f"--json: {path} holds a run with other settings, expected none or one to go on with")
        return list(found["rows"])
