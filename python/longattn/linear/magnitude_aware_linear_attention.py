"""Magnitude-aware linear attention: an affine change of the weights in place of a division."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, finite, integer, scale_factor
from longattn.linear._global import attend, inputs
from longattn.linear.feature_map import FeatureMap, feature_map, parts
from longattn.methods import Method
from longattn.reference import linear as reference


def magnitude_aware_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    phi: str | FeatureMap = "elu1",
    scale: float | None = None,
    eps: float = 1e-6,
    angles: Array | None = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Weights `(1 + 1 / (m_i + eps)) s phi(q_i)^T phi(k_j) / n - m_i / n`, `m_i = s phi(q_i)^T mean_j phi(k_j)`.

    Rows sum to 1 but for `eps`, entries may be negative, and a longer query makes its row sharper, which a division by
    the sum would undo.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        phi: the map of queries and keys, or its name.
        scale: the factor `s`; `None` is `D ** -0.5`.
        eps: added to `m_i` in the denominator.
        angles: floating `[L, F / 2]`: turns each pair of neighbouring features of queries and keys, after the map, in
            the products with values; `m_i` is of features that are not turned, so that rows no longer sum to 1. Takes
            as many queries as keys. `rope_2d_angles` makes those of a map.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros without keys.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds.

    References:
        Q. Fan et al., "Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv:2507.00698.
    """
    qn, kn, _ = arrays = inputs(q, k, v)
    chosen = feature_map(phi)
    dim = qn.shape[3]
    of_queries = parts(chosen, qn.shape[1], dim, keys=False)
    of_keys = parts(chosen, kn.shape[1], dim, keys=True)
    if angles is not None:
        if qn.shape[2] != kn.shape[2]:
            raise ValueError(f"angles: got some with {qn.shape[2]} queries, expected the {kn.shape[2]} keys' number")
        table = _turns(angles, kn.shape[2], chosen.features(dim))
        of_queries["rotation"] = of_keys["rotation"] = table
    read_out = ("magnitude", scale_factor(scale, dim), finite(eps, "eps", 0))
    return attend(q, arrays, (of_queries, of_keys), read_out, mask=mask, out=out)


def rope_2d_angles(height: int, width: int, dim: int, *, base: float = 10000.0) -> NDArray[np.float32]:
    """Angles of a map's tokens: the first half of the channels turns with the row, the second with the column.

    Args:
        height: rows of the map.
        width: its columns.
        dim: channels, a multiple of 4.
        base: frequencies are `base ** -linspace(0, 1, dim / 4)`.

    Returns:
        float32 `[height * width, dim / 2]`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: sizes that do not fit.

    Cost:
        One product per angle.
    """
    height, width = integer(height, "height", 1), integer(width, "width", 1)
    dim = integer(dim, "dim", 4)
    if dim % 4:
        raise ValueError(f"dim: got {dim}, expected a multiple of 4")
    if finite(base, "base") <= 0:
        raise ValueError(f"base: got {base}, expected above 0")
    frequencies = float(base) ** -np.linspace(0, 1, dim // 4)
    rows, columns = (np.arange(n)[:, None] * frequencies for n in (height, width))
    table = np.concatenate([np.repeat(rows, width, axis=0), np.tile(columns, (height, 1))], axis=1)
    return table.astype(np.float32)


def _turns(angles: Array, length: int, features: int) -> NDArray[np.float32]:
    """Cosine and sine of each pair, `[L, F / 2, 2]`."""
    x = as_numpy(angles, "angles")
    check_floating(x, "angles")
    if features % 2 or x.shape != (length, features // 2):
        raise ValueError(f"angles: got shape {x.shape}, expected [{length}, {features} / 2]")
    wide = x.astype(np.float64)
    return np.stack([np.cos(wide), np.sin(wide)], axis=-1).astype(np.float32)


METHOD = Method(
    name="magnitude_aware_linear_attention",
    family="linear",
    title="Rectifying Magnitude Neglect in Linear Attention",
    year=2025,
    arxiv="2507.00698",
    function=magnitude_aware_linear_attention,
    reference=reference.magnitude_aware_linear_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "Without turns and with `eps=0`, rows sum to 1.",
        "Equal values return that value.",
        "The deviation of a row from the uniform one grows affinely with the features of the query.",
        "The factored form is the direct one.",
    ),
    tests="tests/linear/test_magnitude_aware_linear_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds.",
)
