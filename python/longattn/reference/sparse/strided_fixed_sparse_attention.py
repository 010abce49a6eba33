"""The Sparse Transformer's patterns from their formulas: float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def strided_fixed_mask(
    rows: int,
    keys: int,
    pattern: str,
    *,
    stride: int,
    window: int | None = None,
    summary: int = 8,
    slots: int = 1,
    head: int = 0,
) -> NDArray[np.bool_]:
    """The keys that each query of a head sees, `[Lq, Lk]`."""
    i, j = np.arange(rows)[:, None] + keys - rows, np.arange(keys)
    local = i - j < (stride if window is None else window)
    strided = (i - j) % stride == 0
    same = i // stride == j // stride
    m = head % slots
    column = (j % stride >= stride - summary * (m + 1)) & (j % stride < stride - summary * m)
    column = np.broadcast_to(column, same.shape)
    rules = {
        "local": local,
        "strided": strided,
        "local_strided": local | strided,
        "fixed_local": same,
        "fixed_summary": column,
        "fixed": same | column,
    }
    seen: NDArray[np.bool_] = rules[pattern] & (j <= i)
    return seen


def strided_fixed_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    stride: int,
    pattern: str | Sequence[str] = "local_strided",
    window: int | None = None,
    summary: int = 8,
    slots: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.strided_fixed_sparse_attention`."""
    rows, keys, heads = np.shape(q)[2], np.shape(k)[2], np.shape(q)[1]
    names = [pattern] * heads if isinstance(pattern, str) else pattern
    mask = np.stack(
        [
            strided_fixed_mask(rows, keys, name, stride=stride, window=window, summary=summary, slots=slots, head=head)
            for head, name in enumerate(names)
        ]
    )[None]
    return attention(q, k, v, mask=mask, scale=scale, return_lse=return_lse)
