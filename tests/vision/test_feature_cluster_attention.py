"""`feature_cluster_attention` and `balanced_clusters`: attention among alike tokens."""

import numpy as np
import pytest

import longattn as la
from longattn.reference import vision as reference
from longattn.vision import balanced_clusters, feature_cluster_attention
from longattn.vision.feature_cluster_attention import METHOD
from random_arrays import F32, normal, qkv
from vision_checks import check, check_kinds, raises, same


def tokens(rng, n=48, batch=2, heads=4, kv_heads=2):
    return qkv(rng, batch=batch, heads=heads, kv_heads=kv_heads, rows=n, keys=n, dim=8, value_dim=6)


@pytest.mark.parametrize(("cluster", "overlap"), [(6, 0), (6, 2), (12, 12), (24, 5), (48, 20), (3, 1)])
def test_reference(rng, isa, cluster, overlap):
    """Clusters are those of the reference; the order is given so that rounding cannot change it."""
    q, k, v = tokens(rng)
    order = reference.balanced_clusters(q, (48 // cluster).bit_length() - 1)
    check(METHOD, q, k, v, cluster=cluster, overlap=overlap, scale=0.5, order=order)
    own = feature_cluster_attention(q, k, v, cluster=cluster, overlap=overlap, scale=0.5)
    np.testing.assert_array_equal(
        own,
        feature_cluster_attention(
            q,
            k,
            v,
            cluster=cluster,
            overlap=overlap,
            scale=0.5,
            order=balanced_clusters(q, (48 // cluster).bit_length() - 1),
        ),
    )


@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_clusters(rng, levels):
    """Most tokens are where float64 puts them; ties by rounding may swap neighbours at a cut."""
    x = normal(rng, (2, 3, 64, 8))
    order, expected = balanced_clusters(x, levels), reference.balanced_clusters(x, levels)
    assert (np.sort(order, axis=-1) == np.arange(64)).all()
    assert (order == expected).mean() > 0.95


def test_kinds(rng):
    q, k, v = tokens(rng)
    check_kinds(METHOD, q, k, v, cluster=12, overlap=3, order=balanced_clusters(q, 2))


def test_one_cluster(rng):
    q, k, v = tokens(rng)
    out = feature_cluster_attention(q, k, v, cluster=48)
    same(METHOD, out, la.attention(q, k, v), q, k, v, cluster=48)


def test_clusters_of_one_token(rng):
    q, k, v = tokens(rng, n=32)
    out = feature_cluster_attention(q, k, v, cluster=1, overlap=0)
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=1), rtol=1e-6)


def test_equal_queries(rng):
    q, k, v = tokens(rng)
    q = np.broadcast_to(q[:, :, :1], q.shape)
    block = np.arange(48) // 12
    expected = la.attention(q, k, v, segments=(block, block))
    out = feature_cluster_attention(q, k, v, cluster=12, overlap=0)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_opposite_groups(rng):
    direction = normal(rng, (8,))
    signs = rng.permutation(np.repeat([1, -1], 16))
    # The first half holds more of one sign than of the other, as the centres start from the halves.
    signs = (
        np.concatenate([np.sort(signs[:16])[::-1], np.sort(signs[16:])]) if signs[:16].sum() else np.repeat([1, -1], 16)
    )
    x = (signs[:, None] * direction + 0.01 * normal(rng, (32, 8))).astype(F32)[None, None]
    found = balanced_clusters(x, 1)[0, 0]
    assert len(set(signs[found[:16]])) == 1 and len(set(signs[found[16:]])) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cluster": 16}, ValueError, r"cluster: got 16, expected 48 tokens to be 16 times a power of 2"),
        ({"cluster": 96}, ValueError, r"cluster: got 96"),
        ({"overlap": 13}, ValueError, r"overlap: got 13, expected 0 to 12"),
        ({"order": np.zeros((2, 4, 48), np.int64)}, ValueError, r"order: got repeated"),
        ({"order": np.zeros((2, 4, 47), np.int64)}, ValueError, r"order: got shape \(2, 4, 47\)"),
        ({"order": np.zeros((2, 4, 48))}, TypeError, r"order: got dtype float64"),
        ({"k": np.zeros((2, 2, 47, 8), F32), "v": np.zeros((2, 2, 47, 8), F32)}, ValueError, r"k: got length 47"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = tokens(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "cluster": 12, "overlap": 3}, **change)


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (np.zeros((1, 1, 12, 2), F32), 3, r"levels: got 3, expected 12 tokens"),
        (np.zeros((12, 2), F32), 1, r"x: got shape \(12, 2\)"),
    ],
)
def test_bad_clusters(x, levels, message):
    with pytest.raises(ValueError, match=message):
        balanced_clusters(x, levels)
