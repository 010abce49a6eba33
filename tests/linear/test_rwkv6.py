"""`rwkv6`."""

import numpy as np

from longattn.linear import gated_linear_attention, linear_attention, rwkv6
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestRwkv6(Recurrence):
    case = Case(
        rwkv6,
        reference.rwkv6,
        gates={"g": ("channel", lambda u: -u), "u": ("weight", lambda u: 2 * u - 0.5)},
    )


def test_without_decay_it_is_linear_attention(rng):
    arguments = TestRwkv6.case.arguments(rng, length=150)
    arguments["g"], arguments["u"] = np.zeros_like(arguments["g"]), np.ones_like(arguments["u"])
    out, state = rwkv6(**arguments)
    q, k, v = (arguments[name] for name in "qkv")
    expected, last = linear_attention(q, k, v, normalize=False)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-4)


def test_the_first_row_reads_itself(rng):
    arguments = TestRwkv6.case.arguments(rng, length=20)
    out, _ = rwkv6(**arguments)
    q, k, v = (arguments[name][:, :, 0].astype(np.float64) for name in "qkv")
    weight = (q * k * arguments["u"]).sum(-1, keepdims=True)
    np.testing.assert_allclose(out[:, :, 0], weight * v, atol=1e-5)


def test_states_are_those_of_gated_linear_attention(rng):
    arguments = TestRwkv6.case.arguments(rng, length=150)
    _, state = rwkv6(**arguments)
    del arguments["u"]
    np.testing.assert_array_equal(state, gated_linear_attention(**arguments)[1])


def test_large_gates(rng):
    arguments = TestRwkv6.case.arguments(rng, length=100)
    arguments["g"] = 300 * arguments["g"]
    arguments["g"][:, :, 50] = -np.inf
    TestRwkv6.case.check(arguments)
