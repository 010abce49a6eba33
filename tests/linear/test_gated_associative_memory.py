"""`gated_associative_memory`."""

import numpy as np
import pytest

import tolerances
from longattn import attention
from longattn.linear import causal_conv1d, gated_associative_memory
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal

check = tolerances.check_layer


def inputs(rng, length=20, channels=6, slots=9, taps=3, dtype=F32, layout="contiguous"):
    return {
        "x": normal(rng, (2, length, channels), dtype, layout),
        "conv": normal(rng, (channels, taps), spread=0.5),
        "bank": normal(rng, (slots, channels)),
        "w_gate": normal(rng, (channels, 2 * channels), spread=0.4),
    }


def whole(rng, **shape):
    given = inputs(rng, **shape)
    return given | {
        "conv_bias": normal(rng, (6,)),
        "gate_bias": normal(rng, (12,)),
        "bank_values": normal(rng, given["bank"].shape),
        "heads": 2,
        "scale": 0.4,
        "residual": normal(rng, given["x"].shape),
        "initial_state": normal(rng, (2, given["conv"].shape[1] - 1, 6)),
    }


@pytest.mark.parametrize("length", [0, 1, 20])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("make", [inputs, whole])
def test_reference(rng, isa, threads, length, taps, make):
    given = make(rng, length=length, taps=taps)
    for one, two in zip(gated_associative_memory(**given), reference.gated_associative_memory(**given), strict=True):
        check(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    given = inputs(rng, dtype=dtype, layout=layout)
    y, _ = gated_associative_memory(**given)
    assert y.dtype == dtype
    check(y, reference.gated_associative_memory(**given)[0])


def test_steps_are_the_whole(rng, isa):
    given = whole(rng)
    state, parts = given.pop("initial_state"), []
    expected, after = reference.gated_associative_memory(**given, initial_state=state)
    for first, last in ((0, 1), (1, 2), (2, 9), (9, 20)):
        part = given | {name: given[name][:, first:last] for name in ("x", "residual")}
        y, state = gated_associative_memory(**part, initial_state=state)
        parts.append(y)
    check(np.concatenate(parts, axis=1), expected)
    check(state, after)


def gates(given, local, read):
    return given | {"w_gate": np.zeros((6, 12), F32), "gate_bias": np.repeat([local, read], 6).astype(F32)}


def test_open_to_the_convolution_only(rng, isa):
    given = inputs(rng)
    y, _ = gated_associative_memory(**gates(given, 100, -100))
    check(y, causal_conv1d(given["x"], given["conv"])[0].astype(np.float64))


def test_open_to_the_bank_only(rng, isa):
    given = inputs(rng)
    y, _ = gated_associative_memory(**gates(given, -100, 100))
    bank = np.broadcast_to(given["bank"], (2, 1, 9, 6))
    check(y, attention(given["x"][:, None], bank, bank, scale=1.0)[:, 0].astype(np.float64))


def test_tokens_further_back_have_no_effect(rng, isa):
    given = inputs(rng)
    y, _ = gated_associative_memory(**given)
    given["x"][:, :10] += 5
    other, _ = gated_associative_memory(**given)
    np.testing.assert_array_equal(y[:, 12:], other[:, 12:])
    assert (y[:, 11] != other[:, 11]).any()


def test_one_slot_is_read_as_its_value(rng, isa):
    given = inputs(rng, slots=1)
    y, _ = gated_associative_memory(**gates(given, -100, 100))
    check(y, np.broadcast_to(given["bank"][0].astype(np.float64), y.shape))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 4}, ValueError, "heads: got 4, expected a divisor of the 6 channels"),
        ({"bank": np.zeros((9, 5), F32)}, ValueError, r"bank: got shape \(9, 5\)"),
        ({"bank": np.zeros((0, 6), F32)}, ValueError, "expected at least one slot"),
        ({"bank_values": np.zeros((8, 6), F32)}, ValueError, r"bank_values: got shape \(8, 6\)"),
        ({"w_gate": np.zeros((6, 6), F32)}, ValueError, r"w_gate: got shape \(6, 6\)"),
        ({"conv": np.zeros((5, 3), F32)}, ValueError, "conv: got shape"),
        ({"residual": np.zeros((2, 19, 6), F32)}, ValueError, "residual: got shape"),
        ({"scale": "1"}, TypeError, "scale: got '1'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        gated_associative_memory(**(inputs(rng) | change))
