"""`selective_scan` against its float64 loop, its identities, and its step form."""

from itertools import pairwise

import numpy as np
import pytest

import tolerances
from longattn.linear import selective_scan
from longattn.reference import linear as reference
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal
from running import on_threads


def inputs(rng, batch=2, length=37, channels=70, states=16, dtype=F32, layout="contiguous"):
    shape = (batch, length, channels)
    return {
        "x": normal(rng, shape, dtype, layout),
        "dt": np.abs(normal(rng, shape, dtype, layout, 0.5)),
        "a": -np.exp(normal(rng, (channels, states))),
        "b": normal(rng, (batch, length, states), dtype, layout),
        "c": normal(rng, (batch, length, states), dtype, layout),
    }


def whole(rng, **shape):
    """Inputs with everything that is optional."""
    given = inputs(rng, **shape)
    batch, length, channels = given["x"].shape
    return given | {
        "dt": normal(rng, (batch, length, channels), given["x"].dtype),
        "skip": normal(rng, (channels,)),
        "dt_bias": normal(rng, (channels,)),
        "softplus": True,
        "z": normal(rng, (batch, length, channels), given["x"].dtype),
        "initial_state": normal(rng, (batch, channels, given["a"].shape[1])),
    }


def sizes(given):
    """Sums of the magnitudes of what is added up."""
    positive = {
        name: np.abs(np.asarray(value, np.float64)) if name in {"x", "b", "c", "skip", "initial_state"} else value
        for name, value in given.items()
    }
    gate = positive.pop("z", None)
    y, state = reference.selective_scan(**positive)
    if gate is not None:
        y = y * np.abs(np.asarray(gate, np.float64))
    return y, state


def check(given, actual=None):
    actual = selective_scan(**given) if actual is None else actual
    expected, (y, state) = reference.selective_scan(**given), sizes(given)
    terms = given["x"].shape[1] + given["a"].shape[1]
    assert actual[0].dtype == given["x"].dtype and actual[1].dtype == np.float32
    tolerances.check_linear(actual[0], expected[0], y + 1e-30, terms)
    tolerances.check_linear(actual[1], expected[1], state + 1e-30, terms)


@pytest.mark.parametrize("states", [1, 3, 8, 16, 20])
@pytest.mark.parametrize("length", [0, 1, 2, 16, 37])
def test_reference(rng, isa, length, states):
    check(inputs(rng, length=length, states=states))
    check(whole(rng, length=length, states=states))


@pytest.mark.parametrize("channels", [1, 15, 64, 130])
def test_any_number_of_channels(rng, isa, threads, channels):
    check(whole(rng, channels=channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 20])
def test_dtypes(rng, isa, dtype, length):
    check(whole(rng, dtype=dtype, length=length))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(inputs(rng, layout=layout))


def test_threads_do_not_change_a_bit(rng):
    given = whole(rng)
    results = on_threads(lambda: selective_scan(**given), (1, 2))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_torch(rng):
    torch = pytest.importorskip("torch")
    given = whole(rng)
    y, state = selective_scan(**given)
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in given.items()}
    tensor, after = selective_scan(**tensors)
    np.testing.assert_array_equal(tensor.numpy(), y)
    np.testing.assert_array_equal(after, state)


def test_out(rng):
    given = whole(rng)
    out, state = np.empty_like(given["x"]), given["initial_state"].copy()
    y, after = selective_scan(**(given | {"initial_state": state}), out=out, out_state=state)
    assert y is out and after is state
    check(given, (y, after))


# Identities


def test_it_is_the_unrolled_sum(rng, isa):
    given = inputs(rng, length=20)
    x, dt, a, b, c = (np.asarray(v, np.float64) for v in given.values())
    total = dt.cumsum(axis=1)
    y = np.zeros_like(x)
    for t in range(20):
        for j in range(t + 1):
            decay = np.exp(a * (total[:, t] - total[:, j])[..., None])
            y[:, t] += np.einsum("ben,bn,bn->be", decay, c[:, t], b[:, j]) * dt[:, j] * x[:, j]
    tolerances.check_linear(selective_scan(**given)[0], y, sizes(given)[0], 36)


def test_shared_rates_give_attention_with_a_scalar_decay(rng, isa):
    given = inputs(rng)
    given["dt"] = np.repeat(given["dt"][..., :1], 70, axis=-1)
    given["a"] = np.full_like(given["a"], -0.7)
    x, dt, b, c = (np.asarray(given[name], np.float64) for name in ("x", "dt", "b", "c"))
    log = (-0.7 * dt[..., 0]).cumsum(axis=1)
    decay = np.exp(np.tril(log[:, :, None] - log[:, None])) * np.tri(37)
    expected = (c @ b.swapaxes(1, 2) * decay) @ (dt * x)
    tolerances.check_linear(selective_scan(**given)[0], expected, sizes(given)[0], 53)


def test_rates_of_0_give_linear_attention(rng, isa):
    given = inputs(rng)
    given |= {"a": np.zeros_like(given["a"]), "dt": np.ones_like(given["dt"])}
    x, b, c = (np.asarray(given[name], np.float64) for name in ("x", "b", "c"))
    expected = (c @ b.swapaxes(1, 2) * np.tri(37)) @ x
    tolerances.check_linear(selective_scan(**given)[0], expected, sizes(given)[0], 53)


def test_steps_of_0_give_the_skipped_inputs(rng, isa):
    given = whole(rng)
    given |= {"dt": np.zeros_like(given["dt"]), "dt_bias": None, "softplus": False, "z": None, "initial_state": None}
    np.testing.assert_array_equal(selective_scan(**given)[0], given["skip"] * given["x"])


@pytest.mark.parametrize("splits", [tuple(range(38)), (0, 5, 6, 22, 37)], ids=["1", "some"])
@pytest.mark.parametrize("states", [16, 5])
def test_any_split_is_the_whole(rng, isa, splits, states):
    given = whole(rng, states=states)
    state = given.pop("initial_state").copy()
    over_time = ("x", "dt", "b", "c", "z")
    parts = []
    for first, last in pairwise(splits):
        part = {name: v[:, first:last] if name in over_time else v for name, v in given.items()}
        out, state = selective_scan(**part, initial_state=state, out_state=state)
        parts.append(out)
    check(given | {"initial_state": whole(np.random.default_rng(20240229), states=states)["initial_state"]},
          (np.concatenate(parts, axis=1), state))  # fmt: skip


def test_sequences_one_after_another(rng, isa):
    given = whole(rng, batch=1)
    bounds = np.array([0, 1, 1, 20, 37])
    given["initial_state"] = normal(rng, (4, 70, 16))
    given["cu_seqlens"] = bounds
    check(given)


def test_long_runs_stay_where_they_are(rng):
    """A million steps: neither growth nor drift."""
    given = inputs(rng, batch=1, length=1_000_000, channels=2, states=2)
    given["a"] = -np.full((2, 2), 1e-3)
    y, state = selective_scan(**given)
    last = {name: v[:, -30_000:] if v.ndim == 3 else v for name, v in given.items()}
    expected, _ = reference.selective_scan(**last)  # what came before weighs e^-12
    size = np.abs(expected).max()
    np.testing.assert_allclose(y[:, -1000:], expected[:, -1000:], atol=1e-4 * size)
    assert np.isfinite(state).all()


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((37, 70), F32)}, ValueError, r"x: got shape \(37, 70\), expected \[B, L, E\]"),
        ({"x": np.zeros((2, 37, 70))}, TypeError, "x: got dtype float64, expected float32, float16 or bfloat16"),
        ({"dt": np.zeros((2, 37, 7), F32)}, ValueError, r"dt: got shape \(2, 37, 7\)"),
        ({"dt": np.full((2, 37, 70), -1, BF16)}, ValueError, "dt: got a step of -1, expected finite steps of at"),
        ({"dt_bias": np.full(70, -9, F32)}, ValueError, "dt: got a step of -"),
        ({"a": np.full((70, 16), 0.1, F32)}, ValueError, "a: got a rate that is above 0 or not finite"),
        ({"a": np.full((70, 16), np.nan, F32)}, ValueError, "a: got a rate that is above 0 or not finite"),
        ({"a": np.full((70, 16), -np.inf, F32)}, ValueError, "a: got a rate that is above 0 or not finite"),
        ({"b": np.zeros((2, 37, 15), F32)}, ValueError, r"b: got shape \(2, 37, 15\)"),
        ({"c": np.zeros((2, 36, 16), F32)}, ValueError, r"c: got shape \(2, 36, 16\)"),
        ({"skip": np.zeros(71, F32)}, ValueError, r"skip: got shape \(71,\)"),
        ({"z": np.zeros((2, 37, 71), F32)}, ValueError, r"z: got shape \(2, 37, 71\)"),
        ({"softplus": 1}, TypeError, "softplus: got 1"),
        ({"initial_state": np.zeros((2, 70, 15), F32)}, ValueError, r"initial_state: got shape \(2, 70, 15\)"),
        ({"cu_seqlens": np.array([0, 37])}, ValueError, "cu_seqlens: got a batch of 2"),
        ({"out_state": np.zeros((2, 70, 16))}, TypeError, "out_state: got ndarray, expected a float32 numpy array"),
        ({"out_state": np.zeros((2, 70, 15), F32)}, ValueError, r"out_state: got shape \(2, 70, 15\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(inputs(rng) | change))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 300])
def test_steps_that_are_not_finite(rng, length, dtype, softplus):
    """Wherever they stand, and before anything is written."""
    given = inputs(rng, length=length, dtype=dtype) | {"softplus": softplus}
    state = normal(rng, (2, 70, 16))
    out, last = np.zeros_like(given["x"]), state.copy()
    for value, at in ((np.nan, (0, 0, 0)), (np.inf, (1, length - 1, 69)), (-np.inf, (1, 0, 3))):
        if softplus and value == -np.inf:
            continue
        dt = given["dt"].copy()
        dt[at] = value
        with pytest.raises(ValueError, match=f"dt: got a step of {str(value).replace('nan', 'NaN')}, expected"):
            selective_scan(**(given | {"dt": dt}), initial_state=last, out=out, out_state=last)
        assert not out.any()
        np.testing.assert_array_equal(last, state)


def test_biases_that_make_steps_infinite(rng):
    for bias in (np.nan, np.inf):
        with pytest.raises(ValueError, match="dt: got a step of"):
            selective_scan(**(whole(rng) | {"dt_bias": np.full(70, bias, F32)}))


def test_a_softplus_of_minus_infinity_is_a_step_of_0(rng):
    given = whole(rng)
    given["dt"][:, 5:9] = -np.inf
    check(given)
