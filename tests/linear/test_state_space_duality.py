"""`state_space_duality`."""

import numpy as np
import pytest

from longattn.linear import linear_attention, state_space_duality
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestStateSpaceDuality(Recurrence):
    case = Case(
        state_space_duality,
        reference.state_space_duality,
        names=("c", "b", "x"),
        gates={"dt": ("row", lambda u: u), "a": ("head", lambda u: -u), "skip": ("head", lambda u: u)},
        heads=False,
    )


def test_it_is_linear_attention_with_decays(rng):
    arguments = TestStateSpaceDuality.case.arguments(rng, length=150)
    out, _ = state_space_duality(**arguments)
    c, b, x, dt, a, skip = (arguments[n].astype(np.float64) for n in ("c", "b", "x", "dt", "a", "skip"))
    log = (dt * a[:, None]).cumsum(-1)
    decay = np.tril(np.exp(np.minimum(log[..., None] - log[..., None, :], 0)))
    expected = (c @ b.swapaxes(-1, -2) * decay) @ (dt[..., None] * x) + skip[:, None, None] * x
    np.testing.assert_allclose(out, expected, atol=3e-5)


def test_a_rate_of_0_and_steps_of_1_are_linear_attention(rng):
    arguments = TestStateSpaceDuality.case.arguments(rng, length=150)
    x, b, c = (arguments[n] for n in "xbc")
    out, state = state_space_duality(x, np.ones(x.shape[:-1]), np.zeros(2), b, c)
    expected, last = linear_attention(c, b, x, normalize=False)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_wrong_signs(rng):
    arguments = TestStateSpaceDuality.case.arguments(rng)
    with pytest.raises(ValueError, match="a: got a number above 0"):
        state_space_duality(**{**arguments, "a": -arguments["a"]})
    with pytest.raises(ValueError, match="dt: got a number below 0"):
        state_space_duality(**{**arguments, "dt": -arguments["dt"]})
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="dt: got a number below 0 or not finite"):
            state_space_duality(**{**arguments, "dt": np.full_like(arguments["dt"], value)})
