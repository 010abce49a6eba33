"""Multi-head latent attention from its formula: every head's keys and values are made, then attended to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def multi_head_latent_attention(
    q_nope: ArrayLike,
    q_rope: ArrayLike,
    latent: ArrayLike,
    k_rope: ArrayLike | None,
    w_uk: ArrayLike,
    w_uv: ArrayLike,
    **options: Any,
) -> Any:
    """Attention of each head over `[latent w_uk^T, k_rope]` and `latent w_uv`; see `longattn.dense`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    q_nope, q_rope, latent, w_uk, w_uv = (np.asarray(x, np.float64) for x in (q_nope, q_rope, latent, w_uk, w_uv))
    rank = w_uk.shape[-1]
    latent, k_rope = (latent[..., :rank], latent[..., rank:]) if k_rope is None else (latent, k_rope)
    k_nope = np.einsum("bjr,hdr->bhjd", latent, w_uk)
    shared = np.broadcast_to(np.asarray(k_rope, np.float64)[:, None], (*k_nope.shape[:-1], q_rope.shape[-1]))
    q, k = np.concatenate((q_nope, q_rope), axis=-1), np.concatenate((k_nope, shared), axis=-1)
    return attention(q, k, np.einsum("bjr,hrv->bhjv", latent, w_uv), **options)
