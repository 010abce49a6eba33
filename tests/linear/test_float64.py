"""Recurrences of float64 arrays: the oracle's numbers, and what float32 is held to over a million rows."""

import numpy as np
import pytest

from longattn import linear
from longattn.reference import linear as reference
from tolerances import U

HEADS, DIM, VALUE_DIM = 2, 4, 3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(rng, name, length, *, batch=1):
    """Arguments of a recurrence by name, float64."""
    q, k = (unit(rng.standard_normal((batch, HEADS, length, DIM))) for _ in range(2))
    found = {"q": q, "k": k, "v": rng.standard_normal((batch, HEADS, length, VALUE_DIM))}
    gate, beta = -0.1 * rng.random((batch, HEADS, length, DIM)), rng.random((batch, HEADS, length))
    more = {
        "linear_attention": {"q": np.abs(q), "k": np.abs(k)},
        "lightning_attention": {"slopes": np.array([0.001, 0.5])},
        "retention": {"gamma": np.array([0.999, 0.5])},
        "gated_linear_attention": {"g": gate},
        "delta_rule_attention": {"beta": beta},
        "gated_delta_rule": {"g": gate[..., 0], "beta": beta},
        "kimi_delta_attention": {"g": gate, "beta": beta},
        "rwkv6": {"g": gate, "u": rng.standard_normal((HEADS, DIM))},
        "rwkv7": {"g": gate, "a": -k, "b": k * beta[..., None]},
        "hgrn2": {"g": gate},
    }
    found |= more[name]
    if name == "hgrn2":
        del found["k"]
    return found


NAMES = (
    "linear_attention", "lightning_attention", "retention", "gated_linear_attention", "delta_rule_attention",
    "gated_delta_rule", "kimi_delta_attention", "rwkv6", "rwkv7", "hgrn2",
)  # fmt: skip


def cut(found, part):
    heads = ("slopes", "gamma", "u")
    return {n: x if n in heads else np.ascontiguousarray(x[:, :, part]) for n, x in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_reference(rng, isa, name):
    found = rows(rng, name, 60, batch=2)
    out, state = getattr(linear, name)(**found)
    expected, last = getattr(reference, name)(**found)
    assert out.dtype == state.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parts_states_and_outputs(rng, name):
    found = rows(rng, name, 30)
    expected, last = getattr(linear, name)(**found)
    state, outs = None, []
    for part in (slice(0, 1), slice(1, 20), slice(20, 30)):
        out, state = getattr(linear, name)(**cut(found, part), initial_state=state)
        outs.append(out)
    np.testing.assert_array_equal(np.concatenate(outs, axis=2), expected)
    np.testing.assert_array_equal(state, last)
    out, kept = np.empty((*expected.shape[:3], 8))[..., :VALUE_DIM], np.zeros_like(last)
    getattr(linear, name)(**found, initial_state=kept, out_state=kept, out=out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(kept, last)


def test_groups_slots_and_packed_sequences(rng):
    q, g = rng.standard_normal((1, 4, 30, DIM)), -rng.random((1, 2, 30, 5))
    k, v = rng.standard_normal((1, 2, 30, DIM)), rng.standard_normal((1, 2, 30, VALUE_DIM))
    bounds = np.array([0, 7, 7, 30])
    out, state = linear.gated_delta_rule(q, k, v, g[..., 0], -g[..., 1], cu_seqlens=bounds)
    expected, last = reference.gated_delta_rule(q, k, v, g[..., 0], -g[..., 1], cu_seqlens=bounds)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(state, last, rtol=1e-10, atol=1e-11)
    alone, _ = linear.gated_delta_rule(q[0], k[0], v[0], g[0, ..., 0], -g[0, ..., 1], cu_seqlens=bounds)
    np.testing.assert_array_equal(alone, out[0])


@pytest.mark.parametrize("name", ["linear_attention", "lightning_attention", "kimi_delta_attention", "rwkv7"])
def test_a_million_rows_beside_float64(rng, name):
    """Float32 in chunks, and then in steps, beside the same rows in float64: errors of a state's rows do not add up."""
    length = 1_000_000 if name != "linear_attention" else 100_000
    found = rows(rng, name, length)
    narrow = {n: x.astype(np.float32) for n, x in found.items()}
    wide = {n: x.astype(np.float64) for n, x in narrow.items()}
    exact, last = getattr(linear, name)(**wide)
    chunks, steps = slice(0, length - 200), range(length - 200, length)
    out, state = getattr(linear, name)(**cut(narrow, chunks))
    outs = [out[:, :, -100:]]
    for t in steps:
        out, state = getattr(linear, name)(**cut(narrow, slice(t, t + 1)), initial_state=state)
        outs.append(out)
    # A chunk's sums, and those of the states that a row still holds: 1,000 rows at most, but all without decay.
    held = length / 48 if name == "linear_attention" else 1100
    bound = 8 * U * held**0.5 * 30
    for ours, theirs in ((np.concatenate(outs, axis=2), exact[:, :, -300:]), (state, last)):
        assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), 1)


def test_wrong_arguments(rng):
    found = rows(rng, "kimi_delta_attention", 5)

    def bad(name, match, error=ValueError, **changes):
        with pytest.raises(error, match=match):
            getattr(linear, name)(**{**found, **changes})

    bad("kimi_delta_attention", "k: got dtype float32, expected float64", TypeError, k=found["k"].astype(np.float32))
    bad("kimi_delta_attention", "k: got dtype float64", TypeError, q=found["q"].astype(np.float32))
    bad("kimi_delta_attention", "g: got .* expected logarithms", g=-found["g"])
    bad("kimi_delta_attention", "beta: got", beta=found["beta"] * np.inf, normalize_qk=False)
    bad("kimi_delta_attention", "out: got an array that overlaps v", out=found["v"])
    bad("kimi_delta_attention", "out_state: got dtype float32", TypeError, out_state=np.zeros((1, 2, 4, 3), np.float32))
    with pytest.raises(TypeError, match="q: got dtype float64"):
        linear.based(found["q"], found["k"], found["v"])
