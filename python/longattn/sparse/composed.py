"""Selectors made of selectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any, ClassVar

from longattn._arrays import Array
from longattn._checks import integer
from longattn.sparse._aligning import aligned
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sparse_attention import Selector


class Composable:
    """What makes selectors by `|` and `&`: `Union` and `Intersection` of both; the other may be a function."""

    __slots__ = ()

    def __or__(self, other: Selector) -> Union:
        """What either chooses."""
        return Union(_both(self, other))

    def __ror__(self, other: Selector) -> Union:
        """What either chooses."""
        return Union(_both(other, self))

    def __and__(self, other: Selector) -> Intersection:
        """What both choose."""
        return Intersection(_both(self, other))

    def __rand__(self, other: Selector) -> Intersection:
        """What both choose."""
        return Intersection(_both(other, self))


def _both(*selectors: Any) -> tuple[Any, ...]:
    for x in selectors:
        if not callable(x):
            raise TypeError(f"other: got {type(x).__name__}, expected a selector")
    return selectors


def _check(selectors: object) -> None:
    if not isinstance(selectors, Sequence) or not selectors or not all(callable(x) for x in selectors):
        raise TypeError(f"selectors: got {selectors!r}, expected a sequence of selectors")


@dataclass(frozen=True, slots=True)
class _Folded(Composable):
    """What some selectors choose, put together two by two."""

    selectors: Sequence[Selector]

    #: How two choices become one.
    together: ClassVar[Callable[[Any, Any], Any]]

    def __post_init__(self) -> None:
        """Checks the selectors."""
        _check(self.selectors)

    def __call__(self, q: Array, k: Array, *, causal: bool = False, scale: float | None = None) -> BlockMask | RowLists:
        """All choices as one."""
        chosen: list[Any] = [select(q, k, causal=causal, scale=scale) for select in self.selectors]
        made: BlockMask | RowLists = reduce(type(self).together, chosen)
        return made


@dataclass(frozen=True, slots=True)
class Union(_Folded):
    """What any of some selectors chooses; `a | b` is the same of two.

    Blocks of different sizes are cut into smaller ones, and lists of keys make lists of keys of all
    (`longattn.BlockMask`).

    Args:
        selectors: at least one.

    Raises:
        TypeError: not a sequence of selectors.
    """

    together = or_


@dataclass(frozen=True, slots=True)
class Intersection(_Folded):
    """What all of some selectors choose; `a & b` is the same of two.

    Blocks of different sizes are cut into smaller ones, and lists of keys make lists of keys of all
    (`longattn.BlockMask`).

    Args:
        selectors: at least one.

    Raises:
        TypeError: not a sequence of selectors.
    """

    together = and_


@dataclass(frozen=True, slots=True)
class PerHead(Composable):
    """A selector for each query head: head `h` gets what `selectors[which[h]]` chooses for it.

    Every selector runs for all heads.

    Args:
        selectors: at least one; where they choose blocks of different sizes or keys, as in `Union`.
        which: a number for each query head.

    Raises:
        TypeError: not a sequence of selectors, or numbers that are not integers.
        ValueError: a number that no selector has.
    """

    selectors: Sequence[Selector]
    which: Sequence[int]

    def __post_init__(self) -> None:
        """Checks the selectors and the numbers."""
        _check(self.selectors)
        for x in self.which:
            integer(x, "which", 0, len(self.selectors) - 1)

    def __call__(self, q: Array, k: Array, *, causal: bool = False, scale: float | None = None) -> BlockMask | RowLists:
        """The table."""
        tables = aligned([select(q, k, causal=causal, scale=scale) for select in self.selectors], "tables")
        made: BlockMask | RowLists = type(tables[0]).per_head(tables, self.which)
        return made
