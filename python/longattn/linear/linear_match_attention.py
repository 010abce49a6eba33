"""Linear attention between the features of two images, and how matches are read from them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, finite, integer
from longattn.dense.attention import attention
from longattn.linear._global import attend, inputs
from longattn.linear.key_statistics import key_mask
from longattn.methods import Method
from longattn.reference import linear as reference

#: Rows of `a` whose confidences are made at once.
ROWS = 256


def linear_match_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_mask: Array | None = None,
    mask: Array | None = None,
    eps: float = 1e-6,
    out: Array | None = None,
) -> Any:
    """`phi(q_i)^T S / (phi(q_i)^T z + eps)` with `phi = elu + 1`, over one flattened map or from one to another.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        q_mask: boolean `[Lq]` or `[B, Lq]`; False makes the query's output 0.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count.
        eps: added to the denominator.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds.

    References:
        J. Sun et al., "LoFTR: Detector-Free Local Feature Matching with Transformers", 2021, arXiv:2104.00680.
    """
    qn, _, _ = arrays = inputs(q, k, v)
    kept = key_mask(q_mask, qn.shape[0], qn.shape[2], "q_mask")
    maps = {"map": "elu1"}, {"map": "elu1"}
    found = attend(q, arrays, maps, ("divide", finite(eps, "eps", 0), 0.0), mask=mask, out=out)
    if kept is not None:
        plain = as_numpy(found, "out")
        (plain if plain.ndim == 4 else plain[None]).swapaxes(1, 2)[~kept] = 0
    return found


def dual_softmax_matches(
    a: Array,
    b: Array,
    *,
    temperature: float = 0.1,
    threshold: float = 0.2,
    a_size: tuple[int, int] | None = None,
    b_size: tuple[int, int] | None = None,
    border: int = 2,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Matches of two sets of features whose confidence, row softmax times column softmax, is a mutual maximum.

    Scores are `a_i . b_j / (C * temperature)`. They are never stored: two passes give the log-sum-exp of rows and
    columns, and a third one goes through blocks of confidences.

    Args:
        a: features `[L, C]`; float32, float16 or bfloat16.
        b: features `[S, C]`; likewise.
        temperature: of the softmax, above 0.
        threshold: matches have more confidence than this.
        a_size: height and width of the map that `a` is; with it, matches near its border are dropped.
        b_size: those of `b`.
        border: cells along each side of a map whose matches are dropped.

    Returns:
        int64 `[n, 2]`, the indices of matches in `a` and `b`, in the order of `a`; and their confidences, float32
        `[n]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `3 * L * S * C` multiply-adds; memory for 256 rows of `S` numbers.
    """
    features: list[NDArray[np.float32]] = []
    for x, name in ((a, "a"), (b, "b")):
        n = as_numpy(x, name)
        check_float_storage(n, name)
        if n.ndim != 2 or n.shape[1] == 0 or (features and n.shape[1] != features[0].shape[1]):
            raise ValueError(f"{name}: got shape {n.shape}, expected [L, C], C the same in both")
        features.append(np.ascontiguousarray(n, np.float32))
    one, two = features
    heat, least = finite(temperature, "temperature"), finite(threshold, "threshold")
    if heat <= 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0")
    cells = integer(border, "border", 0)
    inner = [
        np.ones(len(x), bool) if size is None else _inside(size, len(x), cells, name)
        for x, size, name in ((one, a_size, "a_size"), (two, b_size, "b_size"))
    ]
    if not len(one) or not len(two):
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    scale = 1 / (one.shape[1] * heat)
    row_lse, column_lse = (
        attention(x[None], y[None], y[None, :, :1], scale=scale, return_lse=True)[1][0]
        for x, y in ((one, two), (two, one))
    )
    best_of_row, row_best = np.empty(len(one), np.int64), np.empty(len(one), np.float32)
    best_of_column, column_best = np.zeros(len(two), np.int64), np.full(len(two), -np.inf, np.float32)
    for first in range(0, len(one), ROWS):
        rows = slice(first, first + ROWS)
        twice = 2 * np.float32(scale) * (one[rows] @ two.T)
        log = twice - row_lse[rows, None] - column_lse
        best_of_row[rows] = log.argmax(axis=1)
        row_best[rows] = log.max(axis=1)
        here = log.argmax(axis=0)
        most = log[here, np.arange(len(two))]
        better = most > column_best
        best_of_column[better], column_best[better] = here[better] + first, most[better]
    index = np.arange(len(one))
    kept = (best_of_column[best_of_row] == index) & (np.exp(row_best) > least) & inner[0] & inner[1][best_of_row]
    return np.stack([index[kept], best_of_row[kept]], axis=1), np.exp(row_best[kept])


def refine_matches(window_a: Array, window_b: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where in its window each match lies: the mean place under `softmax(C^-0.5 f_centre . f_j)`, and its spread.

    Args:
        window_a: features `[n, w * w, C]` around the matches in the first map, whose middle one is the centre; float32,
            float16 or bfloat16; `w` odd.
        window_b: features `[n, w * w, C]` around them in the second.

    Returns:
        float32 `[n, 2]`, x and y from -1 to 1, and their standard deviations `[n]`, summed over both axes.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `n * w * w * C` multiply-adds.
    """
    windows: list[NDArray[Any]] = []
    for x, name in ((window_a, "window_a"), (window_b, "window_b")):
        n = as_numpy(x, name)
        check_float_storage(n, name)
        if n.ndim != 3 or n.shape[2] == 0 or (windows and n.shape != windows[0].shape):
            raise ValueError(f"{name}: got shape {n.shape}, expected [n, w * w, C], the same for both")
        windows.append(n)
    side = round(windows[0].shape[1] ** 0.5)
    if side % 2 == 0 or side * side != windows[0].shape[1]:
        raise ValueError(f"window_a: got {windows[0].shape[1]} features, expected the square of an odd number")
    centre = np.asarray(windows[0][:, None, side * side // 2], np.float32)
    axis = np.linspace(-1, 1, side) if side > 1 else np.zeros(1)
    y, x = (part.reshape(-1) for part in np.meshgrid(axis, axis, indexing="ij"))
    grid = np.stack([x, y, x * x, y * y], axis=1).astype(np.float32)
    keys = np.asarray(windows[1], np.float32)
    places = np.broadcast_to(grid[None], (len(keys), *grid.shape))
    found = attention(centre, keys, places)[:, 0] if len(keys) else np.zeros((0, 4), np.float32)
    variance = np.maximum(found[:, 2:] - found[:, :2] ** 2, 0)
    return found[:, :2], np.sqrt(variance).sum(axis=1)


def _inside(size: tuple[int, int], tokens: int, border: int, name: str) -> NDArray[np.bool_]:
    """Whether each token of a map lies at least `border` cells from its sides."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"{name}: got {size!r}, expected a pair (height, width)")
    height, width = (integer(n, name, 1) for n in size)
    if height * width != tokens:
        raise ValueError(f"{name}: got {height} x {width}, expected the {tokens} features as a map")
    inner = np.zeros((height, width), bool)
    inner[border : max(height - border, 0), border : max(width - border, 0)] = True
    return inner.reshape(-1)


METHOD = Method(
    name="linear_match_attention",
    family="linear",
    title="LoFTR: Detector-Free Local Feature Matching with Transformers",
    year=2021,
    arxiv="2104.00680",
    function=linear_match_attention,
    reference=reference.linear_match_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "Results do not depend on how keys fall into blocks.",
        "A single key returns `v z / (z + eps)`.",
        "The confidence of two single features is 1.",
        "Confidences are at most the row's and the column's softmax.",
        "A one-hot window gives its place, with a spread of 0.",
    ),
    tests="tests/linear/test_linear_match_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds.",
)
