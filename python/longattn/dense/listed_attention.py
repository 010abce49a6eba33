"""Exact attention over listed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import (
    attention_inputs,
    batched,
    check_heads,
    flag,
    per_head,
    result_array,
    returned,
    scale_factor,
    softcap_value,
)
from longattn.gpu import index_sparse_attention, is_on_gpu
from longattn.gpu._checks import listed_rows


def listed_attention(
    q: Array,
    k: Array,
    v: Array,
    rows: Array | Sequence[Array],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Softmax attention of every query over those keys alone that a list names, read where they lie.

    What selected keys come to: a list is one for all heads, or one for each KV head, whose query group shares it. All
    query rows use it; nothing is causal.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, or the `keys` of a `KVStore` of codes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        rows: integers: `[n]` for all heads, `[Hkv, n]` or `[B, Hkv, n]`; or a sequence of `B * Hkv` lists of their own
            lengths. A key that is named twice counts twice.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: floating `[Hq]`: one more logit per head, which adds nothing to the output.
        return_lse: also return the log-sum-exp of the logits.
        out: array that receives the result, as in `longattn.attention`.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; with `return_lse` a pair with
        float32 lse. An empty list gives 0 and -inf.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or rows that are not there.

    Cost:
        `Hq * Lq * n * (D + Dv)` multiply-adds; each listed row is read once per query row of its group.

    Arrays of a GPU go to `longattn.gpu.index_sparse_attention`: at most 16 rows per KV head, no `out`.
    Lists that lie there, `[B, Hkv, n]`, are looked at first, which waits for them.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 16), dtype=np.float32)
        >>> few = la.dense.listed_attention(q[:, :1], k, v, [1, 5, 6])
        >>> np.allclose(few, la.attention(q[:, :1], k[:, [1, 5, 6]], v[:, [1, 5, 6]]), atol=1e-6)
        True
    """
    if is_on_gpu(q):
        if out is not None:
            raise ValueError("out: not offered for arrays of a GPU")
        taken = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": flag(return_lse, "return_lse")}
        return _on_gpu(q, k, v, rows, taken)
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3, 4), codes=True)
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[:-3] != qn.shape[:-3]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {qn.shape[0]} as in q")
    check_heads(qn.shape[-3], kn.shape[-3], vn.shape[-3])
    if vn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"v: got length {vn.shape[-2]}, expected {kn.shape[-2]} as in k")
    lists = _lists(rows, kn.shape[:-2], kn.shape[-2])
    factor, cap = scale_factor(scale, qn.shape[-1]), softcap_value(softcap)
    given = None if sinks is None else per_head(sinks, "sinks", qn.shape[-3])
    return_lse = flag(return_lse, "return_lse")
    shape = (*qn.shape[:-1], vn.shape[-1])
    result = result_array(out, q, shape, qn.dtype, {"q": qn, "k": kn, "v": vn})
    lse = np.empty(shape[:-1], np.float32)
    if lse.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        _core.listed_attention(q4, k4, v4, lists, out4, batched(lse, 3), factor, cap, given)
    return returned(out, q, result, lse if return_lse else None)


def _on_gpu(q: Any, k: Any, v: Any, rows: Any, taken: dict[str, Any]) -> Any:
    """Lists on the device stay there, and are looked at first."""
    if is_on_gpu(rows) and len(rows.shape) == 3:
        return index_sparse_attention(q, k, v, rows, check=True, **taken)
    if is_on_gpu(rows):
        raise ValueError(f"rows: got shape {tuple(rows.shape)}, expected [B, Hkv, n] on a GPU")
    heads = int(k.shape[0]), int(k.shape[1])
    return index_sparse_attention(q, k, v, *listed_rows(_lists(rows, heads, k.shape[2]), heads), **taken)


def _lists(rows: Any, heads: tuple[int, ...], keys: int) -> list[NDArray[np.uint32]]:
    """One list for each batch entry and KV head."""
    total = int(np.prod(heads))
    ragged = isinstance(rows, list | tuple) and len(rows) > 0 and not isinstance(rows[0], int | np.integer)
    if ragged:
        if len(rows) != total:
            raise ValueError(f"rows: got {len(rows)} lists, expected {total}, one for each KV head")
        return [_row_numbers(np.asarray(one, np.int64) if isinstance(one, list) else one, keys) for one in rows]
    x = np.asarray(rows, np.int64) if isinstance(rows, list | tuple) else as_numpy(rows, "rows")
    if x.shape[:-1] not in ((), heads[-1:], heads) or x.ndim == 0:
        raise ValueError(f"rows: got shape {x.shape}, expected [n], {heads[-1:]} + [n] or {heads} + [n]")
    numbers = _row_numbers(x, keys)
    if x.ndim == 1:
        return [numbers] * total
    return [*np.broadcast_to(numbers, (*heads, x.shape[-1])).reshape(total, -1)]


def _row_numbers(rows: Any, keys: int) -> NDArray[np.uint32]:
    x = as_numpy(rows, "rows")
    if x.dtype.kind not in "iu":
        raise TypeError(f"rows: got dtype {x.dtype}, expected integers")
    if x.size and not (int(x.min()) >= 0 and int(x.max()) < keys):
        raise ValueError(f"rows: got numbers from {x.min()} to {x.max()}, expected 0 to {keys - 1}")
    return np.ascontiguousarray(x, np.uint32)
