"""Decode of eight bf16 query rows: where the CPU multiplies pairs of bf16, their weights are rounded to bf16."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, LAYOUTS, qkv


def bf16(rng, **shape):
    """Queries of one head of keys that go through it together, eight of them."""
    return qkv(rng, **({"heads": 8, "kv_heads": 1, "rows": 1, "dim": 64, "q_dtype": BF16} | shape))


def check(q, k, v, **options):
    out, lse = la.attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 127, 128, 129, 1000])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 96), (1, 1), (33, 31), (100, 47)])
def test_reference(rng, isa, keys, dim, value_dim):
    check(*bf16(rng, keys=keys, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("heads", [(8, 1, 1), (16, 2, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8)], ids=str)
def test_heads_and_positions(rng, isa, heads):
    heads, kv_heads, rows = heads
    check(*bf16(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=300), causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, isa, layout):
    check(*bf16(rng, keys=70, layout=layout))


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_flat_and_sharp(rng, isa, spread):
    check(*bf16(rng, keys=2000, spread=spread))


def test_rounding_has_either_sign(rng):
    """The error averages out: it is far below what rounding all weights one way would give."""
    q, k, v = bf16(rng, keys=4096)
    out = np.asarray(la.attention(q, k, v + np.asarray(4, BF16)), np.float64)
    expected = reference.attention(q, k, v + np.asarray(4, BF16))
    # Outputs near 4 are rounded to multiples of 1/64; one way, weights would move them by 4/512 on average.
    assert abs((out - expected).mean()) < 4 / 512 / 4


def test_a_row_with_others_is_the_row_alone(rng, isa):
    q, k, v = bf16(rng, keys=500)
    alone = np.concatenate([la.attention(q[:, h : h + 1], k, v) for h in range(8)], axis=1)
    together = la.attention(q, k, v)
    tolerances.attention(q, k, v).check(together, alone)
    if isa != "avx512bf16":
        np.testing.assert_array_equal(together, alone)


def test_other_numbers_of_rows_keep_their_weights(rng, isa):
    q, k, v = bf16(rng, heads=7, keys=500)
    tolerances.attention(q, k, v).check(la.attention(q, k, v), reference.attention(q, k, v))


def test_hidden_values_may_be_anything(rng, isa):
    q, k, v = bf16(rng, keys=150)
    expected = la.attention(q, k[:, :, 20:], v[:, :, 20:])
    k[:, :, :20], v[:, :, :20] = np.nan, np.inf
    mask = np.arange(150) >= 20
    out = la.attention(q, k, v, mask=mask)
    tolerances.attention(q, k[:, :, 20:], v[:, :, 20:]).check(out, expected.astype(np.float64))


def test_seen_values_that_are_not_finite_show(rng, isa):
    q, k, v = bf16(rng, keys=151)
    v[0, 0, 150, 3] = np.nan
    out = np.asarray(la.attention(q, k, v), np.float32)
    assert np.isnan(out[..., 3]).all() and np.isfinite(np.delete(out, 3, axis=-1)).all()


def test_the_same_bits_on_any_number_of_threads(rng):
    q, k, v = bf16(rng, heads=32, kv_heads=4, keys=9000)
    before, outs = la.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            la.set_num_threads(threads)
            outs.append(la.attention(q, k, v))
    finally:
        la.set_num_threads(before)
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])
