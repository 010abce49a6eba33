"""`dhsa_select`, the boundary predictor and its labels against float64 references, and identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import Dhsa, boundary_logits, boundary_ratios, dhsa_select, pick_boundaries
from random_arrays import DTYPES, LAYOUTS, normal, qkv

SMALL = {"block_q": 8, "n_local": 6, "n_global": 5, "instruction_tokens": 0}


def check(q, k, **options):
    options = SMALL | options
    lists = dhsa_select(q, k, **options)
    expected = reference.dhsa_select(q, k, **options)
    np.testing.assert_array_equal(lists.to_dense_mask(), expected)
    return lists


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(60, 60), (1, 90), (33, 100), (40, 30)])
@pytest.mark.parametrize("boundaries", [7, "ragged"])
def test_reference(rng, isa, per_head, rows, keys, boundaries):
    q, k, _ = qkv(rng, batch=2, heads=6, kv_heads=2, rows=rows, keys=keys, dim=24)
    if boundaries == "ragged":
        inner = np.sort(rng.choice(np.arange(1, keys), 9, replace=False))
        boundaries = np.array([0, *inner, keys])
    for budget in (1, 20, 37, 1000):
        check(q, k, budget=budget, boundaries=boundaries, per_head=per_head)
    check(q, k, budget=20, boundaries=boundaries, per_head=per_head, instruction_tokens=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, _ = qkv(rng, rows=50, keys=70, q_dtype=dtype, layout=layout)
    check(q, k, budget=25, boundaries=9)


def test_as_a_selector(rng, isa, threads):
    q, k, v = qkv(rng, rows=60, keys=60)
    out, stats = la.sparse_attention(q, k, v, Dhsa(budget=20, boundaries=5, **SMALL), causal=True, return_stats=True)
    mask = reference.dhsa_select(q, k, budget=20, boundaries=5, **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=mask, causal=True))
    assert stats.scored == 8 * 12 and 0 < stats.density < 0.6


# Identities


def test_a_budget_of_all_keys_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=60, keys=90)
    lists = dhsa_select(q, k, budget=90, boundaries=11)
    out = la.index_sparse_attention(q, k, v, lists, causal=True)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_chunks_of_one_token_give_the_largest_logits(rng, isa):
    q, k, _ = qkv(rng, heads=4, kv_heads=2, rows=60, keys=60)
    options = {"block_q": 1, "n_local": 0, "n_global": 0, "instruction_tokens": 0, "per_head": True}
    lists = dhsa_select(q, k, budget=7, boundaries=1, **options)
    logits = q.astype(np.float64) @ np.repeat(k, 2, axis=1).swapaxes(-1, -2)
    logits = np.where(np.tri(60, dtype=bool), logits, -np.inf)
    rank = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1, kind="stable")
    np.testing.assert_array_equal(lists.to_dense_mask(), (rank < 7) & np.tri(60, dtype=bool))


def test_equal_chunks_rank_as_by_their_means(rng, isa):
    q, k, _ = qkv(rng, heads=1, kv_heads=1, rows=8, keys=96)
    lists = dhsa_select(q, k, budget=16, boundaries=8, block_q=8, n_local=0, n_global=0, instruction_tokens=0)
    means = k[0, 0].astype(np.float64).reshape(12, 8, 16).mean(axis=1) @ q[0, 0].astype(np.float64).mean(axis=0)
    best = np.sort(np.argsort(-means)[:2])
    np.testing.assert_array_equal(lists.indices.reshape(2, 8)[:, 0] // 8, best)


def test_prefix_sums_are_sums_of_chunks(rng, isa):
    from longattn.sparse.dhsa_select import chunk_means

    x = normal(rng, (2, 3, 40, 16))
    bounds = np.array([0, 1, 7, 20, 40])
    exact = x.astype(np.float64)
    prefix = np.concatenate([np.zeros((2, 3, 1, 16)), np.cumsum(exact, axis=2)], axis=2)
    by_prefix = (prefix[:, :, bounds[1:]] - prefix[:, :, bounds[:-1]]) / np.sqrt(np.diff(bounds))[:, None]
    np.testing.assert_allclose(chunk_means(x, bounds), by_prefix, atol=1e-5)


# Boundaries


def weights_of(rng, *, window=4, dim=16, wide=6, hidden=5):
    shapes = {
        "depthwise": (window, dim), "pointwise": (wide, dim), "pointwise_bias": (wide,),
        "hidden": (hidden, 4 * wide + 1), "hidden_bias": (hidden,), "output": (hidden,), "output_bias": (),
    }  # fmt: skip
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("length", "window"), [(40, 4), (3, 4), (1, 2), (9, 1)])
def test_boundary_logits(rng, length, window):
    keys, weights = normal(rng, (length, 16)), weights_of(rng, window=window)
    logits = boundary_logits(keys, weights, window=window)
    expected = reference.boundary_logits(keys, weights, window=window)
    assert logits.shape == (length - 1,) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half_width", [0, 2, 8, 100])
def test_pick_boundaries(rng, half_width):
    scores = rng.integers(0, 9, 60).astype(np.float64)
    for n in (1, 2, 5, 100):
        picked = pick_boundaries(scores, n, half_width=half_width)
        assert picked.tolist() == reference.pick_boundaries(scores, n, half_width=half_width)
    few = pick_boundaries(scores, 100, half_width=0, threshold=6.5)
    np.testing.assert_array_equal(few[1:-1] - 1, np.flatnonzero(scores > 6.5))


@pytest.mark.parametrize("length", [1, 3, 9, 30])
def test_boundary_ratios(rng, length):
    weights = np.tril(rng.random((length, length)))
    expected = reference.boundary_labels(weights)
    np.testing.assert_allclose(boundary_ratios(weights), expected, rtol=1e-6)


def test_boundaries_lie_where_attention_changes():
    """Later queries look at tokens 0-19 and not at 20-39: the gap between stands out."""
    weights = np.zeros((60, 60))
    weights[40:, :20] = 0.05
    ratios = boundary_ratios(weights)
    assert pick_boundaries(ratios, 2).tolist() == [0, 20, 60] or ratios[19] == ratios.max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0}, ValueError, r"budget: got 0"),
        ({"boundaries": 0}, ValueError, r"boundaries: got 0, expected at least 1"),
        ({"boundaries": np.array([0, 5, 5, 9])}, ValueError, r"boundaries: got an array \(4,\), expected numbers that"),
        ({"boundaries": np.array([0, 8])}, ValueError, r"expected numbers that rise from 0 to 9"),
        ({"boundaries": np.array([0.0, 9.0])}, TypeError, r"boundaries: got dtype float64"),
        ({"block_q": 0}, ValueError, r"block_q: got 0"),
        ({"n_local": -1}, ValueError, r"n_local: got -1"),
        ({"per_head": 1}, TypeError, r"per_head: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, _ = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        dhsa_select(q, k, **({"budget": 5} | change))


def test_bad_weights(rng):
    keys, weights = normal(rng, (9, 16)), weights_of(rng)
    with pytest.raises(ValueError, match=r"weights\['hidden'\]: got shape \(5, 24\), expected \(5, 25\)"):
        boundary_logits(keys, weights | {"hidden": weights["hidden"][:, 1:]})
    with pytest.raises(ValueError, match=r"weights: got .*, expected 'output' among them"):
        boundary_logits(keys, {name: w for name, w in weights.items() if name != "output"})
    with pytest.raises(ValueError, match=r"keys: got shape \(9,\)"):
        boundary_logits(keys[:, 0], weights)
    with pytest.raises(ValueError, match=r"attention: got shape \(3, 4\)"):
        boundary_ratios(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"n_chunks: got 0"):
        pick_boundaries(np.zeros(3), 0)
