"""`head_scaled_nope_attention`, and the search for its factors."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import head_scaled_nope_attention, matching_lam
from longattn.reference import dense as reference
from random_arrays import DTYPES, F16, F32, LAYOUTS, normal, qkv


def check(q, k, v, lam, **options):
    out, lse = head_scaled_nope_attention(q, k, v, lam, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.head_scaled_nope_attention(q, k, v, lam, return_lse=True, **options)
    scale = np.abs(lam).max() * options.get("scale", q.shape[-1] ** -0.5)
    tolerances.attention(q, k, v, scale=scale).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (4, 4), (7, 1)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 300), (9, 45), (40, 40), (5, 3)])
def test_reference(rng, isa, *, heads, kv_heads, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=24, value_dim=20)
    lam = rng.uniform(0.5, 2, heads)
    check(q, k, v, lam)
    check(q, k, v, lam, causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*qkv(rng, rows=3, keys=70, dim=32, q_dtype=dtype), rng.uniform(0.5, 2, 4).astype(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=3, keys=70, dim=32, layout=layout), rng.uniform(0.5, 2, 4))


def test_one_factor_for_all_heads_and_another_scale(rng, isa):
    q, k, v = qkv(rng, rows=5, keys=50)
    check(q, k, v, 1.2, scale=0.4)
    one, all_alike = (head_scaled_nope_attention(q, k, v, lam) for lam in (1.2, np.full(4, 1.2)))
    np.testing.assert_array_equal(one, all_alike)


def test_options_without_a_batch(rng, isa):
    q, k, v = (x[0] for x in qkv(rng, rows=5, keys=50))
    check(q, k, v, rng.uniform(0.5, 2, 4), window=(20, 0), sinks=normal(rng, 4), mask=rng.random((5, 50)) > 0.3)


def test_steps_are_the_prefill(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=20, dim=32)
    lam = rng.uniform(0.5, 2, 4)
    whole = head_scaled_nope_attention(q, k, v, lam)
    tolerance = tolerances.same_storage(q, k, v, scale=2 * 32**-0.5)
    for n in range(1, 21):
        step = head_scaled_nope_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], lam)
        tolerance.check(step, whole[:, :, n - 1 : n])


# Identities


def test_lam_1_is_attention(rng, isa):
    q, k, v = qkv(rng, rows=9, keys=40)
    expected = la.attention(q, k, v, causal=True)
    tolerances.same_storage(q, k, v).check(head_scaled_nope_attention(q, k, v, 1.0), expected)


def test_the_last_row_sees_a_set(rng, isa):
    q, k, v = qkv(rng, rows=9, keys=40)
    order = np.append(rng.permutation(39), 39)
    lam = rng.uniform(0.5, 2, 4)
    out, permuted = (head_scaled_nope_attention(q, *kv, lam) for kv in ((k, v), (k[:, :, order], v[:, :, order])))
    tolerances.same_storage(q, k, v, scale=0.5).check(permuted[:, :, -1], out[:, :, -1])


def test_limits_of_lam(rng, isa):
    """A large factor picks the best key, 0 takes the mean of what is visible."""
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=9, keys=9)
    mean = head_scaled_nope_attention(q, k, v, 0.0)
    expected = np.cumsum(v.astype(np.float64), axis=2) / np.arange(1, 10)[:, None]
    tolerances.attention(q, k, v).check(mean, expected)
    scores = np.where(np.tri(9, dtype=bool), q.astype(np.float64) @ k.swapaxes(-1, -2), -np.inf)
    best = np.take_along_axis(v, scores.argmax(axis=-1)[..., None], axis=2)
    np.testing.assert_allclose(head_scaled_nope_attention(q, k, v, 1e5), best, rtol=1e-6)


def test_it_is_attention_of_scaled_queries(rng, isa):
    q, k, v = qkv(rng, rows=9, keys=40)
    lam = rng.uniform(0.5, 2, 4).astype(np.float32)
    out, lse = head_scaled_nope_attention(q, k, v, lam, return_lse=True)
    expected, expected_lse = la.attention(q * lam[:, None, None], k, v, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v, scale=2 * 16**-0.5).check(out, expected, lse, expected_lse)


# The search


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_it_finds_the_factors_that_made_the_entropy(rng, isa, causal, dtype):
    q, k, _ = qkv(rng, batch=2, rows=60, keys=60, q_dtype=dtype)
    lam = np.array([0.6, 1.0, 1.7, 2.5])
    target = reference.mean_entropy(q, k, lam, causal=causal)
    found, entropy = matching_lam(q, k, target, causal=causal)
    assert found.dtype == entropy.dtype == np.float32 and found.shape == entropy.shape == (4,)
    np.testing.assert_allclose(entropy, target, atol=1e-3 + 1e-5)
    np.testing.assert_allclose(found, lam, rtol=0.02)
    np.testing.assert_allclose(reference.mean_entropy(q, k, found, causal=causal), entropy, atol=2e-5)


def test_twice_the_length_with_the_entropy_of_the_training_length(rng):
    q, k, _ = (x[0] for x in qkv(rng, rows=256, keys=256, spread=2.0))
    _, trained = matching_lam(q[:, :128], k[:, :128], 1.0, bounds=(1, 1))
    np.testing.assert_allclose(trained, reference.mean_entropy(q[:, :128], k[:, :128], np.ones(4)), atol=2e-5)
    last = q[:, 128:], k
    found, entropy = matching_lam(*last, trained)
    assert (found > 1).all()
    np.testing.assert_allclose(entropy, trained, atol=1.1e-3)


def test_targets_out_of_reach_give_the_bounds(rng):
    q, k, _ = (x[0] for x in qkv(rng, rows=20, keys=20))
    lam, entropy = matching_lam(q, k, np.array([0.0, 50.0, 0.0, 50.0]), bounds=(0.5, 4.0))
    np.testing.assert_allclose(lam, [4.0, 0.5, 4.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(entropy, reference.mean_entropy(q, k, lam), atol=2e-5)


def test_rows_that_see_nothing_have_no_entropy(rng):
    q, k, _ = (x[0] for x in qkv(rng, rows=20, keys=10))
    _, entropy = matching_lam(q, k, 1.0, bounds=(1, 1))
    seeing = reference.mean_entropy(q[:, 10:], k, np.ones(4))
    np.testing.assert_allclose(entropy, seeing, atol=2e-5)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lam": np.ones(3)}, ValueError, r"lam: got shape \(3,\), expected \(4,\)"),
        ({"lam": np.ones(4, int)}, TypeError, r"lam: got dtype int64, expected a floating dtype"),
        ({"lam": np.array([1, np.inf, 1, 1])}, ValueError, r"lam: got .*, expected finite numbers"),
        ({"lam": "1"}, TypeError, r"lam: got '1'"),
        ({"scale": np.nan}, ValueError, r"scale: got nan"),
        ({"q": np.ones(3, F32)}, ValueError, r"q: got shape \(3,\), expected rank 3 or 4"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng)
    with pytest.raises(error, match=message):
        head_scaled_nope_attention(**{"q": q, "k": k, "v": v, "lam": 1.0} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": np.ones(3)}, ValueError, r"target: got shape \(3,\), expected \(4,\)"),
        ({"target": np.nan}, ValueError, r"target: got nan, expected a finite float32"),
        ({"target": -1.0}, ValueError, r"target: got -1.0, expected at least 0"),
        ({"bounds": (0, 1)}, ValueError, r"bounds: got \(0, 1\), expected 0 < least <= greatest"),
        ({"bounds": (2.0, 1.0)}, ValueError, r"bounds: got \(2.0, 1.0\)"),
        ({"tolerance": 0.0}, ValueError, r"tolerance: got 0.0"),
        ({"q": np.ones((1, 4, 0, 16), F32)}, ValueError, r"q: got shape \(1, 4, 0, 16\)"),
        ({"k": np.ones((1, 3, 9, 16), F32)}, ValueError, r"q: got 4 heads, expected a positive multiple of the 3"),
        ({"k": np.ones((2, 4, 9, 16), F32)}, ValueError, r"k: got batch 2, expected 1"),
    ],
)
def test_bad_searches(rng, change, error, message):
    q, k, _ = qkv(rng)
    with pytest.raises(error, match=message):
        matching_lam(**{"q": q, "k": k, "target": 1.0} | change)
