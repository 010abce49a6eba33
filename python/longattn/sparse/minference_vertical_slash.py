"""MInference's vertical and slanted lines: keys, and distances, that the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array
from longattn._checks import scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import choose
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import block_bounds, keep_integers, only_causal, selector_inputs
from longattn.sparse.composed import Composable
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class VerticalSlash(Composable):
    """The vertical-slash pattern of MInference, found from the last queries.

    The softmax weights of the last `last_q` queries are summed for each key (a vertical line) and for each distance
    from the query to the key (a slanted one). A block of queries lists the keys of the best vertical lines, and
    those that lie on one of the best slanted lines for some query of the block.

    Args:
        last_q: queries whose weights are summed, fewer where there are fewer.
        vertical: vertical lines, those of `n_sink` included.
        slash: slanted lines, those of `local` included.
        n_sink: first keys, whose lines are always taken.
        local: smallest distances, whose lines are always taken.
        block_q: queries that share a list.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1 (0 for counts that may be none).
    """

    last_q: int = 64
    vertical: int = 500
    slash: int = 700
    n_sink: int = 30
    local: int = 100
    block_q: int = 64

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, last_q=1, vertical=0, slash=0, n_sink=0, local=1, block_q=1)

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> RowLists:
        """The lists, one set for each query head."""
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        batch, heads, rows, dim = qn.shape
        keys, kv_heads = kn.shape[2], kn.shape[1]
        # Queries before the first key see nothing.
        last = min(self.last_q, rows, keys)
        group, factor = heads // kv_heads, scale_factor(scale, dim)
        columns, distances = (np.zeros((batch, heads, 1, keys), np.float32) for _ in range(2))
        for kv_head in range(kv_heads if last else 0):
            some = slice(kv_head * group, (kv_head + 1) * group)
            sums = _core.line_mass(qn[:, some, rows - last :], kn[:, kv_head : kv_head + 1], factor)
            for lines, part in zip((columns, distances), sums, strict=True):
                lines[:, some, 0] = part.reshape(batch, group, keys)
        limits, none = np.array([keys]), np.array([0])
        best = choose(columns, limits, sinks=self.n_sink, least=self.vertical, most=self.vertical)
        near = (none, np.array([self.local]))
        slanted = choose(distances, limits, forced=near, least=self.slash, most=self.slash)
        bounds = np.clip(block_bounds(rows, self.block_q) + (keys - rows), 0, keys)
        flat = [np.append(indptr[..., :-1].ravel(), indices.size) for indptr, indices in (best, slanted)]
        lists = _core.line_lists((flat[0], best[1]), (flat[1], slanted[1]), bounds)
        shape = (batch, heads, len(bounds) - 1)
        return RowLists(
            indptr=from_flat(lists[0], shape),
            indices=lists[1],
            lengths=(rows, keys),
            block_q=self.block_q,
            scored=batch * heads * last * keys,
        )


def minference_vertical_slash(
    q: Array,
    k: Array,
    v: Array,
    *,
    last_q: int = 64,
    vertical: int = 500,
    slash: int = 700,
    n_sink: int = 30,
    local: int = 100,
    block_q: int = 64,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Causal attention over the vertical and slanted lines that carry most of the last queries' weights.

    The softmax weights of the last `last_q` queries are summed for each key (a vertical line) and for each distance
    from the query to the key (a slanted one). A block of queries attends to the keys of the best vertical lines, and
    to those that lie on one of the best slanted lines for some query of the block.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        last_q: queries whose weights are summed, fewer where there are fewer.
        vertical: vertical lines, those of `n_sink` included.
        slash: slanted lines, those of `local` included.
        n_sink: first keys, whose lines are always taken.
        local: smallest distances, whose lines are always taken; at least 1, the query's own position.
        block_q: queries that share a list.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Choosing: `last_q * Lk * D` multiply-adds per query head. Attention: `Lq * (vertical + slash + block_q *
        groups of slanted lines) * (D + Dv)`.

    References:
        H. Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        2024, arXiv:2407.02490.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2000, 16), dtype=np.float32)
        >>> out, stats = la.sparse.minference_vertical_slash(q, k, v, vertical=60, slash=120, return_stats=True)
        >>> stats.density < 0.6
        True
    """
    selector = VerticalSlash(last_q=last_q, vertical=vertical, slash=slash, n_sink=n_sink, local=local, block_q=block_q)
    return sparse_attention(q, k, v, selector, causal=True, scale=scale, **options)


METHOD = Method(
    name="minference_vertical_slash",
    family="sparse",
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    year=2024,
    arxiv="2407.02490",
    function=minference_vertical_slash,
    reference=reference.minference_vertical_slash,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With as many vertical lines as keys it is causal attention.",
        "With as many slanted lines as keys it is causal attention.",
        "With none but the near distances and the first keys it is a window and sinks, for blocks of one query.",
        "Keys that alone carry the weights are found.",
        "It is dense attention with the mask that its lists stand for.",
    ),
    tests="tests/sparse/test_minference_vertical_slash.py",
    cost="`last_q * Lk * D` multiply-adds per query head to choose, and attention over the lines.",
    mask=lambda: seen(
        minference_vertical_slash, *example(), last_q=16, vertical=8, slash=12, n_sink=2, local=6, block_q=4
    ),
)
