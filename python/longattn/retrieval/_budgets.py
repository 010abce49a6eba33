"""Arguments that published methods over an index have in common."""

from __future__ import annotations

import math
from typing import TypeVar

from longattn._checks import real
from longattn.index import Index

Kind = TypeVar("Kind", bound=Index)


def index_of(index: object, kind: type[Kind]) -> Kind:
    """An index of a kind."""
    if not isinstance(index, kind):
        raise TypeError(f"index: got {type(index).__name__}, expected {kind.__name__}")
    return index


def rows_of(share: object, name: str, length: int) -> int:
    """Rows that are a share of all, at least one."""
    number = real(share, name)
    if not 0 < number <= 1:
        raise ValueError(f"{name}: got {share}, expected a number above 0, at most 1")
    return max(1, math.ceil(number * length))
