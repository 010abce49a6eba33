"""`span_dynamic_convolution`."""

from dataclasses import replace

import numpy as np
import pytest

import tolerances
from longattn import attention
from longattn.linear import span_dynamic_convolution
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, normal

check = tolerances.check_layer


def inputs(rng, length=30, channels=6, heads=2, dim=5, taps=5, span=3, dtype=F32):
    width = heads * dim
    return {
        "x": normal(rng, (2, length, channels), dtype),
        "wq": normal(rng, (channels, width), spread=0.4),
        "depthwise": normal(rng, (channels, span)),
        "pointwise": normal(rng, (channels, width), spread=0.4),
        "wv": normal(rng, (channels, width), spread=0.4),
        "wf": normal(rng, (width, heads * taps), spread=0.3),
        "heads": heads,
    }


def whole(rng, **shape):
    given = inputs(rng, **shape)
    return given | {
        "span_bias": normal(rng, (10,)),
        "tap_bias": normal(rng, (given["wf"].shape[1],)),
        "attention_weights": (normal(rng, (6, 10), spread=0.4), normal(rng, (6, 10), spread=0.4)),
        "mask": rng.random(given["x"].shape[:2]) < 0.8,
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [0, 1, 4, 30, 150])
@pytest.mark.parametrize("taps", [1, 9])
def test_reference(rng, isa, causal, length, taps):
    for given in (inputs(rng, length=length, taps=taps), whole(rng, length=length, taps=taps)):
        if length and "mask" in given:
            given["mask"][:, 0] = True  # a row of attention that sees something
        check(span_dynamic_convolution(**given, causal=causal),
              reference.span_dynamic_convolution(**given, causal=causal))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    given = inputs(rng, dtype=dtype)
    y = span_dynamic_convolution(**given)
    assert y.dtype == dtype
    check(y, reference.span_dynamic_convolution(**given))


def test_taps_from_zeros_give_the_moving_average(rng, isa):
    given = inputs(rng)
    given["wf"] = np.zeros((10, 2 * 5), F32)
    v = np.pad(given["x"].astype(np.float64) @ given["wv"], ((0, 0), (2, 2), (0, 0)))
    check(span_dynamic_convolution(**given), np.mean([v[:, t : t + 30] for t in range(5)], axis=0))


def test_taps_at_the_centre_return_the_values(rng, isa):
    given = inputs(rng)
    given |= {"wf": np.zeros((10, 10), F32), "tap_bias": np.tile([0, 0, 200, 0, 0], 2).astype(F32)}
    check(span_dynamic_convolution(**given), given["x"].astype(np.float64) @ given["wv"])


def test_a_single_tap_returns_the_values(rng, isa):
    given = inputs(rng, taps=1) | {"tap_bias": normal(rng, (2,))}
    check(span_dynamic_convolution(**given), given["x"].astype(np.float64) @ given["wv"])


def test_inside_it_is_attention_in_a_window(rng, isa):
    given = inputs(rng)
    x = given["x"].astype(np.float64)
    around = reference.depthwise(x, given["depthwise"], (1,)) @ given["pointwise"]
    z = ((x @ given["wq"] * around) @ given["wf"]).reshape(2, 30, 2, 5)
    bias = np.full((2, 2, 30, 30), -np.inf)
    for i in range(30):
        for t in range(5):
            if 0 <= i + t - 2 < 30:
                bias[:, :, i, i + t - 2] = z[:, i, :, t]
    v = (x @ given["wv"]).reshape(2, 30, 2, 5).swapaxes(1, 2).astype(F32)
    nothing = np.zeros_like(v)
    expected = attention(nothing, nothing, v, bias=bias, window=(2, 2)).swapaxes(1, 2).reshape(2, 30, 10)
    check(span_dynamic_convolution(**given)[:, 2:-2], expected[:, 2:-2].astype(np.float64), depth=2)


@pytest.mark.parametrize("make", [inputs, whole])
@pytest.mark.parametrize(("taps", "span"), [(1, 1), (5, 3), (9, 40)])
def test_steps_and_parts_are_the_whole(rng, isa, make, taps, span):
    given = make(rng, taps=taps, span=span)
    if "mask" in given:
        given["mask"][:, 0] = True
    expected = reference.span_dynamic_convolution(**given, causal=True)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 10), slice(10, 10), *(slice(t, t + 1) for t in range(10, 17)), slice(17, 30)):
        own = given | {n: given[n][:, part] for n in ("x", "mask") if n in given}
        y, state = span_dynamic_convolution(**own, causal=True, initial_state=state, return_state=True)
        parts.append(y)
    check(np.concatenate(parts, axis=1), expected)
    assert state.values.shape == (2, 2, taps - 1, 5) and state.inputs.shape == (2, span - 1, 6)


def test_states_that_do_not_fit(rng):
    given = whole(rng)
    _, state = span_dynamic_convolution(**given, causal=True, return_state=True)
    keys, values, seen = state.attention
    for change, error, message in (
        ({"causal": False}, ValueError, "causal: got False with a state"),
        ({"attention_weights": None}, ValueError, "initial_state: got one of a call with other attention_weights"),
        ({"initial_state": replace(state, inputs=state.inputs[:, 1:])}, ValueError, "initial_state: got inputs"),
        ({"initial_state": replace(state, values=state.values[:1])}, ValueError, "initial_state: got values"),
        (
            {"initial_state": replace(state, attention=(keys, values[:, :, 1:], seen))},
            ValueError,
            "initial_state: got values of attention",
        ),
        (
            {"initial_state": replace(state, attention=(keys, values, seen[:, 1:]))},
            ValueError,
            "initial_state: got a mask",
        ),
        ({"initial_state": keys}, TypeError, "initial_state: got ndarray"),
    ):
        with pytest.raises(error, match=message):
            span_dynamic_convolution(**{**given, "causal": True, "initial_state": state, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"wq: got shape \(6, 10\), expected \[C, heads \* D\] with 3 heads"),
        ({"wf": np.zeros((10, 8), F32)}, ValueError, r"wf: got shape \(10, 8\)"),
        ({"wv": np.zeros((6, 9), F32)}, ValueError, r"wv: got shape \(6, 9\)"),
        ({"depthwise": np.zeros((5, 3), F32)}, ValueError, r"depthwise: got shape \(5, 3\)"),
        ({"tap_bias": np.zeros(9, F32)}, ValueError, r"tap_bias: got shape \(9,\)"),
        ({"mask": np.zeros((2, 30))}, TypeError, "mask: got dtype float64"),
        ({"mask": np.zeros((2, 29), bool)}, ValueError, r"mask: got shape \(2, 29\)"),
        ({"attention_weights": 3}, TypeError, "attention_weights: got int"),
        ({"causal": 0}, TypeError, "causal: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        span_dynamic_convolution(**(inputs(rng) | change))
