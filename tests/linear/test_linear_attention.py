"""`linear_attention`."""

import numpy as np
import pytest

from longattn.linear import FeatureMap, lightning_attention, linear_attention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestLinearAttention(Recurrence):
    case = Case(
        linear_attention,
        reference.linear_attention,
        keys=lambda x: np.abs(x) + 0.1,
        extra=1,
    )


class TestWithoutDivisor(Recurrence):
    case = Case(linear_attention, reference.linear_attention, options={"normalize": False})


def test_it_is_the_lower_triangle(rng):
    arguments = TestLinearAttention.case.arguments(rng, length=150)
    q, k, v = (x.astype(np.float64) for x in arguments.values())
    weights = np.tril(q @ k.swapaxes(-1, -2))
    expected = weights @ v / (weights.sum(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(linear_attention(**arguments)[0], expected, atol=1e-5)


def test_a_divisor_of_0_gives_0(rng):
    arguments = TestLinearAttention.case.arguments(rng, length=5)
    arguments["k"] = np.zeros_like(arguments["k"])
    for rows in (5, 1):
        out, state = linear_attention(**{n: x[:, :, :rows] for n, x in arguments.items()}, eps=0.0)
        assert not out.any() and not state.any()


def test_slopes_of_0_are_the_form_without_divisor(rng):
    arguments = TestLinearAttention.case.arguments(rng, length=150)
    out, state = linear_attention(**arguments, normalize=False)
    expected, last = lightning_attention(**arguments, slopes=np.zeros(2, np.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5)


def test_a_million_steps_neither_overflow_nor_drift(rng):
    """Positive terms add up, rounded once a chunk. The block is the same each time: errors may be of one sign."""
    q, k, v = (np.abs(rng.standard_normal((1, 1, 1000, 4))).astype(np.float32) for _ in range(3))
    _, block = linear_attention(q, k, v)
    state = None
    for _ in range(1000):
        out, state = linear_attention(q, k, v, initial_state=state, out_state=state)
    np.testing.assert_allclose(state, 1000 * block.astype(np.float64), rtol=21_000 * 2.0**-24)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("kind", ["relu", "elu1", "exp", "silu", "softmax", "softmax_pair"])
def test_maps(rng, isa, kind, length):
    """Maps that are fused give what features that come mapped give."""
    q, k, v = (rng.standard_normal((2, 2, length, 12)).astype(np.float32) for _ in range(3))
    mapped = [reference.features(x, kind).astype(np.float32) for x in (q, k)]
    for normalize in (True, False):
        found = linear_attention(q, k, v, feature_map=kind, normalize=normalize, eps=0.1)
        expected = linear_attention(*mapped, v, normalize=normalize, eps=0.1)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_maps_of_heads_with_projections_norms_and_offsets(rng, isa):
    q, k, v = (rng.standard_normal((1, 4, 70, 12)).astype(np.float32) for _ in range(3))
    phi = FeatureMap(kind="relu", norm="standard", projection=rng.standard_normal((4, 20, 12)), offset=0.1, scale=2.0)
    mapped = [reference.features(x, phi).astype(np.float32) for x in (q, k)]
    state = np.abs(rng.standard_normal((1, 4, 20, 13))).astype(np.float32)
    found = linear_attention(q, k, v, feature_map=phi, initial_state=state)
    expected = linear_attention(*mapped, v, initial_state=state)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_maps_that_do_not_fit(rng):
    q = rng.standard_normal((1, 2, 10, 8)).astype(np.float32)
    with pytest.raises(ValueError, match="feature_map: got 'cosine'"):
        linear_attention(q, q, q, feature_map="cosine")
    with pytest.raises(TypeError, match="feature_map: got int"):
        linear_attention(q, q, q, feature_map=3)
    with pytest.raises(ValueError, match="projection: got shape"):
        linear_attention(q, q, q, feature_map=FeatureMap(projection=np.ones((4, 9))))
