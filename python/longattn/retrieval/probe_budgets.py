"""Budgets of rows chosen for each KV head by what the last queries of a prefill lose with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, CodedRows, as_numpy
from longattn._checks import finite, items_of, one_of
from longattn.dense import attention
from longattn.index import Index
from longattn.kv import KVStore
from longattn.retrieval import _budgets
from longattn.retrieval.retrieval_attention import retrieval_attention

#: Rows per KV head that are tried, in this order.
BUDGETS = (16, 64, 256, 1024, 4096)

#: Runs of rows that the norm of the values is taken of, and rows of each.
_RUNS, _RUN = 64, 64


@dataclass(frozen=True, slots=True)
class ProbedBudgets:
    """What `probe_budgets` found.

    Attributes:
        top_k: rows for each KV head, as `retrieval_attention` takes them.
        error: float64 `[Hkv]`, mean error of the probe's outputs with these rows.
        met: bool `[Hkv]`, whether that is at most what was asked for; the other heads have the largest budget.
    """

    top_k: list[int]
    error: NDArray[np.float64]
    met: NDArray[np.bool_]


def probe_budgets(
    q: Array,
    store: KVStore,
    index: Index,
    *,
    error: float = 0.025,
    relative_to: Literal["values", "output"] = "values",
    budgets: Sequence[int] = BUDGETS,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    rest: Literal["values", "none", "sampled"] | None = None,
    sink_logits: Array | None = None,
) -> ProbedBudgets:
    """The smallest budget of each KV head that keeps the error of the last queries, measured against exact attention.

    Heads differ: where few rows hold the mass, or the estimate of the rest is good, few rows do; heads that spread
    their mass over what an index tells apart badly need many. No one number is right for all of them, but a few
    queries of the prefill show which is right for which.

    Budgets are tried from the least on. A KV head keeps the first with which the mean error of its outputs, over the
    queries and the query heads of its group, is at most `error`; one that no budget suits gets the largest.

    Args:
        q: queries `[Hq, n, D]` of the last `n` rows of the store; 64 and more say enough.
        store: keys and values of at least the `n` rows.
        index: an index of it. Brought up to date first.
        error: mean norm of an output's error that is allowed, over what `relative_to` says.
        relative_to: `"values"`: the root mean square norm of the head's values; `"output"`: that of the exact output.
        budgets: rows per KV head to try, ascending.
        sinks: as for `retrieval_attention`.
        window: likewise.
        scale: likewise.
        rest: likewise.
        sink_logits: likewise.

    Returns:
        A `ProbedBudgets`; give its `top_k` to `retrieval_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: no budgets, budgets that do not ascend, an error that is not positive, or what
            `retrieval_attention` refuses.

    Cost:
        Exact attention of the queries, and a retrieval step for each of them and each budget tried: of all KV heads,
        until the last of them is content.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> store = la.KVStore(kv_heads=2, head_dim=16, dtype="float32", capacity=2048)
        >>> _ = store.append(*rng.normal(size=(2, 2, 2000, 16)).astype(np.float32))
        >>> q = rng.normal(size=(4, 64, 16)).astype(np.float32)
        >>> found = la.retrieval.probe_budgets(q, store, la.index.Signatures(store), window=64)
        >>> len(found.top_k), bool(found.met.all())
        (2, True)
    """
    tried = [_budgets.count(rows, "budgets") for rows in items_of(budgets, "budgets", "numbers")]
    if not tried or tried[0] == 0 or sorted(set(tried)) != tried:
        raise ValueError(f"budgets: got {list(budgets)}, expected numbers above 0 that ascend")
    allowed = finite(error, "error")
    if allowed <= 0:
        raise ValueError(f"error: got {error}, expected a number above 0")
    one_of(relative_to, "relative_to", ("values", "output"))
    if not isinstance(store, KVStore):
        raise TypeError(f"store: got {type(store).__name__}, expected a KVStore")
    queries = as_numpy(q, "q")
    if queries.ndim != 3 or 0 in queries.shape:
        raise ValueError(f"q: got shape {queries.shape}, expected [Hq, n, D] without an axis of 0")
    options: dict[str, Any] = {
        "sinks": sinks,
        "window": window,
        "scale": scale,
        "rest": rest,
        "sink_logits": sink_logits,
        "return_stats": False,
    }
    kv_heads = store.kv_heads
    exact: NDArray[np.float32] | None = None
    unit = np.ones(0)
    chosen, errors = [tried[-1]] * kv_heads, np.full(kv_heads, np.inf)
    open_heads = np.ones(kv_heads, bool)
    for rows in tried:
        out = retrieval_attention(queries, store, index, top_k=rows, **options).out
        if exact is None:
            wide = queries.astype(np.float32)
            exact = np.asarray(
                attention(wide, store.keys, store.values, causal=True, scale=scale, sinks=sink_logits), np.float32
            )
            unit = _unit(exact, store, relative_to)
        gap = np.linalg.norm(np.asarray(out, np.float32) - exact, axis=-1)
        # [Hkv, G, n] over [Hkv, G, n] or [Hkv, 1, 1].
        found = (gap.reshape(kv_heads, -1, gap.shape[1]) / unit).mean((1, 2))
        good = open_heads & (found <= allowed)
        for head in np.flatnonzero(open_heads if rows == tried[-1] else good):
            chosen[head], errors[head] = rows, found[head]
        open_heads &= ~good
        if not open_heads.any():
            break
    return ProbedBudgets(chosen, errors, errors <= allowed)


def _unit(exact: NDArray[np.float32], store: KVStore, relative_to: str) -> NDArray[np.float64]:
    """What errors are relative to, `[Hkv, G, n]` or `[Hkv, 1, 1]`; at least the least float."""
    least = np.finfo(np.float32).tiny
    if relative_to == "output":
        norms: NDArray[np.float64] = np.linalg.norm(exact.astype(np.float64), axis=-1)
        return np.maximum(norms.reshape(store.kv_heads, -1, exact.shape[1]), least)
    # A sample of the rows, in runs: their norm is a unit, not a result.
    runs = [slice(first, first + _RUN) for first in range(0, len(store), max(_RUN, len(store) // _RUNS))]
    values = store.values
    squares = np.zeros(store.kv_heads)
    rows = 0
    for run in runs:
        part = np.asarray(values.rows(run) if isinstance(values, CodedRows) else values[:, run], np.float64)
        squares += (part**2).sum((1, 2))
        rows += part.shape[1]
    norms = np.sqrt(squares / rows)
    return np.maximum(norms[:, None, None], least)
