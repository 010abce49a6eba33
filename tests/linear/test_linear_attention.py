"""`linear_attention`."""

import numpy as np

from longattn.linear import lightning_attention, linear_attention
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
