"""`delta_rule_attention`."""

import numpy as np

from longattn.linear import delta_rule_attention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class TestDeltaRuleAttention(Recurrence):
    case = Case(
        delta_rule_attention,
        reference.delta_rule_attention,
        gates={"beta": ("row", lambda u: u)},
        keys=unit,
        delta=True,
    )


def test_orthonormal_keys_are_recalled(rng):
    keys = np.linalg.qr(rng.standard_normal((2, 60, 60)))[0].astype(np.float32)
    values = rng.standard_normal((2, 60, 9)).astype(np.float32)
    _, state = delta_rule_attention(keys, keys, values, np.ones((2, 60), np.float32))
    out, _ = delta_rule_attention(keys, keys, values, np.zeros((2, 60), np.float32), initial_state=state, scale=1.0)
    np.testing.assert_allclose(out, values, atol=1e-5)


def test_a_beta_of_0_leaves_the_state(rng):
    arguments = TestDeltaRuleAttention.case.arguments(rng, length=60)
    state = TestDeltaRuleAttention.case.state(rng, arguments)
    arguments["beta"] = np.zeros_like(arguments["beta"])
    np.testing.assert_array_equal(delta_rule_attention(**arguments, initial_state=state)[1], state)


def test_a_key_written_twice_holds_its_second_value(rng):
    key = np.zeros((1, 2, 4), np.float32)
    key[..., 0] = 1
    values = rng.standard_normal((1, 2, 3)).astype(np.float32)
    out, state = delta_rule_attention(key, key, values, np.ones((1, 2), np.float32), scale=1.0)
    np.testing.assert_allclose(out, values, atol=1e-6)
    np.testing.assert_allclose(state[0, 0], values[0, 1], atol=1e-6)


def test_rows_of_unit_length(rng):
    arguments = TestDeltaRuleAttention.case.arguments(rng, length=100)
    out, _ = delta_rule_attention(**arguments, normalize_qk=True)
    arguments["k"], arguments["q"] = 3 * arguments["k"], 5 * arguments["q"]
    np.testing.assert_allclose(delta_rule_attention(**arguments, normalize_qk=True)[0], out, atol=1e-5)


def test_a_hundred_thousand_steps_do_not_drift(rng):
    """Errors of long ago are overwritten as states are: both forms stay at the float64 recurrence."""
    q, k, v = (unit(rng.standard_normal((1, 1, 100_000, 4))).astype(np.float32) for _ in range(3))
    beta = rng.random((1, 1, 100_000)).astype(np.float32)
    _, last = delta_rule_attention(q, k, v, beta)
    late = (x[:, :, -2000:] for x in (q, k, v, beta))
    _, expected = reference.delta_rule_attention(*late)
    np.testing.assert_allclose(last, expected, atol=1e-5)
