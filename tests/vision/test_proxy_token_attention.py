"""`proxy_token_attention`: one token of each window for all, and windows for detail."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import proxy_token_attention, window_members
from longattn.vision.proxy_token_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights

WINDOWS = (1, 2, 3)
ZERO = (None, None, np.zeros((12, 12), F32), None)


def step(rng, bias=True):
    return tuple(weights(rng, 12, 12, bias) for _ in range(4))


def arguments(rng, shape=(2, 2, 4, 6, 12), windows=WINDOWS, batch=None):
    index = window_members(shape[1:4], windows, seed=3, batch=batch)
    return (normal(rng, shape), step(rng), step(rng)), {"heads": 3, "windows": windows, "index": index}


def attended(x, w, context=None):
    context = x if context is None else context
    q, k, v = (a.reshape(len(a), -1, 3, 4).swapaxes(1, 2) for a in (x @ w[0], context @ w[1], context @ w[2]))
    return la.attention(q, k, v).swapaxes(1, 2).reshape(x.shape) @ w[3]


@pytest.mark.parametrize(("shape", "windows"), [((2, 2, 4, 6, 12), WINDOWS), ((1, 4, 4, 2, 12), (2, 2, 2))])
@pytest.mark.parametrize("batch", [None, 1])
def test_reference(rng, isa, shape, windows, batch):
    args, options = arguments(rng, shape, windows, batch and shape[0])
    check(METHOD, *args, **options, window=step(rng), shifted=step(rng))


def test_kinds(rng):
    args, options = arguments(rng)
    check_kinds(METHOD, *args, **options, shifted=step(rng))


def test_windows_of_one_token(rng):
    (x, *_), _ = arguments(rng, (1, 2, 3, 4, 12), (1, 1, 1))
    w, through = step(rng, bias=False), (None, None, None, None)
    index = np.zeros(24, np.int64)
    rows = x.reshape(1, 24, 12)
    tokens = attended(rows, w)
    q, k = (a.reshape(1, 24, 3, 4).swapaxes(1, 2) for a in (rows, tokens))
    expected = (rows + la.attention(q, k, k).swapaxes(1, 2).reshape(1, 24, 12)).reshape(x.shape)
    options = {"heads": 3, "windows": (1, 1, 1), "index": index}
    same(METHOD, proxy_token_attention(x, w, through, **options), expected, x, w, through, **options)


def test_seeds(rng):
    args, options = arguments(rng)
    one, two = (proxy_token_attention(*args, **options) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    for batch in (None, 3):
        a, b, c = (window_members((2, 4, 6), WINDOWS, seed=s, batch=batch) for s in (5, 5, 6))
        np.testing.assert_array_equal(a, b)
        assert (a != c).any() and a.shape == ((8,) if batch is None else (3, 8)) and a.max() < 6


def test_one_window_adds_a_vector(rng):
    args, options = arguments(rng, (1, 2, 3, 4, 12), (2, 3, 4))
    added = proxy_token_attention(*args, **options) - args[0]
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1, :1], added.shape), atol=1e-5)


def test_without_the_shift(rng):
    (x, _, _), options = arguments(rng)
    w = step(rng)
    twice = proxy_token_attention(x, ZERO, ZERO, **options, window=w, shifted=w, shift=False)
    once = proxy_token_attention(x, ZERO, ZERO, **options, window=w)
    np.testing.assert_array_equal(proxy_token_attention(once, ZERO, ZERO, **options, window=w), twice)
    assert (proxy_token_attention(x, ZERO, ZERO, **options, window=w, shifted=w) != twice).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"windows": (1, 3, 3)}, ValueError, r"windows: got \(1, 3, 3\), expected divisors of \(2, 4, 6\)"),
        ({"index": np.zeros(7, np.int64)}, ValueError, r"index: got shape \(7,\)"),
        ({"index": np.full(8, 6)}, ValueError, r"index: got numbers from 6 to 6, expected 0 to 5"),
        ({"index": np.zeros(8)}, TypeError, r"index: got dtype float64"),
        ({"proxies": 3}, TypeError, r"proxies: got int"),
        ({"spread": (np.zeros((12, 6)),) * 4}, ValueError, r"spread wq: got shape \(12, 6\)"),
        ({"x": np.zeros((2, 4, 6, 12), F32)}, ValueError, r"x: got shape \(2, 4, 6, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    (x, proxies, spread), options = arguments(rng)
    raises(METHOD, error, message, {"x": x, "proxies": proxies, "spread": spread, **options}, **change)
