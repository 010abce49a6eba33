"""`gated_delta_rule`."""

import numpy as np

from longattn.linear import delta_rule_attention, gated_delta_rule, kimi_delta_attention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class TestGatedDeltaRule(Recurrence):
    case = Case(
        gated_delta_rule,
        reference.gated_delta_rule,
        gates={"g": ("row", lambda u: -u), "beta": ("row", lambda u: u)},
        keys=unit,
        delta=True,
    )


def test_log_decays_of_0_give_the_delta_rule(rng):
    arguments = TestGatedDeltaRule.case.arguments(rng)
    arguments["g"] = np.zeros_like(arguments["g"])
    out, state = gated_delta_rule(**arguments)
    del arguments["g"]
    expected, last = delta_rule_attention(**arguments)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)


def test_a_beta_of_0_is_decay_of_the_state(rng):
    arguments = TestGatedDeltaRule.case.arguments(rng)
    state = TestGatedDeltaRule.case.state(rng, arguments)
    arguments["beta"] = np.zeros_like(arguments["beta"])
    _, last = gated_delta_rule(**arguments, initial_state=state)
    decay = np.exp(arguments["g"].astype(np.float64).sum(-1))[..., None, None]
    np.testing.assert_allclose(last, decay * state, rtol=1e-4, atol=1e-12)


def test_it_is_kimi_delta_attention_with_one_gate_for_all_channels(rng):
    arguments = TestGatedDeltaRule.case.arguments(rng, length=130)
    out, state = gated_delta_rule(**arguments, normalize_qk=True)
    arguments["g"] = np.broadcast_to(arguments["g"][..., None], (*arguments["g"].shape, 8)).copy()
    expected, last = kimi_delta_attention(**arguments)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


def test_orthonormal_keys_find_their_values(rng):
    """Without decay and with beta 1, a query along a key reads the value that was stored with it."""
    k = np.linalg.qr(rng.standard_normal((1, 2, 16, 16)))[0].astype(np.float32)[:, :, :10]
    v = rng.standard_normal((1, 2, 10, 5)).astype(np.float32)
    zeros = np.zeros((1, 2, 10), np.float32)
    _, state = gated_delta_rule(k, k, v, zeros, zeros + 1)
    found, _ = gated_delta_rule(k, k, v, zeros, zeros, scale=1.0, initial_state=state)
    np.testing.assert_allclose(found, v, atol=1e-5)
