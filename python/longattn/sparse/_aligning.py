"""Masks and lists over different blocks as ones over the same, which say the same of every query and key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.sparse._lists import Lists, pointers


def aligned(tables: Sequence[Lists], name: str) -> list[Any]:
    """`tables` over the same blocks of queries and of keys, for the same batch and heads.

    Blocks become as small as it takes: of the common divisor of their sizes; of one key where some are lists of keys,
    and then all become such lists.

    Args:
        tables: masks or lists, at least one.
        name: of the argument that the others came as.

    Raises:
        ValueError: other lengths, another batch, or heads that do not divide those of another.
    """
    first = tables[0]
    batch, heads = (max(x.shape[i] for x in tables) for i in range(2))
    for x in tables[1:]:
        if x.lengths != first.lengths:
            raise ValueError(f"{name}: got lengths {x.lengths}, expected {first.lengths}")
    for x in tables:
        if x.shape[0] not in (1, batch) or heads % x.shape[1]:
            raise ValueError(
                f"{name}: got shapes {sorted({x.shape[:2] for x in tables})} of batch and heads, expected batches of 1 "
                f"or {batch} and heads that divide {heads}"
            )
    if any(getattr(x, "bias", None) is not None for x in tables) and len(tables) > 1:
        raise ValueError(f"{name}: got lists with a bias, expected none")
    of_keys = [type(x) for x in tables if not hasattr(x, "block_k")]
    made = of_keys[0] if of_keys else type(first)
    block_q, first_q = _query_blocks(tables)
    sizes = {x._keys_of_each() for x in tables if x._limit() > 1}
    block_k = 1 if of_keys else math.gcd(*sizes) if sizes else first._keys_of_each()
    fields: dict[str, Any] = {"lengths": first.lengths, "block_q": block_q, "first_q": first_q}
    if not of_keys:
        fields["block_k"] = block_k
    return [
        x
        if type(x) is made and x.shape[:2] == (batch, heads) and all(getattr(x, n) == fields[n] for n in fields)
        else made(**fields, **_lists(x, (batch, heads), _bounds(fields), block_k), scored=x.scored)
        for x in tables
    ]


def _query_blocks(tables: Sequence[Lists]) -> tuple[int, int]:
    """`block_q` and `first_q` of blocks that end wherever one of some tables' does."""
    cut = [x for x in tables if x.query_blocks > 1] or tables[:1]
    firsts = [x.first_q if x.first_q is not None else x.block_q for x in cut]
    size = math.gcd(*(x.block_q for x in cut), *(first - firsts[0] for first in firsts))
    return size, (firsts[0] - 1) % size + 1


def _bounds(fields: dict[str, Any]) -> NDArray[np.int64]:
    rows = fields["lengths"][0]
    inner = np.arange(fields["first_q"], rows, fields["block_q"], dtype=np.int64)
    return np.concatenate([[0], inner, [rows]]) if rows else np.zeros(1, np.int64)


def _lists(x: Lists, outer: tuple[int, int], bounds: NDArray[np.int64], block_k: int) -> dict[str, Any]:
    """`indptr` and `indices` of a table for blocks of queries between `bounds` and blocks of `block_k` keys."""
    blocks, keys = len(bounds) - 1, x.lengths[1]
    of_batch = np.arange(outer[0]) if x.shape[0] > 1 else np.zeros(outer[0], np.int64)
    of_head = np.arange(outer[1]) // (outer[1] // x.shape[1])
    of_block = np.searchsorted(x.query_bounds, bounds[:-1], side="right") - 1
    # The list of the table that each new list is, and the entries of it one after another.
    own = ((of_batch[:, None] * x.shape[1] + of_head)[..., None] * x.shape[2] + of_block).ravel()
    flat = x._flat()
    counts = np.diff(flat)[own]
    numbers = np.repeat(np.arange(own.size), counts)
    entries = np.arange(numbers.size) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(flat[own], counts)
    indices = x.indices[entries].astype(np.int64)
    limit = -(-keys // block_k)
    parts = x._keys_of_each() // block_k if x._limit() > 1 else limit
    if parts != 1:
        indices = (indices[:, None] * parts + np.arange(parts)).ravel()
        inside = indices < limit
        indices, numbers = indices[inside], np.repeat(numbers, parts)[inside]
    return {"indptr": pointers(numbers, (*outer, blocks)), "indices": indices.astype(np.uint32)}
