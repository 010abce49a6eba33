"""Core context aware attention: distant tokens as one key and value per group, near ones as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import batched, dense_inputs, flag, integer, real, result_array, returned, scale_factor, storage
from longattn.dense import attention
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import pool as reference


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which cores and which tokens a query sees, and how logits come about."""

    group: int
    window: int
    scale: float
    count_bias: float


def core_context_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    group: int = 16,
    window: int = 1024,
    scale: float | None = None,
    count_bias: float = 0.0,
    cores: tuple[Array, Array] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Causal attention, in one softmax, to a core of each distant group of tokens and to all tokens near the query.

    The tokens `n * group` to `n * group + group - 1` have one core key and one core value, `core_context_pool`. The
    query at position `i` sees the cores of groups that end at or before `i - window`, and the tokens `j` with
    `i - window - (i + 1) % group < j <= i`. As `group` divides `window`, each token up to `i` counts exactly once,
    by its core or itself.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. All of them (`Lq == Lk`) unless
            `cores` are given; else the last ones, as in `longattn.attention`.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        group: tokens per core.
        window: tokens before a query that it sees at least; a multiple of `group`.
        scale: factor on the logits, and on those of the pooling weights; `None` is `D ** -0.5`.
        count_bias: added to the logits of cores. `ln(group)` lets a core weigh as `group` equal tokens do; the paper
            adds nothing.
        cores: pair of core keys `[B, Hkv, N, D]` and core values `[B, Hkv, N, Dv]` to use, `N` at least the number
            that the last query sees; `None` pools those of `k` and `v`. Where rotary positions are wanted otherwise
            than as they are in `k`, pool unrotated keys with `core_context_pool`, rotate those, and give them here
            (the paper does not say how it rotates cores; the mean of rotated keys is the default).
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result; must
            not overlap any input.

    Returns:
        The output in the shape, kind and dtype of `q` (but for `Dv`); with `return_lse` the pair with lse, float32
        `[B, Hq, Lq]` (or `[Hq, Lq]`). Cores and what they add are float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a window that `group` does not divide, or fewer queries than keys
            without `cores`.

    Cost:
        `Hq * L * (L / (2 * group) + window + group / 2) * (D + Dv)` multiply-adds. Beside the output, float32 copies
        of the queries and of the part of the output that comes from cores.

    References:
        Y. Chen et al., "Core Context Aware Transformers for Long Context Language Modeling", 2024, arXiv:2412.12465.

    Example:
        >>> import numpy as np, longattn.pool
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 16), dtype=np.float32)
        >>> longattn.pool.core_context_attention(q, k, v, group=8, window=64).shape
        (4, 300, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    rule = _rule(group, window, scale, count_bias, qn.shape[-1])
    return_lse = flag(return_lse, "return_lse")
    q4, k4, v4 = (batched(x, 4) for x in (qn, kn, vn))
    rows, keys = q4.shape[2], k4.shape[2]
    if rows > keys:
        raise ValueError(f"q: got {rows} queries, expected at most the {keys} keys")
    result = result_array(out, q, (*qn.shape[:-1], vn.shape[-1]), qn.dtype, {"q": qn, "k": kn, "v": vn})
    if cores is not None:
        core_k, core_v = _given_cores(cores, k4, v4, rule)
    elif rows < keys:
        raise ValueError(f"q: got {rows} queries for {keys} keys, expected all of them, or cores")
    else:
        whole = keys // rule.group * rule.group
        ends = q4[:, :, rule.group - 1 : whole : rule.group]
        core_k, core_v = _pool(ends, k4[:, :, :whole], v4[:, :, :whole], rule.group, rule.scale)
    lse = _attend(q4, k4, v4, 0, core_k, core_v, rule, batched(result, 4))
    return returned(out, q, result, (lse if qn.ndim == 4 else lse[0]) if return_lse else None)


def core_context_pool(
    q: Array, k: Array, v: Array, *, group: int = 16, scale: float | None = None
) -> tuple[Array, Array]:
    """One key and one value per group of tokens, weighted by what the group's last query looks at.

    With `a = softmax(scale * q_last . k_j)` over the tokens `j` of a group and `q_last` the query of its last one,
    the core key is `sum_j a_j k_j`, the core value `sum_j a_j v_j`. Where query heads share a KV head, `q_last` is
    their mean (the paper does not say; it has one query head per KV head).

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        group: tokens per core. Tokens after the last whole group have none.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        The pair of core keys `[B, Hkv, L // group, D]` and core values `[B, Hkv, L // group, Dv]`, float32, in the
        kind of `k`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `Hkv * L * (3 * D + Dv)` multiply-adds.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    width = integer(group, "group", 1)
    factor = scale_factor(scale, qn.shape[-1])
    if qn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"q: got {qn.shape[-2]} queries, expected {kn.shape[-2]}, one per key")
    whole = kn.shape[-2] // width * width
    q4, k4, v4 = (batched(x, 4)[:, :, :whole] for x in (qn, kn, vn))
    pooled = _pool(q4[:, :, width - 1 :: width], k4, v4, width, factor)
    first, second = (x if qn.ndim == 4 else x[0] for x in pooled)
    return like(k, first), like(k, second)


class CoreContextCache:
    """Step form of `core_context_attention`: cores of all groups, and the raw tokens near the end.

    Raw keys and values beyond `window + group` tokens are dropped, so that a token costs `1 / group` of a float32
    row of keys and values in the long run.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype of raw keys and values: float32, float16 or bfloat16. Cores are float32.
        group: as in `core_context_attention`.
        window: as in `core_context_attention`.
        scale: as in `core_context_attention`.
        count_bias: as in `core_context_attention`.
        capacity: most tokens the cache will see; it costs address space only.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a size out of range, or a window that `group` does not divide.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: DTypeLike = "float32",
        group: int = 16,
        window: int = 1024,
        scale: float | None = None,
        count_bias: float = 0.0,
        capacity: int = 1 << 20,
    ) -> None:
        heads, dim = integer(kv_heads, "kv_heads", 1), integer(head_dim, "head_dim", 1)
        wide = dim if value_dim is None else integer(value_dim, "value_dim", 1)
        self._rule = _rule(group, window, scale, count_bias, dim)
        self._capacity = integer(capacity, "capacity", 1)
        most = self._capacity // self._rule.group + 1
        self._cores = KVStore(heads, dim, wide, "float32", most)
        kind, space = storage(dtype), 2 * (self._rule.window + self._rule.group)
        self._k, self._v = np.empty((heads, space, dim), kind), np.empty((heads, space, wide), kind)
        self._first = self._length = 0  # position of the first raw row, tokens seen

    def append(self, q: Array, k: Array, v: Array) -> Array:
        """Appends tokens and attends with their queries.

        Args:
            q: queries `[Hq, T, D]`; float32, float16 or bfloat16.
            k: keys `[Hkv, T, D]`; any of the three dtypes, rounded to the cache's.
            v: values `[Hkv, T, Dv]`; dtype of `k`.

        Returns:
            The output `[Hq, T, Dv]`, in the kind and dtype of `q`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit the cache, or more tokens than its capacity leaves.
        """
        qn, kn, vn = dense_inputs(q, k, v, double=False)
        if qn.ndim != 3 or kn.shape[0] != self._k.shape[0] or kn.shape[2] != self._k.shape[2]:
            expected = f"[{self._k.shape[0]}, T, {self._k.shape[2]}]"
            raise ValueError(f"k: got shape {kn.shape}, expected {expected}")
        if vn.shape[2] != self._v.shape[2]:
            raise ValueError(f"v: got value_dim {vn.shape[2]}, expected {self._v.shape[2]}")
        new = kn.shape[1]
        if qn.shape[1] != new:
            raise ValueError(f"q: got {qn.shape[1]} queries, expected {new}, one per key")
        if self._length + new > self._capacity:
            raise ValueError(f"k: got {new} tokens after {self._length}, expected at most {self._capacity} in all")
        self._keep(new)
        at = self._length - self._first
        self._k[:, at : at + new], self._v[:, at : at + new] = kn, vn
        raw_k, raw_v = self._k[None, :, : at + new], self._v[None, :, : at + new]
        group, start, end = self._rule.group, self._length, self._length + new
        complete = slice(start // group * group, end // group * group)
        if complete.stop > complete.start:
            ends = qn[None, :, complete.start + group - 1 - start :: group][:, :, : end // group - start // group]
            rows = slice(complete.start - self._first, complete.stop - self._first)
            core_k, core_v = _pool(ends, raw_k[:, :, rows], raw_v[:, :, rows], group, self._rule.scale)
            self._cores.append(core_k, core_v)
        result = np.empty((*qn.shape[:-1], vn.shape[2]), qn.dtype)
        cores = self._cores.keys[None], self._cores.values[None]
        _attend(qn[None], raw_k, raw_v, self._first, *cores, self._rule, result[None])
        self._length = end
        return like(q, result)

    def _keep(self, new: int) -> None:
        """Makes room for `new` raw rows, dropping those that no later query sees."""
        at = self._length - self._first
        if at + new <= self._k.shape[1]:
            return
        group, window = self._rule.group, self._rule.window
        needed = max(0, min((self._length + 1) // group * group - window, self._length // group * group))
        kept = slice(needed - self._first, at)
        count = kept.stop - kept.start
        space = max(self._k.shape[1], 2 * (window + group), count + new)
        for name in ("_k", "_v"):
            old = getattr(self, name)
            fresh = np.empty((old.shape[0], space, old.shape[2]), old.dtype)
            fresh[:, :count] = old[:, kept]
            setattr(self, name, fresh)
        self._first = needed

    def __len__(self) -> int:
        """Tokens seen."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of raw rows and cores."""
        return self._k.nbytes + self._v.nbytes + self._cores.nbytes


def _rule(group: object, window: object, scale: object, count_bias: object, dim: int) -> _Rule:
    width, near = integer(group, "group", 1), integer(window, "window", 0)
    if near % width:
        raise ValueError(f"window: got {near}, expected a multiple of group, {width}: else tokens count twice or never")
    bias = real(count_bias, "count_bias")
    if not np.isfinite(bias):
        raise ValueError(f"count_bias: got {count_bias}, expected a finite number")
    return _Rule(width, near, scale_factor(scale, dim), bias)


def _given_cores(cores: object, k: NDArray[Any], v: NDArray[Any], rule: _Rule) -> tuple[NDArray[Any], NDArray[Any]]:
    if not isinstance(cores, tuple | list) or len(cores) != 2:
        raise TypeError(f"cores: got {type(cores).__name__}, expected a pair (keys, values)")
    needed = max(0, (k.shape[2] - rule.window) // rule.group)
    found = []
    for x, rows, name in ((cores[0], k, "cores[0]"), (cores[1], v, "cores[1]")):
        given = batched(as_numpy(x, name), 4)
        batch, heads, _, dim = rows.shape
        fits = given.ndim == 4 and (*given.shape[:2], given.shape[3]) == (batch, heads, dim)
        if not fits or given.shape[2] < needed:
            raise ValueError(
                f"{name}: got shape {given.shape}, expected {(batch, heads, 'N', dim)} with N at least {needed}"
            )
        found.append(given)
    if found[0].shape[2] != found[1].shape[2] or found[0].dtype != found[1].dtype:
        raise ValueError("cores: got keys and values of different length or dtype, expected them alike")
    return found[0], found[1]


def _pool(
    last: NDArray[Any], k: NDArray[Any], v: NDArray[Any], group: int, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cores of whole groups: `last` `[B, Hq, N, D]` the queries of their ends, `k` and `v` `[B, Hkv, N * group, D]`.

    Each group is a sequence of its own with one query.
    """
    batch, heads, count, dim = last.shape
    kv_heads = k.shape[1]
    means = last.astype(np.float32).reshape(batch, kv_heads, heads // kv_heads, count, dim).mean(axis=2)
    cores = []
    for rows in (k, v):
        pooled = np.empty((batch, kv_heads, count, rows.shape[3]), np.float32)
        for b in range(batch):
            groups = [x[b].reshape(kv_heads, count, group, x.shape[3]).swapaxes(0, 1) for x in (k, rows)]
            target = pooled[b].swapaxes(0, 1)[:, :, None]
            attention(means[b].swapaxes(0, 1)[:, :, None], *groups, scale=scale, out=target)
        cores.append(pooled)
    return cores[0], cores[1]


def _attend(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    first: int,
    core_k: NDArray[Any],
    core_v: NDArray[Any],
    rule: _Rule,
    out: NDArray[Any],
) -> NDArray[np.float32]:
    """Output into `out`, lse returned. Row 0 of `k` is at position `first`, the last query at the last row.

    The tokens that the query at `i` sees begin at `(i + 1) // group * group - window`, so token `j` is seen up to, not
    including, position `(j // group + 1) * group + window - 1`.
    """
    rows, keys = q.shape[2], k.shape[2]
    positions = np.arange(first, first + keys)
    until = (positions // rule.group + 1) * rule.group + rule.window - 1 - first
    state = _core_pass(q, core_k, core_v, first + keys - rows, rule)
    far = max(rule.window + rule.group - 2, 0)
    _, lse = attention(
        q,
        k,
        v,
        causal=True,
        window=(far, 0),
        visible_until=until,
        scale=rule.scale,
        state=state,
        return_lse=True,
        out=out,
    )
    return np.asarray(lse)


def _core_pass(
    q: NDArray[Any], core_k: NDArray[Any], core_v: NDArray[Any], position: int, rule: _Rule
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """What cores give the queries, the first of which is at `position`.

    The query at `i` sees `(i + 1 - window) // group` cores, so `group` queries in a row see the same ones. As heads of
    a common KV head they are one causal pass, whose rows are groups.
    """
    batch, heads, rows, _ = q.shape
    group, offset = rule.group, 1 + position - rule.window  # of row r: (r + offset) // group cores
    begin, end = max(offset, group), rows + offset
    if begin >= end:
        return None
    out = np.zeros((batch, heads, rows, core_v.shape[3]), np.float32)
    lse = np.full((batch, heads, rows), -np.inf, np.float32)
    first_whole, last_whole = -(-begin // group) * group, end // group * group
    for a, b in ((begin, min(first_whole, end)), (max(first_whole, last_whole), end)):
        if a < b:
            part, seen = slice(a - offset, b - offset), slice(0, a // group)
            mine = np.asarray(q[:, :, part], np.float32)
            out[:, :, part], lse[:, :, part] = attention(
                mine, core_k[:, :, seen], core_v[:, :, seen], scale=rule.scale, return_lse=True
            )
    if first_whole < last_whole:
        part, blocks = slice(first_whole - offset, last_whole - offset), (last_whole - first_whole) // group
        folded = reshaped(q[:, :, part], batch, heads, blocks, group, -1).swapaxes(2, 3)
        folded = reshaped(np.asarray(folded, np.float32), batch, heads * group, blocks, -1)
        seen = slice(0, last_whole // group - 1)
        o, sums = attention(
            folded, core_k[:, :, seen], core_v[:, :, seen], causal=True, scale=rule.scale, return_lse=True
        )
        unfolded = reshaped(o, batch, heads, group, blocks, -1).swapaxes(2, 3)
        out[:, :, part] = reshaped(unfolded, batch, heads, blocks * group, -1)
        lse[:, :, part] = reshaped(sums.reshape(batch, heads, group, blocks).swapaxes(2, 3), batch, heads, -1)
    lse += np.float32(rule.count_bias)
    return out, lse


METHOD = Method(
    name="core_context_attention",
    family="pool",
    title="Core Context Aware Transformers for Long Context Language Modeling",
    year=2024,
    arxiv="2412.12465",
    function=core_context_attention,
    reference=reference.core_context_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Sequences no longer than the window give causal attention.",
        "Groups of one token give causal attention, whatever the window.",
        "Where keys and values are equal within each group, `count_bias = ln(group)` gives causal attention.",
        "Steps of `CoreContextCache` give the rows of the prefill.",
    ),
    tests="tests/pool/test_core_context_attention.py",
    cost="`Hq * L * (L / (2 * group) + window + group / 2) * (D + Dv)` multiply-adds; kept per token in the long run: "
    "`1 / group` of a float32 row of keys and values.",
)
