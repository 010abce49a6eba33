"""`multi_dim_damped_ema` and `mega_gated_attention`."""

from dataclasses import replace

import numpy as np
import pytest

import tolerances
from longattn import attention
from longattn.linear import MegaWeights, mega_gated_attention, multi_dim_damped_ema, toeplitz
from longattn.reference import linear as reference
from longattn.reference.linear.mega_gated_attention import kernel
from longattn.reference.linear.selective_scan import silu
from random_arrays import DTYPES, F32, normal

check = tolerances.check_layer


def averages(rng, channels=6, states=4):
    return tuple(normal(rng, (channels, states)) for _ in range(4))


@pytest.mark.parametrize("length", [0, 1, 40])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("options", [{}, {"silu": True, "omega": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages(rng, isa, length, both, options, dtype):
    x, parameters = normal(rng, (2, length, 6), dtype), averages(rng)
    given = options | {"backward": averages(rng) if both else None, "initial_state": normal(rng, (2, 6, 4))}
    if "omega" in options:
        given["omega"] = normal(rng, (6,))
    y, state = multi_dim_damped_ema(x, *parameters, **given)
    expected, after = reference.multi_dim_damped_ema(x, *parameters, **given)
    check(y, expected)
    check(state, after)


def test_averages_are_a_convolution(rng, isa):
    x, one, two = normal(rng, (2, 300, 6)), averages(rng), averages(rng)
    length = x.shape[1]
    kernels = np.zeros((6, 2 * length - 1))
    kernels[:, length - 1 :] = kernel(*one, length)
    check(multi_dim_damped_ema(x, *one)[0], toeplitz(x, kernels, zero=length - 1).astype(np.float64))
    kernels[:, : length - 1] = kernel(*two, length)[:, :0:-1]
    check(multi_dim_damped_ema(x, *one, backward=two)[0], toeplitz(x, kernels, zero=length - 1).astype(np.float64))


def test_one_dimension_without_damping_is_the_classic_average(rng, isa):
    x, alpha = normal(rng, (2, 50, 6)), normal(rng, (6, 1))
    ones = np.ones((6, 1), F32)
    p = 1 / (1 + np.exp(-alpha[:, 0].astype(np.float64)))
    expected, state = np.zeros(x.shape), np.zeros((2, 6))
    for t in range(50):
        state = p * x[:, t] + (1 - p) * state
        expected[:, t] = state
    check(multi_dim_damped_ema(x, alpha, np.full((6, 1), 100.0), ones, ones)[0], expected)


def test_any_split_is_the_whole(rng, isa):
    x, parameters = normal(rng, (1, 40, 6)), averages(rng)
    expected, after = reference.multi_dim_damped_ema(x, *parameters)
    state, parts = None, []
    for first, last in ((0, 1), (1, 2), (2, 30), (30, 40)):
        y, state = multi_dim_damped_ema(x[:, first:last], *parameters, initial_state=state)
        parts.append(y)
    check(np.concatenate(parts, axis=1), expected)
    check(state, after)
    y, states = multi_dim_damped_ema(x, *parameters, cu_seqlens=np.array([0, 11, 40]))
    check(y[:, 11:], reference.multi_dim_damped_ema(x[:, 11:], *parameters)[0])
    assert states.shape == (2, 6, 4)


def layer(rng, channels=6, dim=4, value_dim=10, both=False):
    columns = 2 * channels + dim + value_dim
    return MegaWeights(
        ema=averages(rng, channels),
        ema_backward=averages(rng, channels) if both else None,
        omega=normal(rng, (channels,)),
        w_v=normal(rng, (channels, value_dim), spread=0.4),
        w_m=normal(rng, (channels, columns), spread=0.4),
        b_m=normal(rng, (columns,), spread=0.4),
        gamma_q=normal(rng, (dim,)),
        beta_q=normal(rng, (dim,)),
        gamma_k=normal(rng, (dim,)),
        beta_k=normal(rng, (dim,)),
        w_h=normal(rng, (value_dim, channels), spread=0.3),
    )


@pytest.mark.parametrize("function", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_layer(rng, function, causal, chunk, bias):
    weights, x = layer(rng, both=not causal), normal(rng, (2, 21, 6))
    options = {"function": function, "causal": causal, "chunk": chunk, "residual": normal(rng, (2, 21, 6))}
    if bias:
        options["relative_bias"] = normal(rng, (45,))
    check(mega_gated_attention(x, weights, **options), reference.mega_gated_attention(x, weights, **options), depth=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("length", [0, 1, 300])
def test_dtypes_and_lengths(rng, isa, dtype, function, length):
    weights, x = layer(rng), normal(rng, (1, length, 6), dtype)
    y = mega_gated_attention(x, weights, function=function)
    assert y.dtype == dtype
    check(y, reference.mega_gated_attention(x, weights, function=function), depth=4)


@pytest.mark.parametrize("function", ["softmax", "laplace", "relu2"])
def test_a_chunk_of_everything_changes_nothing(rng, function):
    weights, x = layer(rng), normal(rng, (2, 21, 6))
    whole = mega_gated_attention(x, weights, function=function)
    for chunk in (21, 100):
        np.testing.assert_array_equal(mega_gated_attention(x, weights, function=function, chunk=chunk), whole)


def with_bias(weights, **values):
    """Weights whose projection gives constants for some parts."""
    w, b = weights.w_m.copy(), weights.b_m.copy()
    for part, value in values.items():
        where = {"u": slice(0, 6), "r": slice(10, 20), "hx": slice(20, 26)}[part]
        w[:, where], b[where] = 0, value
    return replace(weights, w_m=w, b_m=b)


def test_an_update_gate_of_0_returns_the_residual(rng, isa):
    x, residual = normal(rng, (2, 21, 6)), normal(rng, (2, 21, 6))
    y = mega_gated_attention(x, with_bias(layer(rng), u=-100.0), residual=residual)
    np.testing.assert_allclose(y, residual, rtol=1e-6, atol=1e-6)


def test_gates_of_1_give_plain_attention(rng, isa):
    one = 1.2784645427610738  # silu of it is 1
    weights, x = with_bias(layer(rng), u=100.0, r=one, hx=0.0), normal(rng, (2, 21, 6))
    averaged, _ = reference.multi_dim_damped_ema(x, *weights.ema, omega=weights.omega, silu=True)
    z = silu(averaged @ weights.w_m[:, 6:10] + weights.b_m[6:10])
    q, k = (z * g + b for g, b in ((weights.gamma_q, weights.beta_q), (weights.gamma_k, weights.beta_k)))
    v = silu(x.astype(np.float64) @ weights.w_v)
    plain = attention(*(np.asarray(rows[:, None], F32) for rows in (q, k, v)), causal=True)[:, 0]
    check(mega_gated_attention(x, weights), silu(plain.astype(np.float64) @ weights.w_h), depth=4)


@pytest.mark.parametrize("function", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("chunk", [None, 1, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_steps_and_parts_are_the_whole(rng, function, chunk, bias):
    weights, x, residual = layer(rng), normal(rng, (2, 40, 6)), normal(rng, (2, 40, 6))
    options = {"function": function, "chunk": chunk}
    if bias:
        options["relative_bias"] = normal(rng, (81,))
    expected = reference.mega_gated_attention(x, weights, residual=residual, **options)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 19), slice(19, 19), *(slice(t, t + 1) for t in range(19, 26)), slice(26, 40)):
        y, state = mega_gated_attention(
            x[:, part], weights, residual=residual[:, part], initial_state=state, return_state=True, **options
        )
        parts.append(y)
    check(np.concatenate(parts, axis=1), expected, depth=4)
    assert state.keys.shape == (2, 40 if chunk is None else 0, 4)


def test_states_that_do_not_fit(rng):
    weights, x = layer(rng), normal(rng, (2, 9, 6))
    _, state = mega_gated_attention(x, weights, chunk=16, return_state=True)
    for change, error, message in (
        ({"causal": False}, ValueError, "causal: got False with a state"),
        ({"chunk": 9}, ValueError, "initial_state: got keys of 9 rows, expected fewer than the 9 of a chunk"),
        ({"initial_state": replace(state, averages=state.averages[:1])}, ValueError, "initial_state: got averages"),
        ({"initial_state": replace(state, values=state.values[:, 1:])}, ValueError, "initial_state: got values"),
        ({"initial_state": state.keys}, TypeError, "initial_state: got ndarray"),
        ({"relative_bias": np.zeros(17)}, ValueError, "relative_bias: got 17 entries, expected .* at least 31"),
    ):
        with pytest.raises(error, match=message):
            mega_gated_attention(x, weights, **{"initial_state": state, "chunk": 16, **change})


def test_bad_averages(rng):
    x, (alpha, delta, beta, gamma) = normal(rng, (2, 9, 6)), averages(rng)
    for arguments, options, error, message in (
        ((alpha[:5], delta, beta, gamma), {}, ValueError, r"alpha: got shape \(5, 4\)"),
        ((alpha, delta, beta[:, :3], gamma), {}, ValueError, r"beta: got shape \(6, 3\)"),
        ((alpha, delta * np.nan, beta, gamma), {}, ValueError, "delta: got NaN or infinity"),
        ((alpha, delta, beta, gamma), {"omega": alpha}, ValueError, "omega: got shape"),
        ((alpha, delta, beta, gamma), {"backward": alpha}, TypeError, "backward: got ndarray"),
        ((alpha, delta, beta, gamma), {"silu": 1}, TypeError, "silu: got 1"),
    ):
        with pytest.raises(error, match=message):
            multi_dim_damped_ema(x, *arguments, **options)


def test_bad_layers(rng):
    weights, x = layer(rng), normal(rng, (2, 9, 6))
    for change, options, error, message in (
        ({"w_m": weights.w_m[:, :-1]}, {}, ValueError, r"weights.w_m: got shape \(6, 25\)"),
        ({"beta_k": weights.beta_k[:3]}, {}, ValueError, r"weights.beta_k: got shape \(3,\)"),
        ({"ema_backward": weights.ema}, {}, ValueError, "weights.ema_backward: got averages"),
        ({}, {"function": "exp"}, ValueError, "function: got 'exp'"),
        ({}, {"chunk": 0}, ValueError, "chunk: got 0"),
        ({}, {"relative_bias": np.zeros(16)}, ValueError, "relative_bias: got 16 entries"),
        ({}, {"relative_bias": np.zeros(15)}, ValueError, "relative_bias: got 15 entries"),
        ({}, {"residual": x[:1]}, ValueError, "residual: got shape"),
    ):
        with pytest.raises(error, match=message):
            mega_gated_attention(x, replace(weights, **change), **options)
