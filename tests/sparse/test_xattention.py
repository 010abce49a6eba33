"""`xattention` and `Antidiagonal` against their float64 reference, and their identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import Antidiagonal, xattention
from random_arrays import DTYPES, LAYOUTS, normal, qkv

SMALL = {"stride": 4, "block": 16}


def agrees(q, k, *, causal=False, **options):
    """Blocks are those of the reference."""
    ours = Antidiagonal(**SMALL | options)(q, k, causal=causal).blocks()
    np.testing.assert_array_equal(ours, reference.xattention_blocks(q, k, causal=causal, **SMALL | options))
    return ours


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(1, 1, 64, 64), (6, 2, 90, 130), (4, 4, 100, 100)])
def test_blocks(rng, isa, causal, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, spread=3.0)
    for options in ({}, {"threshold": 0.5}, {"threshold": 0.3, "sink": False, "own": False}, {"stride": 16}):
        kept = agrees(q, k, causal=causal, **options)
    assert 0.02 < kept.mean() < 0.98


def test_numbers_per_head(rng, isa):
    q, k, _ = qkv(rng, rows=100, keys=100, spread=3.0)
    agrees(q, k, threshold=np.array([0.1, 0.5, 0.9, 1.0]), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=70, keys=90, dim=20, q_dtype=dtype, layout=layout, spread=2.0)
    agrees(q, k, threshold=0.6)
    out, lse = xattention(q, k, v, **SMALL, threshold=0.6, return_lse=True)
    expected, expected_lse = reference.xattention(q, k, v, **SMALL, threshold=0.6, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


def test_any_number_of_threads(rng, threads):
    agrees(*qkv(rng, rows=200, keys=200)[:2], causal=True)


@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (5, 100), (100, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out = xattention(q, k, v, **SMALL, causal=True)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


@pytest.mark.parametrize("causal", [False, True])
def test_a_threshold_of_one_is_dense_attention(rng, isa, causal):
    q, k, v = qkv(rng, rows=100, keys=130)
    out = xattention(q, k, v, **SMALL, threshold=1.0, causal=causal)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


def test_a_stride_of_one_has_the_true_weights(rng, isa):
    q, k, _ = qkv(rng, heads=2, rows=64, keys=96, spread=3.0)
    kept = Antidiagonal(stride=1, block=16, threshold=0.7, sink=False, own=False)(q, k).blocks()
    weights = la.dense.attention_weights(q, k, rows=np.arange(64)).reshape(1, 2, 4, 16, 6, 16).sum(axis=(3, 5)) / 16
    order = np.sort(weights, axis=-1)[..., ::-1]
    np.testing.assert_array_equal(kept.sum(axis=-1), 1 + (np.cumsum(order, axis=-1) < 0.7).sum(axis=-1))
    assert (np.where(kept, weights, 0).sum(axis=-1) >= 0.7 - 1e-5).all()


def test_equal_rows_of_strides_give_the_softmax_over_strides(rng, isa):
    q, k = (np.repeat(normal(rng, (1, 2, 20, 16), spread=2.0), 4, axis=2) for _ in range(2))
    logits = 16**-0.5 * q[:, :, ::4].astype(float) @ k[:, :, ::4].astype(float).swapaxes(-1, -2)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = weights.reshape(1, 2, 5, 4, 5, 4).sum(axis=(3, 5))
    np.testing.assert_allclose(reference.xattention_mass(q, k, **SMALL), expected, rtol=1e-9)
    agrees(q, k, threshold=0.6)


def test_a_threshold_of_zero_is_the_own_and_the_first_block(rng, isa):
    q, k, _ = qkv(rng, rows=64, keys=64)
    kept = Antidiagonal(**SMALL, threshold=0.0)(q, k, causal=True).blocks()
    expected = np.eye(4, dtype=bool) | (np.arange(4) == 0)
    np.testing.assert_array_equal(kept, np.broadcast_to(expected & np.tri(4, dtype=bool), kept.shape))


def test_it_is_dense_attention_with_its_mask(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=130, spread=2.0)
    mask = Antidiagonal(**SMALL, threshold=0.5)(q, k, causal=True)
    expected = la.attention(q, k, v, mask=mask.to_dense_mask(), causal=True)
    out, stats = xattention(q, k, v, **SMALL, threshold=0.5, causal=True, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, expected)
    assert stats.density == pytest.approx(mask.density(causal=True)) and stats.scored == 4 * 23 * 33


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stride": 3}, ValueError, r"stride: got 3, expected a divisor of the block, 16"),
        ({"stride": 0}, ValueError, r"stride: got 0"),
        ({"block": 1.5}, TypeError, r"block: got 1.5"),
        ({"threshold": np.zeros(3)}, ValueError, r"threshold: got shape \(3,\)"),
        ({"threshold": float("nan")}, ValueError, r"threshold: got NaN"),
        ({"sink": 1}, TypeError, r"sink: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        xattention(q, k, v, **SMALL | change)
