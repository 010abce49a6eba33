"""Local attention with transient global tokens: a symmetric window and summaries of blocks in one softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import FLOATS, Array, as_numpy, like
from longattn._checks import (
    batched,
    check_float_storage,
    check_floating,
    check_heads,
    dense_inputs,
    flag,
    integer,
    real,
    result_array,
    returned,
    scale_factor,
)
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import sparse as reference
from longattn.sparse._lengths import sequence_lengths


def local_global_attention(
    q: Array,
    k: Array,
    v: Array,
    kg: Array,
    vg: Array,
    *,
    radius: int = 127,
    block: int = 16,
    local_bias: Array | None = None,
    side_bias: Array | None = None,
    scale: float = 1.0,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Each query attends, in one softmax, to the tokens within a radius and to all global tokens.

    Query `i` sees the tokens `j` with `|i - j| <= radius`, with `local_bias` by `j - i`, and every global token `b`,
    with `side_bias` by `b - block(i)`, where `block(i) = min(i // block, N - 1)`: tokens after the last whole block
    belong to it. Not causal.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        kg: keys of the global tokens `[B, Hkv, N, D]` (or `[Hkv, N, D]`), one per block; `N` may be 0.
        vg: their values `[B, Hkv, N, Dv]` (or `[Hkv, N, Dv]`); dtype of `kg`.
        radius: how far a query sees to either side.
        block: tokens per global token.
        local_bias: floating `[Hq, 2 * n + 1]`: entry `n + d`, or the nearest there is, is added to the logit of the
            token at distance `d = j - i`.
        side_bias: floating `[Hq, 2 * m + 1]`, likewise by distance in blocks.
        scale: factor on the dot products; 1 as in T5.
        return_lse: also return the log-sum-exp of the logits.
        out: array of the shape of the result, kind and dtype of `q`, that receives it; must not overlap any input.

    Returns:
        The output `[B, Hq, L, Dv]` (or `[Hq, L, Dv]`) in the kind and dtype of `q`; with `return_lse` the pair with
        lse, float32 `[B, Hq, L]` (or `[Hq, L]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * L * (2 * radius + 1 + N) * (D + Dv)` multiply-adds. Beside the output, float32 copies of the queries and
        of the part that comes from global tokens.

    Example:
        >>> import numpy as np, longattn.sparse
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 200, 16), dtype=np.float32)
        >>> kg, vg = k[:, 15::16], v[:, 15::16]
        >>> longattn.sparse.local_global_attention(q, k, v, kg, vg, radius=20).shape
        (4, 200, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"k: got length {kn.shape[-2]}, expected {qn.shape[-2]} as in q")
    kgn, vgn = _globals(kg, vg, kn, vn)
    far, width = integer(radius, "radius", 0), integer(block, "block", 1)
    factor, return_lse = scale_factor(scale, qn.shape[-1]), flag(return_lse, "return_lse")
    heads = qn.shape[-3]
    local = None if local_bias is None else centred_table(local_bias, "local_bias", heads)
    side = None if side_bias is None else centred_table(side_bias, "side_bias", heads)
    inputs: dict[str, NDArray[Any] | None] = {"q": qn, "k": kn, "v": vn, "kg": kgn, "vg": vgn}
    result = result_array(out, q, (*qn.shape[:-1], vn.shape[-1]), qn.dtype, inputs)
    arrays = (batched(x, 4) for x in (qn, kn, vn, kgn, vgn, result))
    lse = _in_one_softmax(*arrays, radius=far, block=width, local=local, side=side, scale=factor)
    return returned(out, q, result, (lse if qn.ndim == 4 else lse[0]) if return_lse else None)


def t5_relative_table(table: Array, *, max_distance: int = 128) -> NDArray[np.float32]:
    """The bias of each distance, from T5's learned bias of each bucket of distances.

    Half of the buckets are for keys after the query. Of each half, the first half are single distances, and the
    others widen logarithmically up to `max_distance`.

    Args:
        table: floating `[buckets, H]`, `buckets` a multiple of 4.
        max_distance: distance from which on all share the last bucket; above `buckets / 4`.

    Returns:
        Float32 `[H, 2 * max_distance + 1]`: entry `max_distance + d` is that of a key `d` after the query. Of use as
        `local_bias` and `side_bias` of `local_global_attention`, and as `relative_bias` of `longattn.attention` with
        `relative_zero=max_distance`.

    Raises:
        TypeError: no array, or no floating dtype.
        ValueError: a shape or `max_distance` that does not fit.

    Cost:
        The result.
    """
    x = as_numpy(table, "table", any_strides=True)
    check_floating(x, "table")
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[0] % 4:
        raise ValueError(f"table: got shape {x.shape}, expected [buckets, H], buckets a multiple of 4")
    half = x.shape[0] // 2
    near = half // 2
    reach = integer(max_distance, "max_distance", near + 1)
    d = np.arange(reach + 1)
    # The small addend keeps boundaries that are whole numbers from rounding to the bucket below.
    steps = np.log(np.maximum(d, 1) / near) / np.log(reach / near) * (half - near) + 1e-9
    bucket = np.where(d < near, d, np.minimum(near + steps.astype(np.int64), half - 1))
    both = np.concatenate([bucket[:0:-1], bucket[:1], half + bucket[1:]])
    return np.ascontiguousarray(x[both].T, np.float32)


def transient_global_attention(
    x: Array,
    wq: Array,
    wk: Array,
    wv: Array,
    g_weight: Array,
    *,
    heads: int,
    wo: Array | None = None,
    local_table: Array | None = None,
    side_table: Array | None = None,
    radius: int = 127,
    block: int = 16,
    max_distance: int = 128,
    eps: float = 1e-6,
    lengths: Array | None = None,
) -> Array:
    """Self-attention of an encoder layer over a window and over summaries of blocks that are made on the fly.

    The global token of a block is the sum of its tokens' `x`, divided by the root of its mean square (T5's layer
    norm: no mean is subtracted), times `g_weight`; its key and value come from the same `wk` and `wv`. Tokens after
    the last whole block count to that block; a sequence shorter than a block has no global token. The rest is
    `local_global_attention` with T5's biases and no factor on the logits.

    Args:
        x: layer input after its norm, `[B, L, E]`; float32, float16 or bfloat16.
        wq: query projection `[E, heads * D]`; any of the three dtypes.
        wk: key projection `[E, Hkv * D]`.
        wv: value projection `[E, Hkv * Dv]`.
        g_weight: weight of the summaries' norm, floating `[E]`.
        heads: query heads; `Hkv` is `wk.shape[1] / D` (T5 has as many).
        wo: output projection `[heads * Dv, Eo]`; `None` leaves the heads side by side.
        local_table: bias of tokens by bucket of distance, floating `[buckets, heads]`; `None` is none.
        side_table: bias of global tokens by bucket of distance in blocks, floating `[buckets, heads]`.
        radius: how far a token sees to either side.
        block: tokens per global token.
        max_distance: of the buckets, in tokens and in blocks.
        eps: added to the mean square.
        lengths: integers `[B]`: tokens of each sequence, those after them being padding, which no token sees and no
            summary holds, and whose output is 0. `None`: all are tokens.

    Returns:
        `[B, L, heads * Dv]`, or `[B, L, Eo]` with `wo`, in the kind and dtype of `x`. Projections are float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `L * (2 * radius + 1 + L / block) * heads * (D + Dv)` multiply-adds per sequence, and the projections.

    References:
        M. Guo et al., "LongT5: Efficient Text-To-Text Transformer for Long Sequences", 2021, arXiv:2112.07916.

    Example:
        >>> import numpy as np, longattn.sparse
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 100, 32), dtype=np.float32)
        >>> wq, wk, wv = rng.standard_normal((3, 32, 32), dtype=np.float32) / np.float32(32**0.5)
        >>> ones = np.ones(32, np.float32)
        >>> longattn.sparse.transient_global_attention(x, wq, wk, wv, ones, heads=4, radius=16).shape
        (1, 100, 32)
    """
    xn = as_numpy(x, "x")
    check_float_storage(xn, "x")
    if xn.ndim != 3:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, L, E]")
    batch, length, width = xn.shape
    number = integer(heads, "heads", 1)
    q_proj, k_proj, v_proj = (_projection(w, name, width) for w, name in ((wq, "wq"), (wk, "wk"), (wv, "wv")))
    if q_proj.shape[1] % number or not q_proj.shape[1]:
        raise ValueError(f"wq: got shape {q_proj.shape}, expected [E, heads * D] with {number} heads")
    dim = q_proj.shape[1] // number
    if k_proj.shape[1] % dim or not k_proj.shape[1]:
        raise ValueError(f"wk: got shape {k_proj.shape}, expected [E, Hkv * D] with D = {dim}")
    kv_heads = k_proj.shape[1] // dim
    check_heads(number, kv_heads, kv_heads)
    if v_proj.shape[1] % kv_heads or not v_proj.shape[1]:
        raise ValueError(f"wv: got shape {v_proj.shape}, expected [E, Hkv * Dv] with {kv_heads} heads")
    value_dim = v_proj.shape[1] // kv_heads
    o_proj = None if wo is None else _projection(wo, "wo", number * value_dim)
    norm = as_numpy(g_weight, "g_weight")
    check_floating(norm, "g_weight")
    if norm.shape != (width,):
        raise ValueError(f"g_weight: got shape {norm.shape}, expected {(width,)}")
    small = real(eps, "eps")
    if not 0 <= small < np.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number of at least 0")
    far, tokens = integer(radius, "radius", 0), integer(block, "block", 1)
    tables = []
    for table, name in ((local_table, "local_table"), (side_table, "side_table")):
        if table is not None:
            check_floating(as_numpy(table, name, any_strides=True), name)
        found = None if table is None else t5_relative_table(table, max_distance=max_distance)
        if found is not None and len(found) != number:
            raise ValueError(f"{name}: got {len(found)} heads, expected {number}")
        tables.append(found)
    kept = sequence_lengths(lengths, batch, length)

    flat = np.zeros((batch, length, number * value_dim), np.float32)
    for n in np.unique(kept):
        chosen = np.flatnonzero(kept == n)
        if n == 0 or not chosen.size:
            continue
        rows = np.asarray(xn[chosen, :n], np.float32)
        summaries = _summaries(rows, tokens, norm, small)
        queries, keys, values, global_keys, global_values = (
            (a @ w).reshape(len(chosen), a.shape[1], parts, w.shape[1] // parts).swapaxes(1, 2)
            for a, w, parts in (
                (rows, q_proj, number),
                (rows, k_proj, kv_heads),
                (rows, v_proj, kv_heads),
                (summaries, k_proj, kv_heads),
                (summaries, v_proj, kv_heads),
            )
        )
        out = np.empty((len(chosen), number, n, value_dim), np.float32)
        _in_one_softmax(
            queries, keys, values, global_keys, global_values, out,
            radius=far, block=tokens, local=tables[0], side=tables[1], scale=1.0,
        )  # fmt: skip
        flat[chosen, :n] = out.swapaxes(1, 2).reshape(len(chosen), n, -1)
    result = flat if o_proj is None else flat @ o_proj
    return like(x, result.astype(xn.dtype, copy=False))


def _summaries(x: NDArray[np.float32], block: int, weight: NDArray[Any], eps: float) -> NDArray[np.float32]:
    """Normalised sums `[B, L // block, E]`, the tokens after the last whole block in the last."""
    batch, length, width = x.shape
    count = length // block
    sums = x[:, : count * block].reshape(batch, count, block, width).sum(axis=2)
    if count:
        sums[:, -1] += x[:, count * block :].sum(axis=1)
    square = np.square(sums, dtype=np.float64).mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = np.where(square + eps > 0, sums / np.sqrt(square + eps), 0.0)
    return (normalised * weight.astype(np.float32)).astype(np.float32)


def _in_one_softmax(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    kg: NDArray[Any],
    vg: NDArray[Any],
    out: NDArray[Any],
    *,
    radius: int,
    block: int,
    local: NDArray[np.float32] | None,
    side: NDArray[np.float32] | None,
    scale: float,
) -> NDArray[np.float32]:
    """Output into `out`, lse returned; all arrays of rank 4, tables with distance 0 in their middle."""
    state = _global_pass(q, kg, vg, block, side, scale) if kg.shape[2] and q.shape[2] else None
    zero = None if local is None else local.shape[1] // 2
    window = (min(radius, q.shape[2]),) * 2
    _, lse = attention(
        q, k, v, window=window, relative_bias=local, relative_zero=zero, scale=scale, state=state,
        return_lse=True, out=out,
    )  # fmt: skip
    return np.asarray(lse)


def _global_pass(
    q: NDArray[Any],
    kg: NDArray[Any],
    vg: NDArray[Any],
    block: int,
    side: NDArray[np.float32] | None,
    scale: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the global tokens give all queries.

    Tokens of a block have equal biases. As heads of their own, `block` to a query head, they are rows numbered by
    their block, whose bias depends on the distance between row and key. Those of the last block that are left over
    are such heads with one row.
    """
    batch, heads, length, dim = q.shape
    count = kg.shape[2]
    whole = min(length // block, count) * block
    out = np.empty((batch, heads, length, vg.shape[3]), np.float32)
    lse = np.empty((batch, heads, length), np.float32)
    for part, width in ((slice(0, whole), block), (slice(whole, length), length - whole)):
        if part.start == part.stop:
            continue
        folded = q[:, :, part].reshape(batch, heads, -1, width, dim).swapaxes(2, 3)
        folded = np.asarray(folded, np.float32).reshape(batch, heads * width, -1, dim)
        rows = folded.shape[2]
        first = min(part.start // block, count - 1)  # block of row 0, which the core sees at key `count - rows`
        zero = None if side is None else side.shape[1] // 2 + count - rows - first
        table = None if side is None else np.repeat(side, width, axis=0)
        if table is not None and zero is not None and zero >= table.shape[1]:
            table = np.pad(table, ((0, 0), (0, zero + 1 - table.shape[1])), mode="edge")
        o, sums = attention(folded, kg, vg, relative_bias=table, relative_zero=zero, scale=scale, return_lse=True)
        shape = (batch, heads, width, rows)
        out[:, :, part] = o.reshape(*shape, -1).swapaxes(2, 3).reshape(batch, heads, rows * width, -1)
        lse[:, :, part] = sums.reshape(shape).swapaxes(2, 3).reshape(batch, heads, -1)
    return out, lse


def _globals(kg: Array, vg: Array, k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    found = []
    for given, of_tokens, name in ((kg, k, "kg"), (vg, v, "vg")):
        x = as_numpy(given, name)
        check_float_storage(x, name)
        expected = (*of_tokens.shape[:-2], "N", of_tokens.shape[-1])
        if x.ndim != k.ndim or (*x.shape[:-2], "N", x.shape[-1]) != expected:
            raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")
        found.append(x)
    if found[1].shape[-2] != found[0].shape[-2]:
        raise ValueError(f"vg: got length {found[1].shape[-2]}, expected {found[0].shape[-2]} as in kg")
    if found[1].dtype != found[0].dtype:
        raise TypeError(f"vg: got dtype {found[1].dtype}, expected {found[0].dtype} as kg")
    return found[0], found[1]


def centred_table(bias: Array, name: str, heads: int) -> NDArray[np.float32]:
    """A checked table `[Hq, 2 * n + 1]`."""
    x = as_numpy(bias, name, any_strides=True)
    check_floating(x, name)
    if x.ndim != 2 or x.shape[0] != heads or x.shape[1] % 2 == 0:
        raise ValueError(f"{name}: got shape {x.shape}, expected {(heads, '2 * n + 1')}")
    return np.ascontiguousarray(x, np.float32)


def _projection(weights: Array, name: str, width: int) -> NDArray[np.float32]:
    x = as_numpy(weights, name, any_strides=True)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16 or bfloat16")
    if x.ndim != 2 or x.shape[0] != width:
        raise ValueError(f"{name}: got shape {x.shape}, expected [{width}, columns]")
    return np.asarray(x, np.float32)


def _example() -> NDArray[np.bool_]:
    """What tokens see: first those around them, then the global tokens, one for each block of 16."""
    (q, k), values = example(), np.eye(136, dtype=np.float32)[None, None]
    near, far = (k, values[:, :, :128]), (k[:, :, 15::16], values[:, :, 128:])
    out = local_global_attention(q, *near, *far, radius=12, scale=0.1)
    mask: NDArray[np.bool_] = np.asarray(out)[0, 0] != 0
    return mask


METHOD = Method(
    name="transient_global_attention",
    family="sparse",
    title="LongT5: Efficient Text-To-Text Transformer for Long Sequences",
    year=2021,
    arxiv="2112.07916",
    function=transient_global_attention,
    reference=reference.transient_global_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without global tokens it is windowed attention.",
        "With a radius of the whole sequence and no global tokens it is attention with T5's bias.",
        "The two passes equal one softmax over a mask.",
        "Padding changes nothing.",
    ),
    tests="tests/sparse/test_transient_global_attention.py",
    cost="`L * (2 * radius + 1 + L / block) * heads * (D + Dv)` multiply-adds per sequence, and the projections.",
    mask=_example,
)
