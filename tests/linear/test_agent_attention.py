"""`agent_attention`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.linear import agent_attention, agent_biases
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.agent_attention


def compare(q, k, v, *, extra=0.0, offset=0.0, **options):
    out = agent_attention(q, k, v, **options)
    expected = oracle(q, k, v, **options)
    assert out.dtype == q.dtype and out.shape == expected.shape
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    one = tolerances.attention(
        *wide, scale=max(abs(options.get(n) or 0.25) for n in ("scale", "query_scale")), offset=offset
    )
    both = tolerances.Tolerance(3 * one.atol + 8 * tolerances.U * extra, 3 * one.rtol, 0.0)
    tolerances.stored(both, q.dtype).check(out, expected)
    return out


@pytest.mark.parametrize("bins", [(2, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_reference(rng, isa, bins, prefix):
    """Bins that overlap, and query heads that share keys."""
    q, k, v = qkv(rng, batch=2, rows=prefix + 8 * 9, keys=prefix + 8 * 9, dim=20, value_dim=37)
    compare(q, k, v, agents=bins, size=(8, 9), prefix_tokens=prefix)


@pytest.mark.parametrize("length", [1, 5, 300])
def test_sequences(rng, length):
    q, k, v = qkv(rng, rows=length, keys=40)
    compare(q, k, v, agents=min(length, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = qkv(rng, rows=40, keys=90, q_dtype=dtype)
    compare(q, k, v, agents=8)
    compare(q, k, v, agents=normal(rng, (1, 4, 5, 16), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    q, k, v = qkv(rng, rows=40, keys=90, layout=layout)
    out = compare(q, k, v, agents=8)
    given = np.empty_like(out)
    assert agent_attention(q, k, v, agents=8, out=given) is given
    np.testing.assert_array_equal(given, out)


def test_threads(rng, threads):
    q, k, v = qkv(rng, batch=2, rows=700, keys=700)
    out = agent_attention(q, k, v, agents=9)
    np.testing.assert_array_equal(agent_attention(q[1], k[1], v[1], agents=9), out[1])


def test_biases_and_shortcut(rng):
    q, k, v = qkv(rng, heads=2, rows=36, keys=36)
    first, rest = (
        agent_biases(
            normal(rng, (2, 4, 7, 7)),
            normal(rng, (2, 4, 5)),
            normal(rng, (2, 4, 7)),
            (5, 7),
            first=normal(rng, (2, 4, 1)),
        )
        for _ in "ab"
    )
    options = {"agent_bias": first, "query_bias": rest.swapaxes(1, 2), "shortcut": 0.075, "query_scale": 0.6}
    compare(q, k, v, agents=(2, 2), size=(5, 7), prefix_tokens=1, offset=12, extra=np.abs(v).max(), **options)


def test_bias_of_a_map(rng):
    """Enlarged as torch does, without corners aligned."""
    torch = pytest.importorskip("torch")
    block, rows, columns = normal(rng, (2, 4, 7, 7)), normal(rng, (2, 4, 12, 1)), normal(rng, (2, 4, 1, 5))
    found = agent_biases(block, rows, columns, (12, 5))
    wide = torch.nn.functional.interpolate(torch.from_numpy(block), size=(12, 5), mode="bilinear").numpy()
    np.testing.assert_allclose(found, (wide + rows + columns).reshape(2, 4, 60), rtol=1e-5, atol=1e-5)


def test_convolution(rng):
    q, k, v = qkv(rng, batch=2, heads=2, rows=36, keys=36)
    weight, bias = normal(rng, (32, 1, 3, 3)), normal(rng, (32,))
    most = 9 * np.abs(v).max() * np.abs(weight).max() + 4
    options = {"dwc_weight": weight, "dwc_bias": bias, "size": (5, 7), "prefix_tokens": 1}
    compare(q, k, v, agents=(2, 2), extra=most, **options)


def test_bad_input(rng):
    q, k, v = qkv(rng, rows=37)
    for options, match in (
        ({}, "size: got None"),
        ({"size": (6, 6)}, "size: got 6 x 6"),
        ({"size": (1, 37)}, "agents: got 7 x 7 bins"),
        ({"agents": 0}, "agents: got 0"),
        ({"agents": np.ones((1, 4, 0, 16), np.float32)}, "agents: got shape"),
        ({"agents": 3, "shortcut": 1.0}, "shortcut: got 1.0"),
        ({"agents": 3, "agent_bias": np.ones(4, np.float32)}, "agent_bias: got shape"),
    ):
        with pytest.raises(ValueError, match=match):
            agent_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="rows: got shape"):
        agent_biases(normal(rng, (1, 2, 3, 3)), normal(rng, (1, 2, 4)), normal(rng, (1, 2, 5)), (5, 5))


# Identities


def test_equal_values(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    v[:] = v[:, :, :1]
    out = agent_attention(q, k, v, agents=5)
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :, :1], out.shape), rtol=1e-5, atol=1e-6)


def test_one_agent(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    agent = normal(rng, (1, 4, 1, 16))
    out = agent_attention(q, k, v, agents=agent)
    np.testing.assert_allclose(out, np.broadcast_to(la.attention(agent, k, v), out.shape), rtol=1e-5, atol=1e-6)


def test_generalised_linear_attention(rng):
    """Features of queries are their weights of agents, features of keys the agents' weights of keys."""
    q, k, v = qkv(rng, rows=20, keys=30)
    agents = normal(rng, (1, 4, 5, 16))
    eye = np.broadcast_to(np.eye(5, dtype=np.float32), (1, 4, 5, 5))
    of_queries = la.attention(q, agents, eye)
    of_keys = la.attention(agents, k, np.broadcast_to(np.eye(30, dtype=np.float32), (1, 2, 30, 30)))
    expected = of_queries.astype(np.float64) @ of_keys @ np.repeat(v, 2, axis=1)
    np.testing.assert_allclose(agent_attention(q, k, v, agents=agents), expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_agents(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    agents, bias = normal(rng, (1, 4, 6, 16)), normal(rng, (4, 6, 30))
    order = rng.permutation(6)
    one = agent_attention(q, k, v, agents=agents, agent_bias=bias)
    two = agent_attention(q, k, v, agents=agents[:, :, order], agent_bias=bias[:, order])
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
