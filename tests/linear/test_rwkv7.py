"""`rwkv7`."""

import numpy as np
import pytest

from longattn.linear import delta_rule_attention, gated_linear_attention, kimi_delta_attention, rwkv7
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestRwkv7(Recurrence):
    """Directions of any sign, whose products are short enough for states to stay bounded."""

    case = Case(
        rwkv7,
        reference.rwkv7,
        gates={
            "g": ("channel", lambda u: -u),
            "a": ("key", lambda u: (u - 0.5) / np.sqrt(u.shape[-1])),
            "b": ("key", lambda u: (u - 0.5) / np.sqrt(u.shape[-1])),
        },
    )


def delta(rng, length, gates=0.3):
    """Arguments of the delta rule with decays, of unit keys."""
    q, k = (rng.standard_normal((1, 2, length, 16)).astype(np.float32) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((1, 2, length, 12)).astype(np.float32)
    g = (-gates * rng.random(k.shape)).astype(np.float32)
    return q, k, v, g, rng.random((1, 2, length)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 150])
def test_kimi_delta_attention(rng, isa, length):
    q, k, v, g, beta = delta(rng, length)
    state = rng.standard_normal((1, 2, 16, 12)).astype(np.float32)
    keys = beta[..., None] * k
    found = rwkv7(q, keys, v, g, -np.exp(g) * k, keys, initial_state=state)
    expected = kimi_delta_attention(q, k, v, g, beta, normalize_qk=False, scale=1.0, initial_state=state)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_the_delta_rule(rng):
    q, k, v, _, beta = delta(rng, 200)
    keys = beta[..., None] * k
    found = rwkv7(q, keys, v, np.zeros_like(k), -k, keys)
    expected = delta_rule_attention(q, k, v, beta, normalize_qk=False, scale=1.0)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_directions_of_0(rng, name):
    arguments = TestRwkv7.case.arguments(rng, length=150)
    arguments[name] = np.zeros_like(arguments[name])
    out, state = rwkv7(**arguments)
    q, k, v, g = (arguments[n] for n in "qkvg")
    expected, last = gated_linear_attention(q, k, v, g, scale=1.0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_rates_per_channel(rng, isa):
    """As RWKV-7 has them: `a = -kappa`, `b = kappa * eta`, decays above `e^-0.61`."""
    q, k, v, g, _ = delta(rng, 300, gates=0.6)
    kappa = rng.standard_normal(k.shape)
    kappa = (kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)).astype(np.float32)
    b = kappa * rng.random(k.shape).astype(np.float32)
    found = rwkv7(q, k, v, g, -kappa, b)
    expected = reference.rwkv7(q, k, v, g, -kappa, b)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_large_gates(rng):
    arguments = TestRwkv7.case.arguments(rng, length=100)
    arguments["g"] = 300 * arguments["g"]
    arguments["g"][:, :, 50] = -np.inf
    TestRwkv7.case.check(arguments)
