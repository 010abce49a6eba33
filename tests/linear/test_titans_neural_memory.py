"""`titans_neural_memory`."""

import numpy as np
import pytest

from longattn.linear import kimi_delta_attention, titans_neural_memory
from longattn.reference import linear as reference
from memories import Case, Memory

RATES = {"theta": lambda u: u, "alpha": lambda u: 0.2 * u, "eta": lambda u: 0.8 * u}


def two_layers(rng, heads, dim, value_dim):
    hidden = dim + 5
    first = rng.standard_normal((heads, dim, hidden)) / np.sqrt(dim)
    return {
        "weights": [first.astype(np.float32), (rng.standard_normal((hidden, value_dim)) / hidden).astype(np.float32)]
    }


class TestLinear(Memory):
    case = Case(titans_neural_memory, reference.titans_neural_memory, RATES)


class TestTwoLayers(Memory):
    case = Case(
        titans_neural_memory,
        reference.titans_neural_memory,
        {name: lambda u, make=make: 0.4 * make(u) for name, make in RATES.items()},
        two_layers,
    )


class TestStepsOfChunks(Memory):
    case = Case(
        titans_neural_memory,
        reference.titans_neural_memory,
        {name: lambda u, make=make: 0.1 * make(u) for name, make in RATES.items()},
        lambda rng, *sizes: {**two_layers(rng, *sizes), "update": "per_chunk"},
    )


@pytest.mark.parametrize("left", ["alpha", "eta", None])
def test_steps_of_chunks_of_a_row(rng, left):
    """They are steps of tokens, which queries read before."""
    arguments = TestLinear.case.arguments(rng, length=50)
    arguments.pop(left, None)
    out, state = titans_neural_memory(**arguments, update="per_chunk", chunk_size=1)
    expected, last = titans_neural_memory(**arguments, read="before", chunk_size=1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state.live, last.live, atol=1e-5)


def test_queries_read_the_chunk_before(rng):
    arguments = TestStepsOfChunks.case.arguments(rng, length=32)
    out, _ = titans_neural_memory(**arguments)
    begun, _ = titans_neural_memory(**{**arguments, "theta": 0 * arguments["theta"]})
    np.testing.assert_allclose(out[:, :, :16], begun[:, :, :16], atol=1e-6)
    assert np.abs(out[:, :, 16:] - begun[:, :, 16:]).max() > 1e-3


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("read", ["after", "before"])
def test_three_layers(rng, isa, activation, read):
    case = TestTwoLayers.case
    arguments = case.arguments(rng, length=40)
    first, second = arguments["weights"]
    middle = (np.eye(13) + 0.1 * rng.standard_normal((2, 13, 13))).astype(np.float32)
    arguments["weights"] = [first, middle, second]
    case.check(arguments, activation=activation, read=read, loss_scale=1.0, normalize_qk=False, scale=0.7)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("left", ["alpha", "eta"])
def test_without_a_gate(rng, isa, left, read):
    case = TestLinear.case
    arguments = case.arguments(rng, length=60)
    del arguments[left]
    case.check(arguments, read=read, chunk_size=20)


def test_before_and_after(rng):
    """What a row reads before its step is what the row before it reads after its own."""
    arguments = TestLinear.case.arguments(rng, length=60)
    arguments["q"] = np.repeat(arguments["q"][:, :, :1], 60, axis=2)
    after, _ = titans_neural_memory(**arguments)
    before, _ = titans_neural_memory(**arguments, read="before")
    np.testing.assert_allclose(before[:, :, 1:], after[:, :, :-1], atol=1e-5)
    assert not before[:, :, 0].any()


def test_a_token_per_chunk_without_momentum_is_a_product_of_matrices(rng):
    """`W_t^T = ((1 - alpha_t) I - theta_t k_t k_t^T) W_(t-1)^T + theta_t k_t v_t^T`: errors are before the decay."""
    k, v = (rng.standard_normal((1, 1, 40, n)).astype(np.float32) for n in (6, 5))
    theta, alpha = rng.random((2, 1, 1, 40)).astype(np.float32)
    theta *= 0.2
    _, state = titans_neural_memory(k, k, v, theta, alpha=alpha, chunk_size=1, normalize_qk=False)
    w = np.zeros((6, 5))
    for key, value, rate, gone in zip(k[0, 0].astype(np.float64), v[0, 0], theta[0, 0], alpha[0, 0], strict=True):
        w = ((1 - gone) * np.eye(6) - rate * np.outer(key, key)) @ w + rate * np.outer(key, value)
    np.testing.assert_allclose(state.weights[0][0, 0], w, rtol=1e-4, atol=1e-4)


def test_reading_changes_nothing(rng):
    arguments = TestTwoLayers.case.arguments(rng, length=40)
    _, state = titans_neural_memory(**arguments)
    _, other = titans_neural_memory(**{**arguments, "q": -3 * arguments["q"]})
    np.testing.assert_array_equal(state.live, other.live)


def test_kimi_delta_attention(rng):
    """A token per chunk, no momentum: the error is of the state that has not decayed."""
    q, k, v = (rng.standard_normal((1, 2, 100, n)).astype(np.float32) for n in (16, 16, 12))
    theta, alpha = (rng.random((1, 2, 100)).astype(np.float32) for _ in range(2))
    alpha *= 0.3
    out, state = titans_neural_memory(q, k, v, theta, alpha=alpha, chunk_size=1)
    kept = 1 - alpha
    g = np.repeat(np.log(kept)[..., None], 16, axis=-1)
    expected, last = kimi_delta_attention(q, k, kept[..., None] * v, g, theta / kept, scale=1.0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(state.weights[0], last, atol=2e-5)


def test_a_rate_of_0_reads_the_first_weights(rng):
    case = TestTwoLayers.case
    arguments = case.arguments(rng, length=40)
    first, second = arguments["weights"]
    out, state = titans_neural_memory(
        arguments["q"], arguments["k"], arguments["v"], 0.0, weights=[first, second], normalize_qk=False
    )
    hidden = arguments["q"].astype(np.float64) @ first
    np.testing.assert_allclose(out, (hidden / (1 + np.exp(-hidden))) @ second, atol=1e-5)
    np.testing.assert_array_equal(state.weights[1][0, 0], second)


def test_weights_that_do_not_fit(rng):
    arguments = TestTwoLayers.case.arguments(rng, length=10)
    first, second = arguments.pop("weights")

    def bad(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            titans_neural_memory(**arguments, **options)

    bad("weights: got ndarray", TypeError, weights=first)
    bad("weights: got matrices", weights=[second])
    bad("weights: got matrices", weights=[first, second[1:]])
    bad(r"weights\[1\]: got shape", weights=[first, second[0]])
    bad(r"weights\[0\]: got shape", weights=[np.stack([first[0]] * 3), second])
    bad("read: got 'now'", read="now")
    bad("update: got 'never'", update="never")
    bad("activation: got 'relu'", activation="relu")
    _, state = titans_neural_memory(**arguments)
    bad("weights: got some beside", weights=[first, second], initial_state=state)
    without = {name: x for name, x in arguments.items() if name != "eta"}
    with pytest.raises(ValueError, match="initial_state: got one with momentum"):
        titans_neural_memory(**without, initial_state=state)
