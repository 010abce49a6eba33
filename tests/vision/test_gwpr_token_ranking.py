"""`gwpr_token_ranking`: importance by a random walk along attention."""

import numpy as np
import pytest

import longattn as la
from longattn.vision.gwpr_token_ranking import METHOD, gwpr_token_ranking, pruned_blocks
from random_arrays import DTYPES, F32, normal, qkv


def case(rng, tokens=40, keys=40, dtype=F32):
    q, k, _ = qkv(rng, batch=2, heads=4, kv_heads=2, rows=tokens, keys=keys, q_dtype=dtype, spread=2.0)
    return q, k


def check(q, k, **options):
    found = gwpr_token_ranking(q, k, **options)
    importance, kept, source = METHOD.reference(q, k, **options)
    np.testing.assert_allclose(np.asarray(found.importance), importance, rtol=2e-4, atol=1e-7)
    np.testing.assert_array_equal(found.kept, kept)
    np.testing.assert_array_equal(found.source, source)
    np.testing.assert_allclose(np.asarray(found.importance).sum(axis=1), 1, rtol=1e-5)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"iterations": 1},
        {"iterations": 50, "tol": 1e-7},
        {"damping": 0.8, "scale": 0.4},
        {"head_weights": np.array([1.0, 0, 2, 0.5])},
    ],
)
def test_reference(rng, isa, threads, options):
    check(*case(rng), ratio=0.4, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    check(*case(rng, dtype=dtype), ratio=0.3)


def test_many_tokens_go(rng):
    found = check(*case(rng, 400, 400), ratio=0.9)
    assert found.kept.shape == (2, 40)


@pytest.mark.parametrize("iterations", [1, 4])
def test_text(rng, isa, iterations):
    check(*case(rng, 40, 13), ratio=0.5, cross=True, iterations=iterations)


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k = case(rng)
    found = gwpr_token_ranking(torch.from_numpy(q), torch.from_numpy(k), ratio=0.5)
    assert isinstance(found.importance, torch.Tensor)
    np.testing.assert_array_equal(found.importance.numpy(), gwpr_token_ranking(q, k, ratio=0.5).importance)


# Identities


def test_one_step_is_the_mean_weight_received(rng, isa):
    q, k = case(rng)
    weights = la.dense.attention_weights(q, k, range(40)).mean(axis=(1, 2), dtype=np.float64)
    found = gwpr_token_ranking(q, k, ratio=0.5, iterations=1)
    np.testing.assert_allclose(found.importance, weights, rtol=1e-5, atol=1e-8)


def test_columns_that_sum_to_1_leave_importance_equal(rng, isa):
    q, k = (np.zeros_like(x) for x in case(rng))
    found = gwpr_token_ranking(q, k, ratio=0.25)
    np.testing.assert_allclose(found.importance, 1 / 40, rtol=1e-6)
    np.testing.assert_array_equal(found.kept, [np.arange(30)] * 2)


def test_nothing_goes(rng):
    found = gwpr_token_ranking(*case(rng), ratio=0.0)
    np.testing.assert_array_equal(found.kept, [np.arange(40)] * 2)
    np.testing.assert_array_equal(found.source, found.kept)


def test_kept_tokens_come_back(rng):
    found = gwpr_token_ranking(*case(rng), ratio=0.6)
    x = normal(rng, (40, 5))
    for kept, source in zip(found.kept, found.source, strict=True):
        back = x[kept][source]
        np.testing.assert_array_equal(back[kept], x[kept])


def test_it_settles(rng):
    q, k = case(rng)
    s = gwpr_token_ranking(q, k, ratio=0.5, iterations=200, tol=1e-6).importance.astype(np.float64)
    weights = la.dense.attention_weights(q, k, range(40)).mean(axis=1, dtype=np.float64)
    assert np.abs(np.einsum("bij,bi->bj", weights, s) - s).sum(axis=1).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio: got 1.0"),
        ({"iterations": 0}, ValueError, r"iterations: got 0"),
        ({"damping": 0.0}, ValueError, r"damping: got 0.0"),
        ({"head_weights": np.array([1.0, -1, 0, 0])}, ValueError, r"head_weights: got"),
        ({"head_weights": np.ones(3)}, ValueError, r"head_weights: got shape \(3,\)"),
        ({"k": np.zeros((2, 2, 39, 16), F32)}, ValueError, r"k: got 39 tokens, expected 40 as in q"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k = case(rng)
    with pytest.raises(error, match=message):
        gwpr_token_ranking(**({"q": q, "k": k, "ratio": 0.5} | change))


def test_pruned_blocks():
    found = pruned_blocks(50, 12)
    assert not found[:15, :6].any() and found[15:].all() and found[:, 6:].all()
    assert pruned_blocks(4, 3, early_steps=0.0).all() and pruned_blocks(0, 3).shape == (0, 3)
    with pytest.raises(ValueError, match=r"early_blocks: got 1.5"):
        pruned_blocks(4, 3, early_blocks=1.5)
