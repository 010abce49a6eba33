"""PowerAttention from its rule: float64 numpy with a materialised mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def power_of_two_mask(
    rows: int, keys: int, *, block: int = 256, n_window: int = 5, n_sink: int = 1, powers: bool = True
) -> NDArray[np.bool_]:
    """Which keys the last `rows` of `keys` positions see, `[Lq, Lk]`, before causality inside blocks."""
    own = (np.arange(rows) + keys - rows)[:, None] // block
    other = np.arange(keys) // block
    back = own - other
    power = (back >= 1) & ((back & (back - 1)) == 0)
    seen: NDArray[np.bool_] = (back >= 0) & ((back < n_window) | (other < n_sink) | (power & powers))
    return seen


def power_of_two_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block: int = 256,
    n_window: int = 5,
    n_sink: int = 1,
    powers: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.power_of_two_attention`."""
    q, k = np.asarray(q), np.asarray(k)
    mask = power_of_two_mask(q.shape[-2], k.shape[-2], block=block, n_window=n_window, n_sink=n_sink, powers=powers)
    return attention(q, k, v, mask=mask, causal=True, scale=scale, return_lse=return_lse)
