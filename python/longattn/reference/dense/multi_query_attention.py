"""Multi-query attention from its formula: one matrix of keys and one of values for all heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def multi_query_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Any) -> Any:
    """Attention of all query heads over one KV head; see `longattn.dense`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads = q.shape[-3]
    k, v = (np.broadcast_to(x, (*x.shape[:-3], heads, *x.shape[-2:])) for x in (k, v))
    return attention(q, k, v, **options)
