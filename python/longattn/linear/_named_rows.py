"""Arguments by name that have a row per token, for what runs any recurrence over parts of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import shape_of


class NamedRows:
    """Checked arguments.

    Args:
        function: what runs over them.
        rows: arguments by name; one of them is called "v", or "x".
        options: further arguments, the same for all rows.

    Raises:
        TypeError: arguments of another kind.
    """

    def __init__(self, function: Callable[..., Any], rows: Mapping[str, Array], options: Mapping[str, Any]) -> None:
        if not callable(function):
            raise TypeError(f"function: got {type(function).__name__}, expected one of longattn.linear")
        if not isinstance(rows, Mapping) or not ({"v", "x"} & set(rows)):
            raise TypeError("rows: got none called v or x, expected arguments by name")
        self.function, self.rows, self.options = function, rows, options
        name = "v" if "v" in rows else "x"
        #: What has the kind of the result, and the shape of its rows.
        self.values: Array = rows[name]
        self.shape = shape_of(self.values, name)
        self.axis = len(self.shape) - 2
        if self.axis < 0:
            raise ValueError(f"{name}: got shape {self.shape}, expected at least an axis of rows and one of channels")

    def check(self, count: int, each: str) -> None:
        """Whether all have so many rows, one for `each`."""
        for name, x in self.rows.items():
            shape = shape_of(x, name)
            if len(shape) <= self.axis or shape[self.axis] != count:
                raise ValueError(
                    f"{name}: got shape {shape}, expected {count} rows on axis {self.axis}, one per {each}"
                )

    def run(self, part: slice | Sequence[int], **state: Any) -> Any:
        """A call with some of the rows."""
        at = (slice(None),) * self.axis + (part if isinstance(part, slice) else list(part),)
        return self.function(**{name: x[at] for name, x in self.rows.items()}, **state, **self.options)

    def empty(self, made: Any, count: int) -> Any:
        """Memory for `count` rows like those that were made."""
        return np.empty((*made.shape[:-2], count, made.shape[-1]), made.dtype)
