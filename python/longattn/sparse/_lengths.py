"""Lengths of padded sequences, and bounds of those that lie one after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import sequence_bounds


def sequence_lengths(lengths: Array | None, batch: int, longest: int) -> NDArray[np.int64]:
    """One length per sequence, of at most `longest`; `None` is all of that."""
    if lengths is None:
        return np.full(batch, longest)
    x = as_numpy(lengths, "lengths")
    if x.dtype.kind not in "iu":
        raise TypeError(f"lengths: got dtype {x.dtype}, expected integers")
    if x.shape != (batch,) or (x < 0).any() or (x > longest).any():
        raise ValueError(f"lengths: got {x.tolist()}, expected {batch} numbers from 0 to {longest}")
    return x.astype(np.int64)


def packed_bounds(
    batch: int, rows: int, keys: int, cu_seqlens_q: Array | None, cu_seqlens_k: Array | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Bounds of sequences that a batch of 1 holds one after another, of queries and of keys; `None` without any.

    Those of the keys are those of the queries where none are given.
    """
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: got bounds without cu_seqlens_q, expected both or neither")
        return None
    if batch != 1:
        raise ValueError(f"cu_seqlens_q: got a batch of {batch}, expected 1, which holds all sequences")
    bounds_q = bounds_k = sequence_bounds(cu_seqlens_q, "cu_seqlens_q", rows)
    if cu_seqlens_k is not None or rows != keys:
        bounds_k = sequence_bounds(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, "cu_seqlens_k", keys)
    if len(bounds_k) != len(bounds_q):
        raise ValueError(f"cu_seqlens_k: got {len(bounds_k) - 1} sequences, expected {len(bounds_q) - 1}")
    return bounds_q, bounds_k
