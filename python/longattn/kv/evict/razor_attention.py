"""RazorAttention: retrieval heads keep everything, the others sinks, a window and one compensation row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, flag, integer
from longattn.kv.evict.policy import Mask, Policy
from longattn.kv.slot_store import SlotStore
from longattn.methods import Method
from longattn.reference import kv as reference


class RazorAttention(Policy):
    """Full cache for retrieval heads; first rows, last rows and a compensation row for the others.

    A KV head that is no retrieval head keeps the first `sinks` rows and the last `max(window, ceil(N / ratio))` of the
    `N` that came. What it drops enters its mean row (the paper's compensation token): one key with a logit of
    `ln` of their number more than the mean key's own. Keys are averaged as they are stored, after rotation. A prompt
    is attended to in full, then compressed.

    Which heads are retrieval heads: `longattn.diagnostics.echo_induction_scores` and `razor_heads`.

    Args:
        retrieval_heads: boolean `[Hkv]`, True for heads that keep everything.
        sinks: first rows that are kept.
        window: last rows that are kept at least.
        ratio: of longer texts, one row in `ratio` is kept.
        compensation: whether there is a compensation row.

    Raises:
        TypeError: an argument of another kind.
        ValueError: numbers below 1 (of sinks, below 0), or another shape.

    References:
        H. Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", 2024,
        arXiv:2407.15891.
    """

    def __init__(
        self,
        retrieval_heads: Array,
        *,
        sinks: int = 4,
        window: int = 4000,
        ratio: int = 5,
        compensation: bool = True,
    ) -> None:
        x = as_numpy(retrieval_heads, "retrieval_heads")
        if x.dtype != np.bool_:
            raise TypeError(f"retrieval_heads: got dtype {x.dtype}, expected bool")
        if x.ndim != 1 or x.size == 0:
            raise ValueError(f"retrieval_heads: got shape {x.shape}, expected [Hkv]")
        self.retrieval_heads = x
        self.sinks = integer(sinks, "sinks", 0)
        self.window, self.ratio = integer(window, "window", 1), integer(ratio, "ratio", 1)
        self.residual = "mean" if flag(compensation, "compensation") else None

    def capacity(self, prompt: int) -> None:
        """No limit: retrieval heads keep everything."""
        return

    def check(self, kv_heads: int, rows: int, **info: Any) -> dict[str, Any]:
        """The heads must be those of the cache."""
        if len(self.retrieval_heads) != kv_heads:
            raise ValueError(f"retrieval_heads: got {len(self.retrieval_heads)} heads, expected {kv_heads}")
        return super().check(kv_heads, rows, **info)

    def keep(self, q: Array, k: Array, options: dict[str, Any]) -> Mask | None:
        """What the next row may see."""
        length = k.shape[1]
        j = np.arange(length)
        near = (j < self.sinks) | (j > length - self._last(length + 1))
        return np.asarray(self.retrieval_heads[:, None] | near)

    def choose(self, step: int) -> Mask | None:
        """Of the other heads, the rows that leave the window."""
        gone = self.live & (self.positions >= self.sinks) & (self.positions <= step + 1 - self._last(step + 2))
        return np.asarray(gone & ~self.retrieval_heads[:, None])

    def _last(self, rows: int) -> int:
        """Last rows that are kept of so many."""
        return max(self.window, -(-rows // self.ratio))


def razor_compress(
    k: Array, v: Array, keep: Array
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Kept rows and one compensation row per head, with the bias that dense attention takes for them.

    `longattn.attention(q, k2, v2, bias=bias)` is attention over the kept rows and so many copies of the mean pair as
    rows were dropped. Heads may keep different numbers of rows; shorter ones are padded with rows of zeros whose
    bias is -inf, as is a head's compensation row where it drops nothing.

    Args:
        k: keys `[Hkv, L, D]`; float32, float16 or bfloat16.
        v: values `[Hkv, L, Dv]`; likewise.
        keep: boolean `[Hkv, L]`, or `[L]` for all heads.

    Returns:
        Keys `[Hkv, n + 1, D]`, values `[Hkv, n + 1, Dv]` and bias `[Hkv, 1, n + 1]`, float32; `n` is the most rows
        that a head keeps, the last row the compensation row. For query heads, repeat the bias over the group.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        One pass over the rows.
    """
    kn, vn, kept = as_numpy(k, "k"), as_numpy(v, "v"), as_numpy(keep, "keep", any_strides=True)
    for x, name in ((kn, "k"), (vn, "v")):
        check_float_storage(x, name)
        if x.ndim != 3 or x.shape[:2] != kn.shape[:2] or 0 in x.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected [Hkv, L, dim], none of them 0")
    heads, length, dim = kn.shape
    if kept.dtype != np.bool_:
        raise TypeError(f"keep: got dtype {kept.dtype}, expected bool")
    if kept.shape not in ((length,), (heads, length)):
        raise ValueError(f"keep: got shape {kept.shape}, expected {(length,)} or {(heads, length)}")
    kept = np.broadcast_to(kept, (heads, length))
    most = int(kept.sum(axis=1).max())
    store = SlotStore(heads, dim, vn.shape[2], dtype="float32", slots=max(most, 1))
    store.append(kn, vn, keep=kept, fold=True)
    keys = np.zeros((heads, most + 1, dim), np.float32)
    values = np.zeros((heads, most + 1, vn.shape[2]), np.float32)
    bias = np.full((heads, 1, most + 1), -np.inf, np.float32)
    for head in range(heads):
        _, of_keys, of_values = store.rows(head)
        n = len(of_keys)
        keys[head, :n], values[head, :n], bias[head, :, :n] = of_keys, of_values, 0
        mean_key, mean_value, count = store.mean_row(head)
        if count:
            keys[head, -1], values[head, -1], bias[head, :, -1] = mean_key, mean_value, np.log(count)
    return keys, values, bias


METHOD = Method(
    name="razor_attention",
    family="kv",
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    year=2024,
    arxiv="2407.15891",
    function=RazorAttention,
    reference=reference.RazorAttention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With retrieval heads only it is dense attention.",
        "A compensation row of one dropped row is that row.",
        "Where all dropped keys are equal the result is dense attention, whatever the values.",
        "Means that grow row by row are the means of the dropped rows.",
        "Where nothing was dropped there is no compensation row.",
    ),
    tests="tests/kv/test_razor_attention.py",
    cost="A step reads all rows of retrieval heads and `sinks + max(window, N / ratio) + 1` of the others.",
)
