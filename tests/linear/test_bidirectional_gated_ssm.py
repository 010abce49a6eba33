"""`bidirectional_gated_ssm`."""

from dataclasses import replace

import numpy as np
import pytest

import tolerances
from longattn.linear import DiagonalSsm, bidirectional_gated_ssm, diagonal_scan, toeplitz
from longattn.reference import linear as reference
from longattn.reference.linear.bidirectional_gated_ssm import kernel, ssm
from random_arrays import DTYPES, F32, LAYOUTS, normal

check = tolerances.check_layer


def model(rng, channels=6, states=4):
    def numbers():
        return rng.standard_normal((channels, states)) + 1j * rng.standard_normal((channels, states))

    rates = -rng.uniform(0.1, 1, (channels, states)) + 1j * np.pi * np.arange(states)
    dt, skip = rng.uniform(0.01, 0.3, channels), normal(rng, (channels,))
    return DiagonalSsm(a=rates, b=numbers(), c=numbers(), dt=dt, skip=skip)


def inputs(rng, length=40, dtype=F32, layout="contiguous"):
    return {
        "x": normal(rng, (2, length, 6), dtype, layout),
        "forward": model(rng),
        "backward": model(rng),
        "w_y": normal(rng, (12, 8), spread=0.3),
        "w_g": normal(rng, (6, 8), spread=0.4),
        "w_o": normal(rng, (8, 5), spread=0.4),
    }


@pytest.mark.parametrize("length", [0, 1, 40, 150])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "none"])
def test_reference(rng, isa, length, activation):
    given = inputs(rng, length) | {"activation": activation}
    check(bidirectional_gated_ssm(**given), reference.bidirectional_gated_ssm(**given), depth=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    given = inputs(rng, dtype=dtype, layout=layout)
    y = bidirectional_gated_ssm(**given)
    assert y.dtype == dtype
    check(y, reference.bidirectional_gated_ssm(**given), depth=4)


def test_real_rates_and_rates_of_0(rng):
    given = inputs(rng)
    given["forward"] = replace(given["forward"], a=-np.ones((6, 4), F32))
    check(bidirectional_gated_ssm(**given), reference.bidirectional_gated_ssm(**given), depth=4)
    still = bidirectional_gated_ssm(**(given | {"backward": replace(given["backward"], a=np.zeros((6, 4)))}))
    slow = replace(given["backward"], a=np.full((6, 4), -1e-9))
    check(still, reference.bidirectional_gated_ssm(**(given | {"backward": slow})), depth=16)


def test_the_convolution_with_the_kernels_gives_the_same(rng, isa):
    given = inputs(rng, 200)
    x, both = given["x"], np.zeros((6, 399))
    both[:, 199:] = kernel(given["forward"], 200)
    forward = toeplitz(x, both, zero=199) + given["forward"].skip * x
    both[:] = 0
    both[:, :200] = kernel(given["backward"], 200)[:, ::-1]
    backward = toeplitz(x, both, zero=199) + given["backward"].skip * x
    gate = x.astype(np.float64) @ given["w_g"]
    expected = (np.concatenate([forward, backward], axis=-1) @ given["w_y"] * gate) @ given["w_o"]
    check(bidirectional_gated_ssm(**given, activation="none"), expected.astype(np.float64), depth=8)


def test_without_the_backward_model_it_is_causal(rng, isa):
    given = inputs(rng)
    nothing = replace(given["backward"], c=np.zeros((6, 4)), skip=np.zeros(6))
    given |= {"backward": nothing, "w_g": np.zeros((6, 8), F32), "w_o": np.eye(8, dtype=F32), "activation": "sigmoid"}
    expected = 0.5 * ssm(given["x"].astype(np.float64), given["forward"]) @ given["w_y"][:6]
    check(bidirectional_gated_ssm(**given), expected, depth=4)


def test_output_weights_of_0_leave_the_skipped_inputs(rng, isa):
    given = inputs(rng)
    x, one = given["x"], model(rng)
    decay = np.exp(one.dt[:, None] * one.a)
    y, _ = diagonal_scan(x, decay, one.b, np.zeros((6, 4)), skip=one.skip)
    np.testing.assert_array_equal(y, one.skip * x)


def test_bad_arguments(rng):
    given = inputs(rng)
    forward = given["forward"]
    for change, error, message in (
        ({"forward": {}}, TypeError, "forward: got dict, expected a DiagonalSsm"),
        ({"forward": replace(forward, a=-forward.a)}, ValueError, "forward.a: got a rate whose real part is above 0"),
        ({"forward": replace(forward, a=forward.a[:5])}, ValueError, r"forward.a: got shape \(5, 4\)"),
        ({"forward": replace(forward, b=forward.b[:, :3])}, ValueError, r"forward.b: got shape \(6, 3\)"),
        ({"forward": replace(forward, dt=-forward.dt)}, ValueError, "forward.dt: got a step size"),
        ({"forward": replace(forward, a=np.zeros((6, 4), int))}, TypeError, "forward.a: got dtype int64"),
        ({"w_y": given["w_y"][:11]}, ValueError, r"w_y: got shape \(11, 8\)"),
        ({"w_g": given["w_g"][:, :7]}, ValueError, r"w_g: got shape \(6, 7\)"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
    ):
        with pytest.raises(error, match=message):
            bidirectional_gated_ssm(**(given | change))
