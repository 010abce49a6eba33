"""Random queries, keys and values in the dtypes and memory layouts that callers have."""

import ml_dtypes
import numpy as np

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F64 = np.dtype(np.float64)
DTYPES = (F32, F16, BF16)

#: Memory layouts of a `[B, H, L, D]` array. The last two cannot be read in place and cost a copy.
LAYOUTS = ("contiguous", "blhd", "sliced", "fused", "reversed", "repeated", "stepped", "misaligned")


def normal(rng, shape, dtype=F32, layout="contiguous", spread=1.0):
    """Normal numbers of a `[B, H, L, D]` shape (or `[H, L, D]`), lying in memory as `layout` says."""
    values = (spread * rng.standard_normal(shape)).astype(dtype)
    return lay(values, layout)


def lay(x, layout):
    """`x` in another memory layout ("repeated" keeps only the first head's numbers, seen by every head)."""
    if layout == "contiguous":
        return x
    if layout == "blhd":
        return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)
    if layout == "sliced":  # every second row of a longer buffer, from its middle
        buffer = np.full((*x.shape[:-2], 2 * x.shape[-2] + 3, x.shape[-1]), np.nan, x.dtype)
        buffer[..., 2 : 2 + 2 * x.shape[-2] : 2, :] = x
        return buffer[..., 2 : 2 + 2 * x.shape[-2] : 2, :]
    if layout == "fused":  # one third of a projection that holds queries, keys and values
        buffer = np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan, x.dtype)
        buffer[..., x.shape[-1] : 2 * x.shape[-1]] = x
        return buffer[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if layout == "repeated":
        return np.broadcast_to(x[..., :1, :, :], x.shape)
    if layout == "stepped":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "misaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        raw[...] = x
        return raw
    raise ValueError(f"layout: got {layout!r}, expected one of {LAYOUTS}")


def qkv(rng, *, batch=1, heads=4, kv_heads=2, rows=5, keys=37, dim=16, value_dim=None, q_dtype=F32,
        kv_dtype=None, layout="contiguous", spread=1.0):  # fmt: skip
    """Queries, keys and values; `spread` > 1 makes the softmax peaked."""
    kv_dtype = q_dtype if kv_dtype is None else kv_dtype
    value_dim = dim if value_dim is None else value_dim
    q = normal(rng, (batch, heads, rows, dim), q_dtype, layout, spread)
    k = normal(rng, (batch, kv_heads, keys, dim), kv_dtype, layout)
    v = normal(rng, (batch, kv_heads, keys, value_dim), kv_dtype, layout)
    return q, k, v
