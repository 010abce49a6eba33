"""`mediator_attention`: two attentions through a few tokens."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import mediator_attention, mediator_schedule
from longattn.vision.mediator_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same


def qkv(rng, batch=2, heads=2, shape=(5, 6), dim=8):
    return tuple(normal(rng, (batch, heads, shape[0] * shape[1], dim)) for _ in range(3))


def bias(rng, heads, count, shape, coarse=7):
    return (
        normal(rng, (heads, count, coarse, coarse)),
        normal(rng, (heads, count, shape[0], 1)),
        normal(rng, (heads, count, 1, shape[1])),
    )


@pytest.mark.parametrize(("shape", "mediators"), [((5, 6), 9), ((7, 7), 49), ((3, 4), 1), ((1, 5), 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_reference(rng, isa, shape, mediators, biased):
    options = {}
    if biased:
        options = {name: bias(rng, 2, mediators, shape) for name in ("gather_bias", "spread_bias")}
        options["v_kernel"] = normal(rng, (3, 3, 16))
    check(METHOD, *qkv(rng, shape=shape), shape, mediators=mediators, **options)


def test_given_mediators(rng):
    check(METHOD, *qkv(rng), (5, 6), t=normal(rng, (2, 2, 3, 8)), scale=0.5)


def test_kinds(rng):
    check_kinds(METHOD, *qkv(rng), (5, 6), mediators=4)


def test_one_mediator(rng):
    q, k, v = qkv(rng)
    out = mediator_attention(q, k, v, (5, 6), mediators=1)
    same(METHOD, out, np.broadcast_to(out[:, :, :1], out.shape), q, k, v, (5, 6), mediators=1)
    u = la.attention(q.mean(axis=2, keepdims=True), k, v)
    same(METHOD, out, np.broadcast_to(u, out.shape), q, k, v, (5, 6), mediators=1)


def test_equal_keys(rng):
    q, k, v = qkv(rng)
    k = np.broadcast_to(k[:, :, :1], k.shape)
    out = mediator_attention(q, k, v, (5, 6), mediators=9)
    same(METHOD, out, np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape), q, k, v, (5, 6), mediators=9)


def test_rows_sum_to_one_and_the_rank(rng):
    q, k, _ = qkv(rng, batch=1, heads=1)
    matrix = mediator_attention(q, k, np.eye(30, dtype=F32)[None, None], (5, 6), mediators=4)[0, 0]
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert np.linalg.matrix_rank(matrix, tol=1e-5) <= 4


def test_two_calls(rng):
    q, k, v = qkv(rng)
    t = normal(rng, (2, 2, 5, 8))
    np.testing.assert_array_equal(mediator_attention(q, k, v, (5, 6), t=t), la.attention(q, t, la.attention(t, k, v)))


def test_schedule():
    segments = [(0.3, 4), (0.7, 16), (1.0, 64)]
    assert [mediator_schedule(s, segments) for s in (0.0, 0.29, 0.3, 0.8, 1.0)] == [4, 4, 16, 64, 64]
    with pytest.raises(ValueError, match=r"segments: got ends \[1.0, 0.5\]"):
        mediator_schedule(0.1, [(1.0, 4), (0.5, 16)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (5, 5)}, ValueError, r"shape: got \(5, 5\), expected H \* W = 30"),
        ({"shape": 30}, TypeError, r"shape: got 30"),
        ({"mediators": 8}, ValueError, r"mediators: got 8, expected a square"),
        ({"mediators": 36}, ValueError, r"mediators: got 36"),
        ({"t": np.zeros((2, 2, 0, 8), F32)}, ValueError, r"t: got shape \(2, 2, 0, 8\)"),
        ({"gather_bias": np.zeros(3)}, TypeError, r"gather_bias: got ndarray"),
        ({"v_kernel": np.zeros((3, 3, 8), F32)}, ValueError, r"v_kernel: got shape \(3, 3, 8\)"),
        ({"v_kernel": np.zeros((4, 4, 16), F32)}, ValueError, r"v_kernel: got shape \(4, 4, 16\), expected odd sizes"),
        ({"k": np.zeros((2, 1, 30, 8), F32), "v": np.zeros((2, 1, 30, 8), F32)}, ValueError, r"k: got 1 heads"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "shape": (5, 6), "mediators": 4}, **change)
