"""Decoding over an `EvictingCache`, beside its float64 reference."""

import numpy as np

import longattn as la
import tolerances
from longattn.reference import kv as reference
from longattn.reference.dense import attention
from random_arrays import F32, normal


def sequence(rng, heads=4, kv_heads=2, length=60, dim=16, value_dim=None, dtype=F32, spread=2.0):
    """Queries `[heads, length, dim]`, keys and values; a softmax with a peak."""
    q = normal(rng, (heads, length, dim), dtype, spread=spread)
    k = normal(rng, (kv_heads, length, dim), dtype)
    return q, k, normal(rng, (kv_heads, length, dim if value_dim is None else value_dim), dtype)


def cache_of(policy, k, v, **options):
    return la.kv.EvictingCache(policy, len(k), k.shape[2], v.shape[2], dtype=k.dtype, **options)


def decode(cache, q, k, v, *, prompt=0, per_row=None, **info):
    """Output `[Hq, L, Dv]` and, from the prompt's last row on, the kept positions after each step."""
    out = np.zeros((*q.shape[:2], v.shape[2]), q.dtype)
    kept = []
    if prompt:
        out[:, :prompt] = cache.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt], **info)
        kept.append([rows.tolist() for rows in cache.kept])
    for i in range(prompt, q.shape[1]):
        row = slice(i, i + 1)
        cache.append(k[:, row], v[:, row], **({} if per_row is None else per_row(i)))
        out[:, row] = cache.attend(q[:, row])
        kept.append([rows.tolist() for rows in cache.kept])
    return out, kept


def check(make, model, q, k, v, *, prompt=0, residual=None, tolerance=None, slots=None, **options):
    """Steps and what is kept after each are those of the reference; returns the cache, outputs and kept rows."""
    info = {name: options.pop(name) for name in ("visual",) if name in options}
    cache = cache_of(make, k, v, residual=residual, slots=slots, **options)
    out, kept = decode(cache, q, k, v, prompt=prompt, **info)
    expected, expected_kept = reference.evicting.decode(
        model, q, k, v, prompt=prompt, residual=residual, **options, **info
    )
    assert kept == expected_kept
    tolerance = tolerance or tolerances.attention(q, k, v, scale=options.get("scale"), offset=np.log(q.shape[1]))
    tolerance.check(out, expected)
    positions = cache.store.positions
    for head, rows in enumerate(kept[-1]):
        held, keys, values = cache.store.rows(head)
        assert held.tolist() == rows == sorted(positions[head][positions[head] >= 0].tolist())
        np.testing.assert_array_equal(keys, k[head, rows])
        np.testing.assert_array_equal(values, v[head, rows])
    return cache, out, kept


def dense(q, k, v, **options):
    """Exact attention of all rows, by the reference."""
    return attention(q, k, v, causal=True, **options)
