"""Attention-Gate: flags from a small attention; attention to kept keys, masked or over a compacted cache."""

import numpy as np
import pytest

import tolerances
from eviction import cache_of, decode, dense, sequence
from longattn.kv.evict import AttentionGate, attention_gate, gated_attention
from longattn.reference import kv as reference
from random_arrays import DTYPES, F32, normal


def gate_weights(rng, width=24, heads=2, dim=8, kv_heads=2):
    w = [normal(rng, (width, heads * dim), spread=width**-0.5) for _ in range(3)]
    return (*w, normal(rng, (heads * dim, kv_heads)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(30, 24), (2, 17, 24), (1, 24)])
def test_the_gate(rng, isa, shape, causal):
    x, weights = normal(rng, shape), gate_weights(rng)
    flags, p = attention_gate(x, *weights, heads=2, tau=0.4, causal=causal)
    _, expected = reference.attention_gate(x, *weights, heads=2, tau=0.4, causal=causal)
    assert p.shape == flags.shape == (*shape[:-2], 2, shape[-2]) and p.dtype == F32 and flags.dtype == bool
    np.testing.assert_allclose(p, expected, atol=2e-6)
    np.testing.assert_array_equal(flags, p >= 0.4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_of_stored_numbers(rng, dtype):
    x, weights = normal(rng, (30, 24), dtype), [w.astype(dtype) for w in gate_weights(rng)]
    _, p = attention_gate(x, *weights, heads=2)
    np.testing.assert_allclose(p, reference.attention_gate(x, *weights, heads=2)[1], atol=2e-6)


@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_attention_to_kept_keys(rng, isa, batch, keep_self):
    q = normal(rng, (*batch, 6, 40, 16), spread=2.0)
    k, v = normal(rng, (*batch, 2, 40, 16)), normal(rng, (*batch, 2, 40, 12))
    flags = rng.random((*batch, 2, 40)) < 0.4
    flags[..., :3] = False
    got = gated_attention(q, k, v, flags, keep_self=keep_self, return_lse=True)
    expected = reference.gated_attention(q, k, v, flags, keep_self=keep_self, return_lse=True)
    tolerances.attention(q, k, v).check(got[0], expected[0], got[1], expected[1])
    if not keep_self:
        assert not got[0][..., :3, :].any() and np.isneginf(got[1][..., :3]).all()


def test_a_threshold_of_zero_is_causal_attention(rng):
    q, k, v = sequence(rng)
    flags, _ = attention_gate(normal(rng, (60, 24)), *gate_weights(rng), heads=2, tau=0.0)
    assert flags.all()
    tolerances.attention(q, k, v).check(gated_attention(q, k, v, flags), dense(q, k, v))


def test_without_flags_each_row_gets_its_own_value(rng):
    q, k, v = sequence(rng)
    out = gated_attention(q, k, v, np.zeros((2, 60), bool))
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=0), rtol=1e-6)


@pytest.mark.parametrize("prompt", [1, 30, 60])
def test_the_compacted_cache_is_the_mask(rng, isa, prompt):
    q, k, v = sequence(rng)
    flags, _ = attention_gate(normal(rng, (60, 24)), *gate_weights(rng), heads=2, tau=0.5)
    assert 0 < flags.mean() < 1
    cache = cache_of(AttentionGate(), k, v)
    out, kept = decode(
        cache, q, k, v, prompt=prompt, flags=flags[:, :prompt], per_row=lambda i: {"flags": flags[:, i : i + 1]}
    )
    tolerances.attention(q, k, v).check(out, reference.gated_attention(q, k, v, flags))
    assert kept[-1] == [np.flatnonzero(of_head).tolist() for of_head in flags]
    assert cache.stats.live == [len(rows) for rows in kept[-1]]


def test_generated_rows_are_kept_until_gated_again(rng):
    q, k, v = sequence(rng)
    flags = np.arange(120).reshape(2, 60) % 3 == 0
    policy = AttentionGate()
    cache = cache_of(policy, k, v)
    _, kept = decode(cache, q[:, :50], k[:, :50], v[:, :50], prompt=30, flags=flags[:, :30])
    assert kept[-1] == [[*np.flatnonzero(of_head[:30]), *range(30, 50)] for of_head in flags]
    policy.regate(25, flags[:, 25:50])
    cache.append(k[:, 50:51], v[:, 50:51])
    cache.attend(q[:, 50:51])
    assert [rows.tolist() for rows in cache.kept] == [[*np.flatnonzero(of_head[:50]), 50] for of_head in flags]


def test_options(rng):
    q, k, v = sequence(rng)
    flags = rng.random((2, 60)) < 0.5
    options = {"scale": 0.4, "softcap": 3.0, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    out = gated_attention(q, k, v, flags, **options)
    tolerances.attention(q, k, v, scale=0.4, offset=3).check(out, reference.gated_attention(q, k, v, flags, **options))
    cache = cache_of(AttentionGate(), k, v, **options)
    out, _ = decode(cache, q, k, v, prompt=20, flags=flags[:, :20], per_row=lambda i: {"flags": flags[:, i : i + 1]})
    tolerances.attention(q, k, v, scale=0.4, offset=3).check(out, reference.gated_attention(q, k, v, flags, **options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: attention_gate(x[0], *w, heads=2), ValueError, r"x: got shape \(24,\)"),
        (lambda x, w: attention_gate(x, *w, heads=3), ValueError, "wq: got 16 columns, expected a multiple of the 3"),
        (lambda x, w: attention_gate(x, w[3], *w[1:], heads=2), ValueError, r"wq: got shape \(16, 2\)"),
        (lambda x, w: attention_gate(x, *w[:3], w[0], heads=2), ValueError, r"wo: got shape \(24, 16\)"),
        (lambda x, w: attention_gate(x, *w, heads=2, tau=1.5), ValueError, "tau: got 1.5, expected 0 to 1"),
        (lambda x, w: attention_gate(x.astype(int), *w, heads=2), TypeError, "x: got dtype int64"),
        (
            lambda x, w: gated_attention(x[None], x[None], x[None], np.ones((2, 9), bool)),
            ValueError,
            "flags: got shape",
        ),
        (
            lambda x, w: gated_attention(x[None], x[None], x[None], np.ones((1, 9))),
            TypeError,
            "flags: got dtype float64",
        ),
        (lambda x, w: AttentionGate().regate(0, np.ones((1, 1), bool)), ValueError, "flags: got flags for an empty"),
        (
            lambda x, w: cache_of(AttentionGate(), x[None], x[None]).append(x[None], x[None], keep=1),
            TypeError,
            "keep: ",
        ),
        (
            lambda x, w: cache_of(AttentionGate(), x[None], x[None]).append(
                x[None], x[None], flags=np.ones((1, 2), bool)
            ),
            ValueError,
            r"flags: got shape \(1, 2\), expected \(1, 9\)",
        ),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(normal(rng, (9, 24)), gate_weights(rng))
