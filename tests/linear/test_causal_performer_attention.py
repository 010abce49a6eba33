"""`causal_performer_attention`."""

import numpy as np
import pytest

from longattn.linear import causal_performer_attention, performer_attention, random_directions
from longattn.reference import linear as reference
from recurrences import Case, Recurrence

FEATURES = 24


def directed(function, make=lambda w: w):
    """With directions for the head_dim at hand."""

    def call(q, k, v, **options):
        return function(q, k, v, make(random_directions(FEATURES, q.shape[-1], seed=3)), **options)

    return call


class TestCausalPerformerAttention(Recurrence):
    case = Case(
        directed(causal_performer_attention),
        directed(reference.causal_performer_attention),
        extra=1,
        features=lambda dim: FEATURES,
        signed=True,
        options={"shift": 1.0},
    )


class TestRelu(Recurrence):
    """Directions and keys are positive, so that features are no differences."""

    case = Case(
        directed(causal_performer_attention, np.abs),
        directed(reference.causal_performer_attention, np.abs),
        keys=lambda x: np.abs(x) + 0.1,
        extra=1,
        features=lambda dim: FEATURES,
        options={"kernel": "relu"},
    )


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_the_last_row_sees_all_keys(rng, isa, kernel):
    q, k, v = (rng.standard_normal((1, 2, 90, 16)).astype(np.float32) for _ in range(3))
    w = random_directions(64, 16, seed=1)
    out, _ = causal_performer_attention(q, k, v, w, kernel=kernel)
    expected = performer_attention(q[:, :, -1:], k, v, w, kernel=kernel)
    np.testing.assert_allclose(out[:, :, -1:], expected, atol=2e-5)


def test_a_shift_cancels(rng):
    q, k, v = (rng.standard_normal((1, 2, 90, 16)).astype(np.float32) for _ in range(3))
    w = random_directions(64, 16, seed=1)
    out, _ = causal_performer_attention(q, k, v, w)
    np.testing.assert_allclose(causal_performer_attention(q, k, v, w, shift=20.0)[0], out, atol=2e-5)


def test_equal_values(rng):
    q, k, _ = (rng.standard_normal((1, 2, 100, 8)).astype(np.float32) for _ in range(3))
    w = random_directions(32, 8, seed=1)
    out, _ = causal_performer_attention(q, k, np.full((1, 2, 100, 3), 1.5, np.float32), w)
    np.testing.assert_allclose(out, 1.5, rtol=1e-5)


def test_options_that_do_not_fit(rng):
    q = rng.standard_normal((1, 2, 10, 8)).astype(np.float32)
    w = random_directions(32, 8, seed=1)
    with pytest.raises(ValueError, match="kernel: got 'cosine'"):
        causal_performer_attention(q, q, q, w, kernel="cosine")
    with pytest.raises(ValueError, match="scale: got 0"):
        causal_performer_attention(q, q, q, w, scale=0.0)
    with pytest.raises(ValueError, match="projection: got shape"):
        causal_performer_attention(q, q, q, w[:, :5])
