"""Landmark attention: a token after each block says how much of a query's attention the block gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array, like
from longattn._checks import (
    batched,
    dense_inputs,
    flag,
    integer,
    one_of,
    real,
    result_array,
    returned,
    scale_factor,
    storage,
)
from longattn._rotary import turned
from longattn.dense.attention import attention
from longattn.dense.merge import merge
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference

Choice = Literal["row", "chunk"]

#: Blocks whose results are held at a time.
BLOCKS = 32


@dataclass(frozen=True, slots=True)
class LandmarkStats:
    """What a call read.

    Attributes:
        blocks_total: int64 `[B, Hq, Lq]` (or `[Hq, Lq]`): finished blocks before each query.
        blocks_attended: int64, likewise: blocks whose tokens each query attends to. `block_len` keys each.
        blocks_scored: int64, likewise: landmarks scored; all of them.
    """

    blocks_total: NDArray[np.int64]
    blocks_attended: NDArray[np.int64]
    blocks_scored: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Rule:
    block_len: int
    top_k: int | None
    select: Choice
    scale: float
    rope_base: float | None

    @property
    def page(self) -> int:
        """Rows of a block with its landmark."""
        return self.block_len + 1


def landmark_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_len: int = 50,
    top_k: int | None = None,
    select: Choice = "row",
    scale: float | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    out: Array | None = None,
) -> Any:
    """Causal attention by a softmax of two levels, over blocks of tokens that a landmark token closes.

    Rows come in pages of `block_len` ordinary tokens and a landmark. A query's own page is attended to token by token,
    each earlier page by its landmark: one softmax over the logits of the own page's tokens up to the query, and of
    the earlier landmarks, gives every landmark a share, which a softmax over its page's tokens deals out to them.
    Landmarks' values are never read, a landmark never attends to itself, and weights sum to 1.

    With `top_k`, only that many earlier pages take part, those of the largest landmark logits; the lower one of equals.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. The last rows of the sequence,
            landmarks among them.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. Row `j` is a landmark where
            `j % (block_len + 1) == block_len`.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        block_len: ordinary tokens of a block.
        top_k: earlier blocks that take part; `None` is all of them.
        select: blocks are chosen for each query row and head (`"row"`), or once per head for all rows of the call
            that lie in one page (`"chunk"`): by the largest share that any of the rows gives the landmark in a softmax
            over all landmarks.
        scale: factor on the logits; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the upper level's logits.
        return_stats: also return what was read.
        out: array of the shape of the result, kind and dtype of `q`, that receives it; must not overlap any input.

    Returns:
        The output in the shape, kind and dtype of `q` (but for `Dv`); then, where asked for, lse, float32
        `[B, Hq, Lq]` (or `[Hq, Lq]`), and `LandmarkStats`, as a tuple.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or more queries than keys.

    Cost:
        `Hq * Lq * (pages * D + (own + read) * (D + Dv))` multiply-adds, `own` at most `block_len` keys and `read`
        `block_len` for each block that is attended to. With `select="row"` and several queries of a page, blocks that
        any row of any head wants are computed for all of them; `"chunk"` and single queries read `top_k` blocks.

    References:
        A. Mohtashami, M. Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023,
        arXiv:2305.16300.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 16), dtype=np.float32)
        >>> la.retrieval.landmark_attention(q, k, v, block_len=20, top_k=3).shape
        (4, 300, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    rule = _rule(block_len, top_k, select, scale, None, qn.shape[-1])
    return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
    rows, keys = qn.shape[-2], kn.shape[-2]
    if rows > keys:
        raise ValueError(f"q: got {rows} queries, expected at most the {keys} keys")
    result = result_array(out, q, (*qn.shape[:-1], vn.shape[-1]), qn.dtype, {"q": qn, "k": kn, "v": vn})
    lse = np.empty(qn.shape[:-1], np.float32)
    q4, k4, v4, o4, lse3 = batched(qn, 4), batched(kn, 4), batched(vn, 4), batched(result, 4), batched(lse, 3)
    for b in range(len(q4)):
        landmarks = np.asarray(k4[b, :, rule.block_len :: rule.page], np.float32)
        _attend(q4[b], k4[b], v4[b], landmarks, rule, o4[b], lse3[b])
    found: tuple[Any, ...] = ()
    if return_lse:
        found += (like(q, lse),)
    if return_stats:
        found += (_stats(qn.shape[:-1], keys, rule),)
    output = returned(out, q, result, None)
    return (output, *found) if found else output


class LandmarkCache:
    """Step form of `landmark_attention`: keys and values in a `KVStore`, landmark keys beside it.

    Feed every token in order, a landmark after each `block_len` ordinary ones (it goes through the model as tokens do).

    With `rope_base`, queries and keys come without rotary positions, and with `top_k` the retrieved blocks get near
    ones, whatever their age: `top_k + 1` slots of a page each lie right before the query's own page. Retrieved blocks
    stay in order of time; blocks of the last `top_k` pages go to slots 1 to `top_k`, older ones to 0 to `top_k - 1`.
    For choosing, landmarks of the last `top_k` pages are at their true places and all older ones in slot 0. (Whether
    the upper softmax takes the landmark where it was chosen or in its slot, the paper leaves open; here in its slot.)
    So a model meets no distance beyond `(top_k + 2) * (block_len + 1)`, and where all blocks take part all are at
    their true places. Keys are stored turned by their place in their page, which a store needs once; queries are
    turned by their distance from the page's first row.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key; even with `rope_base`.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16.
        block_len: as in `landmark_attention`.
        top_k: as in `landmark_attention`.
        select: as in `landmark_attention`; `"chunk"` is the offloading mode.
        scale: as in `landmark_attention`.
        rope_base: base of rotary positions, pairs being dimensions `d` and `d + D / 2`; `None`: queries and keys come
            with their positions in them.
        capacity: most rows.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a size out of range.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: DTypeLike = "bfloat16",
        block_len: int = 50,
        top_k: int | None = 4,
        select: Choice = "row",
        scale: float | None = None,
        rope_base: float | None = None,
        capacity: int = 1 << 20,
    ) -> None:
        heads, dim = integer(kv_heads, "kv_heads", 1), integer(head_dim, "head_dim", 1)
        wide = dim if value_dim is None else integer(value_dim, "value_dim", 1)
        self._rule = _rule(block_len, top_k, select, scale, rope_base, dim)
        self._store = KVStore(heads, dim, wide, storage(dtype), integer(capacity, "capacity", 1))
        self._landmarks = np.empty((heads, 16, dim), np.float32)

    def append(self, k: Array, v: Array) -> None:
        """Appends tokens, landmarks among them.

        Args:
            k: keys `[Hkv, T, D]`; float32, float16 or bfloat16.
            v: values `[Hkv, T, Dv]`; dtype of `k`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit the cache, or more rows than its capacity leaves.
        """
        kn, _, vn = dense_inputs(k, k, v, double=False)
        if kn.ndim != 3:
            raise ValueError(f"k: got shape {kn.shape}, expected [Hkv, T, D]")
        start = len(self._store)
        rule = self._rule
        if rule.rope_base is not None:
            offsets = np.arange(start, start + kn.shape[1]) % rule.page
            kn = turned(np.asarray(kn, np.float32), offsets, rule.rope_base)
        self._store.append(kn, vn)
        pages, before = len(self._store) // rule.page, start // rule.page
        if pages > self._landmarks.shape[1]:
            fresh = np.empty((kn.shape[0], 2 * pages, kn.shape[2]), np.float32)
            fresh[:, :before] = self._landmarks[:, :before]
            self._landmarks = fresh
        rows = slice(before * rule.page + rule.block_len, pages * rule.page, rule.page)
        self._landmarks[:, before:pages] = self._store.keys[:, rows]

    def attend(self, q: Array, *, return_lse: bool = False, return_stats: bool = False) -> Any:
        """Attention of the newest rows' queries.

        Args:
            q: queries `[Hq, Lq, D]` of the last `Lq` rows; float32, float16 or bfloat16.
            return_lse: as in `landmark_attention`.
            return_stats: as in `landmark_attention`.

        Returns:
            As `landmark_attention`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit the cache.
        """
        keys, values = self._store.keys, self._store.values
        qn, kn, vn = dense_inputs(q, keys, values, double=False)
        return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
        if qn.shape[1] > kn.shape[1]:
            raise ValueError(f"q: got {qn.shape[1]} queries, expected at most the {kn.shape[1]} rows of the cache")
        result = np.empty((*qn.shape[:2], vn.shape[2]), qn.dtype)
        lse = np.empty(qn.shape[:2], np.float32)
        _attend(qn, kn, vn, self._landmarks, self._rule, result, lse)
        found: tuple[Any, ...] = (like(q, result),)
        if return_lse:
            found += (like(q, lse),)
        if return_stats:
            found += (_stats(qn.shape[:2], kn.shape[1], self._rule),)
        return found if len(found) > 1 else found[0]

    def __len__(self) -> int:
        """Rows, landmarks included."""
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of the landmark keys."""
        return self._store.nbytes + self._landmarks.nbytes

    @property
    def landmark_nbytes(self) -> int:
        """Bytes of the landmark keys alone."""
        return self._landmarks.nbytes


def _rule(block_len: object, top_k: object, select: object, scale: object, rope_base: object, dim: int) -> _Rule:
    one_of(select, "select", get_args(Choice))
    base = None if rope_base is None else real(rope_base, "rope_base")
    if base is not None and not 0 < base < np.inf:
        raise ValueError(f"rope_base: got {rope_base}, expected a positive number")
    if base is not None and dim % 2:
        raise ValueError(f"rope_base: got {rope_base} for head_dim {dim}, expected an even head_dim")
    best = None if top_k is None else integer(top_k, "top_k", 0)
    return _Rule(integer(block_len, "block_len", 1), best, select, scale_factor(scale, dim), base)  # type: ignore[arg-type]


def _stats(shape: tuple[int, ...], keys: int, rule: _Rule) -> LandmarkStats:
    total = np.broadcast_to((np.arange(keys - shape[-1], keys)) // rule.page, shape)
    read = total if rule.top_k is None else np.minimum(total, rule.top_k)
    scored = np.zeros_like(total) if rule.top_k == 0 else total
    return LandmarkStats(total.copy(), read.copy(), scored.copy())


def _attend(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    landmarks: NDArray[np.float32],
    rule: _Rule,
    out: NDArray[Any],
    lse: NDArray[np.float32],
) -> None:
    """Output and lse of the last rows of one sequence, page by page; `landmarks` holds at least the whole pages'."""
    rows, keys = q.shape[1], k.shape[1]
    at = keys - rows
    while at < keys:
        page = at // rule.page
        end = min((page + 1) * rule.page, keys)
        part = slice(at - (keys - rows), end - (keys - rows))
        o, sums = _page(np.asarray(q[:, part], np.float32), k, v, landmarks, at, rule)
        out[:, part], lse[:, part] = o, sums
        at = end


def _page(
    q: NDArray[np.float32],
    k: NDArray[Any],
    v: NDArray[Any],
    landmarks: NDArray[np.float32],
    at: int,
    rule: _Rule,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Queries of rows `at..`, all in one page.

    What a block gives is its softmax's output, whose lse in the merge is the landmark's logit.
    """
    rows = q.shape[1]
    page, first = at // rule.page, at // rule.page * rule.page
    offsets = np.arange(at - first, at - first + rows)
    own = slice(first, at + rows)
    # A landmark at the end is seen by none.
    until = np.where(np.arange(own.stop - own.start) < rule.block_len, np.iinfo(np.int32).max, 0)
    mine = q if rule.rope_base is None else turned(q, offsets, rule.rope_base)
    o, lse = attention(mine, k[:, own], v[:, own], causal=True, visible_until=until, scale=rule.scale, return_lse=True)
    parts = [(o, lse)]
    if page and rule.top_k != 0:
        chosen = _chosen(q, landmarks[:, :page], offsets, rule)
        if chosen is not None and (rows == 1 or rule.select == "chunk"):
            parts += _listed_blocks(q, k, v, landmarks, page, offsets, chosen, rule)
        else:
            parts += _common_blocks(q, k, v, landmarks, page, offsets, chosen, rule)
    o, lse = merge(parts)
    return np.asarray(o), np.asarray(lse)


def _chosen(
    q: NDArray[np.float32], landmarks: NDArray[np.float32], offsets: NDArray[np.int64], rule: _Rule
) -> NDArray[np.int64] | None:
    """Blocks for each head and row, ascending, `[Hq, rows or 1, top_k]`; `None` where all take part."""
    pages, top_k = landmarks.shape[1], rule.top_k
    if top_k is None or top_k >= pages:
        return None
    if rule.rope_base is None:
        scores = _logits(q, landmarks, rule.scale)
    else:
        # The last top_k at their true places, all older ones in slot 0.
        distance = np.minimum(pages - np.arange(pages), top_k + 1)[None, :, None] * rule.page + offsets
        scores = np.empty((*q.shape[:2], pages), np.float32)
        for d in range(1, top_k + 2):
            of_slot = slice(0, pages - top_k) if d == top_k + 1 else slice(pages - d, pages - d + 1)
            placed = turned(q, distance[0, of_slot.start], rule.rope_base)
            scores[..., of_slot] = _logits(placed, landmarks[:, of_slot], rule.scale)
    if rule.select == "chunk":
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores = (e / e.sum(axis=-1, keepdims=True)).max(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    return np.sort(best, axis=-1)


def _logits(q: NDArray[np.float32], landmarks: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """`[Hq, rows, blocks]` of `q` `[Hq, rows, D]`."""
    heads, rows, dim = q.shape
    groups = q.reshape(landmarks.shape[0], -1, dim)
    return (np.float32(scale) * (groups @ landmarks.swapaxes(1, 2))).reshape(heads, rows, -1)


def _distances(blocks: NDArray[np.int64], page: int, rule: _Rule, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """From the first row of the query's page back to that of blocks, which are the `ranks`-th of those chosen."""
    if rule.top_k is None:
        return (page - blocks) * rule.page
    slots = ranks + max(rule.top_k - page, 0) + (blocks >= page - rule.top_k)
    return (rule.top_k + 1 - slots) * rule.page


def _listed_blocks(
    q: NDArray[np.float32],
    k: NDArray[Any],
    v: NDArray[Any],
    landmarks: NDArray[np.float32],
    page: int,
    offsets: NDArray[np.int64],
    chosen: NDArray[np.int64],
    rule: _Rule,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Parts of the blocks `chosen` `[Hq, 1, n]`: each head reads its own."""
    lists, share = chosen[:, 0], q.shape[0] // k.shape[0]
    kv_head = (np.arange(q.shape[0]) // share)[:, None]
    block_k, block_v = (_pages(x, page, rule)[kv_head, lists] for x in (k, v))  # [Hq, n, block_len, D]
    placed = np.broadcast_to(q[:, None], (*lists.shape, *q.shape[1:]))
    if rule.rope_base is not None:
        back = _distances(lists, page, rule, np.arange(lists.shape[1]))
        placed = turned(placed, back[..., None] + offsets, rule.rope_base)
    o = np.asarray(attention(placed, block_k, block_v, scale=rule.scale))
    marks = landmarks[kv_head, lists]  # [Hq, n, D]
    s = np.float32(rule.scale) * (placed @ marks[..., None])[..., 0]
    return [(o[:, n], s[:, n]) for n in range(lists.shape[1])]


def _common_blocks(
    q: NDArray[np.float32],
    k: NDArray[Any],
    v: NDArray[Any],
    landmarks: NDArray[np.float32],
    page: int,
    offsets: NDArray[np.int64],
    chosen: NDArray[np.int64] | None,
    rule: _Rule,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Parts of all blocks that any row of any head takes, merged every few blocks; others do not count for it."""
    blocks = np.arange(page) if chosen is None else np.unique(chosen)
    pages_k, pages_v = (_pages(x, page, rule) for x in (k, v))
    merged: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for n in range(0, len(blocks), BLOCKS):
        some = blocks[n : n + BLOCKS]
        index: Any = slice(int(some[0]), int(some[-1]) + 1) if some[-1] - some[0] + 1 == len(some) else some
        taken = None if chosen is None else (chosen == some[:, None, None, None])  # [blocks, Hq, rows, n]
        placed: NDArray[np.float32] = np.broadcast_to(q, (len(some), *q.shape))
        if rule.rope_base is not None:
            every = np.broadcast_to(some[:, None, None], (len(some), *q.shape[:2]))
            ranks = every if taken is None else taken.argmax(axis=-1)
            placed = turned(placed, _distances(every, page, rule, ranks) + offsets, rule.rope_base)
        block_k, block_v = (x[:, index].swapaxes(0, 1) for x in (pages_k, pages_v))
        o = np.asarray(attention(placed, block_k, block_v, scale=rule.scale))
        marks = landmarks[:, index].swapaxes(0, 1)[:, :, None]  # [blocks, Hkv, 1, D]
        groups = placed.reshape(len(some), k.shape[0], -1, q.shape[2])
        s = np.float32(rule.scale) * (groups @ marks.swapaxes(2, 3)).reshape(o.shape[:3])
        if taken is not None:
            s = np.where(taken.any(axis=-1), s, np.float32(-np.inf))
        parts = [(o[i], s[i]) for i in range(len(some))]
        merged = [merge(merged + parts)]
    return merged


def _pages(x: NDArray[Any], pages: int, rule: _Rule) -> NDArray[Any]:
    """Ordinary rows of whole pages, `[Hkv, pages, block_len, D]`, where they lie."""
    whole = x[:, : pages * rule.page]
    return whole.reshape(x.shape[0], pages, rule.page, x.shape[2])[:, :, : rule.block_len]


METHOD = Method(
    name="landmark_attention",
    family="retrieval",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    year=2023,
    arxiv="2305.16300",
    function=landmark_attention,
    reference=reference.landmark_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A `top_k` of all earlier blocks is attention over all of them.",
        "Landmark logits that are the log-sum-exp of their blocks give causal attention over the ordinary tokens.",
        "Without a finished block it is causal attention.",
        "Weights sum to 1: equal values come out as they are.",
        "Steps of `LandmarkCache` give the rows of the prefill.",
    ),
    tests="tests/retrieval/test_landmark_attention.py",
    cost="`Hq * Lq * (pages * D + (1 + top_k) * block_len * (D + Dv))` multiply-adds; scored per query: one key in "
    "`block_len + 1`.",
)
