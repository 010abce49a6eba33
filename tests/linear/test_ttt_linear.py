"""`ttt_linear`."""

import numpy as np
import pytest

from longattn.linear import ttt_linear
from longattn.reference import linear as reference
from memories import Case, Memory


def around(rng, heads, dim, value_dim):
    return {
        "gain": (1 + 0.2 * rng.standard_normal((heads, dim))).astype(np.float32),
        "shift": (0.2 * rng.standard_normal(dim)).astype(np.float32),
        "weights": (rng.standard_normal((heads, dim + 1, dim)) / np.sqrt(dim)).astype(np.float32),
        "eps": 1e-2,
    }


class TestTttLinear(Memory):
    case = Case(ttt_linear, reference.ttt_linear, {"eta": lambda u: 0.3 * u}, around, square=True)


def norm(x, gain, shift, eps):
    return gain * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + shift


def test_a_rate_of_0_reads_the_first_weights(rng):
    arguments = TestTttLinear.case.arguments(rng, length=40)
    arguments["eta"] = 0.0
    out, state = ttt_linear(**arguments)
    q, w = arguments["q"].astype(np.float64), arguments["weights"]
    sums = q @ w[:, :-1] + w[:, -1:]
    gain = arguments["gain"][:, None]
    np.testing.assert_allclose(out, q + norm(sums, gain, arguments["shift"], 1e-2), atol=2e-5)
    np.testing.assert_array_equal(state.weights[0][0], w)


def test_a_step_is_the_gradient_of_the_loss(rng):
    """By differences in float64."""
    arguments = TestTttLinear.case.arguments(rng, heads=(1, 1), length=1, dim=5)
    arguments["eta"] = 1.0
    _, state = ttt_linear(**arguments)
    k, v = arguments["k"][0, 0, 0].astype(np.float64), arguments["v"][0, 0, 0]
    first = arguments["weights"][0].astype(np.float64)

    def loss(w):
        said = k + norm(k @ w[:-1] + w[-1], arguments["gain"][0], arguments["shift"], 1e-2)
        return 0.5 * ((said - v) ** 2).sum()

    for i in np.ndindex(first.shape):
        step = np.zeros_like(first)
        step[i] = 1e-6
        slope = (loss(first + step) - loss(first - step)) / 2e-6
        np.testing.assert_allclose(first[i] - state.weights[0][0, 0][i], slope, rtol=1e-3, atol=1e-4)


def test_values_must_be_as_wide_as_keys(rng):
    arguments = TestTttLinear.case.arguments(rng)
    with pytest.raises(ValueError, match="v: got head_dim 7, expected 8"):
        ttt_linear(**{**arguments, "v": arguments["v"][..., :7]})
    with pytest.raises(ValueError, match="gain: got shape"):
        ttt_linear(**{**arguments, "gain": arguments["gain"][:, 1:]})
    with pytest.raises(ValueError, match="eps: got -1"):
        ttt_linear(**{**arguments, "eps": -1.0})


def test_a_call_may_end_in_a_mini_batch(rng):
    """The gradients of its other rows are taken at the weights with which it began."""
    arguments = TestTttLinear.case.arguments(rng, length=20)
    _, last = ttt_linear(**arguments, chunk_size=20)
    _, state = ttt_linear(**TestTttLinear.case.rows(arguments, slice(0, 7)), chunk_size=20)
    assert state.position == 7
    np.testing.assert_array_equal(state.frozen.reshape(2, 9, 8), arguments["weights"])
    rest = TestTttLinear.case.rows(arguments, slice(7, None))
    del rest["weights"]
    _, after = ttt_linear(**rest, chunk_size=20, initial_state=state)
    np.testing.assert_allclose(after.live, last.live, atol=1e-5)
    assert after.position == 0
