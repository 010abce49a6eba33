"""`kimi_delta_attention`."""

import numpy as np
import pytest

from longattn.linear import delta_rule_attention, gated_linear_attention, kimi_delta_attention, kimi_delta_gates
from longattn.reference import linear as reference
from random_arrays import DTYPES
from recurrences import Case, Recurrence


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class TestKimiDeltaAttention(Recurrence):
    case = Case(
        kimi_delta_attention,
        reference.kimi_delta_attention,
        gates={"g": ("channel", lambda u: -u), "beta": ("row", lambda u: u)},
        keys=unit,
        delta=True,
        options={"normalize_qk": False},
    )


class TestRowsOfAnyLength(Recurrence):
    """With rows divided by their lengths."""

    case = Case(
        kimi_delta_attention,
        reference.kimi_delta_attention,
        gates={"g": ("channel", lambda u: -u / 10), "beta": ("row", lambda u: u)},
        keys=unit,
        delta=True,
    )


def test_gates_of_0_are_the_delta_rule(rng):
    arguments = TestKimiDeltaAttention.case.arguments(rng, length=150)
    arguments["g"] = np.zeros_like(arguments["g"])
    out, state = kimi_delta_attention(**arguments)
    del arguments["g"]
    expected, last = delta_rule_attention(**arguments)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


def test_a_beta_of_0_is_decay_of_the_state(rng):
    arguments = TestKimiDeltaAttention.case.arguments(rng)
    state = TestKimiDeltaAttention.case.state(rng, arguments)
    arguments["beta"] = np.zeros_like(arguments["beta"])
    _, last = kimi_delta_attention(**arguments, initial_state=state)
    decay = np.exp(arguments["g"].astype(np.float64).sum(-2))[..., None]
    np.testing.assert_allclose(last, decay * state, rtol=1e-4, atol=1e-12)


def test_the_state_decays_before_what_is_new_is_measured(rng):
    """A key whose value has decayed is written anew in full."""
    key = np.eye(1, 4, dtype=np.float32)[None]
    value = np.ones((1, 1, 3), np.float32)
    state = np.zeros((1, 4, 3), np.float32)
    state[0, 0] = 1
    g, beta = np.full((1, 1, 4), np.log(0.5), np.float32), np.full((1, 1), 0.5, np.float32)
    _, last = kimi_delta_attention(key, key, value, g, beta, initial_state=state)
    np.testing.assert_allclose(last[0, 0], 0.5 + 0.5 * (1 - 0.5), atol=1e-6)


def test_orthonormal_keys_find_their_values(rng):
    """With beta 1 and no decay, a query along a key reads the value that was stored with it."""
    k = np.linalg.qr(rng.standard_normal((1, 2, 16, 16)))[0].astype(np.float32)[:, :, :10]
    v = rng.standard_normal((1, 2, 10, 5)).astype(np.float32)
    none = np.zeros_like(k)
    _, state = kimi_delta_attention(k, k, v, none, np.ones((1, 2, 10), np.float32))
    found, _ = kimi_delta_attention(k, k, v, none, np.zeros((1, 2, 10), np.float32), scale=1.0, initial_state=state)
    np.testing.assert_allclose(found, v, atol=1e-5)


def test_keys_of_which_nothing_is_held_make_gated_linear_attention(rng):
    """Channels decay by themselves and a key is one of them: nothing is taken from what is new."""
    q, v = (rng.standard_normal((1, 2, 60, n)).astype(np.float32) for n in (64, 5))
    k = np.broadcast_to(np.eye(64, dtype=np.float32)[:60], (1, 2, 60, 64))
    g, beta = -rng.random((1, 2, 60, 64)).astype(np.float32) / 10, rng.random((1, 2, 60)).astype(np.float32)
    out, state = kimi_delta_attention(q, k, v, g, beta, normalize_qk=False)
    expected, last = gated_linear_attention(q, k, beta[..., None] * v, g)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_large_gates(rng):
    arguments = TestKimiDeltaAttention.case.arguments(rng, length=100)
    arguments["g"] = 300 * arguments["g"]
    TestKimiDeltaAttention.case.check(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 37])
def test_gates(rng, isa, dtype, dim):
    f = (3 * rng.standard_normal((2, 3, 300, dim))).astype(dtype)
    a_log, bias = rng.standard_normal(3).astype(np.float32), rng.standard_normal((3, dim)).astype(np.float32)
    x, rates = f.astype(np.float64) + bias[:, None], np.exp(a_log.astype(np.float64))[:, None, None]
    g = kimi_delta_gates(f, a_log, bias)
    assert g.dtype == np.float32
    np.testing.assert_allclose(g, -rates * np.logaddexp(0, x), rtol=2e-5)
    np.testing.assert_allclose(kimi_delta_gates(f[0], a_log, bias), g[0])
    bounded = kimi_delta_gates(f, a_log, bias, lower_bound=-5.0)
    np.testing.assert_allclose(bounded, -5 / (1 + np.exp(-rates * x)), rtol=2e-5, atol=1e-30)
    assert (kimi_delta_gates(f, a_log) <= 0).all()


def test_gates_that_do_not_fit(rng):
    f = rng.standard_normal((2, 3, 10, 4)).astype(np.float32)
    a_log = np.zeros(3, np.float32)
    for match, given, options in (
        ("f: got shape", (f[0, 0], a_log), {}),
        ("a_log: got shape", (f, a_log[1:]), {}),
        ("a_log: got numbers", (f, a_log + 200), {}),
        ("dt_bias: got shape", (f, a_log, np.zeros((3, 5))), {}),
        ("lower_bound: got 1", (f, a_log), {"lower_bound": 1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            kimi_delta_gates(*given, **options)
