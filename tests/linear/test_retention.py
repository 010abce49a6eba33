"""`retention`."""

import numpy as np
import pytest

from longattn.linear import retention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestRetention(Recurrence):
    case = Case(
        retention,
        reference.retention,
        gates={"gamma": ("head", lambda u: 1 - u / 4)},
    )


def test_it_is_the_lower_triangle_with_decays(rng):
    arguments = TestRetention.case.arguments(rng, length=150)
    q, k, v, gamma = (x.astype(np.float64) for x in arguments.values())
    distance = np.subtract.outer(np.arange(150), np.arange(150))
    decay = np.tril(gamma[:, None, None] ** np.maximum(distance, 0))
    expected = (q @ k.swapaxes(-1, -2) * decay) @ v * 8**-0.5
    np.testing.assert_allclose(retention(**arguments)[0], expected, atol=2e-5)


def test_the_papers_decays(rng):
    arguments = TestRetention.case.arguments(rng, heads=(6, 6, 6), length=100)
    arguments["gamma"] = 1 - 2.0 ** (-5.0 - np.arange(6))
    expected, _ = retention(**arguments)
    arguments["gamma"] = None
    np.testing.assert_allclose(retention(**arguments)[0], expected, atol=1e-6)


def test_a_decay_of_0_forgets_everything(rng):
    arguments = TestRetention.case.arguments(rng, length=60)
    arguments["gamma"] = np.zeros(2)
    own = (arguments["q"] * arguments["k"]).sum(-1, keepdims=True) * 8**-0.5
    np.testing.assert_allclose(retention(**arguments)[0], own * arguments["v"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_decays_outside_0_to_1(rng, gamma):
    arguments = TestRetention.case.arguments(rng)
    with pytest.raises(ValueError, match="gamma: got a number outside 0 to 1"):
        retention(**{**arguments, "gamma": np.full(2, gamma)})
