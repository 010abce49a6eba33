"""`miras_memory`."""

import numpy as np
import pytest

from longattn.linear import miras_memory, titans_neural_memory
from longattn.reference import linear as reference
from memories import Case, Memory

RATES = {"eta": lambda u: 0.3 * u, "alpha": lambda u: 1 - 0.2 * u}


def started(**options):
    """Weights to begin with, so that norms are not 0."""

    def make(rng, heads, dim, value_dim):
        w = (rng.standard_normal((heads, dim, value_dim)) / np.sqrt(dim)).astype(np.float32)
        return {"weights": [w], **options}

    return make


class TestMoneta(Memory):
    case = Case(miras_memory, reference.miras_memory, RATES, started(variant="moneta", steepness=3.0))


class TestMonetaByChunks(Memory):
    case = Case(miras_memory, reference.miras_memory, RATES, started(variant="moneta", read="chunk", loss_exponent=2.0))


class TestYaad(Memory):
    """The threshold is passed by none of the errors that rounding moves across it: the loss is continuous."""

    case = Case(
        miras_memory,
        reference.miras_memory,
        {**RATES, "delta": lambda u: 1 + 3 * u},
        started(variant="yaad", huber="norm"),
    )


class TestYaadEach(Memory):
    case = Case(
        miras_memory,
        reference.miras_memory,
        {**RATES, "delta": lambda u: u},
        started(variant="yaad", huber="each"),
    )


class TestMemora(Memory):
    case = Case(miras_memory, reference.miras_memory, RATES, started(variant="memora", total=2.0))


class TestMemoraByChunks(Memory):
    case = Case(miras_memory, reference.miras_memory, RATES, started(variant="memora", read="chunk"))


def network(rng, heads, dim, value_dim):
    hidden = 2 * dim
    first = rng.standard_normal((dim, hidden)) / np.sqrt(dim)
    second = rng.standard_normal((heads, hidden, dim)) / np.sqrt(hidden)
    gain = 1 + 0.2 * rng.standard_normal((heads, dim))
    around = (gain.astype(np.float32), np.full(dim, 0.1, np.float32), 1e-2)
    weights = [first.astype(np.float32), second.astype(np.float32)]
    return {"weights": weights, "residual": around, "variant": "yaad", "huber": "norm"}


class TestNetwork(Memory):
    """Two layers inside `x + norm(..)`."""

    case = Case(
        miras_memory,
        reference.miras_memory,
        {"eta": lambda u: 0.1 * u, "alpha": lambda u: 1 - 0.1 * u, "delta": lambda u: 1 + 3 * u},
        network,
        square=True,
    )


def test_signs(rng, isa):
    """Far from the threshold on either side."""
    case = TestYaad.case
    arguments = case.arguments(rng, length=40)
    arguments["delta"] = np.where(rng.random((1, 2, 40)) < 0.5, 0.01, 100).astype(np.float32)
    arguments["huber"] = "signs"
    case.check(arguments)


def test_without_a_threshold_it_is_the_memory_of_titans(rng):
    arguments = TestYaad.case.arguments(rng, length=100)
    q, k, v, eta, alpha, _ = (arguments[name] for name in ("q", "k", "v", "eta", "alpha", "delta"))
    out, state = miras_memory(q, k, v, eta, alpha=alpha, delta=1e30, variant="yaad")
    expected, last = titans_neural_memory(q, k, v, eta, alpha=1 - alpha)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state.live, last.live, atol=1e-5)


def test_exponents_of_2_are_the_memory_of_titans(rng):
    """Where errors are so large that their smooth sign is 1."""
    arguments = TestYaad.case.arguments(rng, length=60)
    q, k, v, eta, alpha = (arguments[name] for name in ("q", "k", "v", "eta", "alpha"))
    out, _ = miras_memory(
        q, k, v, eta / 4, alpha=alpha, variant="moneta", loss_exponent=2.0, norm_exponent=2.0, steepness=1e4
    )
    expected, _ = titans_neural_memory(q, k, v, eta / 2, alpha=1 - alpha)
    np.testing.assert_allclose(out, expected, atol=3e-3)


def test_an_exponent_of_1_has_steps_of_one_size(rng):
    k = np.eye(1, 4, dtype=np.float32)[None]
    v = np.array([[[3.0, -0.2, 50.0]]], np.float32)
    _, state = miras_memory(
        k, k, v, 0.5, variant="moneta", loss_exponent=1.0, norm_exponent=2.0, steepness=1e3, normalize_qk=False
    )
    np.testing.assert_allclose(state.weights[0][0, 0, 0], [0.5, -0.5, 0.5], atol=1e-6)


def test_memora_by_its_weights(rng):
    """`softmax(alpha log W - eta k e^T)`, a token per chunk."""
    arguments = TestMemora.case.arguments(rng, heads=(1, 1), length=30)
    q, k, v, eta, alpha, w = (arguments[name] for name in ("q", "k", "v", "eta", "alpha", "weights"))
    out, state = miras_memory(
        q, k, v, eta, alpha=alpha, weights=w, variant="memora", total=2.0, chunk_size=1, normalize_qk=False
    )
    weights = reference.features(w[0][0].T, "softmax").T
    for t in range(30):
        error = k[0, 0, t] @ (2 * weights) - v[0, 0, t]
        logits = alpha[0, 0, t] * np.log(weights) - eta[0, 0, t] * np.outer(k[0, 0, t], error)
        weights = reference.features(logits.T, "softmax").T
        np.testing.assert_allclose(2 * weights.sum(axis=0), 2.0, rtol=1e-12)
        np.testing.assert_allclose(out[0, 0, t], q[0, 0, t] @ (2 * weights), atol=1e-5)
    read = reference.features(state.weights[0][0, 0].T, "softmax").T
    np.testing.assert_allclose(read, weights, atol=1e-5)


def test_options_that_do_not_fit(rng):
    arguments = TestMoneta.case.arguments(rng, length=5)
    arguments.pop("variant")

    def bad(match, error=ValueError, variant="moneta", **changes):
        with pytest.raises(error, match=match):
            miras_memory(**arguments, variant=variant, **changes)

    bad("variant: got 'titans'", variant="titans")
    bad("huber: got 'l3'", huber="l3")
    bad("read: got 'row'", read="row")
    bad("activation: got 'relu'", activation="relu")
    bad("delta: got one", delta=1.0)
    bad("delta: got none", variant="yaad")
    bad("loss_exponent: got 0.5", loss_exponent=0.5)
    bad("norm_exponent: got 1.5", norm_exponent=1.5)
    bad("total: got 0", variant="memora", total=0.0)
    bad("residual: got list", TypeError, residual=[1])
