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
