"""What every method over sums of all keys is checked for: its oracle, instruction sets, dtypes, layouts and inputs."""

import numpy as np

import tolerances
from random_arrays import F32, normal, qkv

LENGTHS = [(1, 1), (3, 5), (70, 300), (100, 1100)]


def compare(call, oracle, q, k, v, *, most=None, **options):
    """Assert that a method's result is its oracle's: kind, dtype and numbers.

    Args:
        call: the method.
        oracle: its reference.
        q: queries, or the method's first argument.
        k: keys.
        v: values.
        most: the size of the terms that are added, like the result; `None`: those of weights of 1 in all.
        options: of both.
    """
    out = call(q, k, v, **options)
    expected = oracle(q, k, v, **options)
    like = q if q.ndim == v.ndim else k
    assert out.dtype == like.dtype and out.shape == expected.shape
    largest = np.abs(np.asarray(v, np.float64)).max(initial=0.0)
    tolerances.check_linear(out, expected, 4 * largest if most is None else most, terms(q, k))
    return out


def terms(q, k):
    """Numbers that are added one after another for a number of the result."""
    return 4 * (q.shape[-1] + k.shape[-2])


def across(rng, call, oracle, **options):
    """A call with groups of query heads, ragged lengths and dimensions."""
    for rows, keys in LENGTHS:
        q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=rows, keys=keys, dim=20, value_dim=37)
        compare(call, oracle, q, k, v, **options)


def storage(rng, call, oracle, dtype, **options):
    """Inputs in a storage dtype."""
    compare(call, oracle, *qkv(rng, rows=40, keys=90, q_dtype=dtype), **options)


def laid(rng, call, oracle, layout, *, most=None, **options):
    """Inputs in a memory layout, and a result that goes into a caller's array."""
    q, k, v = qkv(rng, batch=2, rows=40, keys=90, layout=layout)
    out = compare(call, oracle, q, k, v, most=most, **options)
    given = np.full((2, 40, 4, 16), np.nan, np.float32).swapaxes(1, 2)
    assert call(q, k, v, out=given, **options) is given
    np.testing.assert_array_equal(given, out)


def bits(rng, call, threads, **options):
    """The same bits for any number of threads, and for a batch of one."""
    from longattn import _core

    q, k, v = qkv(rng, batch=2, rows=2100, keys=2100, dim=16)
    out = call(q, k, v, **options)
    _core.set_num_threads(1)
    np.testing.assert_array_equal(call(q, k, v, **options), out)
    np.testing.assert_array_equal(call(q[0], k[0], v[0], **options), out[0])
    _core.set_num_threads(threads)


def masked(rng, call, oracle, **options):
    """A mask, of one and of each sequence, equals leaving keys out; what is masked may hold anything."""
    q, k, v = qkv(rng, batch=2, rows=20, keys=50)
    keep = rng.random((2, 50)) < 0.6
    expected = compare(call, oracle, q, k, v, mask=keep, **options)
    k[0, :, ~keep[0]], v[1, :, ~keep[1]] = np.nan, np.inf
    np.testing.assert_array_equal(call(q, k, v, mask=keep, **options), expected)
    assert not np.asarray(call(q, k, v, mask=np.zeros(50, bool), **options)).any()


def refused(call, q, k, v, **options):
    """Inputs that no method takes."""
    import pytest

    with pytest.raises(ValueError, match="v: got length"):
        call(q, k, v[..., 1:, :], **options)
    with pytest.raises(ValueError, match="k: got head_dim"):
        call(q, k[..., 1:], v, **options)
    with pytest.raises(TypeError, match="q: got dtype"):
        call(q.astype(np.float64), k, v, **options)
    with pytest.raises(ValueError, match="q: got 3 heads"):
        call(q[:, :3], k, v, **options)
    with pytest.raises(ValueError, match="out: got shape"):
        call(q, k, v, out=np.empty((1, 2), F32), **options)


def uniform(rng, batch=1, heads=2, rows=30, dim=16):
    """Queries, keys and values of as many heads and rows each."""
    return (normal(rng, (batch, heads, rows, dim)) for _ in "qkv")
