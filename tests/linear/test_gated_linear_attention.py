"""`gated_linear_attention`."""

import numpy as np
import pytest

from longattn.linear import gated_linear_attention, linear_attention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestGatedLinearAttention(Recurrence):
    case = Case(
        gated_linear_attention,
        reference.gated_linear_attention,
        gates={"g": ("channel", lambda u: -u)},
    )


def test_gates_of_0_are_linear_attention(rng):
    arguments = TestGatedLinearAttention.case.arguments(rng, length=150)
    arguments["g"] = np.zeros_like(arguments["g"])
    out, state = gated_linear_attention(**arguments)
    del arguments["g"]
    expected, last = linear_attention(**arguments, normalize=False, scale=8**-0.5)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_gates_of_one_number_are_a_decay_per_row(rng):
    arguments = TestGatedLinearAttention.case.arguments(rng, length=150)
    rows = arguments["g"][..., :1]
    arguments["g"] = np.broadcast_to(rows, arguments["g"].shape).copy()
    out, _ = gated_linear_attention(**arguments)
    q, k, v = (arguments[n].astype(np.float64) for n in "qkv")
    log = rows[..., 0].astype(np.float64).cumsum(-1)
    decay = np.tril(np.exp(np.minimum(log[..., None] - log[..., None, :], 0)))
    np.testing.assert_allclose(out, (q @ k.swapaxes(-1, -2) * decay) @ v * 8**-0.5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 10.0, 100.0, 1e30, np.inf])
def test_gates_of_any_size(rng, size):
    arguments = TestGatedLinearAttention.case.arguments(rng, length=100)
    arguments["g"] = np.where(rng.random(arguments["g"].shape) < 0.3, -np.float32(size), arguments["g"])
    TestGatedLinearAttention.case.check(arguments)


def test_positive_gates(rng):
    arguments = TestGatedLinearAttention.case.arguments(rng)
    for at in (3, -1):
        wrong = arguments["g"].copy()
        wrong[0, 1, 2, at] = 1e-3
        with pytest.raises(ValueError, match="g: got a number above 0 or NaN"):
            gated_linear_attention(**{**arguments, "g": wrong})
