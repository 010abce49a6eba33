"""How far heads look: weights of attention by the distance of the key from the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer
from longattn.dense.attention_weights import attention_weights

Float64 = NDArray[np.float64]

#: Query rows whose weights are held at once.
ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistanceProfile:
    """Weights of heads by distance; a distance is rounded to an integer `d`.

    Attributes:
        pairs: int64 `[n]`: pairs of a query row and a key at each distance, seen or not.
        means: float64 `[..., Hq, n]`: mean weight of such a pair; 0 where there is none.
        shares: float64 `[..., Hq, n]`: share of all weight at each distance; the shares of a head sum to 1.
        constant: float64 `[..., Hq]`: the smallest of the means: what a key gets however far it is.
        local: float64 `[..., Hq]`: share of all weight above that constant; 0 for weights that know no distance.
        distance: float64 `[..., Hq]`: mean distance of the keys by their weights.
    """

    pairs: NDArray[np.int64]
    means: Float64
    shares: Float64
    constant: Float64
    local: Float64
    distance: Float64


def attention_distances(
    q: Array, k: Array, rows: Array, *, size: tuple[int, int] | None = None, **options: Any
) -> DistanceProfile:
    """Attention weights of some query rows, by distance: whether a convolution and a mean could stand for a head.

    Weights fall into a part that depends on the distance and one that does not. The paper does not say how it parts
    them; here the constant is the smallest mean weight of a distance (UNSURE). A distance beyond which no row sees a
    key, as with a window, makes it 0; with `causal`, keys after a query are no pairs.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`, those of the last keys; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        rows: which query rows, integers `[n]`, as of `attention_weights`.
        size: height and width of a map whose places, row by row, are the keys: distances are those of places in the
            plane. `None`: those along the sequence.
        options: those of `attention_weights`.

    Returns:
        `DistanceProfile`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or no row.

    Cost:
        `Hq * n * Lk * D` multiply-adds, and a few operations per weight; memory for the weights of 64 rows.

    References:
        Z. Dong et al., "Can We Achieve Efficient Diffusion without Self-Attention? Distilling Self-Attention into
        Convolutions", 2025, arXiv:2504.21292.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k = np.zeros((2, 1, 64, 8), np.float32)
        >>> profile = la.diagnostics.attention_distances(q, k, range(64), size=(8, 8))
        >>> bool(abs(profile.means - 1 / 64).max() < 1e-6), bool(profile.local[0] < 1e-5)
        (True, True)
    """
    qn, kn = as_numpy(q, "q"), as_numpy(k, "k")
    if qn.ndim not in (3, 4) or kn.ndim != qn.ndim:
        raise ValueError(f"q, k: got shapes {qn.shape} and {kn.shape}, expected rank 3 or 4")
    keys = kn.shape[-2]
    if keys == 0:
        raise ValueError(f"k: got shape {kn.shape}, expected at least one key")
    down, across = _places(size, keys)
    chosen = np.asarray(list(rows) if isinstance(rows, range) else rows)
    if chosen.ndim != 1 or len(chosen) == 0 or chosen.dtype.kind not in "iu":
        raise ValueError(f"rows: got {chosen.dtype} {chosen.shape}, expected at least one integer, [n]")
    lengths = int(np.ceil(np.hypot(np.ptp(down), np.ptp(across)))) + 1
    causal = bool(options.get("causal", False))
    pairs, sums = np.zeros(lengths, np.int64), np.zeros((*qn.shape[:-2], lengths))
    for first in range(0, len(chosen), ROWS):
        part = chosen[first : first + ROWS]
        weights = as_numpy(attention_weights(qn, kn, part, **options), "weights")
        for n, row in enumerate(part):
            at = keys - qn.shape[-2] + (int(row) if row >= 0 else qn.shape[-2] + int(row))
            bins = np.rint(np.hypot(down - down[at], across - across[at])).astype(np.int64)
            last = at + 1 if causal else keys
            pairs += np.bincount(bins[:last], minlength=lengths)
            order = np.argsort(bins, kind="stable")
            found, starts = np.unique(bins[order], return_index=True)
            sums[..., found] += np.add.reduceat(weights[..., n, :].astype(np.float64)[..., order], starts, axis=-1)
    means = sums / np.maximum(pairs, 1)
    total = np.maximum(sums.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    shares = sums / total
    constant = np.where(pairs > 0, means, np.inf).min(axis=-1)
    return DistanceProfile(
        pairs=pairs,
        means=means,
        shares=shares,
        constant=constant,
        local=1 - constant * pairs.sum() / total[..., 0],
        distance=(shares * np.arange(lengths)).sum(axis=-1),
    )


def _places(size: object, keys: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the keys are, in the plane."""
    if size is None:
        return np.zeros(keys), np.arange(keys, dtype=np.float64)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"size: got {size!r}, expected a pair (height, width)")
    height, width = integer(size[0], "size", 1), integer(size[1], "size", 1)
    if height * width != keys:
        raise ValueError(f"size: got {height} x {width}, expected a map of the {keys} keys")
    down, across = np.divmod(np.arange(keys), width)
    return down.astype(np.float64), across.astype(np.float64)
