"""A million rows: recurrences neither overflow nor drift.

What a row does to a state is affine, `S_t = A_t S_(t-1) + U_t`. Pairs of such rows make one, so that float64 goes
through all rows by halving their number, without a loop over them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from longattn import linear
from longattn.reference import linear as reference
from tolerances import SAFETY, U

DIM, VALUE_DIM, MILLION = 4, 3, 1_000_000
#: Rows that float64 goes through at once, a multiple of a memory's chunk.
BLOCK = 48_000
#: How often a state is rounded to which rows are added 48 at a time.
ADDED = MILLION / 48
#: Rows of the calls, which hand states on: a long one, then steps.
CALLS = (249_900, *[1] * 100) * 4


def composed(transition, update):
    """`A` and `U` of all rows `[L, D, D]` and `[L, D, Dv]`, one after another."""
    while len(transition) > 1:
        if len(transition) % 2:
            transition = np.concatenate([transition, np.eye(transition.shape[-1])[None]])
            update = np.concatenate([update, np.zeros_like(update[:1])])
        second = transition[1::2]
        update = second @ update[::2] + update[1::2]
        transition = second @ transition[::2]
    return transition[0], update[0]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def outer(x, y):
    return x[:, :, None] * y[:, None, :]


def plain(x):
    """Rows whose transition is what the gates say, without a correction."""
    g = x.get("g", np.zeros((len(x["k"]), 1)))
    g = g if g.ndim == 2 else g[:, None]
    return np.exp(g)[..., None] * np.eye(DIM), outer(x["k"], x["v"])


def delta(x):
    """The correction reads the state after its decay."""
    decay, write = plain(x)
    beta = x["beta"][:, None, None]
    return (np.eye(DIM) - beta * outer(x["k"], x["k"])) @ decay, beta * write


def pair(x):
    decay, write = plain(x)
    return decay + outer(x["b"], x["a"]), write


def memory(x):
    """Rows of weights, of the last step and of the weights that gradients are taken at, every 16 rows anew."""
    rows, eye = len(x["k"]), np.eye(DIM)
    gradient = x["theta"][:, None, None] * outer(x["k"], x["k"])
    write = x["theta"][:, None, None] * outer(x["k"], x["v"])
    kept, slowed = ((1 - x["alpha"])[:, None, None] * eye, x["eta"][:, None, None] * eye)
    none, same = np.zeros((rows, DIM, DIM)), np.broadcast_to(eye, (rows, DIM, DIM))
    transition = np.block([[kept, slowed, -gradient], [none, slowed, -gradient], [none, none, same]])
    renewed = np.block([[eye, 0 * eye, 0 * eye], [0 * eye, eye, 0 * eye], [eye, 0 * eye, 0 * eye]])
    transition[::16] = transition[::16] @ renewed
    return transition, np.concatenate([write, write, np.zeros_like(write)], axis=1)


@dataclass(frozen=True)
class Run:
    """A recurrence, what its rows do in float64, and how much of them a state holds.

    Attributes:
        call: the function.
        oracle: its own, that rows are checked against.
        rows: makes transitions and updates of rows.
        held: how many roundings of a state's size it holds, of either sign.
        gates: arguments made of uniform numbers `[L, D]`.
        options: further arguments.
    """

    call: Callable[..., Any]
    oracle: Callable[..., Any]
    rows: Callable[[dict[str, Any]], Any]
    held: float
    gates: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, rng, length):
        """Unit keys and queries, values and gates, without heads."""
        q, k = (unit(rng.standard_normal((length, DIM))).astype(np.float32) for _ in range(2))
        found = {"q": q, "k": k, "v": rng.standard_normal((length, VALUE_DIM)).astype(np.float32)}
        for name, make in self.gates.items():
            found[name] = make(rng.random((length, DIM))).astype(np.float32)
        if self.rows is pair:
            found |= {"a": -k, "b": (k * rng.random((length, DIM))).astype(np.float32)}
        return found


def log(size):
    """Log decays down to `-size`."""
    return lambda u: -size * u[:, 0]


EACH = {"g": lambda u: -2e-3 * u}
RUNS = {
    "linear": Run(linear.linear_attention, reference.linear_attention, plain, ADDED, options={"normalize": False}),
    "scalar decay": Run(
        linear.lightning_attention,
        reference.lightning_attention,
        lambda x: plain({**x, "g": np.full((len(x["k"]), 1), -np.float64(np.float32(1e-3)))}),
        1000,
        options={"slopes": np.full(1, 1e-3, np.float32)},
    ),
    "channel decay": Run(linear.gated_linear_attention, reference.gated_linear_attention, plain, 1000, EACH),
    "delta rule": Run(
        linear.delta_rule_attention, reference.delta_rule_attention, delta, 100, {"beta": lambda u: u[:, 0]}
    ),
    "delta rule, beta to 2": Run(
        linear.delta_rule_attention, reference.delta_rule_attention, delta, 100, {"beta": lambda u: 2 * u[:, 0]}
    ),
    # Nothing is forgotten, and a row's correction in a chunk adds up as many terms of the state's size.
    "reflections": Run(
        linear.delta_rule_attention,
        reference.delta_rule_attention,
        delta,
        48 * MILLION,
        {"beta": lambda u: 0 * u[:, 0] + 2},
    ),
    "gated delta rule": Run(
        linear.gated_delta_rule,
        reference.gated_delta_rule,
        delta,
        1000,
        {"g": log(2e-3), "beta": lambda u: 0.01 * u[:, 0]},
    ),
    "Kimi delta attention": Run(
        linear.kimi_delta_attention,
        reference.kimi_delta_attention,
        delta,
        1000,
        {**EACH, "beta": lambda u: 0.01 * u[:, 0]},
        {"normalize_qk": False},
    ),
    "RWKV-7": Run(linear.rwkv7, reference.rwkv7, pair, 100, EACH),
    "memory": Run(
        linear.titans_neural_memory,
        reference.titans_neural_memory,
        memory,
        1000,
        {"theta": lambda u: 0.02 * u[:, 0], "alpha": lambda u: 2e-3 * u[:, 0], "eta": lambda u: 0.8 * u[:, 0]},
        {"normalize_qk": False},
    ),
}


def arrays(arguments, rows=slice(None)):
    return {name: x[None, None, rows] for name, x in arguments.items()}


def weights(state):
    """The matrix of a state."""
    return (state.weights[0] if isinstance(state, linear.MemoryState) else state)[0, 0]


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_those_of_the_recurrence(rng, name):
    """What the long run is compared with is the oracle's recurrence."""
    run = RUNS[name]
    arguments = {n: x.astype(np.float64) for n, x in run.arguments(rng, 45).items()}
    out, state = run.oracle(**arrays(arguments), **{"scale": 1.0, **run.options})
    last = np.asarray(state[0] if isinstance(state, list) else state)[0, 0]
    found = composed(*run.rows(arguments))[1][:DIM]
    np.testing.assert_allclose(found, last, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(arguments["q"][-1] @ found, out[0, 0, -1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", RUNS)
def test_a_million_rows(rng, name):
    """Long calls and single steps end where float64 ends, within `SAFETY U sqrt(held)` of the largest state."""
    run = RUNS[name]
    arguments = run.arguments(rng, MILLION)
    state, at, largest = None, 0, 0.0
    for length in CALLS:
        part = slice(at, at + length)
        out, state = run.call(**arrays(arguments, part), **{"scale": 1.0, **run.options}, initial_state=state)
        at += length
        largest = max(largest, np.abs(weights(state)).max())
    assert at == MILLION
    # Of what came before the float64 rows nothing is left where states forget, which their transition shows.
    first = 0 if run.held >= ADDED else MILLION - 2 * BLOCK
    transition, expected = None, 0.0
    for start in range(first, MILLION, BLOCK):
        rows = run.rows({n: x[start : start + BLOCK].astype(np.float64) for n, x in arguments.items()})
        further, update = composed(*rows)
        transition = further if transition is None else further @ transition
        expected = further @ expected + update if start > first else update
    assert not first or np.abs(transition).max() < 1e-20
    expected = expected[:DIM]
    allowed = SAFETY * U * np.sqrt(run.held) * largest
    error = np.abs(weights(state) - expected).max()
    assert error <= allowed, f"{error / allowed:.2f} times the error that is allowed"
    # A query of unit length adds up `DIM` numbers of the state.
    np.testing.assert_allclose(out[0, 0, -1], arguments["q"][-1] @ expected, atol=np.sqrt(DIM) * allowed)
