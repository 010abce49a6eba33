"""`learned_aggregation_pool`."""

import numpy as np
import pytest

import longattn as la
from longattn.pool import learned_aggregation_pool
from longattn.reference import pool as reference
from random_arrays import DTYPES, normal


def arrays(rng, m=1, patches=30, channels=16, dtype=np.float32):
    weights = [normal(rng, (channels, channels), spread=0.3) for _ in range(4)]
    return normal(rng, (m, channels), dtype), normal(rng, (2, patches, channels), dtype), *weights


def compare(given, **options):
    out = learned_aggregation_pool(*given, **options)
    expected = reference.learned_aggregation_pool(*given, **options)
    roundoff = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[given[1].dtype.name]
    assert out.dtype == given[1].dtype and out.shape == expected.shape
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=roundoff, atol=10 * roundoff)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"heads": 4}, {"patches_only": True}], ids=str)
@pytest.mark.parametrize("m", [1, 5])
def test_reference(rng, isa, dtype, options, m):
    gamma, beta = normal(rng, (16,)), normal(rng, (16,))
    compare(arrays(rng, m, dtype=dtype), ln_gamma=gamma, ln_beta=beta, layer_scale=normal(rng, (16,)), **options)


def test_tokens_per_sample(rng):
    _, x, *weights = arrays(rng)
    compare((normal(rng, (2, 3, 16)), x, *weights), layer_scale=1.0)


def test_weights(rng):
    given = arrays(rng, 2)
    out, weights = learned_aggregation_pool(*given, heads=4, return_weights=True)
    np.testing.assert_array_equal(out, learned_aggregation_pool(*given, heads=4))
    assert weights.shape == (2, 4, 2, 32)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_bad_input(rng):
    cls, x, *weights = arrays(rng)
    for args, options, match in (
        ((cls[:, 1:], x, *weights), {}, "cls: got shape"),
        ((cls, x[0], *weights), {}, "x: got shape"),
        ((cls, x, weights[0][1:], *weights[1:]), {}, "w_q: got shape"),
        ((cls, x, *weights), {"heads": 3}, "heads: got 3"),
        ((cls, x, *weights), {"layer_scale": np.ones(3, np.float32)}, "layer_scale: got shape"),
    ):
        with pytest.raises(ValueError, match=match):
            learned_aggregation_pool(*args, **options)


# Identities


def test_without_queries_it_is_mean_pooling(rng):
    cls, x, wq, wk, wv, wo = arrays(rng)
    out = learned_aggregation_pool(cls, x, 0 * wq, wk, wv, wo, layer_scale=1.0, patches_only=True)
    expected = cls + (x.astype(np.float64).mean(axis=1, keepdims=True) @ wv) @ wo
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_it_is_dense_attention(rng):
    cls, x, wq, wk, wv, wo = arrays(rng, 3)
    u = np.concatenate([np.broadcast_to(cls, (2, 3, 16)), x], axis=1)
    attended = la.attention(*(rows[:, None] for rows in (u[:, :3] @ wq, u @ wk, u @ wv)))[:, 0]
    out = learned_aggregation_pool(cls, x, wq, wk, wv, wo, layer_scale=0.5)
    np.testing.assert_allclose(out, cls + 0.5 * (attended @ wo), rtol=1e-5, atol=1e-5)


def test_one_patch(rng):
    cls, x, wq, wk, wv, wo = arrays(rng, patches=1)
    out = learned_aggregation_pool(cls, x, wq, wk, wv, wo, layer_scale=1.0, patches_only=True)
    np.testing.assert_allclose(out, cls + (x @ wv) @ wo, rtol=1e-5, atol=1e-5)
