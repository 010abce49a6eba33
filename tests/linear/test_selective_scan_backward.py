"""`selective_scan_backward`: gradients beside the adjoint scan, and that beside differences."""

import numpy as np
import pytest

import tolerances
from longattn.linear import selective_scan_backward
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32
from running import on_threads


def arguments(rng, *, batch=1, length=37, channels=20, states=5, sequences=None, options=(), dtype=F32):
    """Random arguments by name; `options` names those that may be left out."""
    rows = (batch, length, channels)
    found = {name: rng.standard_normal(rows) for name in ("x", "dt")}
    found["a"] = -np.exp(rng.standard_normal((channels, states)))
    found |= {name: rng.standard_normal((batch, length, states)) for name in ("b", "c")}
    if "softplus" not in options:
        found["dt"] = np.abs(found["dt"])
    for name, shape in (("skip", (channels,)), ("dt_bias", (channels,)), ("z", rows)):
        if name in options:
            found[name] = rng.standard_normal(shape)
    if "dt_bias" in options and "softplus" not in options:
        found["dt_bias"] = np.abs(found["dt_bias"])
    if "initial_state" in options:
        found["initial_state"] = rng.standard_normal((sequences or batch, channels, states))
    stored = ("x", "dt", "b", "c", "z")
    return {name: x.astype(dtype if name in stored else F32) for name, x in found.items()}


ALL = ("skip", "dt_bias", "z", "softplus", "initial_state")
OPTIONS = ((), ("skip",), ("dt_bias",), ("softplus",), ("z",), ("initial_state",), ALL)


def compare(rng, found, options, **more):
    """Gradients of random linear forms of outputs and states, beside the oracle's."""
    through = "softplus" in options
    plain = {name: x.astype(np.float64) for name, x in found.items()}
    out, state = reference.selective_scan(**plain, softplus=through, **more)
    d_out, d_state = rng.standard_normal(out.shape).astype(found["x"].dtype), rng.standard_normal(state.shape)
    expected = reference.selective_scan_backward(
        d_out.astype(np.float64), d_state.astype(F32), **plain, softplus=through, **more
    )
    ours = selective_scan_backward(d_out, d_state, **found, softplus=through, **more)
    names = {"x": ours.dx, "dt": ours.d_dt, "a": ours.da, "b": ours.db, "c": ours.dc, "skip": ours.d_skip}
    names |= {"dt_bias": ours.d_dt_bias, "initial_state": ours.d_initial_state, "z": ours.dz}
    for name, gradient in names.items():
        if name in found:
            assert gradient.dtype == found[name].dtype
        if gradient is None:
            assert name == "z" and "z" not in found
            continue
        terms = 8 * out.shape[1] * out.shape[0] + out.shape[2]
        of = expected["dt"] if name == "dt_bias" else None
        tolerances.check_gradients(gradient, expected[name], terms, of)
    return ours


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_oracle_is_the_slope(rng, options):
    """Central differences of the forward oracle, in random directions."""
    through = "softplus" in options
    found = arguments(rng, batch=2, length=6, channels=3, states=2, options=options)
    found = {name: x.astype(np.float64) for name, x in found.items()}
    out, state = reference.selective_scan(**found, softplus=through)
    d_out, d_state = rng.standard_normal(out.shape), rng.standard_normal(state.shape)
    gradients = reference.selective_scan_backward(d_out, d_state, **found, softplus=through)
    for name, x in found.items():
        direction, step = rng.standard_normal(x.shape), 1e-6
        ends = [
            reference.selective_scan(**{**found, name: x + sign * step * direction}, softplus=through)
            for sign in (1, -1)
        ]
        slope = sum(((a - b) * d).sum() for a, b, d in zip(*ends, (d_out, d_state), strict=True)) / (2 * step)
        np.testing.assert_allclose((gradients[name] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 70])
def test_reference(rng, isa, options, length):
    compare(rng, arguments(rng, batch=2, length=length, options=options), options)


@pytest.mark.parametrize("channels, states", [(1, 1), (64, 16), (65, 3), (200, 20)])
def test_sizes(rng, isa, channels, states):
    compare(rng, arguments(rng, length=40, channels=channels, states=states, options=ALL), ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    compare(rng, arguments(rng, dtype=dtype, options=ALL), ALL)


@pytest.mark.parametrize("bounds", [[0, 0, 1, 20, 41, 50], [0, 1, 2, 3]], ids=str)
def test_packed_sequences(rng, bounds):
    found = arguments(rng, length=bounds[-1], sequences=len(bounds) - 1, options=ALL)
    compare(rng, found, ALL, cu_seqlens=np.array(bounds))


def test_threads_do_not_matter(rng):
    found = arguments(rng, batch=3, length=50, channels=150, options=ALL)
    d_out = rng.standard_normal((3, 50, 150)).astype(F32)
    results = on_threads(lambda: selective_scan_backward(d_out, None, **found, softplus=True))
    for other in results[1:]:
        for name in results[0].__slots__:
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))


def test_wrong_arguments(rng):
    found = arguments(rng)
    d_out = np.zeros((1, 37, 20), F32)

    def bad(match, error=ValueError, d=d_out, d_state=None, **changes):
        with pytest.raises(error, match=match):
            selective_scan_backward(d, d_state, **{**found, **changes})

    bad("d_out: got shape", d=d_out[:, 1:])
    bad("d_out: got dtype", TypeError, d=d_out.astype(int))
    bad("d_state: got shape", d_state=np.zeros((1, 20, 6), F32))
    bad("a: got a rate that is above 0", a=-found["a"])
    bad("dt: got a step of", dt=-found["dt"])
    bad("dt: got a step of NaN", dt=np.nan * found["dt"])
    bad("softplus: got 1", TypeError, softplus=1)
    bad("b: got shape", b=found["b"][:, :, 1:])
