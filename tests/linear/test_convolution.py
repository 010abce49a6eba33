"""Short convolutions against every tap of every output."""

import numpy as np
import pytest

import tolerances
from longattn.linear import causal_conv1d, depthwise_conv1d, depthwise_conv2d, diagonal_scan, dynamic_conv
from longattn.reference import linear as reference
from longattn.reference.linear.selective_scan import silu
from random_arrays import DTYPES, F32, LAYOUTS, normal


def check(actual, expected, size, terms):
    tolerances.check_linear(actual, expected, np.asarray(size) + 1e-30, terms)


@pytest.mark.parametrize("length", [0, 1, 3, 150])
@pytest.mark.parametrize("taps", [1, 4, 9])
def test_causal(rng, isa, length, taps):
    x, w, bias = normal(rng, (2, length, 70)), normal(rng, (70, taps)), normal(rng, (70,))
    before = normal(rng, (2, taps - 1, 70))
    expected = reference.depthwise(np.concatenate([before, x], axis=1), w, (taps - 1,), bias)[:, taps - 1 :]
    size = np.abs(bias) + reference.depthwise(np.abs(np.concatenate([before, x], axis=1)), np.abs(w), (taps - 1,))
    y, state = causal_conv1d(x, w, bias, initial_state=before)
    check(y, expected, size[:, taps - 1 :], taps)
    np.testing.assert_array_equal(state, np.concatenate([before, x], axis=1)[:, length:])
    y, _ = causal_conv1d(x, w, bias, initial_state=before, silu=True)
    check(y, silu(expected), size[:, taps - 1 :], taps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    x, w = normal(rng, (2, 30, 20), dtype, layout), normal(rng, (20, 4))
    y, state = causal_conv1d(x, w)
    check(y, reference.depthwise(x, w, (3,)), reference.depthwise(np.abs(x), np.abs(w), (3,)), 4)
    np.testing.assert_array_equal(state, x[:, -3:].astype(F32))


def test_causal_steps_are_the_whole(rng, isa):
    x, w = normal(rng, (2, 20, 17)), normal(rng, (17, 4))
    whole, after = causal_conv1d(x, w)
    state = None
    for t in range(20):
        y, state = causal_conv1d(x[:, t : t + 1], w, initial_state=state)
        np.testing.assert_allclose(y[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state, after)


def test_sequences_one_after_another(rng, isa, threads):
    x, w = normal(rng, (1, 200, 17)), normal(rng, (17, 4))
    bounds, before = np.array([0, 2, 2, 90, 200]), normal(rng, (4, 3, 17))
    y, state = causal_conv1d(x, w, cu_seqlens=bounds, initial_state=before)
    for s in range(4):
        part = x[:, bounds[s] : bounds[s + 1]]
        one, after = causal_conv1d(part, w, initial_state=before[s : s + 1])
        np.testing.assert_array_equal(y[:, bounds[s] : bounds[s + 1]], one)
        np.testing.assert_array_equal(state[s], after[0])


@pytest.mark.parametrize("taps", [1, 3, 8])
def test_around_each_token(rng, isa, taps):
    x, w = normal(rng, (2, 90, 5)), normal(rng, (5, taps))
    centre = ((taps - 1) // 2,)
    size = reference.depthwise(np.abs(x), np.abs(w), centre)
    check(depthwise_conv1d(x, w), reference.depthwise(x, w, centre), size, taps)


@pytest.mark.parametrize(
    ("taps", "size"), [((1, 1), (1, 1)), ((3, 3), (1, 70)), ((5, 2), (20, 7)), ((7, 7), (5, 4)), ((3, 3), (18, 66))]
)
def test_maps(rng, isa, taps, size):
    x, w, bias = normal(rng, (2, *size, 6)), normal(rng, (6, *taps)), normal(rng, (6,))
    centre = (taps[0] // 2, taps[1] // 2)
    terms = np.abs(bias) + reference.depthwise(np.abs(x), np.abs(w), centre)
    check(depthwise_conv2d(x, w, bias), reference.depthwise(x, w, centre, bias), terms, 49)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_map_dtypes_and_strides(rng, isa, dtype):
    x, w = normal(rng, (2, 9, 11, 80), dtype)[:, ::-1, ::2], normal(rng, (80, 3, 3))
    check(
        depthwise_conv2d(x, w), reference.depthwise(x, w, (1, 1)), reference.depthwise(np.abs(x), np.abs(w), (1, 1)), 9
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(0, 3), (1, 1), (1, 9), (70, 9), (130, 20), (5, 70)])
def test_dynamic(rng, isa, causal, softmax, length, taps):
    v, w = normal(rng, (2, 3, length, 20)), normal(rng, (2, 3, length, taps))
    options = {"causal": causal, "softmax": softmax}
    expected = reference.dynamic_conv(v, w, **options)
    size = reference.dynamic_conv(np.abs(v), w if softmax else np.abs(w), **options)
    check(dynamic_conv(v, w, **options), expected, size, taps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_dtypes(rng, isa, dtype):
    v, w = normal(rng, (2, 3, 30, 20), dtype, "blhd"), normal(rng, (2, 3, 30, 5), dtype)
    check(dynamic_conv(v, w), reference.dynamic_conv(v, w), reference.dynamic_conv(np.abs(v), np.abs(w)), 5)


@pytest.mark.parametrize("kept", [2, 4, 7])
def test_dynamic_continues(rng, isa, kept):
    v, w = normal(rng, (2, 3, 30, 20)), normal(rng, (2, 3, 30, 5))
    whole = dynamic_conv(v, w, causal=True)
    rest = dynamic_conv(v[:, :, 10:], w[:, :, 10:], causal=True, initial_state=v[:, :, 10 - kept : 10])
    np.testing.assert_array_equal(rest[:, :, max(0, 4 - kept) :], whole[:, :, 10 + max(0, 4 - kept) :])


def decays(rng, channels, states, complex_numbers):
    if complex_numbers:
        size, angle = rng.uniform(0.5, 1, (channels, states)), rng.uniform(0, 3, (channels, states))
        weights = rng.standard_normal((4, channels, states))
        return size * np.exp(1j * angle), weights[0] + 1j * weights[1], weights[2] + 1j * weights[3]
    return rng.uniform(0.5, 1, (channels, states)), *rng.standard_normal((2, channels, states))


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (70, 3), (130, 4), (20, 17)])
@pytest.mark.parametrize("length", [0, 1, 100])
def test_diagonal_scan(rng, isa, complex_numbers, channels, states, length):
    x = normal(rng, (2, length, channels))
    weights = decays(rng, channels, states, complex_numbers)
    size = reference.diagonal_scan(np.abs(x), *(np.abs(w) for w in weights))
    y, state = diagonal_scan(x, *weights)
    check(y, reference.diagonal_scan(x, *weights), size, 2 * length + states)
    assert state.shape == (2, channels, states) and state.dtype == (np.complex64 if complex_numbers else F32)


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diagonal_scan_continues(rng, isa, threads, complex_numbers, dtype):
    x, weights, skip = normal(rng, (1, 90, 20), dtype), decays(rng, 20, 5, complex_numbers), normal(rng, (20,))
    whole, after = diagonal_scan(x, *weights, skip=skip, silu=True)
    one, state = diagonal_scan(x[:, :31], *weights, skip=skip, silu=True)
    two, state = diagonal_scan(x[:, 31:], *weights, skip=skip, silu=True, initial_state=state)
    roundoff = tolerances.ROUNDOFF[dtype][0]
    both = np.concatenate([one, two], axis=1).astype(F32)
    np.testing.assert_allclose(both, whole.astype(F32), rtol=2 * roundoff, atol=1e-4)
    np.testing.assert_allclose(state, after, rtol=1e-4, atol=1e-4)
    bounds = np.array([0, 31, 31, 90])
    three, states = diagonal_scan(x, *weights, skip=skip, silu=True, cu_seqlens=bounds)
    np.testing.assert_array_equal(three[:, :31], one)
    assert states.shape == (3, 20, 5) and not states[1].any()


def test_slow_decays_keep_their_precision(rng):
    """A decay of 1 - 1e-6 is no float32; its distance from 1 is."""
    x, decay = np.zeros((1, 200_000, 1), F32), np.full((1, 1), 1 - 1e-6)
    x[0, 0] = 1
    y, _ = diagonal_scan(x, decay, np.ones((1, 1)), np.ones((1, 1)))
    np.testing.assert_allclose(y[0, :, 0], (1 - 1e-6) ** np.arange(200_000), rtol=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: causal_conv1d(x[0], x[0]), ValueError, r"x: got shape \(5, 6\), expected \[B, L, C\]"),
        (lambda x: causal_conv1d(x, np.zeros((5, 3), F32)), ValueError, r"weight: got shape \(5, 3\)"),
        (lambda x: causal_conv1d(x, np.zeros((6, 0), F32)), ValueError, "expected at least one tap"),
        (lambda x: causal_conv1d(x, np.zeros((6, 3), int)), TypeError, "weight: got dtype int64"),
        (lambda x: causal_conv1d(x, np.zeros((6, 3), F32), x[0, 0, :5]), ValueError, r"bias: got shape \(5,\)"),
        (lambda x: causal_conv1d(x, np.zeros((6, 3)), initial_state=x), ValueError, "initial_state: got shape"),
        (lambda x: causal_conv1d(x, np.zeros((6, 3)), cu_seqlens=[0, 5]), TypeError, "cu_seqlens: got list"),
        (lambda x: depthwise_conv2d(x, np.zeros((6, 3, 3))), ValueError, r"expected \[B, H, W, C\]"),
        (lambda x: depthwise_conv2d(x[None], np.zeros((6, 3, 0))), ValueError, "expected at least one tap"),
        (lambda x: dynamic_conv(x[None], x), ValueError, r"w: got shape \(1, 5, 6\), expected \[B, H, L, K\]"),
        (lambda x: dynamic_conv(x[None], x[None, ..., :0]), ValueError, "expected at least one tap"),
        (lambda x: dynamic_conv(x[None], x[None], initial_state=x[None]), ValueError, "got one without causal"),
        (lambda x: diagonal_scan(x, np.full((6, 2), 1.5), np.ones((6, 2)), np.ones((6, 2))), ValueError, "decay: got"),
        (lambda x: diagonal_scan(x, np.ones((6, 2)), np.ones((6, 3)), np.ones((6, 2))), ValueError, r"b: got shape"),
        (lambda x: diagonal_scan(x, np.ones((6, 2), int), np.ones((6, 2)), np.ones((6, 2))), TypeError, "decay: got"),
    ],
)
def test_bad_arguments(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(normal(rng, (1, 5, 6)))
