"""Pooling by attention of a learned token over the patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_float_storage, check_floating, finite, flag, integer
from longattn.dense.attention import attention
from longattn.dense.attention_weights import attention_weights
from longattn.methods import Method
from longattn.reference import pool as reference

Float32 = NDArray[np.float32]


def learned_aggregation_pool(
    cls: Array,
    x: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    w_o: Array,
    *,
    heads: int = 1,
    ln_gamma: Array | None = None,
    ln_beta: Array | None = None,
    eps: float = 1e-6,
    layer_scale: float | Array = 1e-4,
    patches_only: bool = False,
    return_weights: bool = False,
) -> Any:
    """`cls + layer_scale * (softmax(q k^T / sqrt(D)) v W_o)`: one learned token, or one per class, reads the patches.

    `u = LN([cls; x])`, `q = u_cls W_q`, `k = u W_k`, `v = u W_v`. The feed-forward part that follows in the paper is
    the caller's.

    Args:
        cls: learned tokens `[m, C]` or `[B, m, C]`; float32, float16 or bfloat16.
        x: patches `[B, N, C]`; likewise.
        w_q: floating `[C, C]`; multiplies rows from the right.
        w_k: floating `[C, C]`.
        w_v: floating `[C, C]`.
        w_o: floating `[C, C]`.
        heads: heads, a divisor of `C`.
        ln_gamma: factors of the layer normalisation, floating `[C]`; `None` leaves the normalisation out where
            `ln_beta` is `None`, too, else 1.
        ln_beta: its shifts; `None` is 0.
        eps: added to the variance.
        layer_scale: a number, or floating `[C]`.
        patches_only: keys and values are the patches alone, as with one token per class.
        return_weights: also return the attention map.

    Returns:
        The new tokens `[B, m, C]` in the kind and dtype of `x`. With `return_weights`, a pair with the weights, float32
        `[B, heads, m, m + N]`, tokens first, or `[B, heads, m, N]` with `patches_only`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * B * N * C * C` multiply-adds, mostly of the projections.

    References:
        H. Touvron et al., "Augmenting Convolutional networks with attention-based aggregation", 2021, arXiv:2112.13692.
    """
    xn, cn = as_numpy(x, "x"), as_numpy(cls, "cls")
    check_float_storage(xn, "x")
    check_float_storage(cn, "cls")
    if xn.ndim != 3 or xn.shape[2] == 0:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, N, C]")
    batch, _, channels = xn.shape
    if (
        cn.ndim not in (2, 3)
        or cn.shape[-1] != channels
        or (cn.ndim == 3 and cn.shape[0] != batch)
        or cn.shape[-2] == 0
    ):
        raise ValueError(f"cls: got shape {cn.shape}, expected [m, {channels}] or [{batch}, m, {channels}]")
    parts = integer(heads, "heads", 1)
    if channels % parts:
        raise ValueError(f"heads: got {parts}, expected a divisor of {channels}")
    wq, wk, wv, wo = (
        _numbers(w, name, (channels, channels)) for w, name in ((w_q, "w_q"), (w_k, "w_k"), (w_v, "w_v"), (w_o, "w_o"))
    )
    step = np.float32(finite(layer_scale, "layer_scale")) if isinstance(layer_scale, int | float) else None
    gamma = _numbers(layer_scale, "layer_scale", (channels,)) if step is None else step
    only, weights = flag(patches_only, "patches_only"), flag(return_weights, "return_weights")
    small = finite(eps, "eps", 0)
    tokens: Float32 = np.broadcast_to(cn, (batch, *cn.shape[-2:])).astype(np.float32)
    u = np.concatenate([tokens, xn.astype(np.float32, copy=False)], axis=1)
    if ln_gamma is not None or ln_beta is not None:
        centred = u - u.mean(axis=2, keepdims=True)
        u = centred / np.sqrt((centred * centred).mean(axis=2, keepdims=True) + np.float32(small))
        if ln_gamma is not None:
            u = u * _numbers(ln_gamma, "ln_gamma", (channels,))
        if ln_beta is not None:
            u = u + _numbers(ln_beta, "ln_beta", (channels,))
    m = tokens.shape[1]
    seen = u[:, m:] if only else u

    def split(rows: Float32, w: Float32) -> Float32:
        return reshaped(rows @ w, batch, rows.shape[1], parts, -1).swapaxes(1, 2)

    q, k, v = split(u[:, :m], wq), split(seen, wk), split(seen, wv)
    gathered = attention(q, k, v).swapaxes(1, 2).reshape(batch, m, channels)
    result = like(x, (tokens + gamma * (gathered @ wo)).astype(xn.dtype, copy=False))
    return (result, like(x, np.asarray(attention_weights(q, k, np.arange(m))))) if weights else result


def _numbers(x: Array, name: str, shape: tuple[int, ...]) -> Float32:
    a = as_numpy(x, name)
    check_floating(a, name)
    if a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    return np.ascontiguousarray(a, np.float32)


METHOD = Method(
    name="learned_aggregation_pool",
    family="pool",
    title="Augmenting Convolutional networks with attention-based aggregation",
    year=2021,
    arxiv="2112.13692",
    function=learned_aggregation_pool,
    reference=reference.learned_aggregation_pool,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "With `W_q = 0` it is mean pooling of the values.",
        "It is dense attention with the learned tokens as queries.",
        "A single patch, patches only, gives its value times `W_o`.",
    ),
    tests="tests/pool/test_learned_aggregation_pool.py",
    cost="`2 * B * N * C * C` multiply-adds.",
)
