"""Rank of heads: in how many directions their scores tell keys apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, real

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreRank:
    """Singular values of the scores of each head, and two numbers that sum them up.

    Attributes:
        singular_values: float64 `[..., Hq, n]`, falling, `n` the least of both numbers of rows and `D`.
        rank: int64 `[..., Hq]`, how many of them count.
        effective: float64 `[..., Hq]`, `e` to the entropy of their shares: `n` where all are alike, 1 where one is not
            0, 0 where all are.
    """

    singular_values: Float64
    rank: NDArray[np.int64]
    effective: Float64


def score_rank(q: Array, k: Array, *, tolerance: float = 1e-6) -> ScoreRank:
    """Singular values of `q k^T` for each head, without the product.

    With queries and keys it is about a head's scores; with the weights `[Hq, C, D]` and `[Hkv, C, D]` that make them,
    about the form `x_i^T W_q W_k^T x_j` of all scores, whose rank is at most `D`: what heads with `D` below the width
    `C` give up. With rows of weights for `q` and rows of the unit matrix for `k`, it is about these weights.

    Args:
        q: floating `[..., Hq, Lq, D]`.
        k: floating `[..., Hkv, Lk, D]`, `Hkv` a divisor of `Hq`.
        tolerance: a singular value counts that is above this times the head's largest.

    Returns:
        `ScoreRank`. Arithmetic is float64.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, numbers that are not finite, or a tolerance outside 0 to 1.

    Cost:
        `Hq * (Lq + Lk + D) * D ** 2` multiply-adds, several times.

    References:
        N. Amsel, G. Yehudai and J. Bruna, "On the Benefits of Rank in Attention Layers", 2024, arXiv:2407.16153. The
        effective rank is that of O. Roy and M. Vetterli, "The effective rank: A measure of effective dimensionality",
        2007.

    Example:
        >>> import numpy as np, longattn as la
        >>> w = np.random.default_rng(0).standard_normal((2, 4, 64, 16))
        >>> la.diagnostics.score_rank(w[0], w[1]).rank
        array([16, 16, 16, 16])
    """
    qn, kn = as_numpy(q, "q", any_strides=True), as_numpy(k, "k", any_strides=True)
    for x, name in ((qn, "q"), (kn, "k")):
        check_floating(x, name)
        if x.ndim < 3 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected [..., heads, rows, D], none of them 0")
    heads, dim = qn.shape[-3], qn.shape[-1]
    if kn.shape[:-3] != qn.shape[:-3] or kn.shape[-1] != dim or heads % kn.shape[-3]:
        raise ValueError(f"k: got shape {kn.shape}, expected a divisor of the heads of q, {qn.shape}, and its D")
    least = real(tolerance, "tolerance")
    if not 0 <= least < 1:
        raise ValueError(f"tolerance: got {tolerance}, expected at least 0 and below 1")
    triangles = []
    for x, name in ((qn, "q"), (kn, "k")):
        wide = x.astype(np.float64)
        if not np.isfinite(wide).all():
            raise ValueError(f"{name}: got numbers that are not finite, expected finite ones")
        # Rotations of the rows change no singular value: what is left of them are triangles.
        triangles.append(np.linalg.qr(wide, mode="r"))
    of_q, of_k = triangles[0], np.repeat(triangles[1], heads // kn.shape[-3], axis=-3)
    values = np.linalg.svd(of_q @ of_k.swapaxes(-1, -2), compute_uv=False)
    return ScoreRank(
        singular_values=values,
        rank=(values > least * values[..., :1]).sum(axis=-1),
        effective=_effective(values),
    )


def _effective(values: Float64) -> Float64:
    """`e` to the entropy of the shares of singular values `[..., n]`; 0 where there are none but zeros."""
    total = values.sum(axis=-1, keepdims=True)
    shares = values / np.where(total > 0, total, 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    found: Float64 = np.where(total[..., 0] > 0, np.exp(-(shares * logs).sum(axis=-1)), 0.0)
    return found
