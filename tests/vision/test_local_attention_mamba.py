"""`local_attention_mamba`: windows, then scans."""

from dataclasses import replace

import numpy as np
import pytest

import longattn as la
from longattn.linear import MambaWeights
from longattn.vision import local_attention_mamba
from longattn.vision.local_attention_mamba import METHOD
from random_arrays import F32, normal
from random_layers import mamba
from vision_checks import check, check_kinds, raises, weights

NOTHING = (None, None, None, None)
#: Steps of 0: what is left is the skipped part.
STILL = MambaWeights(
    w_in=np.eye(8), w_dt=np.zeros((8, 8)), dt_bias=np.full(8, -200.0), w_b=np.ones((8, 2)), w_c=np.ones((8, 2)),
    a=-np.ones((8, 2)), skip=np.ones(8),
)  # fmt: skip


def arguments(rng, shape=(2, 6, 5, 8)):
    projections = tuple(weights(rng, 8, 8, bias) for bias in (True, False, True, True))
    return normal(rng, shape), projections, mamba(rng, 8, 6)


@pytest.mark.parametrize("directions", ["forward", "both", "cross"])
@pytest.mark.parametrize("window", [2, (3, 4), 7])
def test_reference(rng, isa, window, directions):
    check(METHOD, *arguments(rng), window=window, heads=2, directions=directions)


def test_bias(rng):
    check(METHOD, *arguments(rng), window=(3, 2), heads=2, bias=normal(rng, (2, 6, 6)), scale=0.3)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), window=3, heads=2)


@pytest.mark.parametrize(("directions", "count"), [("forward", 1), ("both", 2), ("cross", 4)])
def test_steps_of_zero_leave_what_is_skipped(rng, directions, count):
    x = normal(rng, (2, 6, 4, 8))
    out = local_attention_mamba(x, NOTHING, STILL, window=1, heads=2, directions=directions)
    np.testing.assert_allclose(out, count * x, rtol=1e-6)


def test_one_state_is_a_moving_sum(rng):
    x = normal(rng, (1, 4, 5, 8))
    x[..., 0] = 1  # gives constant weights of input and output
    first = np.zeros((8, 1))
    first[0] = 1
    layer = replace(STILL, dt_bias=np.full(8, 0.3), w_b=first, w_c=first, a=np.full((8, 1), -0.7), skip=None)
    out = local_attention_mamba(x, NOTHING, layer, window=1, heads=1, directions="forward").reshape(20, 8)
    step, state = np.log1p(np.exp(0.3)), np.zeros(8)
    for row, u in zip(out, x.reshape(20, 8), strict=True):
        state = np.exp(-0.7 * step) * state + step * u
        np.testing.assert_allclose(row, state, rtol=2e-5, atol=2e-5)


def test_a_window_of_the_image_is_attention(rng):
    x, projections, _ = arguments(rng)
    out = local_attention_mamba(x, projections, STILL, window=(6, 5), heads=2, directions="forward")
    rows = x.reshape(2, 30, 8)
    q, k, v = (
        (rows @ (w if isinstance(w, np.ndarray) else w[0]) + (0 if isinstance(w, np.ndarray) else w[1]))
        .reshape(2, 30, 2, 4).swapaxes(1, 2) for w in projections[:3]
    )  # fmt: skip
    expected = la.attention(q, k, v).swapaxes(1, 2).reshape(2, 30, 8) @ projections[3][0] + projections[3][1]
    np.testing.assert_allclose(out, expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"heads": 3}, ValueError, r"heads: got 3"),
        ({"directions": "up"}, ValueError, r"directions: got 'up'"),
        ({"attention": (None,) * 3}, TypeError, r"attention: got tuple"),
        ({"scan": None}, TypeError, r"scan: got NoneType"),
        ({"x": np.zeros((6, 5, 8), F32)}, ValueError, r"x: got shape \(6, 5, 8\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, projections, scan = arguments(rng)
    raises(METHOD, error, message, {"x": x, "attention": projections, "scan": scan, "window": 2, "heads": 2}, **change)
