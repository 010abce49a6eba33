"""`shard_state` and `exclusive_states`: stretches of a sequence compose to the whole."""

from itertools import pairwise

import numpy as np
import pytest

import tolerances
from longattn.linear import (
    exclusive_states,
    gated_linear_attention,
    lightning_attention,
    linear_attention,
    shard_state,
    state_space_duality,
)
from random_arrays import DTYPES, F32

BOUNDS = ([0, 90], [0, 30, 31, 31, 90], [0, 1, 2, 3, 90])


def arrays(rng, dtype=F32, heads=(2, 4)):
    q, k = (rng.standard_normal((2, heads[0], 90, 8)).astype(dtype) for _ in range(2))
    return q, k, rng.standard_normal((2, heads[1], 90, 6)).astype(dtype)


def composed(call, bounds, k, v, g, **more):
    """Outputs of all stretches, and the last state."""
    cuts = [slice(a, z) for a, z in pairwise(bounds)]
    own = [
        shard_state(
            k[:, :, s], v[:, :, s], g=None if g is None else g[:, :, s], **{n: x[:, :, s] for n, x in more.items()}
        )
        for s in cuts
    ]
    before, last = exclusive_states([state for state, _ in own], [decay for _, decay in own])
    return np.concatenate([call(s, state) for s, state in zip(cuts, before, strict=True)], axis=2), last


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decays_per_channel(rng, bounds, dtype):
    q, k, v = arrays(rng, dtype)
    g = -rng.random((2, 4, 90, 8)).astype(F32)
    whole, state = gated_linear_attention(q, k, v, g)

    def call(s, first):
        return gated_linear_attention(q[:, :, s], k[:, :, s], v[:, :, s], g[:, :, s], initial_state=first)[0]

    out, last = composed(call, bounds, k, v, g)
    tolerances.check_gradients(out, whole.astype(np.float64), 400)
    tolerances.check_gradients(last, state.astype(np.float64), 400)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_decays_per_row_and_steps(rng, bounds):
    """Mamba-2: decays and factors of updates come from one step size."""
    c, b, x = arrays(rng)
    dt, a = rng.random((2, 4, 90)).astype(F32), -rng.random(4).astype(F32)
    whole, state = state_space_duality(x, dt, a, b, c)

    def call(s, first):
        return state_space_duality(x[:, :, s], dt[:, :, s], a, b[:, :, s], c[:, :, s], initial_state=first)[0]

    out, last = composed(call, bounds, b, x, dt * a[:, None], beta=dt)
    tolerances.check_gradients(out, whole.astype(np.float64), 400)
    tolerances.check_gradients(last, state.astype(np.float64), 400)


def test_no_decay_and_one_per_head(rng):
    q, k, v = arrays(rng)
    for call, g in (
        (lambda *x, **more: linear_attention(*x, normalize=False, **more), None),
        (lambda *x, **more: lightning_attention(*x, np.array([0.1, 0.2, 0, 1], F32), **more), [-0.1, -0.2, 0, -1]),
    ):
        decays = None if g is None else np.array(g, F32)
        own = [shard_state(k[:, :, s], v[:, :, s], g=decays) for s in (slice(0, 50), slice(50, 90))]
        before, last = exclusive_states(*zip(*own, strict=True))
        out, state = call(q, k, v)
        part, _ = call(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], initial_state=before[1])
        tolerances.check_gradients(part, out[:, :, 50:].astype(np.float64), 400)
        tolerances.check_gradients(last, state.astype(np.float64), 400)


def test_a_first_state_and_no_batch(rng):
    q, k, v = (x[0] for x in arrays(rng))
    first = rng.standard_normal((4, 8, 6)).astype(F32)
    own, decay = shard_state(k, v)
    (before,), last = exclusive_states([own], [decay], initial_state=first)
    np.testing.assert_array_equal(before, first)
    _, expected = linear_attention(q, k, v, normalize=False, initial_state=first)
    tolerances.check_gradients(last, expected.astype(np.float64), 400)


def test_total_decay_forgets(rng):
    _, k, v = arrays(rng)
    g = np.zeros((2, 4, 90), F32)
    g[:, :, 40] = -np.inf
    own, decay = shard_state(k, v, g=g)
    expected, _ = shard_state(k[:, :, 40:], v[:, :, 40:])
    np.testing.assert_allclose(own, expected, atol=1e-5)
    _, last = exclusive_states([own], [decay], initial_state=np.ones((2, 4, 8, 6), F32))
    np.testing.assert_array_equal(last, own)


def test_wrong_arguments(rng):
    _, k, v = arrays(rng)
    own, decay = shard_state(k, v)
    for match, call in (
        ("g: got a number above 0", lambda: shard_state(k, v, g=np.ones((2, 4, 90), F32))),
        ("g: got shape", lambda: shard_state(k, v, g=np.zeros((2, 4, 9), F32))),
        ("beta: got NaN or infinity", lambda: shard_state(k, v, beta=np.full((2, 4, 90), np.inf, F32))),
        ("v: got length", lambda: shard_state(k, v[:, :, 1:])),
        ("states: got 0 beside 0", lambda: exclusive_states([], [])),
        ("states: got 1 beside 2", lambda: exclusive_states([own], [decay, decay])),
        ("decays.0.: got shape", lambda: exclusive_states([own], [decay[..., None]])),
        ("states.1.: got shape", lambda: exclusive_states([own, own[:1]], [decay, decay])),
        ("initial_state: got shape", lambda: exclusive_states([own], [decay], initial_state=own[:1])),
    ):
        with pytest.raises(ValueError, match=match):
            call()
