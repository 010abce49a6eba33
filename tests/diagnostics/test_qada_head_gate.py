"""QAdA: local shares from moments of the other keys, and attention that reads them only where it must."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn.diagnostics import KeyMoments, key_moments, qada_attention, qada_gate
from longattn.reference import diagnostics as reference
from longattn.reference.dense import attention
from random_arrays import DTYPES, normal, qkv


def one(rng, heads=6, kv_heads=2, keys=300, dim=16, spread=1.5, **options):
    return tuple(x[0] for x in qkv(rng, heads=heads, kv_heads=kv_heads, rows=1, keys=keys, dim=dim, **options))


def near(keys, sinks, local):
    j = np.arange(keys)
    return (j < sinks) | (j >= keys - local)


@pytest.mark.parametrize("any_of_group", [True, False])
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.6])
def test_attention_is_that_of_the_formula(rng, isa, tau, any_of_group):
    q, k, v = one(rng)
    q[:, 0] = 5 * k[np.arange(6) // 3, 290] * np.array([1, 0, 0.2, 0.9, 0.9, 0.9])[:, None]
    options = {"tau": tau, "sinks": 8, "local": 40, "any_of_group": any_of_group}
    out, stats = qada_attention(q, k, v, return_stats=True, **options)
    tolerances.attention(q, k, v).check(out, reference.qada_attention(q, k, v, **options))
    share = reference.qada_share(q[:, 0], k, near(300, 8, 40))
    np.testing.assert_allclose(stats.share, share, rtol=1e-4)
    assert 0 < stats.local.sum() < 6
    read = np.flatnonzero(~stats.local)
    _, whole = attention(q, k, v, return_lse=True)
    _, few = attention(q, k, v, mask=near(300, 8, 40), return_lse=True)
    np.testing.assert_allclose(stats.true_share[read], np.exp(few - whole)[read, 0], rtol=1e-4)
    groups = np.unique(read // 3)
    assert (stats.keys_total, stats.keys_read) == (300, 48 + 252 * len(groups) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_threshold_of_zero_is_local_one_above_one_is_dense(rng, dtype):
    q, k, v = one(rng, q_dtype=dtype)
    local = qada_attention(q, k, v, tau=0.0, sinks=5, local=30)
    tolerances.attention(q, k, v).check(local, attention(q, k, v, mask=near(300, 5, 30)))
    whole = qada_attention(q, k, v, tau=1.1, sinks=5, local=30)
    tolerances.attention(q, k, v).check(whole, attention(q, k, v))


@pytest.mark.parametrize(("sinks", "local"), [(0, 300), (16, 400), (300, 1), (4, 296)])
def test_without_other_keys_the_share_is_one(rng, sinks, local):
    q, k, v = one(rng)
    out, stats = qada_attention(q, k, v, tau=1.0, sinks=sinks, local=local, return_stats=True)
    assert (stats.share == 1).all() and stats.local.all() and stats.keys_read == 300
    tolerances.attention(q, k, v).check(out, attention(q, k, v))


def test_equal_keys_are_exact(rng, isa):
    q, k, v = one(rng)
    k[:, 8:260] = k[:, 8:9]
    _, stats = qada_attention(q, k, v, tau=1.1, sinks=8, local=40, return_stats=True)
    np.testing.assert_allclose(stats.share, stats.true_share, rtol=1e-4)


def test_gaussian_keys_are_nearly_exact(rng):
    mix = normal(rng, (8, 8))
    k = (normal(rng, (1, 200_000, 8)) @ mix + normal(rng, (8,))).astype(np.float32)
    q = normal(rng, (5, 8), spread=0.5)
    local = k[:, :50]
    _, share = qada_gate(q, local, KeyMoments(k[:, 50:]))
    logits = 8**-0.5 * k[0].astype(float) @ q.T.astype(float)
    true = np.exp(logits[:50]).sum(axis=0) / np.exp(logits).sum(axis=0)
    np.testing.assert_allclose(share, true, rtol=0.1)


def test_the_gate_alone(rng):
    q, k, _ = one(rng)
    mask = near(300, 8, 40)
    expected = reference.qada_share(q[:, 0], k, mask)
    for tau in (0.0, float(np.median(expected)), 1.1):
        local, share = qada_gate(q[:, 0], k[:, mask], KeyMoments(k[:, ~mask]), tau=tau)
        np.testing.assert_allclose(share, expected, rtol=1e-4)
        np.testing.assert_array_equal(local, share >= tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(rng, dtype):
    k = normal(rng, (3, 9000, 8), dtype, spread=2.0)
    mu, sigma = key_moments(k)
    for head in range(3):
        rows = k[head].astype(float)
        np.testing.assert_allclose(mu[head], rows.mean(axis=0), atol=1e-10)
        np.testing.assert_allclose(sigma[head], np.cov(rows, rowvar=False, bias=True), atol=1e-10)


@settings(max_examples=30)
@given(st.data())
def test_moments_follow_keys_that_come_and_go(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keys = normal(rng, (2, data.draw(st.integers(0, 20)), 6))
    moments = KeyMoments(keys)
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            more = normal(rng, (2, data.draw(st.integers(0, 9)), 6))
            moments.add(more)
            keys = np.concatenate([keys, more], axis=1)
        else:
            count = data.draw(st.integers(0, keys.shape[1]))
            moments.remove(keys[:, :count])
            keys = keys[:, count:]
    assert moments.count == keys.shape[1]
    if moments.count:
        wide = keys.astype(float)
        np.testing.assert_allclose(moments.mu, wide.mean(axis=1), atol=1e-9)
        for head in range(2):
            expected = np.cov(wide[head], rowvar=False, bias=True)
            np.testing.assert_allclose(moments.sigma[head], expected, atol=1e-9)
    else:
        assert not moments.mu.any() and not moments.sigma.any()


def test_moments_of_steps_are_those_of_the_rows(rng):
    """A key leaves the window with each step; kept moments give what moments made anew give."""
    q, k, v = one(rng)
    moments = KeyMoments(k[:, 8:150])
    for length in range(200, 210):
        first = length - 50
        moments.add(k[:, first : first + 1])
        args = q, k[:, : length + 1], v[:, : length + 1]
        kept = qada_attention(*args, sinks=8, local=50, tau=0.4, moments=moments, return_stats=True)
        anew = qada_attention(*args, sinks=8, local=50, tau=0.4, return_stats=True)
        np.testing.assert_allclose(kept[1].share, anew[1].share, rtol=1e-9)
        np.testing.assert_array_equal(kept[0], anew[0])


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_low_rank(rng, rank):
    k = (normal(rng, (2, 500, 6)) * np.array([5, 3, 2, 1, 0.5, 0.1])).astype(np.float32)
    full, few = KeyMoments(k), KeyMoments(k, rank=rank)
    q = rng.standard_normal((2, 4, 6))
    exact, form = full.quadratic(q), few.quadratic(q)
    for head in range(2):
        values, vectors = np.linalg.eigh(full.sigma[head])
        top = (vectors[:, 6 - rank :] * values[6 - rank :]) @ vectors[:, 6 - rank :].T
        sigma = top + np.diag(np.diag(full.sigma[head] - top))
        np.testing.assert_allclose(form[head], np.einsum("gd,de,ge->g", q[head], sigma, q[head]), rtol=1e-8)
    if rank == 6:
        np.testing.assert_allclose(form, exact, rtol=1e-8)
    few.add(k[:, :5])
    full.add(k[:, :5])
    assert few.quadratic(q).shape == (2, 4) and full.nbytes == few.nbytes


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in one(rng))
    assert isinstance(qada_attention(q, k, v, local=40), torch.Tensor)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: qada_attention(np.repeat(q, 2, 1), k, k), ValueError, "expected one query"),
        (lambda q, k: qada_attention(q, k, k[:, 1:]), ValueError, "v: got length 299, expected 300"),
        (lambda q, k: qada_attention(q, k, k, sinks=0, local=0), ValueError, "local: got 0, expected at least 1"),
        (lambda q, k: qada_attention(q, k, k, moments=1), TypeError, "moments: got int, expected KeyMoments"),
        (lambda q, k: qada_attention(q, k, k, local=9, moments=KeyMoments(k[:1])), ValueError, "moments: got those"),
        (lambda q, k: qada_gate(q, k, KeyMoments(k)), ValueError, "q: got shape"),
        (lambda q, k: qada_gate(q[:, 0], k[:1], KeyMoments(k)), ValueError, "k_local: got shape"),
        (lambda q, k: KeyMoments(k[0]), ValueError, "k: got shape"),
        (lambda q, k: KeyMoments(k, rank=17), ValueError, "rank: got 17, expected 0 to 16"),
        (lambda q, k: KeyMoments(k[:, :3]).remove(k), ValueError, "k: got 300 keys to remove, expected at most 3"),
        (lambda q, k: KeyMoments(k).add(k[:, :, :8]), ValueError, "k: got shape"),
    ],
)
def test_bad_input(rng, call, error, message):
    q, k, _ = one(rng)
    with pytest.raises(error, match=message):
        call(q, k)
    assert la.diagnostics.qada_gate is qada_gate
