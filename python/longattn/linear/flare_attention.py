"""FLARE: attention routed through a few latent queries per head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import attention_inputs, batched, check_float_storage, finite, flag, result_array, returned
from longattn.dense.attention import attention
from longattn.linear.key_statistics import key_mask
from longattn.methods import Method
from longattn.reference import linear as reference


def flare_attention(
    latents: Array,
    k: Array,
    v: Array,
    *,
    scale: float = 1.0,
    qk_norm: bool = False,
    eps: float = 1e-6,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """`Z = softmax_n(s R K^T) V`, then `Y = softmax_m(s K R^T) Z`: the same scores, normalised both ways.

    There are no queries of tokens: token `n` reads what the latents gathered by the weights that it gave them.

    Args:
        latents: learned queries `R`, `[H, M, D]`; float32, float16 or bfloat16.
        k: keys `[B, H, N, D]`, or `[H, N, D]`; float32, float16 or bfloat16.
        v: values `[B, H, N, Dv]`, or `[H, N, Dv]`; dtype of `k`.
        scale: factor on the scores (not `D ** -0.5`).
        qk_norm: rows of latents and keys are divided by their root mean square over the channels.
        eps: added to the mean square.
        mask: boolean `[N]` or `[B, N]`; False hides the token from the latents. Its own output is computed like any
            other.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, H, N, Dv]` (or `[H, N, Dv]`), in the kind and dtype of `k`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * H * N * M * (D + Dv)` multiply-adds; memory for `H * M * Dv` numbers.

    References:
        V. Puri et al., "FLARE: Fast Low-rank Attention Routing Engine", 2025, arXiv:2508.12594.
    """
    rn = as_numpy(latents, "latents")
    check_float_storage(rn, "latents")
    kn, _, vn = attention_inputs(k, k, v, ranks=(3, 4))
    if vn.shape[:-1] != kn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {kn.shape[:-1]} and a head_dim, as in k")
    heads, dim = kn.shape[-3], kn.shape[-1]
    if rn.ndim != 3 or rn.shape[0] != heads or rn.shape[1] == 0 or rn.shape[2] != dim:
        raise ValueError(f"latents: got shape {rn.shape}, expected [{heads}, M, {dim}], M at least 1")
    factor, small, normalised = finite(scale, "scale"), finite(eps, "eps", 0), flag(qk_norm, "qk_norm")
    result = result_array(out, k, (*kn.shape[:-1], vn.shape[-1]), kn.dtype, {"k": kn, "v": vn, "latents": rn})
    k4, v4, out4 = batched(kn, 4), batched(vn, 4), batched(result, 4)
    keep = key_mask(mask, k4.shape[0], k4.shape[2])
    column = None if keep is None else keep[:, None, None]
    r4 = np.broadcast_to(rn.astype(np.float32), (k4.shape[0], *rn.shape))
    if normalised:
        r4, k4, v4 = _unit(r4, small), _unit(k4, small), v4.astype(np.float32, copy=False)
    gathered = attention(r4, k4, v4, scale=factor, mask=column)
    if k4.dtype == out4.dtype:
        attention(k4, r4, gathered, scale=factor, out=out4)
    else:
        out4[...] = attention(k4, r4, gathered, scale=factor)
    return returned(out, k, result, None)


def _unit(x: NDArray[Any], eps: float) -> NDArray[np.float32]:
    """Float32 rows over their root mean square."""
    wide = x.astype(np.float32)
    found: NDArray[np.float32] = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + np.float32(eps))
    return found


METHOD = Method(
    name="flare_attention",
    family="linear",
    title="FLARE: Fast Low-rank Attention Routing Engine",
    year=2025,
    arxiv="2508.12594",
    function=flare_attention,
    reference=reference.flare_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Rows of the implied matrix are non-negative and sum to 1.",
        "Its rank is at most the number of latents.",
        "One latent gives every token `softmax(s r K^T) V`.",
        "It is agent attention with keys as queries and latents as agents.",
    ),
    tests="tests/linear/test_flare_attention.py",
    cost="`2 * H * N * M * (D + Dv)` multiply-adds.",
)
