"""Lightweight top-k attention from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def lightweight_topk_logits(x_q: ArrayLike, x_k: ArrayLike, wq: ArrayLike, wk: ArrayLike) -> NDArray[np.float64]:
    """What keys are picked by, `[B, Lq, Lk]` or `[Lq, Lk]`."""
    x_q, x_k, wq, wk = (np.asarray(x, np.float64) for x in (x_q, x_k, wq, wk))
    logits: NDArray[np.float64] = (x_q @ wq) @ (x_k @ wk).swapaxes(-1, -2) * wq.shape[1] ** -0.5
    return logits


def lightweight_topk_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    lists: Any,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.lightweight_topk_attention`."""
    mask = lists.to_dense_mask()
    return attention(q, k, v, mask=mask, causal=causal, scale=scale, return_lse=return_lse)
