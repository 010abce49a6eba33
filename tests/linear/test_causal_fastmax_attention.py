"""`causal_fastmax_attention`."""

from dataclasses import dataclass

import numpy as np
import pytest

from longattn.linear import causal_fastmax_attention, fastmax_attention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


@dataclass(frozen=True)
class Fastmax(Case):
    """States are those of rows, so that divisors are sums of weights."""

    def state(self, rng, arguments, sequences=None):
        q, k, v = (arguments[name] for name in "qkv")
        given = self.arguments(
            rng,
            batch=sequences or v.shape[0],
            heads=(q.shape[1], k.shape[1], v.shape[1]),
            length=9,
            dim=q.shape[-1],
            value_dim=v.shape[-1],
        )
        return self.reference(**given)[1].astype(np.float32)

    def sizes(self, arguments, state, **options):
        """`1 + |s| + s^2 / 2`, what a weight is the sum of, is up to 6 times the weight `1 + s + s^2 / 2`."""
        plain = {name: x for name, x in arguments.items() if name not in "qkv"}
        q, k, v = (np.abs(np.asarray(arguments[n], np.float64)) for n in "qkv")
        _, held = self.reference(q, k, v, **plain)
        first = np.zeros(1) if state is None else np.abs(state)
        largest = max(v.max(initial=0), first.max())
        shape = (len(v), max(q.shape[1], v.shape[1]), *v.shape[2:])
        return np.full(shape, 6 * largest), 6 * np.abs(held).max(initial=0) + first


class TestStandardised(Recurrence):
    case = Fastmax(
        causal_fastmax_attention,
        reference.causal_fastmax_attention,
        extra=1,
        signed=True,
        features=lambda dim: 1 + dim + dim * (dim + 1) // 2,
    )


class TestFirstOrder(Recurrence):
    case = Case(
        causal_fastmax_attention,
        reference.causal_fastmax_attention,
        keys=lambda x: np.abs(x) + 0.1,
        extra=1,
        features=lambda dim: 1 + dim,
        options={"qk_norm": "none", "order": 1},
    )


@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 1, "temperature": 40.0},
        {"coefficients": (2.0, 0.5, 0.3), "temperature": 1.5},
        {"qk_norm": "none"},
        {"qk_norm": "none", "temperature": 0.8},
    ],
    ids=str,
)
def test_its_last_row_is_that_over_all_keys(rng, isa, options, length):
    q, k, v = (
        rng.standard_normal((2, heads, length, dim)).astype(np.float32) for heads, dim in ((4, 8), (2, 8), (2, 5))
    )
    out, _ = causal_fastmax_attention(q, k, v, **options)
    for end in {1, (length + 1) // 2, length}:
        expected = fastmax_attention(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], **options)
        np.testing.assert_allclose(out[:, :, end - 1 : end], expected, rtol=1e-4, atol=5e-5)


def test_it_is_the_lower_triangle(rng):
    q, k, v = (rng.standard_normal((1, 2, 130, 16)).astype(np.float32) for _ in range(3))
    a, b = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (q.astype(np.float64), k))
    s = a @ b.swapaxes(-1, -2)
    w = np.tril(1 + s + s**2 / 2)
    out, _ = causal_fastmax_attention(q, k, v)
    np.testing.assert_allclose(out, w @ v / w.sum(-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 48])
def test_queries_of_zeros_give_means(rng, chunk_size):
    k, v = (rng.standard_normal((1, 2, 100, 8)).astype(np.float32) for _ in range(2))
    out, _ = causal_fastmax_attention(np.zeros_like(k), k, v, chunk_size=chunk_size)
    means = np.cumsum(v.astype(np.float64), axis=2) / np.arange(1, 101)[:, None]
    np.testing.assert_allclose(out, means, atol=1e-5)


def test_options_that_do_not_fit(rng):
    q = rng.standard_normal((1, 2, 10, 8)).astype(np.float32)

    def bad(match, **options):
        with pytest.raises(ValueError, match=match):
            causal_fastmax_attention(q, q, q, **options)

    bad("order: got 3", order=3)
    bad("coefficients: got", coefficients=(1.0, 2.0))
    bad("coefficients: got nan", coefficients=(1.0, np.nan, 1.0))
    bad("qk_norm: got 'maxnorm'", qk_norm="maxnorm")
    bad("temperature: got 0", temperature=0)
    bad("initial_state: got shape", initial_state=np.zeros((1, 2, 8, 8), np.float32))
