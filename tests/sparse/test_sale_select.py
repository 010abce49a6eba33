"""`sale_select` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense
from longattn.reference import sparse as reference
from longattn.sparse import Sale, sale_select
from random_arrays import DTYPES, LAYOUTS, qkv

SMALL = {"block_q": 16, "block_k": 8, "local_window": 20, "segment": 16, "min_length": 0}


def margins(q, k, *, tau, scale=None, levels=7.0, **sizes):
    """How far the best pair of each judged block lies above the threshold, and what is kept unjudged."""
    near = reference.sale_select(q, k, tau=np.inf, scale=scale, **sizes)
    _, lse = dense.attention(q, k, k, mask=near, causal=True, scale=scale, return_lse=True)
    estimates = reference.sale_estimates(q, k, scale=scale, levels=levels)
    tau = np.broadcast_to(np.asarray(tau, np.float64), q.shape[1])[:, None, None]
    return estimates - lse[..., None] - np.log(tau), near


def check(q, k, *, tau, scale=None, **sizes):
    """Kept blocks are those of the reference at a threshold within rounding."""
    sizes = SMALL | sizes
    ours = sale_select(q, k, tau=tau, scale=scale, **sizes).to_dense_mask()
    # A number that lies on the border between two codes may fall on either side, which moves a logit a little.
    slack = 0.004 * np.abs(reference.sale_estimates(q, k, scale=scale)).max() + 1e-4
    options = {"scale": scale, **sizes}
    low, high = (reference.sale_select(q, k, tau=np.asarray(tau) * np.exp(d), **options) for d in (slack, -slack))
    assert (low <= ours).all() and (ours <= high).all()
    return ours, low, high


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
@pytest.mark.parametrize(("rows", "keys"), [(200, 200), (100, 213), (5, 150), (40, 30)])
def test_reference(rng, isa, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=24, spread=2.0)
    k = k + 2 * rng.standard_normal(24).astype(np.float32)  # a mean that matters
    for tau in (0.05, 0.5):
        ours, low, high = check(q, k, tau=tau)
    if (rows, keys) == (200, 200):
        assert 0.01 < ours.mean() < 0.55 and (high & ~low).mean() < 0.2


def test_exact_numbers(rng, isa):
    """Where every row holds its largest magnitude 7 and whole numbers, nothing is rounded."""
    q, k = (rng.integers(-6, 7, (1, 2, 200, 16)).astype(np.float32) for _ in range(2))
    for x in (q, k):
        x[..., 0] = np.where(np.arange(200) % 2, 7, -7)
        x[:, :, 100:] = -x[:, :, :100]  # no means
    distance, near = margins(q, k, tau=0.3, scale=0.07, **SMALL)
    assert np.abs(distance).min() > 1e-5
    kept = sale_select(q, k, tau=0.3, scale=0.07, **SMALL).to_dense_mask()
    np.testing.assert_array_equal(kept, reference.sale_select(q, k, tau=0.3, scale=0.07, **SMALL))
    assert near.mean() < kept.mean() < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, _ = qkv(rng, rows=120, keys=120, q_dtype=dtype, layout=layout)
    check(q, k, tau=0.2)


def test_numbers_per_head(rng, isa, threads):
    q, k, _ = qkv(rng, rows=150, keys=150)
    ours, *_ = check(q, k, tau=np.array([0.01, 0.1, 1.0, 10.0]))
    assert (np.diff(ours.mean(axis=(0, 2, 3))) < 0).all()
    some = sale_select(q, k, tau=np.array([0.0, 0.5, 0.5, 0.5]), **SMALL).to_dense_mask()
    assert (some[:, 0] >= np.tri(150, dtype=bool)).all() and not (some[:, 1] >= np.tri(150, dtype=bool)).all()


def test_as_a_selector(rng, isa):
    q, k, v = qkv(rng, rows=150, keys=150)
    out, stats = la.sparse_attention(q, k, v, Sale(tau=0.3, **SMALL), causal=True, return_stats=True)
    mask = sale_select(q, k, tau=0.3, **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=mask.to_dense_mask(), causal=True))
    assert stats.density == mask.density(causal=True) and stats.scored == mask.scored > 0


# Identities


def test_without_a_threshold_it_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=150, keys=180)
    for options in ({"tau": 0.0, **SMALL}, {"tau": 1.0, **SMALL, "min_length": 150}, {"tau": 1.0}):
        mask = sale_select(q, k, **options)
        out = la.block_sparse_attention(q, k, v, mask, causal=True)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))
        assert mask.density(causal=True) == 1


def test_an_infinite_threshold_keeps_sinks_and_near_keys(rng, isa):
    q, k, _ = qkv(rng, rows=160, keys=160)
    kept = sale_select(q, k, tau=float("inf"), **SMALL).to_dense_mask()[0, 0]
    position, j = np.arange(160)[:, None], np.arange(160)
    start = position // 16 * 16
    middle = 8 + np.maximum(start - 28, 0) // 16 * 16
    np.testing.assert_array_equal(kept, (j < 8) | ((j >= middle) & (j < start + 16)))


def test_it_agrees_with_exact_logits_where_margins_are_wide(rng, isa):
    q, k, _ = qkv(rng, rows=200, keys=200, dim=32)
    exact, near = margins(q, k, tau=0.3, levels=None, **SMALL)
    estimated, _ = margins(q, k, tau=0.3, **SMALL)
    wide = np.abs(exact) > np.abs(estimated - exact)
    ours = sale_select(q, k, tau=0.3, **SMALL).to_dense_mask()
    by_exact = reference.sale_kept(q, k, tau=0.3, levels=None, **SMALL)
    # By blocks: those all of whose pairs have wide margins.
    rows, same = (x[:, :, :192].reshape(1, 4, 12, 16, 25, 8).all(axis=(3, 5)) for x in (wide | near, ours == by_exact))
    assert rows.mean() > 0.2 and same[rows].all() and not near.all()


def test_means_change_no_logit(rng):
    q, k, _ = qkv(rng, rows=50, keys=70)
    exact = q.astype(np.float64) @ np.repeat(k, 2, axis=1).astype(np.float64).swapaxes(-1, -2) * 0.25
    np.testing.assert_allclose(reference.sale_estimates(q, k, levels=None), exact, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": -1.0}, ValueError, r"tau: got -1.0, expected no negative"),
        ({"tau": np.zeros(3)}, ValueError, r"tau: got shape \(3,\)"),
        ({"tau": float("nan")}, ValueError, r"tau: got NaN"),
        ({"segment": 40}, ValueError, r"segment: got 40, expected a multiple of block_k, 32"),
        ({"block_k": 0}, ValueError, r"block_k: got 0"),
        ({"local_window": -1}, ValueError, r"local_window: got -1"),
        ({"q": np.zeros((4, 9, 16), np.float32)}, ValueError, r"k: got shape"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, _ = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        sale_select(**({"q": q, "k": k} | change))
