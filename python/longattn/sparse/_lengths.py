"""Lengths of padded sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy


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
