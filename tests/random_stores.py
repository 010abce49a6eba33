"""Random stores that look a little like a model's: keys share an offset, heads differ in it."""

import longattn as la
from random_arrays import F32, normal


def rows(rng, kv_heads=2, count=1000, dim=32, value_dim=None, *, spread=1.0, offset=0.5):
    """Keys `[kv_heads, count, dim]` and values `[kv_heads, count, value_dim]`, float32."""
    keys = normal(rng, (kv_heads, count, dim), spread=spread) + normal(rng, (kv_heads, 1, dim), spread=offset)
    values = normal(rng, (kv_heads, count, dim if value_dim is None else value_dim))
    return keys, values + normal(rng, (kv_heads, 1, values.shape[-1]), spread=0.3)


def store_of(keys, values, dtype=F32, room=8192, **options):
    """A store that holds these rows and has room for more."""
    capacity = keys.shape[1] + room
    store = la.KVStore(len(keys), keys.shape[-1], values.shape[-1], dtype=dtype, capacity=capacity, **options)
    store.append(keys, values)
    return store


def store(rng, kv_heads=2, count=1000, dim=32, value_dim=None, *, dtype=F32):
    """A store of random rows."""
    return store_of(*rows(rng, kv_heads, count, dim, value_dim), dtype)


def queries(rng, heads=4, count=1, dim=32, *, dtype=F32, spread=1.5):
    """Queries `[heads, count, dim]`, longer than the keys' spread: the softmax has a peak."""
    return normal(rng, (heads, count, dim), spread=spread).astype(dtype)
