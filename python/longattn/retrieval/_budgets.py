"""Indexes and budgets that callers give: checks of their kind, and what they mean in rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from longattn._checks import any_integer, finite, one_of
from longattn.index import Index
from longattn.index._index import check_seed
from longattn.kv import KVStore

Kind = TypeVar("Kind", bound=Index)

#: What becomes of rows that are not read.
RESTS = ("values", "none", "sampled", None)

#: Seed, and epsilon, whether it is in units of the values, and the deviations of delta: what the core samples by.
Sampling = tuple[int, tuple[float, bool, tuple[float, float]] | None]


def sampling(
    weighs_none: str | None,
    seed: int,
    rest: str | None,
    epsilon: float | None,
    delta: float | None,
    relative_to: str | None,
    top_k: int | Sequence[int] | None,
    top_p: float | None,
) -> Sampling | None:
    """What the core samples by; `None` where nothing is sampled.

    Args:
        weighs_none: an index that weighs no single rows, by its name; `None` for one that does.
        seed: as for `retrieval_attention`, like all that follows.
        rest: likewise.
        epsilon: likewise.
        delta: likewise.
        relative_to: likewise.
        top_k: likewise.
        top_p: likewise.

    Raises:
        TypeError: numbers of another kind.
        ValueError: numbers out of range, or what does not go with the rest.
    """
    number = check_seed(seed)
    if epsilon is None:
        for name, value in (("delta", delta), ("relative_to", relative_to)):
            if value is not None:
                raise ValueError(f"{name}: got {value!r} without epsilon, expected an epsilon beside it")
        if rest != "sampled":
            return None
        if top_p is not None:
            raise ValueError("rest: got 'sampled' with top_p, expected top_k: a sample has a size")
        if weighs_none is not None:
            raise ValueError(f"rest: got 'sampled' with {weighs_none} that weigh no single rows")
        return number, None
    allowed = _share(epsilon, "epsilon")
    beside: dict[str, object] = {"top_k": top_k, "top_p": top_p, "rest": rest}
    for name, given in beside.items():
        if given is not None:
            raise ValueError(f"epsilon: got {epsilon} beside {name}={given!r}, expected epsilon alone")
    one_of(relative_to, "relative_to", ("output", "values", None))
    if weighs_none is not None:
        raise ValueError(f"epsilon: got {epsilon} with {weighs_none} that weigh no single rows")
    chance = 0.05 if delta is None else _share(delta, "delta")
    if 1 - chance / 2 == 1:
        raise ValueError(f"delta: got {delta}, expected a chance that a normal number can have")
    normal = NormalDist()
    return number, (allowed, relative_to == "values", (normal.inv_cdf(1 - chance), normal.inv_cdf(1 - chance / 2)))


def index_of(index: object, kind: type[Kind]) -> Kind:
    """An index of a kind."""
    if not isinstance(index, kind):
        raise TypeError(f"index: got {type(index).__name__}, expected {kind.__name__}")
    return index


def length_of(store: object) -> int:
    """Rows of a store."""
    if not isinstance(store, KVStore):
        raise TypeError(f"store: got {type(store).__name__}, expected a KVStore")
    return len(store)


def rows_of(share: object, name: str, length: int) -> int:
    """Rows that are a share of all, at least one."""
    number = finite(share, name)
    if not 0 < number <= 1:
        raise ValueError(f"{name}: got {share}, expected a number above 0, at most 1")
    return max(1, math.ceil(number * length))


def _share(value: object, name: str) -> float:
    number = finite(value, name)
    # As the core sees it, in float32.
    if not 0 < np.float32(number) < 1:
        raise ValueError(f"{name}: got {value}, expected a number between 0 and 1")
    return number


def rows_or_mass(
    top_k: int | Sequence[int] | None, top_p: float | None, length: int, kv_heads: int
) -> tuple[list[int] | None, float | None]:
    """Rows of all KV heads or of each, or the share of the mass."""
    if top_k is not None and top_p is not None:
        raise ValueError(f"top_p: got {top_p} beside top_k={top_k}, expected one of the two")
    if top_p is not None:
        return None, _share(top_p, "top_p")
    if top_k is None:
        return [max(64, length // 100)], None
    if isinstance(top_k, Sequence | np.ndarray) and not isinstance(top_k, str):
        rows = [count(k, "top_k") for k in top_k]
        if len(rows) != kv_heads:
            raise ValueError(f"top_k: got {len(rows)} numbers, expected one, or one for each of {kv_heads} KV heads")
    else:
        rows = [count(top_k, "top_k")]
    if 0 in rows:
        raise ValueError(f"top_k: got {top_k}, expected at least 1")
    return rows, None


def count(value: object, name: str) -> int:
    number = any_integer(value, name)
    if number < 0:
        raise ValueError(f"{name}: got {number}, expected at least 0")
    return min(number, sys.maxsize)  # more than any store holds
