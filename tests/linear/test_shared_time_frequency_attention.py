"""`shared_time_frequency_attention`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import shared_time_frequency_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, normal
from random_layers import mamba

check = tolerances.check_layer


def inputs(rng, size=(7, 5), channels=6, heads=2, dtype=F32):
    return {
        "x": normal(rng, (2, *size, channels), dtype),
        "norm": (1 + 0.2 * normal(rng, (channels,)), normal(rng, (channels,), spread=0.2)),
        "wq": normal(rng, (channels, 4 * heads), spread=0.4),
        "wk": normal(rng, (channels, 4 * heads), spread=0.4),
        "wv": normal(rng, (channels, 3 * heads), spread=0.4),
        "wo": normal(rng, (3 * heads, channels), spread=0.4),
        "heads": heads,
    }


def both_ways(rng):
    return mamba(rng), mamba(rng), normal(rng, (12, 6), spread=0.3)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1, 9), (30, 2), (0, 3)])
@pytest.mark.parametrize("first", [False, True])
def test_attention_only(rng, isa, size, first):
    given = inputs(rng, size) | {"frequency_first": first}
    check(shared_time_frequency_attention(**given), reference.shared_time_frequency_attention(**given), depth=4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_mamba(rng, first, dtype):
    given = inputs(rng, dtype=dtype)
    given |= {"time": both_ways(rng), "frequency": both_ways(rng), "frequency_first": first}
    y = shared_time_frequency_attention(**given)
    assert y.dtype == dtype
    check(y, reference.shared_time_frequency_attention(**given), depth=16)


def test_a_single_frame_is_a_linear_map(rng, isa):
    given = inputs(rng, (1, 1))
    x = given["x"].astype(np.float64)

    def step(y):
        centred = y - y.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return y + (normed * given["norm"][0] + given["norm"][1]) @ given["wv"] @ given["wo"]

    check(shared_time_frequency_attention(**given), step(step(x)), depth=4)


def test_swapped_axes_in_the_other_order_give_swapped_outputs(rng, isa):
    given = inputs(rng)
    y = shared_time_frequency_attention(**given)
    swapped = shared_time_frequency_attention(
        **(given | {"x": np.ascontiguousarray(given["x"].swapaxes(1, 2)), "frequency_first": True})
    )
    check(swapped.swapaxes(1, 2), y.astype(np.float64), depth=4)


def test_both_axes_go_through_the_same_weights(rng):
    """On a symmetric map the two orders can only agree if the weights do."""
    given = inputs(rng, (6, 6))
    given["x"] = given["x"] + given["x"].swapaxes(1, 2)
    one, two = (shared_time_frequency_attention(**given, frequency_first=first) for first in (False, True))
    check(two, one.swapaxes(1, 2).astype(np.float64), depth=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((7, 5, 6), F32)}, ValueError, r"x: got shape \(7, 5, 6\)"),
        ({"norm": None}, TypeError, "norm: got NoneType"),
        ({"heads": 3}, ValueError, "wq: got shape"),
        ({"wk": np.zeros((6, 7), F32)}, ValueError, "wk: got shape"),
        ({"wo": np.zeros((6, 7), F32)}, ValueError, "wo: got shape"),
        ({"time": 1}, TypeError, "time: got int"),
        ({"frequency_first": 1}, TypeError, "frequency_first: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        shared_time_frequency_attention(**(inputs(rng) | change))
