"""Flux attention: the router's gates, and attention by them."""

import itertools

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.diagnostics import flux_route, routed_attention
from longattn.reference import diagnostics as reference
from longattn.reference.dense import attention
from random_arrays import DTYPES, normal, qkv


def router(rng, dim=16):
    sizes = [dim, 8 * dim, 2 * dim, 4 * dim, dim, 2]
    return [
        (normal(rng, (n, m), spread=2 * m**-0.5), normal(rng, (n,), spread=0.2)) for m, n in itertools.pairwise(sizes)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 19, 20, 21, 60])
def test_the_router(rng, length, dtype):
    q, weights = normal(rng, (8, 3, length, 16), dtype, spread=3.0), router(rng)
    gate, logits = flux_route(q, weights, pool=10, return_logits=True)
    expected, expected_logits = reference.flux_route(q, weights, pool=10, return_logits=True)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(gate, expected)
    assert flux_route(q[3], weights, pool=10) == expected[3]


def test_gates_differ(rng):
    q = normal(rng, (64, 3, 40, 16), spread=3.0)
    assert 0 < flux_route(q, router(rng), pool=10).mean() < 1


@pytest.mark.parametrize("sparse", ["streaming", "window"])
@pytest.mark.parametrize("rows", [1, 6, 30, 37])
def test_attention_by_gates(rng, isa, rows, sparse):
    q, k, v = qkv(rng, batch=4, rows=rows, value_dim=12)
    gate = np.array([0, 1, 1, 0])
    options = {"sparse": sparse, "sinks": 3, "window": 8}
    out = routed_attention(q, k, v, gate, **options)
    tolerances.attention(q, k, v).check(out, reference.routed_attention(q, k, v, gate, **options))


@pytest.mark.parametrize("gate", [1, np.ones(3, int)])
def test_gates_of_one_are_dense(rng, gate):
    q, k, v = qkv(rng, batch=3)
    out = routed_attention(q, k, v, gate)
    np.testing.assert_array_equal(out, la.attention(q, k, v, causal=True))


def test_gates_of_zero_are_the_sparse_operator(rng):
    q, k, v = qkv(rng, batch=3)
    out = routed_attention(q, k, v, 0, sparse="window", window=5)
    np.testing.assert_array_equal(out, la.attention(q, k, v, causal=True, window=(4, -1)))
    own = routed_attention(q, k, v, 0, sparse=lambda q, k, v: la.attention(q, k, v, window=(2, 2)))
    np.testing.assert_array_equal(own, la.attention(q, k, v, window=(2, 2)))


def test_rows_of_a_mixed_batch_are_those_of_each_alone(rng):
    q, k, v = qkv(rng, batch=4)
    gate = np.array([0, 1, 0, 1])
    whole = routed_attention(q, k, v, gate, sinks=2, window=4)
    for b in range(4):
        alone = routed_attention(q[b], k[b], v[b], int(gate[b]), sinks=2, window=4)
        np.testing.assert_array_equal(whole[b], alone)


def test_sinks_and_window_in_one_softmax(rng, isa):
    """Chunks of the text give the rows of all of it."""
    q, k, v = qkv(rng, rows=37)
    mask = np.subtract.outer(np.arange(37), np.arange(37)) < 6
    mask |= np.arange(37) < 5
    expected = attention(q, k, v, causal=True, mask=mask, sinks=np.array([0.0, 1, 2, -1]))
    for first, last in ((0, 37), (0, 3), (3, 9), (5, 6), (20, 37)):
        part = la.kv.evict.sink_window_attention(
            q[:, :, first:last], k[:, :, :last], v[:, :, :last], 5, 6, sink_logits=np.array([0.0, 1, 2, -1])
        )
        tolerances.attention(q, k, v, offset=2).check(part, expected[:, :, first:last])


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, batch=2))
    assert isinstance(routed_attention(q, k, v, torch.tensor([0, 1])), torch.Tensor)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, w: flux_route(q[0, 0], w), ValueError, "q: got shape"),
        (lambda q, k, w: flux_route(q, w[:4]), ValueError, "weights: got list, expected 5 pairs"),
        (lambda q, k, w: flux_route(q, [w[1], *w[1:]]), ValueError, r"weights\[0\]: got shape \(32, 128\)"),
        (lambda q, k, w: flux_route(q, w, pool=0), ValueError, "pool: got 0"),
        (lambda q, k, w: flux_route(q, w, return_logits=1), TypeError, "return_logits: got 1"),
        (lambda q, k, w: flux_route(q, [1, *w[1:]]), TypeError, r"weights\[0\]: got int"),
        (lambda q, k, w: routed_attention(q, k, k, 2), ValueError, "gate: got 2, expected 0"),
        (lambda q, k, w: routed_attention(q, k, k, np.zeros(4, int)), ValueError, "gate: got shape"),
        (lambda q, k, w: routed_attention(q, k, k, 0.5), TypeError, "gate: got float"),
        (lambda q, k, w: routed_attention(q, k, k, 0, sparse="none"), ValueError, "sparse: got 'none'"),
        (lambda q, k, w: routed_attention(q, k, k, 0, full=3), TypeError, "full: got int, expected a function"),
        (lambda q, k, w: routed_attention(q, k, k, 0, window=0), ValueError, "window: got 0"),
    ],
)
def test_bad_input(rng, call, error, message):
    q, k, _ = qkv(rng, batch=2)
    with pytest.raises(error, match=message):
        call(q, k, router(rng))
