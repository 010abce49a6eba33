"""Lightweight top-k: a narrow attention of its own picks the keys of each query, for all heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import batched, check_floating, flag, integer, real
from longattn.dense._options import Options
from longattn.methods import Method
from longattn.pictures import causally, example
from longattn.reference import sparse as reference
from longattn.sparse._selecting import listed
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sparse_attention import sparse_attention


def lightweight_topk_select(
    x_q: Array,
    x_k: Array,
    wq: Array,
    wk: Array,
    *,
    rho: float = 0.05,
    min_keys: int = 10,
    causal: bool = False,
) -> RowLists:
    """The keys with the largest `(x_q wq) . (x_k wk)` of each query.

    Args:
        x_q: what queries are made of, `[B, Lq, E]` or `[Lq, E]`; floating.
        x_k: what keys are made of, `[B, Lk, E]` or `[Lk, E]`.
        wq: projection `[E, d]` of `x_q`, `d` small.
        wk: projection `[E, d]` of `x_k`.
        rho: share of the keys that a query sees, above 0 and at most 1; rounded up.
        min_keys: but at least so many.
        causal: the query `i` sees keys up to its own position, `Lk - Lq + i`.

    Returns:
        A list for each query, common to all heads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Lq * Lk * d` multiply-adds, and the projections. Memory: one row of logits per query at work.

    Example:
        >>> import numpy as np, longattn as la
        >>> x = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
        >>> lists = la.sparse.lightweight_topk_select(x, x, np.eye(8), np.eye(8), rho=0.1, causal=True)
        >>> lists.indptr[0, 0, -1] - lists.indptr[0, 0, -2]  # keys of the last query
        np.int64(30)
    """
    share = real(rho, "rho")
    if not 0 < share <= 1:
        raise ValueError(f"rho: got {rho}, expected above 0 and at most 1")
    least, causal = integer(min_keys, "min_keys", 0), flag(causal, "causal")
    q, k = (_projected(x, w, *names) for x, w, names in ((x_q, wq, ("x_q", "wq")), (x_k, wk, ("x_k", "wk"))))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"x_k: got batch {k.shape[0]} and projected width {k.shape[3]}, expected {q.shape[0]} and {q.shape[3]}"
        )
    options: Options = {"causal": causal}
    chosen = _core.best_of_rows(q, k, share, least, options)
    lengths = (q.shape[2], k.shape[2])
    return RowLists(
        **listed(chosen, (q.shape[0], 1, lengths[0])),  # type: ignore[arg-type]
        lengths=lengths,
        block_q=1,
        scored=q.shape[0] * lengths[0] * lengths[1],
    )


def _projected(x: Array, w: Array, x_name: str, w_name: str) -> NDArray[np.float32]:
    """`x w` as `[B, 1, L, d]`."""
    xn, wn = as_numpy(x, x_name), as_numpy(w, w_name)
    check_floating(xn, x_name)
    check_floating(wn, w_name)
    if xn.ndim not in (2, 3):
        raise ValueError(f"{x_name}: got shape {xn.shape}, expected [B, L, E] or [L, E]")
    if wn.ndim != 2 or wn.shape[0] != xn.shape[-1] or wn.shape[1] == 0:
        raise ValueError(f"{w_name}: got shape {wn.shape}, expected [{xn.shape[-1]}, d]")
    projected: NDArray[np.float32] = xn.astype(np.float32, copy=False) @ wn.astype(np.float32, copy=False)
    return batched(projected, 3)[:, None]


def lightweight_topk_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    lists: RowLists,
    causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention of all heads over the keys that a narrow attention picked for each query.

    `lightweight_topk_select` picks; layers that share its lists are given the same ones (layer `i` those of
    `shared_layer(i, r)`). While decoding, keep `x_k wk` of earlier tokens beside keys and values.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        lists: the keys of each query.
        causal: a query sees only keys at its own position and before, of those in its list.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(D + Dv)` multiply-adds per query head and listed key, beside the selection.

    References:
        Z. Liu et al., "Only 5% Attention Is All You Need: Efficient Long-range Document-level Neural Machine
        Translation", 2023, arXiv:2309.14174.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((300, 8), dtype=np.float32)
        >>> q, k, v = rng.standard_normal((3, 4, 300, 16), dtype=np.float32)
        >>> lists = la.sparse.lightweight_topk_select(x, x, np.eye(8), np.eye(8), rho=1.0)
        >>> np.allclose(la.sparse.lightweight_topk_attention(q, k, v, lists=lists), la.attention(q, k, v), atol=1e-5)
        True
    """
    if not isinstance(lists, RowLists):
        raise TypeError(f"lists: got {type(lists).__name__}, expected RowLists")
    return sparse_attention(q, k, v, lists, causal=causal, scale=scale, **options)


def shared_layer(layer: int, together: int) -> int:
    """The layer whose lists layer `layer` uses when so many layers that follow one another go together.

    Args:
        layer: number of a layer, from 0.
        together: layers that share lists; 1 is none.

    Returns:
        The lowest layer of the group.

    Raises:
        TypeError: no integers.
        ValueError: a negative layer, or no layers.

    Cost:
        Nothing.
    """
    layer, together = integer(layer, "layer", 0), integer(together, "together", 1)
    return layer // together * together


def next_rho(rho: float, mass: float, *, target: float = 0.95, step: float = 0.001, least: float = 0.01) -> float:
    """One step of the rule by which training adapts `rho`: less where the kept keys have more than enough mass.

    Args:
        rho: the share now (training begins with 1).
        mass: share of the narrow attention's softmax that the kept keys have.
        target: enough. (The paper's value is not known to us; this is a guess.)
        step: by how much `rho` changes.
        least: the smallest `rho`.

    Returns:
        The share from now on, between `least` and 1.

    Raises:
        TypeError: no numbers.

    Cost:
        Nothing.
    """
    rho, mass, target = real(rho, "rho"), real(mass, "mass"), real(target, "target")
    step, least = real(step, "step"), real(least, "least")
    return min(1.0, max(least, rho - math.copysign(step, mass - target) if mass != target else rho + step))


def _example_mask() -> NDArray[np.bool_]:
    q, k = (x[0, 0] for x in example())
    lists = lightweight_topk_select(q, k, np.eye(32), np.eye(32), rho=0.12, min_keys=4, causal=True)
    return causally(lists.to_dense_mask())


METHOD = Method(
    name="lightweight_topk_attention",
    family="sparse",
    title="Only 5% Attention Is All You Need: Efficient Long-range Document-level Neural Machine Translation",
    year=2023,
    arxiv="2309.14174",
    function=lightweight_topk_attention,
    reference=reference.lightweight_topk_attention,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "With `rho` 1 it is dense attention.",
        "With a single head's own queries and keys to select by, the keys are those of its largest logits.",
        "Shared lists are those that equal weights select again.",
        "Decode steps give the rows of the prefill.",
    ),
    tests="tests/sparse/test_lightweight_topk_attention.py",
    cost="`Lq * Lk * d` multiply-adds to select, `Lq * rho * Lk * (D + Dv)` per query head to attend.",
    mask=_example_mask,
)
