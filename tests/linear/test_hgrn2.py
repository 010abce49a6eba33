"""`hgrn2`."""

import numpy as np

from longattn.linear import gated_linear_attention, hgrn2
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestHgrn2(Recurrence):
    case = Case(
        hgrn2,
        reference.hgrn2,
        names=("q", None, "v"),
        gates={"g": ("channel", lambda u: -u)},
    )


def test_it_is_gated_linear_attention_with_keys_of_gates(rng):
    arguments = TestHgrn2.case.arguments(rng, length=150)
    out, state = hgrn2(**arguments)
    k = -np.expm1(arguments["g"])
    expected, last = gated_linear_attention(**arguments, k=k, scale=1.0)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_a_value_that_never_changes_is_held(rng):
    arguments = TestHgrn2.case.arguments(rng, length=300)
    arguments["v"] = np.full_like(arguments["v"], 2.5)
    np.testing.assert_allclose(hgrn2(**arguments)[1], 2.5, rtol=1e-5)


def test_gates_of_0_ignore_the_input(rng):
    arguments = TestHgrn2.case.arguments(rng, length=60)
    state = TestHgrn2.case.state(rng, arguments)
    arguments["g"] = np.zeros_like(arguments["g"])
    np.testing.assert_array_equal(hgrn2(**arguments, initial_state=state)[1], state)


def test_slow_gates_keep_their_digits(rng):
    """`1 - e^g` of a small `g` is no difference of nearly equal numbers."""
    arguments = TestHgrn2.case.arguments(rng, length=50)
    arguments["g"] = 1e-6 * arguments["g"]
    _, last = hgrn2(**arguments)
    _, expected = reference.hgrn2(**arguments)
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-9)
