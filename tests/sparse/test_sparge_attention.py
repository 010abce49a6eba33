"""`sparge_attention` and `Sparge` against their float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import Sparge, sparge_attention
from random_arrays import DTYPES, LAYOUTS, normal, qkv

SMALL = {"block_q": 32, "block_k": 16}


def clustered(rng, *, heads=4, kv_heads=2, rows=300, keys=400, dim=16, noise=0.4, dtype=np.float32, batch=1):
    """Queries and keys whose neighbours are mostly alike, but not everywhere."""

    def alike(heads, length):
        runs = np.repeat(rng.standard_normal((batch, heads, -(-length // 32), dim)), 32, axis=2)[:, :, :length]
        wild = np.repeat(rng.random((batch, heads, -(-length // 32), 1)) < 0.2, 32, axis=2)[:, :, :length]
        return (2 * runs + rng.standard_normal(runs.shape) * np.where(wild, 5.0, noise)).astype(dtype)

    return alike(heads, rows), alike(kv_heads, keys), normal(rng, (batch, kv_heads, keys, dim), np.dtype(dtype))


def agrees(selector, q, k, *, causal=False):
    """Blocks are those of the reference, but for scores and likenesses within rounding of a border."""
    options = {name: getattr(selector, name) for name in Sparge.__dataclass_fields__}
    ours = selector(q, k, causal=causal).blocks()
    sharp = [
        reference.sparge_blocks(q, k, causal=causal, **options | {name: np.asarray(options[name]) + d})
        for name in ("theta", "topk" if selector.topk is not None else "cdf")
        for d in (-2e-5, 2e-5)
    ]
    low, high = np.logical_and.reduce(sharp), np.logical_or.reduce(sharp)
    assert (low <= ours).all() and (ours <= high).all()
    return ours


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4)])
def test_blocks(rng, isa, causal, heads, kv_heads):
    q, k, _ = clustered(rng, heads=heads, kv_heads=kv_heads, batch=2)
    for options in ({}, {"cdf": 0.7}, {"topk": 0.3, "theta": -0.1}, {"smooth_k": False, "sink": True, "cdf": 0.5}):
        kept = agrees(Sparge(**SMALL, **options), q, k, causal=causal)
    assert 0.02 < kept.mean() < 0.98


def test_numbers_per_head(rng, isa):
    q, k, _ = clustered(rng, heads=4)
    theta, cdf = np.array([0.3, 0.6, 0.95, 2.0]), np.array([0.2, 0.5, 0.9, 0.1])
    kept = agrees(Sparge(**SMALL, theta=theta, cdf=cdf), q, k)
    assert kept[:, 3].all() and not kept[:, 0].all()
    agrees(Sparge(**SMALL, topk=np.array([0.1, 0.2, 0.5, 1.0])), q, k, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    q, k, v = clustered(rng, dtype=dtype)
    agrees(Sparge(**SMALL), q, k, causal=True)
    out, lse = sparge_attention(q, k, v, **SMALL, causal=True, return_lse=True)
    mask = Sparge(**SMALL)(q, k, causal=True).to_dense_mask()
    expected, expected_lse = la.attention(q, k, v, mask=mask, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, isa, layout):
    q, k, _ = qkv(rng, rows=100, keys=90, layout=layout, dim=20)
    agrees(Sparge(**SMALL, theta=0.02, cdf=0.9), q, k)


def test_reference_output(rng, isa, threads):
    q, k, v = clustered(rng)
    options = {**SMALL, "theta": 0.5, "topk": 0.31}
    expected, expected_lse = reference.sparge_attention(q, k, v, **options, return_lse=True)
    out, lse = sparge_attention(q, k, v, **options, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (5, 100), (100, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    agrees(Sparge(**SMALL, theta=0.0), q, k) if rows and keys else None
    out = sparge_attention(q, k, v, **SMALL, causal=True)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


@pytest.mark.parametrize("causal", [False, True])
def test_all_of_the_mass_is_dense_attention(rng, isa, causal):
    q, k, v = clustered(rng)
    out, lse = sparge_attention(q, k, v, cdf=1.0, skip_log2=float("inf"), causal=causal, return_lse=True)
    expected, expected_lse = la.attention(q, k, v, causal=causal, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_are_never_alike_give_dense_attention(rng, isa, causal):
    q, k, v = clustered(rng)
    out = sparge_attention(q, k, v, theta=1.0, cdf=0.1, causal=causal, **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))
    assert Sparge(theta=1.0, cdf=0.1, **SMALL)(q, k).density() == 1


def test_constant_blocks_give_the_softmax_over_blocks(rng, isa):
    """The kept blocks are the smallest set with more than the share, less one, of the true mass."""
    q = np.repeat(normal(rng, (1, 2, 6, 16), spread=3.0), 32, axis=2)
    k = np.repeat(normal(rng, (1, 2, 20, 16)), 16, axis=2)
    kept = Sparge(**SMALL, cdf=0.8, theta=0.9)(q, k).blocks()
    mass = la.dense.attention_weights(q, k, rows=np.arange(0, 192, 32)).reshape(1, 2, 6, 20, 16).sum(axis=-1)
    order = np.sort(mass, axis=-1)[..., ::-1]
    wanted = np.maximum((np.cumsum(order, axis=-1) <= 0.8).sum(axis=-1), 1)
    np.testing.assert_array_equal(kept.sum(axis=-1), wanted)
    assert (np.where(kept, mass, 1).min(axis=-1) >= np.where(kept, 0, mass).max(axis=-1)).all()


def test_the_mean_key_changes_no_dense_result(rng, isa):
    q, k, v = clustered(rng)
    k = k + 3
    one, other = (sparge_attention(q, k, v, cdf=1.0, smooth_k=smooth, **SMALL) for smooth in (False, True))
    tolerances.same_storage(q, k, v).check(one, other)
    assert Sparge(cdf=0.5, **SMALL)(q, k).density() < Sparge(cdf=0.5, theta=0.999, **SMALL)(q, k).density() <= 1


def test_the_density_is_the_share_of_kept_blocks(rng):
    q, k, v = clustered(rng, rows=320, keys=320)
    _, stats = sparge_attention(q, k, v, **SMALL, cdf=0.5, return_stats=True)
    blocks = Sparge(**SMALL, cdf=0.5)(q, k).blocks()
    assert stats.density == pytest.approx(blocks.mean()) and stats.scored == blocks.size


def test_what_fifty_powers_of_two_leave_out_is_nothing(rng, isa):
    q, k, v = clustered(rng)
    exact = sparge_attention(8 * q, k, v, **SMALL, skip_log2=float("inf"))
    tolerances.same_storage(q, k, v).check(sparge_attention(8 * q, k, v, **SMALL), exact)


def test_what_is_skipped_does_not_count(rng, isa):
    """Keys whose weights are 2^-7 of the largest are left out by 6 powers of two, and by 8 they are not."""
    q, k, v = qkv(rng, rows=128, keys=1024, dim=16)
    q[:], k[:] = 0.0, 0.01 * k
    q[..., 0] = 4.0  # logits are the keys' first numbers, but for a little
    k[..., 0] -= np.where(np.arange(1024) < 256, 0, 7 * np.log(2)).astype(np.float32)
    v[:, :, 256:] += 50.0
    every, near = la.attention(q, k, v), la.attention(q, k[:, :, :256], v[:, :, :256])
    assert np.abs(every - near).min() > 0.5
    for powers, expected in ((6.0, near), (8.0, every)):
        out = sparge_attention(q, k, v, theta=1.0, block_k=256, skip_log2=powers)
        tolerances.same_storage(q, k, v).check(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta": np.zeros(3)}, ValueError, r"theta: got shape \(3,\), expected a number or \(4,\)"),
        ({"cdf": float("nan")}, ValueError, r"cdf: got NaN"),
        ({"topk": "a"}, TypeError, r"topk"),
        ({"block_q": 0}, ValueError, r"block_q: got 0"),
        ({"block_k": 1.5}, TypeError, r"block_k: got 1.5"),
        ({"smooth_k": 0}, TypeError, r"smooth_k: got 0"),
        ({"skip_log2": 0.0}, ValueError, r"skip_log2: got 0.0, expected a positive number"),
        ({"causal": None}, TypeError, r"causal: got None"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        sparge_attention(q, k, v, **change)
