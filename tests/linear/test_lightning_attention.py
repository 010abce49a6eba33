"""`lightning_attention`."""

import numpy as np
import pytest

from longattn.linear import (
    gated_linear_attention,
    lightning_attention,
    lightning_slopes,
    recurrence_backward,
    retention,
)
from longattn.reference import linear as reference
from random_arrays import DTYPES
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


def test_it_is_gated_linear_attention_with_one_gate_for_all_rows_and_channels(rng):
    arguments = TestLightningAttention.case.arguments(rng, length=150)
    out, state = lightning_attention(**arguments)
    q, k, v, slopes = (arguments[name] for name in ("q", "k", "v", "slopes"))
    g = np.broadcast_to(-slopes[:, None, None], q.shape).copy()
    expected, last = gated_linear_attention(q, k, v, g, scale=1.0)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


def test_gradients_are_scans_forward_and_back(rng):
    """`dq_t = S_t do_t`, and with `R_t = lambda R_(t+1) + q_t do_t^T`, `dk_t = R_t v_t` and `dv_t = R_t^T k_t`."""
    arguments = TestLightningAttention.case.arguments(rng, length=70)
    q, k, v = (arguments[name][0].astype(np.float64) for name in "qkv")
    d_out = rng.standard_normal(v.shape)
    decay = np.exp(-arguments["slopes"].astype(np.float64))[:, None, None]
    dq, dk, dv = (np.empty_like(x) for x in (q, k, v))
    state, rest = np.zeros((2, 8, 12)), np.zeros((2, 8, 12))
    for t in range(70):
        state = decay * state + k[:, t, :, None] * v[:, t, None]
        dq[:, t] = np.einsum("hde,he->hd", state, d_out[:, t])
    for t in reversed(range(70)):
        rest = decay * rest + q[:, t, :, None] * d_out[:, t, None]
        dk[:, t] = np.einsum("hde,he->hd", rest, v[:, t])
        dv[:, t] = np.einsum("hde,hd->he", rest, k[:, t])
    found = recurrence_backward(
        d_out[None].astype(np.float32), None, *(arguments[name] for name in "qkv"), g=-arguments["slopes"], scale=1.0
    )
    for x, y in ((found.dq, dq), (found.dk, dk), (found.dv, dv)):
        np.testing.assert_allclose(x[0], y, rtol=1e-4, atol=1e-4)


def test_slopes_of_published_models():
    np.testing.assert_allclose(lightning_slopes(8), 2.0 ** -np.arange(1, 9) * (1 + 1e-5), rtol=1e-6)
    twelve = lightning_slopes(12, layer=5, layers=11)
    assert twelve.shape == (12,)
    np.testing.assert_allclose(twelve[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]) * (0.5 + 1e-5), rtol=1e-6)
    for bad in ({"heads": 0}, {"heads": 4, "layer": 3, "layers": 3}):
        with pytest.raises(ValueError):
            lightning_slopes(**bad)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float64], ids=str)
@pytest.mark.parametrize("heads", [2, 70])
def test_slopes_below_0_or_nan(rng, dtype, heads):
    arguments = TestLightningAttention.case.arguments(rng, heads=(heads,) * 3, length=2)
    for head in (0, heads - 1):
        for slope in (-0.5, -np.inf, np.nan):
            slopes = np.ones(heads)
            slopes[head] = slope
            with pytest.raises(ValueError, match="slopes: got a number below 0 or NaN"):
                lightning_attention(**{**arguments, "slopes": slopes.astype(dtype)})
    lightning_attention(**{**arguments, "slopes": np.zeros(heads, dtype)})
