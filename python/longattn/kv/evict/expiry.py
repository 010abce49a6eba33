"""Attention over keys that are seen up to a position of their own, head by head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, is_torch, like
from longattn._checks import dense_inputs, flag, per_head
from longattn.dense.attention import attention

#: A position that no query reaches.
FOREVER = 2**62


def expiring_attention(
    q: Array, k: Array, v: Array, last_visible: NDArray[np.int64], options: dict[str, Any], name: str
) -> Any:
    """Causal attention in which queries after `last_visible` `[(B,) Hkv, L]` do not see the key.

    One call whose batch is the KV heads, for each has its own bounds. `name` is the argument that the bounds come from.
    """
    qn, kn, vn = dense_inputs(q, k, v)
    if qn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"q: got {qn.shape[-2]} rows, expected {kn.shape[-2]}, one for each key")
    if last_visible.shape != kn.shape[:-1]:
        raise ValueError(f"{name}: got shape {last_visible.shape}, expected {kn.shape[:-1]}, one for each key and head")
    kv_heads, length = kn.shape[-3:-1]
    group = qn.shape[-3] // kv_heads
    if kn.size == 0 or qn.size == 0:
        return attention(q, k, v, causal=True, **options)
    batch = int(np.prod(kn.shape[:-3]))
    apart = [x.reshape(batch * kv_heads, heads, length, x.shape[-1]) for x, heads in ((qn, group), (kn, 1), (vn, 1))]
    until = np.minimum(last_visible, length).reshape(batch * kv_heads, length) + 1
    options = dict(options)
    sinks = options.pop("sinks", None)
    return_lse = flag(options.pop("return_lse", False), "return_lse")
    if sinks is None:
        out, lse = attention(*apart, causal=True, visible_until=until, return_lse=True, **options)
    else:
        out, lse = _with_sinks(apart, until, per_head(sinks, "sinks", qn.shape[-3]), options)
    out = out.reshape(*qn.shape[:-1], vn.shape[-1])
    result = like(q, out) if is_torch(q) else out
    return (result, like(q, lse.reshape(qn.shape[:-1]))) if return_lse else result


def _with_sinks(
    apart: list[NDArray[Any]], until: NDArray[np.int64], sinks: NDArray[np.float32], options: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Heads have sink logits of their own, which a call takes per query head: one call for each KV head."""
    q, k, v = apart
    group = q.shape[1]
    heads = len(sinks) // group
    out, lse = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype), np.empty(q.shape[:-1], np.float32)
    for head in range(heads):
        one = slice(head, None, heads)
        part: dict[str, Any] = {"sinks": sinks[head * group : (head + 1) * group], "visible_until": until[one]}
        out[one], lse[one] = attention(q[one], k[one], v[one], causal=True, return_lse=True, **part, **options)
    return out, lse


def as_flags(flags: Array, name: str) -> NDArray[np.bool_]:
    """Booleans, or numbers 0 and 1."""
    x = as_numpy(flags, name, any_strides=True)
    if not x.ndim:
        raise ValueError(f"{name}: got shape (), expected one for each key")
    if x.dtype != np.bool_:
        if x.dtype.kind not in "iu" or (x.size and not (int(x.min()) >= 0 and int(x.max()) <= 1)):
            raise TypeError(f"{name}: got dtype {x.dtype}, expected bool, or integers 0 and 1")
        return x.astype(bool)
    return x
