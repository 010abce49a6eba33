"""`lightning_attention`."""

import numpy as np
import pytest

from longattn.linear import lightning_attention, lightning_slopes, retention
from longattn.reference import linear as reference
from recurrences import Case, Recurrence


class TestLightningAttention(Recurrence):
    case = Case(
        lightning_attention,
        reference.lightning_attention,
        gates={"slopes": ("head", lambda u: u)},
    )


def test_slopes_towards_infinity_keep_the_row_alone(rng):
    arguments = TestLightningAttention.case.arguments(rng, length=60)
    for slope in (200.0, np.inf):
        arguments["slopes"] = np.full(2, slope, np.float32)
        out, _ = lightning_attention(**arguments)
        own = (arguments["q"] * arguments["k"]).sum(-1, keepdims=True)
        np.testing.assert_allclose(out, own * arguments["v"], rtol=1e-5, atol=1e-6)


def test_it_is_retention_of_other_names(rng):
    arguments = TestLightningAttention.case.arguments(rng, length=150)
    out, state = lightning_attention(**arguments)
    gamma = np.exp(-arguments.pop("slopes").astype(np.float64))
    expected, last = retention(**arguments, gamma=gamma, scale=1.0)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


def test_slopes_of_published_models():
    np.testing.assert_allclose(lightning_slopes(8), 2.0 ** -np.arange(1, 9) * (1 + 1e-5), rtol=1e-6)
    twelve = lightning_slopes(12, layer=5, layers=11)
    assert twelve.shape == (12,)
    np.testing.assert_allclose(twelve[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]) * (0.5 + 1e-5), rtol=1e-6)
    for bad in ({"heads": 0}, {"heads": 4, "layer": 3, "layers": 3}):
        with pytest.raises(ValueError):
            lightning_slopes(**bad)


def test_negative_slopes(rng):
    arguments = TestLightningAttention.case.arguments(rng)
    with pytest.raises(ValueError, match="slopes: got a number below 0"):
        lightning_attention(**{**arguments, "slopes": -arguments["slopes"]})
