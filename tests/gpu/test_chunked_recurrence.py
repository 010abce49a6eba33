"""The recurrence, of the CPU and of `longattn.gpu`, against its definition, token by token in float64."""

import itertools

import numpy as np
import pytest

import tolerances
from emu import emulator
from emu.device import EmulatorDevice
from gpu.conftest import function_of, get, put
from longattn import gpu, linear
from longattn.reference.linear._recurrence import recurrence
from random_arrays import BF16, DTYPES, F16, F32


def arrays(rng, dtype, *, batch=1, heads=2, value_heads=None, length, dim=64, value_dim=40, gate="channel", delta=True):
    value_heads = value_heads or heads
    q, k = (rng.standard_normal((batch, heads, length, dim)) for _ in "qk")
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((batch, value_heads, length, value_dim))
    shape = {"channel": (batch, value_heads, length, dim), "head": (batch, value_heads, length)}.get(gate)
    g = None if shape is None else -rng.exponential(0.3, shape).astype(np.float32)
    beta = rng.uniform(0.1, 1, (batch, value_heads, length)).astype(np.float32) if delta else None
    return *(x.astype(dtype) for x in (q, k, v)), g, beta


def on_cpu(q, k, v, g, beta, **how):
    """The same by the CPU's methods, each of which is one form."""
    if beta is None:
        if g is None:
            scale = how.pop("scale") or q.shape[-1] ** -0.5
            return linear.linear_attention(q, k, v, normalize=False, scale=scale, **how)
        gates = g if g.ndim == 4 else np.repeat(g[..., None], q.shape[-1], axis=-1)
        return linear.gated_linear_attention(q, k, v, gates, **how)
    if g is None:
        return linear.delta_rule_attention(q, k, v, beta, **how)
    rule = linear.kimi_delta_attention if g.ndim == 4 else linear.gated_delta_rule
    return rule(q, k, v, g, beta, normalize_qk=False, **how)


def check(device, q, k, v, g, beta, *, scale=None, state=None):
    placed = [None if x is None else put(device, x) for x in (q, k, v, g, beta)]
    initial = None if state is None else put(device, state)
    function = function_of(device, on_cpu, gpu.chunked_recurrence)
    out, final = function(*placed, scale=scale, initial_state=initial)
    expected, expected_state = recurrence(
        q, k, v, g=g, beta=beta, delta=beta is not None, scale=scale, initial_state=state
    )
    assert get(out).dtype == q.dtype
    tolerances.device_recurrence(get(out), expected, get(final), expected_state)
    return get(out), get(final)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
@pytest.mark.parametrize("delta", [True, False])
def test_every_form(rng, anywhere, dtype, gate, delta):
    check(anywhere, *arrays(rng, dtype, length=50, gate=gate, delta=delta))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("value_dim", [1, 32, 100])
def test_head_sizes(rng, anywhere, dim, value_dim):
    check(anywhere, *arrays(rng, BF16, length=20, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 48])
def test_lengths_and_initial_states(rng, anywhere, length):
    state = rng.standard_normal((1, 2, 64, 40)).astype(np.float32)
    q, k, v, g, beta = arrays(rng, F32, length=length)
    check(anywhere, q, k, v, g, beta, state=state)
    _, final = check(anywhere, q, k, v, g, beta)
    if length == 0:
        assert not final.any()


def test_more_value_heads_than_keys(rng, anywhere):
    check(anywhere, *arrays(rng, F16, batch=2, heads=2, value_heads=6, length=33))


def test_a_sequence_in_pieces_and_in_steps_is_the_sequence(rng):
    device = EmulatorDevice()
    q, k, v, g, beta = arrays(rng, F32, length=45)
    whole, final = gpu.chunked_recurrence(q, k, v, g, beta, device=device)
    for cuts in ([0, 7, 32, 45], list(range(46))):
        state, outs = None, []
        for a, b in itertools.pairwise(cuts):
            out, state = gpu.chunked_recurrence(
                *(np.ascontiguousarray(x[:, :, a:b]) for x in (q, k, v, g, beta)), initial_state=state, device=device
            )
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, axis=2), whole, atol=2e-5)
        np.testing.assert_allclose(state, final, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_gates_neither_overflow_nor_lose(rng, anywhere, dtype):
    """Channels that forget everything at once beside channels that forget nothing."""
    q, k, v, g, beta = arrays(rng, dtype, length=40)
    g[..., ::3], g[..., 1::3] = -200.0, 0.0
    out, _ = check(anywhere, q, k, v, g, beta)
    assert np.isfinite(out).all()


def test_gate_per_head_is_that_gate_in_every_channel(rng):
    device = EmulatorDevice()
    q, k, v, g, beta = arrays(rng, F32, length=30, gate="head")
    wide = np.ascontiguousarray(np.broadcast_to(g[..., None], (*g.shape, 64)))
    for a, b in zip(
        gpu.chunked_recurrence(q, k, v, g, beta, device=device),
        gpu.chunked_recurrence(q, k, v, wide, beta, device=device),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes_of_every_dtype(rng, anywhere, dtype):
    """Values in rows that are read in pieces of 16 bytes, and in rows that are not."""
    for dim, value_dim in ((128, 64), (256, 65)):
        check(anywhere, *arrays(rng, dtype, heads=1, length=35, dim=dim, value_dim=value_dim))


def test_matrix_loads_meet_no_bank_twice(rng):
    for dim in (64, 128, 256):
        device = EmulatorDevice()
        gpu.chunked_recurrence(*arrays(rng, BF16, heads=1, length=20, dim=dim), device=device)
        loads, waits = device.matrix_loads
        assert loads > 0 and waits == 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_thread_orders_give_the_same_bits(rng, dtype):
    given = arrays(rng, dtype, length=40)
    first, *others = (gpu.chunked_recurrence(*given, device=EmulatorDevice(order)) for order in emulator.ORDERS)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_bad_input(rng):
    device = EmulatorDevice()
    q, k, v, g, beta = arrays(rng, F32, length=8)

    def call(**change):
        given = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | change
        return gpu.chunked_recurrence(**given, device=device)

    for change, error, message in (
        ({"k": k[:, :, :5]}, ValueError, "k: got shape"),
        ({"v": v[:, :1]}, ValueError, "v: got shape"),
        ({"v": v.astype(F16)}, TypeError, "v: got dtype float16"),
        ({"g": g[:, :, :5]}, ValueError, "g: got float32"),
        ({"g": g.astype(np.float64)}, ValueError, "g: got float64"),
        ({"beta": beta[..., None]}, ValueError, "beta: got"),
        ({"initial_state": np.zeros((1, 2, 64, 41), np.float32)}, ValueError, "initial_state: got"),
    ):
        with pytest.raises(error, match=message):
            call(**change)
    assert not device.started
