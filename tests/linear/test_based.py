"""`based`."""

import numpy as np
import pytest

import longattn as la
from longattn.linear import based
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestBased(Recurrence):
    """Positive logits, whose terms do not cancel."""

    case = Case(
        based,
        reference.based,
        keys=lambda x: np.abs(x) + 0.1,
        extra=1,
        features=lambda dim: 1 + dim + dim * (dim + 1) // 2,
    )


class TestFirstOrder(Recurrence):
    case = Case(
        based,
        reference.based,
        features=lambda dim: 1 + dim,
        options={"order": 1, "normalize": False, "scale": 0.3},
    )


def weights(q, k, scale):
    s = scale * (q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2))
    return np.tril(1 + s + s**2 / 2)


def test_it_is_the_lower_triangle(rng):
    q, k, v = (rng.standard_normal((1, 2, 130, 16)).astype(np.float32) for _ in range(3))
    w = weights(q, k, 0.25)
    out, _ = based(q, k, v)
    np.testing.assert_allclose(out, w @ v / (w.sum(-1, keepdims=True) + 1e-6), atol=2e-5)
    out, _ = based(q, k, v, normalize=False)
    np.testing.assert_allclose(out, w @ v, rtol=1e-4, atol=2e-4)


def test_small_logits_give_softmax_attention(rng):
    q, k, v = (rng.standard_normal((1, 2, 100, 16)).astype(np.float32) for _ in range(3))
    out, _ = based(0.02 * q, k, v)
    # Logits stay below 0.1, so that a weight lacks less than `0.1 ** 3 / 6`.
    np.testing.assert_allclose(out, la.attention(0.02 * q, k, v, causal=True), atol=2e-4)


def test_equal_values(rng):
    q, k, _ = (rng.standard_normal((1, 2, 100, 8)).astype(np.float32) for _ in range(3))
    out, _ = based(q, k, np.full((1, 2, 100, 3), 1.5, np.float32), eps=0.0)
    np.testing.assert_allclose(out, 1.5, rtol=1e-5)


def test_options_that_do_not_fit(rng):
    q = rng.standard_normal((1, 2, 10, 8)).astype(np.float32)
    with pytest.raises(ValueError, match="order: got 3"):
        based(q, q, q, order=3)
    with pytest.raises(ValueError, match="scale: got -1"):
        based(q, q, q, scale=-1.0)
