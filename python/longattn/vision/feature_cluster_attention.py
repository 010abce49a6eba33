"""Attention inside balanced clusters of alike tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_float_storage, dense_inputs, integer, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import vision as reference

#: Factor on the cosines in the soft assignment of tokens to halves.
SHARPNESS = 100.0
#: Refinements of the two centres.
REFINEMENTS = 2


def feature_cluster_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    cluster: int = 49,
    overlap: int = 20,
    scale: float | None = None,
    order: Array | None = None,
) -> Array:
    """Attention inside clusters that `balanced_clusters` makes of the queries, with part of the sibling cluster.

    Clusters of `cluster` tokens stand one after another in the order of the clustering. Queries of an even cluster also
    see the first `overlap` keys of the one after it, those of an odd cluster the last `overlap` keys of the one before
    it, its sibling. In the paper's block this is added to attention in windows (`grouped_attention`).

    Args:
        q: queries `[B, Hq, N, D]`, `N = cluster * 2 ** levels`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, N, D]`; any of the three dtypes.
        v: values `[B, Hkv, N, Dv]`; dtype of `k`.
        cluster: tokens of a cluster.
        overlap: keys of the sibling that are seen as well, at most `cluster`.
        scale: factor on the logits; `None` is `D ** -0.5`.
        order: integers `[B, Hq, N]` that `balanced_clusters` gave before, to use again; `None` makes them from `q`.

    Returns:
        `[B, Hq, N, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * N * (cluster + overlap) * (D + Dv)` multiply-adds, and the clustering; copies of queries, keys and values
        in the clusters' order, for each query head.

    References:
        T. Yu et al., "BOAT: Bilateral Local Attention Vision Transformer", 2022, arXiv:2201.13027.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 64, 8), dtype=np.float32)
        >>> longattn.vision.feature_cluster_attention(q, k, v, cluster=16, overlap=4).shape
        (1, 2, 64, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 4:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, N, D]")
    batch, heads, tokens, dim = qn.shape
    if kn.shape[2] != tokens:
        raise ValueError(f"k: got length {kn.shape[2]}, expected {tokens} as in q")
    size = integer(cluster, "cluster", 1)
    levels = _levels(tokens, size)
    extra = integer(overlap, "overlap", 0, size)
    factor = scale_factor(scale, dim)
    by = balanced_clusters(qn, levels) if order is None else _given(order, qn.shape[:3])
    by = np.asarray(by)
    count = tokens // size
    b, h = np.arange(batch)[:, None, None], np.arange(heads)[None, :, None]
    group = heads // kn.shape[1]
    rows = qn[b, h, by]
    keys, values = kn[b, h // group, by], vn[b, h // group, by]
    out = np.empty((*qn.shape[:3], vn.shape[3]), qn.dtype)
    if count == 1:
        attention(*(x.reshape(-1, 1, size, x.shape[-1]) for x in (rows, keys, values)), scale=factor,
                  out=out.reshape(-1, 1, size, out.shape[-1]))  # fmt: skip
    elif tokens:
        # A pair of siblings is one stretch of keys, of which each sees its own end.
        pairs = [x.reshape(-1, 1, 2 * size, x.shape[-1]) for x in (rows, keys, values, out)]
        for half, seen in ((slice(0, size), slice(0, size + extra)), (slice(size, None), slice(size - extra, None))):
            attention(pairs[0][:, :, half], pairs[1][:, :, seen], pairs[2][:, :, seen], scale=factor,
                      out=pairs[3][:, :, half])  # fmt: skip
    back = np.empty_like(out)
    back[b, h, by] = out
    return like(q, back)


def balanced_clusters(x: Array, levels: int) -> NDArray[np.int64]:
    """An order of tokens in which alike ones stand together, by repeated halving.

    At each level each cluster is cut in two of equal size. Two centres start as the directions of the means of its
    first and second half, in the order so far; twice, tokens are shared softly between them by their cosines (times
    100) and the centres become the directions of the sums of their shares. Tokens are then sorted by
    `(1 + cosine to the first) / (1 + cosine to the second)`, ascending, equal ones as they were, and cut in the middle.

    Args:
        x: tokens `[B, H, N, D]`, `N` a multiple of `2 ** levels`; float32, float16 or bfloat16.
        levels: halvings.

    Returns:
        Int64 `[B, H, N]`: which token is where; cluster `c` is the `c`-th of `2 ** levels` equal stretches.

    Raises:
        TypeError: no array of a storage dtype.
        ValueError: another shape, or a length that cannot be halved so often.

    Cost:
        `8 * N * D` multiply-adds per level and head, by numpy in float32, and a sort.
    """
    a = as_numpy(x, "x")
    check_float_storage(a, "x")
    if a.ndim != 4:
        raise ValueError(f"x: got shape {a.shape}, expected [B, H, N, D]")
    rounds = integer(levels, "levels", 0, 62)
    batch, heads, tokens, dim = a.shape
    if tokens % 2**rounds:
        raise ValueError(f"levels: got {rounds}, expected {tokens} tokens to be a multiple of {2**rounds}")
    unit = _direction(np.asarray(a, np.float32))
    full = np.asarray(a, np.float32)
    order = np.broadcast_to(np.arange(tokens), (batch, heads, tokens)).copy()
    for level in range(rounds):
        shape = (batch, heads, 2**level, tokens // 2**level)
        index = order[..., None]
        at = np.take_along_axis(unit, index, axis=2).reshape(*shape, dim)
        plain = np.take_along_axis(full, index, axis=2).reshape(*shape, dim)
        halves = reshaped(plain, *shape[:3], 2, -1, dim)
        centres = _direction(halves.mean(axis=4))
        for _ in range(REFINEMENTS):
            cosines = at @ centres.swapaxes(-1, -2)
            first = 1 / (1 + np.exp(np.clip(SHARPNESS * (cosines[..., 1] - cosines[..., 0]), -80, 80)))
            shares = np.stack([first, 1 - first], axis=-2)
            centres = _direction(np.asarray(shares @ plain, np.float32))
        cosines = at @ centres.swapaxes(-1, -2)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num((cosines[..., 0] + 1) / (cosines[..., 1] + 1), nan=1.0)
        sort = np.argsort(ratio, axis=-1, kind="stable")
        order = np.take_along_axis(order.reshape(shape), sort, axis=-1).reshape(order.shape)
    return order


def _direction(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of norm 1; rows of zeros stay."""
    norms = np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
    unit: NDArray[np.float32] = x / np.maximum(norms, np.float32(1e-12))
    return unit


def _levels(tokens: int, size: int) -> int:
    count = tokens // size
    if tokens % size or count & (count - 1) or not count:
        raise ValueError(f"cluster: got {size}, expected {tokens} tokens to be {size} times a power of 2")
    return count.bit_length() - 1


def _given(order: Array, shape: tuple[int, ...]) -> NDArray[np.int64]:
    a = as_numpy(order, "order")
    if a.dtype.kind not in "iu":
        raise TypeError(f"order: got dtype {a.dtype}, expected integers")
    if a.shape != shape:
        raise ValueError(f"order: got shape {a.shape}, expected {shape}")
    if not (np.sort(a, axis=-1) == np.arange(shape[2])).all():
        raise ValueError("order: got repeated or other numbers, expected each token once per head")
    return np.asarray(a, np.int64)


METHOD = Method(
    name="feature_cluster_attention",
    family="vision",
    title="BOAT: Bilateral Local Attention Vision Transformer",
    year=2022,
    arxiv="2201.13027",
    function=feature_cluster_attention,
    reference=reference.feature_cluster_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "One cluster gives attention.",
        "Clusters of one token without overlap return the values.",
        "Equal queries give blocks of tokens in their order.",
        "Two opposite groups are found at the first halving.",
    ),
    tests="tests/vision/test_feature_cluster_attention.py",
    cost="`Hq * N * (cluster + overlap) * (D + Dv)` multiply-adds, and the clustering.",
    mask=lambda: seen(feature_cluster_attention, *example(), cluster=16, overlap=4),
)
