"""Which tokens stay: the best of each group, within budgets, or the best that differ from one another.

What methods that drop tokens of an image have in common. Scores are a few thousand numbers; what is computed from
queries and keys is computed elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, integer, real
from longattn.dense._query_key import query_key_inputs
from longattn.dense.prob_reduce import prob_reduce


def token_mass(
    q: Array, k: Array, *, query_weights: Array | None = None, causal: bool = False, scale: float | None = None
) -> Array:
    """The weight that each key gets from all query rows, averaged over heads.

    Args:
        q: queries `[B, Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`; any of the three dtypes.
        query_weights: floating `[B, Lq]`: factors of the rows; `None` is 1.
        causal: rows see keys up to their own position, the last row being at the last key.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Float32 `[B, Lk]` in the kind of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * Lq * Lk * D` multiply-adds; no weights are stored.
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 4:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, Lq, D]")
    rows = None
    if query_weights is not None:
        rows = scores(query_weights, "query_weights", (len(qn), qn.shape[2])).astype(np.float32)
        rows = np.broadcast_to(rows[:, None], qn.shape[:3])
    found = prob_reduce(qn, kn, column_mass=True, query_weights=rows, causal=causal, scale=scale).column_mass
    return like(q, np.asarray(found).mean(axis=1, dtype=np.float64).astype(np.float32))


def split_budget(shares: Array, total: int, *, capacity: int | None = None) -> NDArray[np.int64]:
    """A number of tokens, divided among groups by their shares.

    What a group's share is above its capacity goes to the others by their shares. Each group gets the whole part; what
    is left goes to those of the largest remainders, the first of equal ones.

    Args:
        shares: floating `[G]`, not negative, one of them positive.
        total: tokens of all groups together.
        capacity: the most of one group; `None` is no limit.

    Returns:
        Int64 `[G]` with sum `total`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: negative shares or none above 0, or a total that the groups do not hold.

    Cost:
        A sort of the groups, and a pass over them for each that is full.
    """
    x = scores(shares, "shares", (None,))
    if not x.size or x.min() < 0 or not x.sum() > 0:
        raise ValueError(f"shares: got {x.tolist()}, expected numbers of at least 0, one of them above 0")
    wanted = integer(total, "total", 0)
    most = wanted if capacity is None else integer(capacity, "capacity", 0)
    if wanted > most * x.size:
        raise ValueError(f"total: got {wanted}, expected at most {most * x.size}, {most} of each of {x.size} groups")
    quota, free = np.zeros(x.size), np.ones(x.size, bool)
    while free.any():
        share = x * free if (x * free).sum() > 0 else free.astype(np.float64)
        quota[free] = ((wanted - quota[~free].sum()) * share / share.sum())[free]
        full = free & (quota > most)
        if not full.any():
            break
        quota[full], free = most, free & ~full
    # Quotas that are equal up to rounding get the same.
    budgets = np.floor(quota + 1e-9).astype(np.int64)
    lacking = np.where(budgets < most, np.round(quota - budgets, 9), -np.inf)
    budgets[np.argsort(-lacking, kind="stable")[: wanted - int(budgets.sum())]] += 1
    return budgets


def budgeted_topk(values: Array, groups: Array, budgets: Array) -> NDArray[np.int64]:
    """The tokens of largest value in each group, as many as the group's budget.

    Args:
        values: floating `[N]`.
        groups: integers `[N]`: the group of each token, 0 to `G - 1`.
        budgets: integers `[G]`, at most the tokens of the group.

    Returns:
        Int64 `[sum of budgets]`, ascending; of equal values the first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, unknown groups, or a budget that its group does not hold.

    Cost:
        A sort.
    """
    x = scores(values, "values", (None,))
    of, each = _integers(groups, "groups"), _integers(budgets, "budgets")
    if of.shape != x.shape or (of.size and not 0 <= of.min() <= of.max() < len(each)):
        raise ValueError(f"groups: got shape {of.shape}, expected {x.shape}, each from 0 to {len(each) - 1}")
    held = np.bincount(of, minlength=len(each))
    if each.size and (each.min() < 0 or (each > held).any()):
        raise ValueError(f"budgets: got {each.tolist()}, expected at most {held.tolist()}, the groups' tokens")
    order = np.lexsort((-x, of))
    rank = np.arange(x.size) - np.repeat(np.cumsum(held) - held, held)
    kept: NDArray[np.int64] = np.sort(order[rank < each[of[order]]])
    return kept


def diverse_topk(values: Array, vectors: Array, count: int, *, power: float = 1.0) -> NDArray[np.int64]:
    """Tokens of large value that differ from one another, chosen one by one.

    The first is that of the largest value. Then always the one with the largest
    `value ** power * (1 - max(cosine with those chosen))`.

    Args:
        values: floating `[N]`, not negative.
        vectors: floating `[N, D]`: what tells how tokens differ.
        count: how many.
        power: how much the value counts, at least 0; with 0 it decides on the first only.

    Returns:
        Int64 `[count]`, ascending; of equal ones the first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `count * N * D` multiply-adds, by numpy.
    """
    x = scores(values, "values", (None,))
    v = scores(vectors, "vectors", (x.size, None))
    if x.size and x.min() < 0:
        raise ValueError(f"values: got {x.min()}, expected numbers of at least 0")
    wanted, exponent = integer(count, "count", 0, x.size), real(power, "power")
    if not 0 <= exponent < np.inf:
        raise ValueError(f"power: got {power}, expected a finite number of at least 0")
    if not wanted:
        return np.zeros(0, np.int64)
    unit = (v / np.maximum(np.sqrt((v**2).sum(axis=1, keepdims=True)), 1e-12)).astype(np.float32)
    weight = (x / max(float(x.max()), 1e-300)) ** exponent
    chosen = [int(np.argmax(x))]
    nearest = np.full(x.size, -np.inf)
    while len(chosen) < wanted:
        np.maximum(nearest, unit @ unit[chosen[-1]], out=nearest)
        gain = weight * np.maximum(1 - nearest, 0)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return np.sort(np.array(chosen, np.int64))


def scores(x: Array, name: str, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    """Finite floating numbers of a shape (`None`: any length), as float64."""
    a = as_numpy(x, name, any_strides=True)
    check_floating(a, name)
    if a.ndim != len(shape) or any(n is not None and m != n for m, n in zip(a.shape, shape, strict=True)):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {a.shape}, expected [{wanted}]")
    wide: NDArray[np.float64] = a.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    return wide


def token_numbers(x: Array, name: str, tokens: int) -> NDArray[np.int64]:
    """Ascending numbers of tokens below `tokens`, at least one."""
    a = _integers(x, name)
    if not a.size or a[0] < 0 or a[-1] >= tokens or (np.diff(a) <= 0).any():
        raise ValueError(f"{name}: got {a.tolist()[:8]}, expected ascending numbers from 0 to {tokens - 1}")
    return a


def _integers(x: Array, name: str) -> NDArray[np.int64]:
    a = as_numpy(x, name, any_strides=True)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {a.dtype}, expected integers")
    if a.ndim != 1:
        raise ValueError(f"{name}: got shape {a.shape}, expected rank 1")
    return a.astype(np.int64)
