"""`regla`."""

import numpy as np
import pytest

from longattn.linear import linear_attention, regla
from longattn.reference import linear as reference
from recurrences import Case, Recurrence

GATES = {"gate": ("channel", lambda u: 0.02 + 0.98 * u), "refine": ("channel", lambda u: u)}


class TestPlain(Recurrence):
    """Before the norm, whose factors depend on outputs."""

    case = Case(
        regla,
        reference.regla,
        gates=GATES,
        keys=lambda x: np.abs(x) / 2,
        options={"norm": "none"},
    )


class TestByValues(Recurrence):
    case = Case(
        regla,
        reference.regla,
        gates={name: ("column", make) for name, (_, make) in GATES.items()},
        keys=lambda x: np.abs(x) / 2,
        options={"norm": "none", "gate_axis": "value"},
    )


@pytest.mark.parametrize("axis", ["key", "value"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms(rng, isa, norm, axis):
    case = TestPlain.case if axis == "key" else TestByValues.case
    for length in (1, 60):
        arguments = {**case.arguments(rng, length=length, heads=(4, 2, 2)), "norm": norm}
        gain, shift = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 12), (12,)))
        found, last = regla(**arguments, gain=gain, shift=shift, eps=1e-9)
        expected, state = reference.regla(**arguments, gain=gain, shift=shift, eps=1e-9)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(last, state, rtol=1e-4, atol=1e-5)


def test_a_half_leaves_gates_as_they_are(rng):
    arguments = TestPlain.case.arguments(rng, length=80)
    g = arguments["gate"].astype(np.float64)
    for r, expected in ((0.5, g), (0.0, g**2), (1.0, 1 - (1 - g) ** 2)):
        arguments["refine"] = np.full_like(arguments["gate"], r)
        _, state = regla(**arguments)
        k = np.exp(arguments["k"].astype(np.float64))
        _, last = reference.gated_linear_attention(arguments["q"], k, arguments["v"], np.log(expected))
        np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-4)


def test_a_constant_added_to_keys_changes_nothing(rng):
    arguments = {**TestPlain.case.arguments(rng, length=80), "norm": "rms"}
    out, _ = regla(**arguments)
    arguments["k"] = arguments["k"] + 3
    np.testing.assert_allclose(regla(**arguments)[0], out, rtol=1e-3, atol=1e-4)


def test_gates_of_1_are_linear_attention(rng):
    arguments = TestPlain.case.arguments(rng, length=80)
    arguments["gate"] = np.ones_like(arguments["gate"])
    _, state = regla(**arguments)
    q, k, v = (arguments[name] for name in "qkv")
    _, last = linear_attention(q, k, v, feature_map="exp", normalize=False)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_one(rng):
    arguments = {**TestPlain.case.arguments(rng, length=5), "norm": "rms"}
    arguments["v"] = np.zeros_like(arguments["v"])
    assert not regla(**arguments)[0].any()


# Keys of any size


def large(rng, axis, *, length=60, heads=(4, 2, 2), offset=0.0, spread=0.0, dtype=np.float32):
    """Keys around `offset`, row by row off by up to `spread`."""
    case = TestPlain.case if axis == "key" else TestByValues.case
    arguments = {**case.arguments(rng, length=length, heads=heads), "norm": "rms"}
    rows = offset + spread * rng.uniform(-1, 1, (1, heads[1], length, 1))
    return {**arguments, "k": (arguments["k"] + rows).astype(dtype)}


def check_large(arguments, **options):
    """Outputs and, by their logarithms, states."""
    shape = options["initial_state"].shape[:2] if "initial_state" in options else arguments["v"].shape[:2]
    scale = options.pop("log_scale", np.zeros(shape))
    before = {**options, "log_scale": scale.copy()}
    out, last = regla(**arguments, **options, log_scale=scale)
    expected, state = reference.regla(**arguments, **before)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    true = last * np.exp(scale)[..., None, None]
    most = np.abs(state).max(axis=(-2, -1), keepdims=True)
    np.testing.assert_allclose(true / most, state / most, rtol=1e-4, atol=1e-5)
    return out, last, scale


@pytest.mark.parametrize("axis", ["key", "value"])
@pytest.mark.parametrize("offset", [200.0, -200.0, 88.0, -100.0])
@pytest.mark.parametrize("length", [1, 60])
def test_large_keys(rng, isa, length, offset, axis):
    check_large(large(rng, axis, length=length, offset=offset))
    check_large({**large(rng, axis, length=length, offset=offset), "norm": "layer"})


@pytest.mark.parametrize("heads", [(2, 2, 2), (2, 1, 2), (2, 2, 4), (6, 1, 3)], ids=str)
@pytest.mark.parametrize("axis", ["key", "value"])
def test_keys_of_all_sizes(rng, heads, axis):
    check_large(large(rng, axis, heads=heads, spread=250.0))


def test_large_keys_of_16_bits(rng):
    arguments = large(rng, "key", offset=200.0, spread=100.0, dtype=np.float16)
    check_large(arguments)


def test_a_large_key_is_forgotten(rng):
    """Later keys count once decays have brought the state down to them."""
    arguments = large(rng, "key", length=80, heads=(2, 2, 2))
    arguments["k"][:, :, 0] += 200
    arguments["gate"][:], arguments["refine"][:] = 0.02, 0.5
    out, _, scale = check_large(arguments)
    assert (scale < 10).all()
    arguments["v"][:, :, 0] *= -5
    np.testing.assert_allclose(regla(**arguments, log_scale=scale)[0][:, :, -1], out[:, :, -1], rtol=1e-4)
    # Nothing is too large for states as they are, either.
    _, state = reference.regla(**arguments)
    np.testing.assert_allclose(regla(**arguments)[1], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["key", "value"])
def test_parts_of_large_keys_hand_scales_on(rng, axis):
    arguments = large(rng, axis, heads=(2, 2, 2), spread=150.0)
    case = TestPlain() if axis == "key" else TestByValues()
    whole = np.zeros((1, 2))
    expected, last = regla(**arguments, log_scale=whole)
    state, scale, outs = np.zeros((1, 2, 8, 12), np.float32), np.full((1, 2), -np.inf), []
    for part in (slice(0, 20), slice(20, 20), slice(20, 21), slice(21, 22), slice(22, 60)):
        rows = case.rows(arguments, part)
        outs.append(regla(**rows, initial_state=state, out_state=state, log_scale=scale)[0])
    np.testing.assert_allclose(np.concatenate(outs, axis=2), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scale, whole, rtol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-6)


def test_large_keys_of_packed_sequences(rng):
    arguments, bounds = large(rng, "key", spread=250.0), np.array([0, 1, 30, 30, 60])
    state, scale = rng.standard_normal((4, 2, 8, 12)).astype(np.float32), 100 * rng.standard_normal((4, 2))
    check_large(arguments, initial_state=state, log_scale=scale, cu_seqlens=bounds)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_scale_of_minus_infinity_is_a_state_of_zeros(rng, in_place):
    """Whatever numbers stand there."""
    arguments = large(rng, "key", spread=150.0)
    state, scale = rng.standard_normal((1, 2, 8, 12)).astype(np.float32), np.array([[-np.inf, 1.0]])
    state[0, 0, 0, 0] = np.nan
    before = state.copy()
    before[:, 0] = 0
    expected = regla(**arguments, initial_state=before, log_scale=(other := scale.copy()))
    found = regla(**arguments, initial_state=state, log_scale=scale, **({"out_state": state} if in_place else {}))
    for ours, theirs in zip((*found, scale), (*expected, other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not in_place or found[1] is state


def test_eps_is_of_outputs_as_they_are(rng):
    for offset in (-6.0, 0.0, 6.0):
        arguments = large(rng, "key", offset=offset)
        found, expected = (f(**arguments, eps=1e-4)[0] for f in (regla, reference.regla))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_outputs_of_tiny_numbers_get_the_norm_of_others(rng):
    # e^-86 times values: the factor that brings such a row to length 1 is no float.
    q, k = (np.full((1, 1, 3, 4), -1000, np.float32) for _ in range(2))
    for x, first in ((q, 90), (k, -86)):
        x[..., :2] = first, 0
    v = (0.01 * rng.standard_normal(q.shape)).astype(np.float32)
    gates = {name: np.full_like(q, value) for name, value in (("gate", 0.9), ("refine", 0.5))}
    arguments = {"q": q, "k": k, "v": v, **gates, "norm": "rms"}
    found, expected = regla(**arguments, eps=0.0)[0], reference.regla(**arguments, eps=0.0)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_keys_of_minus_infinity_are_none(rng):
    arguments = {**large(rng, "key"), "norm": "none"}
    arguments["k"][:, :, 10:20] = -np.inf
    TestPlain.case.check(arguments)


def test_states_that_float32_does_not_hold(rng):
    arguments = large(rng, "key", offset=200.0)
    out, state = np.zeros((1, 4, 60, 12), np.float32), np.zeros((1, 2, 8, 12), np.float32)
    with pytest.raises(ValueError, match=r"k: got terms of e\^20\d in states, expected at most e\^80 \(or log_scale"):
        regla(**arguments, out=out, out_state=state)
    scale = np.full((1, 2), 7.0)
    with pytest.raises(ValueError, match=r"k: got terms of e\^20\d in outputs, expected at most e\^80 \(or a norm"):
        regla(**{**arguments, "norm": "none"}, out=out, out_state=state, log_scale=scale)
    assert not out.any() and not state.any() and (scale == 7).all()


def test_scales_that_do_not_fit(rng):
    arguments = large(rng, "key")
    state = np.zeros((1, 2, 8, 12), np.float32)

    def bad(match, scale, error=ValueError):
        with pytest.raises(error, match=match):
            regla(**arguments, initial_state=state, log_scale=scale)

    bad("log_scale: got shape", np.zeros((2, 2)))
    bad("log_scale: got dtype float32", np.zeros((1, 2), np.float32), TypeError)
    bad("log_scale: got NaN or infinity", np.full((1, 2), np.nan))
    bad("log_scale: got NaN or infinity", np.full((1, 2), np.inf))


def test_tensors_of_torch(rng):
    torch = pytest.importorskip("torch")
    arguments = large(rng, "key", spread=150.0)
    scale = np.zeros((1, 2))
    out, state = regla(**arguments, log_scale=scale)
    tensors = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    own = {"log_scale": torch.zeros((1, 2), dtype=torch.float64), "out_state": torch.zeros((1, 2, 8, 12))}
    found, last = regla(**tensors, **own)
    assert last is own["out_state"]
    for tensor, expected in ((found, out), (last, state), (own["log_scale"], scale)):
        np.testing.assert_array_equal(tensor.numpy(), expected)


def test_options_that_do_not_fit(rng):
    arguments = TestPlain.case.arguments(rng, length=5)

    def bad(match, **changes):
        with pytest.raises(ValueError, match=match):
            regla(**{**arguments, **changes})

    bad("gate_axis: got 'row'", gate_axis="row")
    bad("norm: got 'batch'", norm="batch")
    bad("norm: got 'none' with gain", gain=np.ones(12))
    bad("eps: got -1", eps=-1.0)
    bad("gain: got shape", norm="rms", gain=np.ones(5))
    bad("gate: got a number outside 0 to 1", gate=1.2 * np.ones_like(arguments["gate"]))
