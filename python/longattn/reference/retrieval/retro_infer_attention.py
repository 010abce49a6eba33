"""RetroInfer, given its clusters. Nothing is checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.retrieval.units import UnitAttention, unit_attention


def retro_infer_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    clusters: Sequence[Sequence[ArrayLike]],
    *,
    retrieved: float = 0.018,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
    sink_logits: ArrayLike | None = None,
) -> UnitAttention:
    """Attention in three zones: steady rows, the best clusters, the other clusters by centroid and mean value.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        clusters: `[Hkv]` lists of clusters: their rows.
        retrieved: share of the rows that is read by cluster.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        sink_logits: `[Hq]`, in the denominator only.

    References:
        Y. Chen et al., "RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference", 2025.
    """
    rows = max(1, int(np.ceil(retrieved * np.shape(keys)[1])))
    return unit_attention(
        q,
        keys,
        values,
        clusters,
        top_k=rows,
        sinks=sinks,
        window=window,
        scale=scale,
        sink_logits=sink_logits,
    )
