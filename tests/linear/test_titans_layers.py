"""Titans' memory as context, as a gate and as a layer."""

import numpy as np
import pytest

from longattn import attention, linear
from longattn.linear import (
    TitansWeights,
    titans_memory_as_context,
    titans_memory_as_gate,
    titans_memory_as_layer,
    titans_neural_memory,
)
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32

CHANNELS, HEADS, PERSISTENT = 12, 2, 3
CALLS = {
    "titans_memory_as_context": {"segment": 16},
    "titans_memory_as_gate": {"window": 7},
    "titans_memory_as_layer": {"window": 7},
}


def arguments(rng, call, *, batch=2, length=40, dtype=F32, persistent=PERSISTENT):
    def w(inputs, outputs):
        return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(F32)

    weights = TitansWeights(
        memory=(w(CHANNELS, 8), w(CHANNELS, 8), w(CHANNELS, CHANNELS)),
        attention=(w(CHANNELS, 10), w(CHANNELS, 10), w(CHANNELS, 8), w(8, CHANNELS)),
        persistent=rng.standard_normal((persistent, CHANNELS)).astype(F32) if persistent else None,
    )
    rows = length + persistent * (call == "titans_memory_as_layer")
    gates = rng.random((3, batch, HEADS, rows)).astype(F32)
    return {
        "x": rng.standard_normal((batch, length, CHANNELS)).astype(dtype),
        "theta": gates[0],
        "weights": weights,
        "heads": HEADS,
        "alpha": 0.2 * gates[1],
        "eta": 0.6 * gates[2],
        "memory_weights": [0.5 * rng.standard_normal((HEADS, 4, 6)).astype(F32)],
        **CALLS[call],
    }


def check(call, given, **options):
    out, state = getattr(linear, call)(**given, **options)
    expected, last = getattr(reference, call)(**given, **options)
    assert out.dtype == given["x"].dtype and out.shape == expected.shape
    rtol = {2: 1e-2, 4: 2e-4}[out.dtype.itemsize]
    size = np.abs(expected).max()
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(state.weights[0], last[0], rtol=2e-4, atol=2e-4)
    return out, state


@pytest.mark.parametrize("length", [1, 16, 40])
@pytest.mark.parametrize("call", CALLS)
def test_reference(rng, isa, call, length):
    check(call, arguments(rng, call, length=length))


@pytest.mark.parametrize("call", CALLS)
def test_without_persistent_tokens_and_gates(rng, call):
    given = arguments(rng, call, persistent=0)
    check(call, {**given, "theta": 0.3, "alpha": None, "eta": None, "memory_weights": None})
    # Steps that keys as they come let converge.
    check(call, {**given, "theta": 0.01 * given["theta"]}, activation="gelu", normalize_qk=False, loss_scale=0.25)


@pytest.mark.parametrize("update", ["per_token", "per_chunk"])
@pytest.mark.parametrize("call", CALLS)
def test_updates(rng, call, update):
    given = arguments(rng, call, length=48)
    if call == "titans_memory_as_layer":
        given = {**given, "x": given["x"][:, :45], "theta": given["theta"][..., :48]}
        given |= {name: given[name][..., :48] for name in ("alpha", "eta")}
    check(call, given, update=update)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_dtypes(rng, call, dtype):
    check(call, arguments(rng, call, dtype=dtype))


@pytest.mark.parametrize("options", [{"gate": "silu"}, {"eps": 0.1}, {"norms": None}])
def test_gates(rng, options):
    norms = rng.standard_normal((2, CHANNELS)).astype(F32)
    check(
        "titans_memory_as_gate", arguments(rng, "titans_memory_as_gate"), **{"norms": (norms[0], norms[1]), **options}
    )


def test_segments_hand_over(rng):
    given = arguments(rng, "titans_memory_as_context", length=40)
    out, last = titans_memory_as_context(**given)
    halves, state = [], None
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):
        own = {name: given[name][..., part] for name in ("theta", "alpha", "eta")}
        first = given["memory_weights"] if state is None else None
        y, state = titans_memory_as_context(
            **{**given, **own, "x": given["x"][:, part], "memory_weights": first, "initial_state": state}
        )
        halves.append(y)
    np.testing.assert_allclose(np.concatenate(halves, axis=1), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.live, last.live, rtol=1e-5, atol=1e-6)


def test_segments_see_none_after_them(rng):
    given = arguments(rng, "titans_memory_as_context")
    out, _ = titans_memory_as_context(**given)
    changed = given["x"].copy()
    changed[:, 32:] += 1
    after, _ = titans_memory_as_context(**{**given, "x": changed})
    np.testing.assert_array_equal(after[:, :32], out[:, :32])


@pytest.mark.parametrize("call", ["titans_memory_as_gate", "titans_memory_as_layer"])
def test_rows_see_none_after_them(rng, call):
    given = arguments(rng, call)
    out, _ = getattr(linear, call)(**given)
    changed = given["x"].copy()
    changed[:, 21:] += 1
    after, _ = getattr(linear, call)(**{**given, "x": changed})
    np.testing.assert_allclose(after[:, :21], out[:, :21], rtol=1e-5, atol=1e-6)


def test_a_memory_of_0_gates_by_a_half(rng):
    """What it says is 0, whose sigmoid is 1/2."""
    given = {**arguments(rng, "titans_memory_as_gate", persistent=0), "theta": 0.0, "memory_weights": None}
    out, _ = titans_memory_as_gate(**given, eps=1e-12)
    x, weights = given["x"], given["weights"]
    q, k, v = ((x @ w).reshape(2, 40, HEADS, -1).swapaxes(1, 2).copy() for w in weights.attention[:3])
    y = attention(q, k, v, causal=True, window=(6, 0)).swapaxes(1, 2).reshape(2, 40, -1) @ weights.attention[3]
    np.testing.assert_allclose(out, 0.5 * y / np.sqrt((y**2).mean(-1, keepdims=True)), rtol=1e-4, atol=1e-5)


def test_a_window_of_1_reads_the_memory_alone(rng):
    given = {**arguments(rng, "titans_memory_as_layer", persistent=0), "window": 1}
    out, _ = titans_memory_as_layer(**given)
    x, weights = given["x"], given["weights"]
    q, k, v = ((x @ w).reshape(2, 40, HEADS, -1).swapaxes(1, 2).copy() for w in weights.memory)
    said, _ = titans_neural_memory(
        q, k, v, given["theta"], alpha=given["alpha"], eta=given["eta"], weights=given["memory_weights"]
    )
    said = said.swapaxes(1, 2).reshape(2, 40, -1)
    np.testing.assert_allclose(out, said @ weights.attention[2] @ weights.attention[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_states_of_layers_are_their_own(rng, call):
    given = arguments(rng, call)
    _, state = getattr(linear, call)(**given)
    with pytest.raises(TypeError, match="out_state: got one, expected none"):
        getattr(linear, call)(**given, out_state=state)


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments(rng, call):
    given = arguments(rng, call)
    good = given["weights"]

    def bad(match, error=ValueError, **changes):
        with pytest.raises(error, match=match):
            getattr(linear, call)(**{**given, **changes})

    def weights(**changes):
        parts = {"memory": good.memory, "attention": good.attention, "persistent": good.persistent}
        return TitansWeights(**{**parts, **changes})

    bad("x: got shape", x=given["x"][0])
    bad("x: got dtype", TypeError, x=given["x"].astype(int))
    bad("heads: got 5", heads=5)
    bad("heads: got 0", heads=0)
    bad("weights: got dict", TypeError, weights={})
    bad("memory: got list", TypeError, weights=weights(memory=[]))
    bad(r"memory\[1\]: got shape", weights=weights(memory=(good.memory[0], good.memory[2], good.memory[2])))
    bad(r"memory\[2\]: got shape", weights=weights(memory=(good.memory[0],) * 3))
    bad(r"attention\[3\]: got shape", weights=weights(attention=(*good.attention[:3], good.attention[0])))
    bad("persistent: got shape", weights=weights(persistent=good.persistent[:, 1:]))
    bad("theta: got shape", theta=given["theta"][..., 1:])
    bad("alpha: got a number outside", alpha=given["alpha"] + 2)
    name = next(iter(CALLS[call]))
    bad(f"{name}: got 0", **{name: 0})
    if call == "titans_memory_as_gate":
        bad("gate: got 'relu'", gate="relu")
        bad("norms: got ndarray", TypeError, norms=np.ones(3))
        bad("eps: got -1", eps=-1)
