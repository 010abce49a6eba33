"""Multi-head attention whose head size is chosen by itself, and the rank of a head's scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_heads, real
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference


def fixed_head_size_attention(
    x: Array,
    wq: Array,
    wk: Array,
    wv: Array,
    wo: Array,
    *,
    heads: int,
    context: Array | None = None,
    **options: Any,
) -> Array:
    """Multi-head attention of a layer, projections included, with any head size `Dp`.

    `q, k, v = x wq, x wk, x wv`, attention of every head with scale `Dp ** -0.5`, heads side by side times `wo`.
    `Dp` is `wq.shape[1] / heads`, whatever `C / heads` is: a head's `L x L` scores have rank at most `Dp`, so that a
    head narrower than the sequence cannot express every pattern of attention. `score_rank` measures it. The paper
    recommends `Dp = L`, or a fixed size while the number of heads varies.

    Args:
        x: layer input `[B, L, C]`, or `[L, C]`; float32, float16 or bfloat16.
        wq: query projection `[C, H * Dp]`; any of the three dtypes, as the other projections.
        wk: key projection `[C, Hkv * Dp]`, `H` a multiple of `Hkv`.
        wv: value projection `[C, Hkv * Dv]`.
        wo: output projection `[H * Dv, Cout]`.
        heads: `H`.
        context: what keys and values are made of, `[B, Lk, Ck]` (or `[Lk, Ck]`), for cross-attention; `None` is `x`.
            `wk` and `wv` are then `[Ck, ...]`.
        options: options of `longattn.attention`, such as `causal` or another `scale`; not `out` and `return_lse`.

    Returns:
        The layer's output `[B, L, Cout]`, or `[L, Cout]`, in the kind and dtype of `x`. Everything between is
        float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit each other.

    Cost:
        `2 * L * L * H * Dp` multiply-adds of attention and `4 * L * C * H * Dp` of projections; keys and values take
        `2 * Hkv * Dp` numbers per token. Arguments of another dtype than float32 are converted in each call.

    References:
        S. Bhojanapalli et al., "Low-Rank Bottleneck in Multi-head Attention Models", 2020, arXiv:2002.07028.

    Example:
        >>> import numpy as np, longattn as la
        >>> x = np.ones((1, 10, 32), np.float32)
        >>> wq, wk, wv = np.ones((3, 32, 4 * 64), np.float32)  # 4 heads of 64, though 32 / 4 is 8
        >>> la.dense.fixed_head_size_attention(x, wq, wk, wv, np.ones((256, 32), np.float32), heads=4).shape
        (1, 10, 32)
    """
    for name in ("out", "return_lse"):
        if name in options:
            raise TypeError(f"{name}: got one, expected none: the result is the projected output")
    given = {"x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo} | ({} if context is None else {"context": context})
    arrays = {name: as_numpy(array, name) for name, array in given.items()}
    for name, array in arrays.items():
        check_float_storage(array, name)
    xn, source = arrays["x"], arrays.get("context", arrays["x"])
    if xn.ndim not in (2, 3):
        raise ValueError(f"x: got shape {xn.shape}, expected [B, L, C] or [L, C]")
    if source.ndim != xn.ndim or source.shape[:-2] != xn.shape[:-2]:
        raise ValueError(f"context: got shape {source.shape}, expected batch and rank of x, {xn.shape}")
    for name, rows in (("wq", xn), ("wk", source), ("wv", source)):
        if arrays[name].ndim != 2 or arrays[name].shape[0] != rows.shape[-1]:
            raise ValueError(f"{name}: got shape {arrays[name].shape}, expected [{rows.shape[-1]}, heads * width]")
    if isinstance(heads, bool) or not isinstance(heads, int | np.integer):
        raise TypeError(f"heads: got {heads!r}, expected an integer")
    wide = arrays["wq"].shape[1]
    if heads < 1 or wide == 0 or wide % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of the {wide} columns of wq")
    dim = wide // heads
    kv_heads, rest = divmod(arrays["wk"].shape[1], dim)
    if rest:
        raise ValueError(f"wk: got {arrays['wk'].shape[1]} columns, expected a multiple of the head size {dim}")
    check_heads(heads, kv_heads, kv_heads)
    value_dim, rest = divmod(arrays["wv"].shape[1], kv_heads)
    if rest or value_dim == 0:
        raise ValueError(f"wv: got {arrays['wv'].shape[1]} columns, expected a positive multiple of {kv_heads} heads")
    if arrays["wo"].ndim != 2 or arrays["wo"].shape[0] != heads * value_dim:
        raise ValueError(f"wo: got shape {arrays['wo'].shape}, expected [{heads * value_dim}, C]")

    wide_x, wide_source = (a.astype(np.float32, copy=False) for a in (xn, source))
    q, k, v = (
        _split(rows @ arrays[name].astype(np.float32, copy=False), count)
        for name, rows, count in (("wq", wide_x, heads), ("wk", wide_source, kv_heads), ("wv", wide_source, kv_heads))
    )
    # The heads' outputs are written where the next product reads them, side by side.
    joined = np.empty((*xn.shape[:-1], heads * value_dim), np.float32)
    attention(q, k, v, out=_split(joined, heads), **options)
    result = joined @ arrays["wo"].astype(np.float32, copy=False)
    return like(x, result.astype(xn.dtype, copy=False))


def _split(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """`[..., L, heads * D]` as `[..., heads, L, D]`, a view."""
    return rows.reshape(*rows.shape[:-1], heads, rows.shape[-1] // heads).swapaxes(-3, -2)


@dataclass(frozen=True, slots=True)
class ScoreRank:
    """Rank of each head's scores `S = q k^T`.

    Attributes:
        rank: int64 `[B, Hq]` (or `[Hq]`), singular values above `rtol` times the largest.
        stable_rank: float64, likewise: `|S|_F^2 / |S|_2^2`, 0 where `S` is 0.
        singular_values: float64 `[B, Hq, min(Lq, Lk, D)]` (or without `B`), descending; all others are 0. Without
            the factor `scale`, which changes no rank.
    """

    rank: NDArray[np.int64]
    stable_rank: NDArray[np.float64]
    singular_values: NDArray[np.float64]


def score_rank(q: Array, k: Array, *, rtol: float | None = None) -> ScoreRank:
    """Numerical rank, stable rank and spectrum of each head's scores `q k^T`, before softmax and mask.

    They come from the thin triangular factors of q and k, `q k^T = Q_q (R_q R_k^T) Q_k^T`, never from the `Lq x Lk`
    matrix: the rank is at most `D`. With weights `[Hq, C, D]` and `[Hkv, C, D]` in place of queries and keys, they are
    those of the form `W_q W_k^T` of all scores of a layer.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        rtol: singular values above `rtol` times the largest count; `None` is `max(Lq, Lk) * 2**-52`: the rank of
            the numbers as they are given, what their storage rounded included. 0 to 1.

    Returns:
        A `ScoreRank`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, no rows, numbers that are not finite, or `rtol` out of range.

    Cost:
        `2 * (Lq + Lk) * D**2` multiply-adds per head in float64, and a singular value decomposition of a `D x D`
        matrix.

    References:
        N. Amsel, G. Yehudai and J. Bruna, "On the Benefits of Rank in Attention Layers", 2024, arXiv:2407.16153.
    """
    qn, kn = as_numpy(q, "q"), as_numpy(k, "k")
    for x, name in ((qn, "q"), (kn, "k")):
        check_float_storage(x, name)
        if x.ndim not in (3, 4) or 0 in x.shape[-2:]:
            raise ValueError(f"{name}: got shape {x.shape}, expected [B, H, L, D] or [H, L, D] with rows")
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: got numbers that are not finite, expected finite ones")
    if kn.ndim != qn.ndim or kn.shape[:-3] != qn.shape[:-3] or kn.shape[-1] != qn.shape[-1]:
        raise ValueError(f"k: got shape {kn.shape}, expected batch and head_dim of q, {qn.shape}")
    check_heads(qn.shape[-3], kn.shape[-3], kn.shape[-3])
    rows, keys, dim = qn.shape[-2], kn.shape[-2], qn.shape[-1]
    threshold = max(rows, keys) * 2.0**-52 if rtol is None else real(rtol, "rtol")
    if not 0 <= threshold <= 1:
        raise ValueError(f"rtol: got {rtol}, expected 0 to 1")

    group = qn.shape[-3] // kn.shape[-3]
    least = min(rows, keys, dim)
    spectra = np.zeros((*qn.shape[:-2], least))
    for kv_head in np.ndindex(kn.shape[:-2]):
        of_keys = _triangular(kn[kv_head])
        for head in range(kv_head[-1] * group, (kv_head[-1] + 1) * group):
            one = (*kv_head[:-1], head)
            product = _triangular(qn[one]) @ of_keys.T
            spectra[one] = np.linalg.svd(product, compute_uv=False)[:least]
    largest = spectra[..., :1]
    counted = (spectra > threshold * largest).sum(axis=-1, dtype=np.int64)
    relative = np.divide(spectra, largest, out=np.zeros_like(spectra), where=largest > 0)
    return ScoreRank(counted, (relative**2).sum(axis=-1), spectra)


def _triangular(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The factor R of rows `[L, D]`, float64 `[min(L, D), D]`."""
    factor: NDArray[np.float64] = np.asarray(np.linalg.qr(rows.astype(np.float64), mode="r"))
    return factor


METHOD = Method(
    name="fixed_head_size_attention",
    family="exact",
    title="Low-Rank Bottleneck in Multi-head Attention Models",
    year=2020,
    arxiv="2002.07028",
    function=fixed_head_size_attention,
    reference=reference.fixed_head_size_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "A head size of `C / H` is standard multi-head attention.",
        "The rank of a head's scores is never above the head size.",
        "Heads widened by zeros, the scale kept, give the same output.",
    ),
    tests="tests/dense/test_fixed_head_size_attention.py",
    cost="`2 * L * L * H * Dp` multiply-adds of attention and `4 * L * C * H * Dp` of projections.",
)
