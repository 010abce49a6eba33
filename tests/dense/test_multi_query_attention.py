"""`multi_query_attention`: one KV head for all query heads."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import grouped_query_attention, multi_query_attention
from longattn.reference import dense as reference
from random_arrays import DTYPES, LAYOUTS, qkv


def check(q, k, v, **options):
    out, lse = multi_query_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.multi_query_attention(q, k, v, return_lse=True, **options)
    tolerances.attention(q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("heads", [1, 5, 32])
@pytest.mark.parametrize(("rows", "keys"), [(1, 300), (9, 45), (40, 40), (5, 3)])
def test_reference(rng, isa, heads, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=1, rows=rows, keys=keys, dim=24, value_dim=20)
    check(q, k, v, causal=True)
    check(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*qkv(rng, heads=8, kv_heads=1, rows=3, keys=70, dim=32, q_dtype=dtype), causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, isa, layout):
    check(*qkv(rng, heads=8, kv_heads=1, rows=3, keys=70, dim=32, layout=layout), causal=True)


def test_without_a_factor_on_the_logits(rng, isa):
    check(*qkv(rng, heads=8, kv_heads=1, rows=3, keys=70, dim=16, spread=0.3), scale=1.0)


def test_steps_are_the_prefill(rng, isa):
    q, k, v = qkv(rng, heads=6, kv_heads=1, rows=20, keys=20, dim=32)
    whole = multi_query_attention(q, k, v, causal=True)
    tolerance = tolerances.same_storage(q, k, v)
    for n in range(1, 21):
        step = multi_query_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], causal=True)
        tolerance.check(step, whole[:, :, n - 1 : n])


# Identities


@pytest.mark.parametrize("rows", [1, 17])
def test_it_is_attention_with_the_head_given_to_all(rng, isa, rows):
    q, k, v = qkv(rng, heads=7, kv_heads=1, rows=rows, keys=60)
    given = [np.repeat(x, 7, axis=1) for x in (k, v)]
    out, lse = multi_query_attention(q, k, v, return_lse=True)
    expected, expected_lse = la.attention(q, *given, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_grouped_query_attention_with_one_kv_head(rng, isa, interleaved):
    q, k, v = qkv(rng, heads=6, kv_heads=1, rows=4, keys=40)
    expected = grouped_query_attention(q, k, v, interleaved=interleaved)
    np.testing.assert_array_equal(multi_query_attention(q, k, v), expected)


def test_one_query_head_is_single_head_attention(rng, isa):
    q, k, v = qkv(rng, heads=1, kv_heads=1, rows=4, keys=40)
    np.testing.assert_array_equal(multi_query_attention(q, k, v), la.attention(q, k, v))


# Bad input


def test_several_kv_heads_are_refused(rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match=r"k: got 2 heads, expected 1 \(several are grouped_query_attention\)"):
        multi_query_attention(q, k, v)
    with pytest.raises(ValueError, match=r"v: got 2 heads, expected 1"):
        multi_query_attention(q, k[:, :1], v)
    with pytest.raises(TypeError, match=r"k: got list"):
        multi_query_attention(q, [1.0], v)
    with pytest.raises(ValueError, match=r"k: got shape \(3,\)"):
        multi_query_attention(q, np.zeros(3, np.float32), v)
