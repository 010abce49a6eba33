"""A few tokens from a state, of the CPU and of `longattn.gpu`, against the definition in float64."""

import itertools

import numpy as np
import pytest

import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import get, put
from gpu.test_chunked_recurrence import arrays, check
from longattn import gpu
from longattn.gpu.chunked_recurrence import STEPS
from random_arrays import BF16, DTYPES, F16, F32


def state_of(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("length", [1, 3, STEPS])
def test_every_form(rng, anywhere, dtype, gate, delta, length):
    given = arrays(rng, dtype, batch=2, length=length, gate=gate, delta=delta)
    check(anywhere, *given, state=state_of(rng, 2, 2, 64, 40))
    check(anywhere, *given, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("value_dim", [1, 31, 32, 33, 64, 100, 128])
def test_head_sizes(rng, anywhere, dtype, dim, value_dim):
    """Rows of the state that are aligned to 16 bytes and rows that are not; blocks whose columns end early."""
    given = arrays(rng, dtype, heads=1, length=2, dim=dim, value_dim=value_dim)
    check(anywhere, *given, state=state_of(rng, 1, 1, dim, value_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_more_value_heads_than_keys(rng, anywhere, dtype, gate):
    given = arrays(rng, dtype, batch=2, heads=2, value_heads=6, length=2, gate=gate)
    check(anywhere, *given, state=state_of(rng, 2, 6, 64, 40))


def test_one_launch(rng):
    """Where the steps end, the chunks begin."""
    for length, kernels in ((1, ["recurrence_step_bf16_64"]), (STEPS, ["recurrence_step_bf16_64"])):
        device = EmulatorDevice()
        gpu.chunked_recurrence(*arrays(rng, BF16, length=length), device=device)
        assert device.started == kernels
    device = EmulatorDevice()
    gpu.chunked_recurrence(*arrays(rng, BF16, length=STEPS + 1), device=device)
    assert device.started == ["recurrence_prepare_bf16_64", "recurrence_carry_bf16_64"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_the_rows_of_the_sequence(rng, device, dtype):
    """One by one, several at a time, and after chunks: the same bits for the same state, rounding apart else."""
    length = 3 * STEPS
    q, k, v, g, beta = arrays(rng, dtype, length=length, value_dim=36)
    given = [put(device, x) for x in (q, k, v, g, beta)]
    whole, final = (get(x) for x in gpu.chunked_recurrence(*given, device=device))

    def pieces(cuts):
        state, outs = None, []
        for a, b in itertools.pairwise(cuts):
            out, state = gpu.chunked_recurrence(*(x[:, :, a:b] for x in given), initial_state=state, device=device)
            outs.append(get(out))
        return np.concatenate(outs, axis=2), get(state)

    one_by_one, several = pieces(range(length + 1)), pieces([0, 1, 9, 14, 16, length])
    for a, b in zip(one_by_one, several, strict=True):
        np.testing.assert_array_equal(a, b)
    after = pieces([0, 16, *range(17, length + 1)])
    for out, state in (one_by_one, after):
        tolerances.device_recurrence(out, whole, state, final)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_that_forget_everything(rng, anywhere, dtype):
    """-inf included, beside channels that forget nothing."""
    q, k, v, g, beta = arrays(rng, dtype, length=3)
    g[..., ::3], g[..., 1::3], g[:, :, 1, 2::3] = -np.inf, 0.0, -200.0
    out, final = check(anywhere, q, k, v, g, beta, state=state_of(rng, 1, 2, 64, 40))
    assert np.isfinite(out).all() and np.isfinite(final).all()


def test_a_state_that_is_not_aligned(rng, device):
    """Is read by numbers; what comes out is the same to the bit."""
    given = [put(device, x) for x in arrays(rng, F16, length=2, value_dim=32)]
    state = state_of(rng, 1, 2, 64, 32)
    shifted = put(device, np.concatenate([np.zeros(1, np.float32), state.ravel()]))[1:].reshape(state.shape)
    for a, b in zip(
        gpu.chunked_recurrence(*given, initial_state=put(device, state), device=device),
        gpu.chunked_recurrence(*given, initial_state=shifted, device=device),
        strict=True,
    ):
        np.testing.assert_array_equal(get(a), get(b))


def test_the_state_given_is_not_written(rng, device):
    """A step is a function: whoever tries several continuations keeps the state."""
    given = [put(device, x) for x in arrays(rng, F32, length=1)]
    state = state_of(rng, 1, 2, 64, 40)
    there = put(device, state)
    gpu.chunked_recurrence(*given, initial_state=there, device=device)
    np.testing.assert_array_equal(get(there), state)


def test_rows_in_any_strides(rng, device):
    """Rows of a longer array, heads last, and values that begin anywhere."""
    q, k, v, g, beta = arrays(rng, F16, heads=2, length=2, value_dim=35)
    expected = gpu.chunked_recurrence(*(put(device, x) for x in (q, k, v, g, beta)), device=device)
    last = [put(device, np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2) for x in (q, k)]
    wide = put(device, np.concatenate([v, v], axis=3)[..., 1:])[..., 34:]
    others = [put(device, np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2) for x in (g, beta)]
    found = gpu.chunked_recurrence(*last, wide, *others, device=device)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(get(a), get(b))
