"""`flex_prefill` and `FlexPrefill` against their float64 reference, and their identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import FlexPrefill, flex_prefill
from random_arrays import DTYPES, LAYOUTS, normal, qkv

SMALL = {"block": 16, "min_budget": 32}


def agrees(q, k, **options):
    """Blocks are those of the reference."""
    mask = FlexPrefill(**SMALL | options)(q, k)
    past = np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool)
    expected = reference.flex_blocks(q, k, **SMALL | options)
    np.testing.assert_array_equal(mask.to_dense_mask() & past, expected & past)
    return mask


def middling(q, k):
    """A bound that some heads are below and others not."""
    return float(np.median(reference.flex_divergence(q, k, block=SMALL["block"])))


@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(2, 1, 128, 128), (6, 2, 90, 130), (4, 4, 100, 100)])
def test_blocks(rng, isa, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, spread=3.0)
    tau = middling(q, k)
    for options in ({"tau": tau}, {"tau": tau, "gamma": 0.4}, {"tau": 1.0, "gamma": 0.3, "min_budget": 0}):
        mask = agrees(q, k, **options)
    assert 0.02 < mask.density(causal=True) < 0.98


def test_divergence(rng, isa):
    q, k, _ = qkv(rng, batch=2, rows=50, keys=130, spread=2.0)
    ours = FlexPrefill(**SMALL).divergence(q, k)
    np.testing.assert_allclose(ours, reference.flex_divergence(q, k, block=16), atol=1e-5)


def test_numbers_per_head(rng, isa):
    q, k, _ = qkv(rng, rows=100, keys=100, spread=3.0)
    agrees(q, k, gamma=np.array([0.1, 0.5, 0.9, 1.0]), tau=middling(q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=70, keys=90, dim=20, q_dtype=dtype, layout=layout, spread=2.0)
    options = {**SMALL, "gamma": 0.55, "tau": middling(q, k) * 1.01, "scale": 20**-0.5}
    out, lse = flex_prefill(q, k, v, **options, return_lse=True)
    expected, expected_lse = reference.flex_prefill(q, k, v, **options, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


def test_any_number_of_threads(rng, threads):
    q, k, _ = qkv(rng, rows=300, keys=300)
    agrees(q, k, tau=middling(q, k), gamma=0.7)


@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (5, 100), (100, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out = flex_prefill(q, k, v, **SMALL)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_a_share_of_one_is_causal_attention(rng, isa, tau):
    q, k, v = qkv(rng, rows=100, keys=130)
    out = flex_prefill(q, k, v, gamma=1.0, tau=tau, **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_tau_decides_between_the_rules(rng):
    q, k, _ = qkv(rng, rows=128, keys=128, spread=3.0)
    lines, aware = (FlexPrefill(block=16, min_budget=0, gamma=0.5, tau=tau)(q, k).blocks() for tau in (0.0, 1.0))
    # On lines, a block that is taken for its distance is taken by every block of queries that has it.
    own = np.arange(8)
    for h in range(4):
        columns = lines[0, h, -1]
        for i in range(8):
            on_line = [j for j in range(i + 1) if columns[j + 7 - i] or columns[j]]
            assert set(np.flatnonzero(lines[0, h, i])) <= {0, i, *on_line}
    assert (lines != aware).any() and lines[:, :, own, own].all() and aware[:, :, own, own].all()


def test_equal_rows_hardly_diverge(rng, isa):
    """Only inside the last block, where causality hides keys from some queries, do the two maps differ."""
    q, k = (np.repeat(normal(rng, (1, 2, 16, 16)), 16, axis=2) for _ in range(2))
    q[:, :, -16:] *= 3
    k[:, :, -16:] = -10 * q[:, :, -16:]
    assert (FlexPrefill(**SMALL).divergence(q, k) < 1e-3).all()


def test_first_block_own_block_and_budget(rng, isa):
    q, k, _ = qkv(rng, rows=128, keys=128, spread=3.0)
    for tau in (0.0, 1.0):
        blocks = FlexPrefill(block=16, min_budget=48, gamma=0.1, tau=tau)(q, k).blocks()
        assert blocks[..., 0].all() and blocks[:, :, np.arange(8), np.arange(8)].all()
        assert (blocks.sum(axis=-1) >= np.minimum(np.arange(8) + 1, 3)).all()


def test_it_is_dense_attention_with_its_mask(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=130)
    mask = FlexPrefill(**SMALL, gamma=0.5)(q, k)
    expected = la.attention(q, k, v, mask=mask.to_dense_mask(), causal=True)
    out, stats = flex_prefill(q, k, v, **SMALL, gamma=0.5, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, expected)
    assert stats.density == pytest.approx(mask.density(causal=True)) and stats.scored > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": np.zeros(3)}, ValueError, r"gamma: got shape \(3,\)"),
        ({"tau": -1.0}, ValueError, r"tau: got -1.0"),
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"min_budget": 1.5}, TypeError, r"min_budget: got 1.5"),
        ({"k": np.zeros((1, 3, 9, 16), np.float32)}, ValueError, r"q: got 4 heads"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        flex_prefill(**({"q": q, "k": k, "v": v} | change))
