"""Rates of delta rules: from 0 to 2 for keys of length 1, beyond which states grow."""

import numpy as np
import pytest

from longattn import linear
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32

#: Functions by name, and the width of their gates.
RULES = {"delta_rule_attention": None, "gated_delta_rule": (), "kimi_delta_attention": (6,)}


def arguments(rng, rule, length, heads=2, dtype=F32):
    """Without decay."""
    q, k, v = (rng.standard_normal((1, heads, length, n)).astype(dtype) for n in (6, 6, 4))
    gates = [] if RULES[rule] is None else [np.zeros((1, heads, length, *RULES[rule]), F32)]
    return [q, k, v, *gates]


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("rule", RULES)
def test_rates_outside_0_to_2_are_refused_for_unit_keys(rng, rule, length):
    call, given = getattr(linear, rule), arguments(rng, rule, length)
    for dtype in (*DTYPES, np.float64):
        for rate in (2.125, -0.125, np.nan, np.inf):
            beta = np.ones((1, 2, length))
            beta[0, 1, -1] = rate
            with pytest.raises(ValueError, match="beta: got a number outside 0 to 2"):
                call(*given, beta.astype(dtype), normalize_qk=True)
        for rate in (0.0, 2.0):
            call(*given, np.full((1, 2, length), rate).astype(dtype), normalize_qk=True)


def test_gradients_refuse_them_too(rng):
    q, k, v = arguments(rng, "delta_rule_attention", 20)
    beta = np.full((1, 2, 20), 2.5, F32)
    with pytest.raises(ValueError, match="beta: got a number outside 0 to 2"):
        linear.recurrence_backward(v, None, q, k, v, beta=beta, delta=True, normalize_qk=True)
    linear.recurrence_backward(v, None, q, k, v, beta=beta, normalize_qk=True)  # a factor, not a rule


@pytest.mark.parametrize("rule", RULES)
def test_states_do_not_grow_up_to_2(rng, rule):
    """With nothing to store, each row's `I - beta k k^T` lengthens no column."""
    q, k, v, *gates = arguments(rng, rule, 2000)
    state = rng.standard_normal((1, 2, 6, 4)).astype(F32)
    beta = rng.choice(np.array([0, 1, 2], F32), (1, 2, 2000))
    beta[:, 1] = 2
    _, last = getattr(linear, rule)(q, k, 0 * v, *gates, beta, normalize_qk=True, initial_state=state)
    before, after = (np.linalg.norm(x, axis=-2) for x in (state, last))
    assert (after <= before * (1 + 1e-5)).all()
    # Reflections, but for the 1e-6 beside the squares of the keys.
    np.testing.assert_allclose(after[:, 1], before[:, 1], rtol=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_keys_as_they_come_may_let_states_grow(rng, isa, rule):
    """A `beta |k|^2` of 3 doubles what is held for a key, row after row, as the recurrence has it, until infinity."""
    call, oracle = getattr(linear, rule), getattr(reference, rule)
    q, k, v, *gates = arguments(rng, rule, 300)
    k[:] = 0
    k[..., 0] = np.sqrt(np.float32(0.5))
    beta = np.full((1, 2, 300), 6, F32)
    beta[:, 1] = 2  # 1, which replaces
    state = np.ones((1, 2, 6, 4), F32)
    part = [x[:, :, :60] for x in (q, k, 0 * v, *gates, beta)]
    out, last = call(*part, normalize_qk=False, initial_state=state)
    expected, expected_last = oracle(*part, normalize_qk=False, initial_state=state)
    np.testing.assert_allclose(last[0, 0, 0], np.full(4, 2.0**60), rtol=1e-4)
    np.testing.assert_allclose(last, expected_last, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-5)
    out, last = call(q, k, 0 * v, *gates, beta, normalize_qk=False, initial_state=state)
    assert not np.isfinite(last[0, 0, 0]).any() and not np.isfinite(out[0, 0, -1]).any()
    assert np.isfinite(out[0, 0, :60]).all() and np.isfinite(out[0, 1]).all() and np.isfinite(last[0, 1]).all()
