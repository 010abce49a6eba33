"""`diagonal_scan_backward`: gradients beside the adjoint scan, and that beside differences."""

import numpy as np
import pytest

import tolerances
from longattn.linear import diagonal_scan, diagonal_scan_backward
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32
from running import on_threads


def arguments(rng, *, batch=2, length=70, channels=9, states=3, is_complex=False, sequences=None, dtype=F32):
    """Random arguments by name."""

    def weights():
        return rng.standard_normal((channels, states)) + (1j * rng.standard_normal((channels, states)) * is_complex)

    angles = rng.uniform(-1, 1, (channels, states)) * (1j if is_complex else 0)
    decay = rng.uniform(0.2, 1, (channels, states)) * np.exp(angles)
    found = {"x": rng.standard_normal((batch, length, channels)).astype(dtype), "decay": decay}
    found |= {"b": weights(), "c": weights(), "skip": rng.standard_normal(channels)}
    found["initial_state"] = rng.standard_normal((sequences or batch, channels, states)) + 0 * angles
    kinds = {name: (np.complex64 if np.iscomplexobj(w) and is_complex else F32) for name, w in found.items()}
    return {name: w if name == "x" else (w if is_complex else w.real).astype(kinds[name]) for name, w in found.items()}


def names(found):
    results = {"x": found.dx, "decay": found.d_decay, "b": found.db, "c": found.dc, "skip": found.d_skip}
    return {**results, "initial_state": found.d_initial_state}


def wide(found):
    return {n: w.astype(np.complex128 if np.iscomplexobj(w) else np.float64) for n, w in found.items()}


def compare(rng, given, cu_seqlens=None):
    out, state = diagonal_scan(**given, cu_seqlens=cu_seqlens)
    d_out = rng.standard_normal(out.shape).astype(given["x"].dtype)
    d_state = rng.standard_normal(state.shape).astype(state.dtype)
    ours = names(diagonal_scan_backward(d_out, d_state, **given, cu_seqlens=cu_seqlens))
    exact = {"d_out": d_out.astype(np.float64), "d_state": d_state, **wide(given)}
    expected = reference.diagonal_scan_backward(**exact, cu_seqlens=cu_seqlens)
    for name, x in given.items():
        assert ours[name].shape == x.shape and ours[name].dtype == x.dtype, name
        theirs = expected[name] if np.iscomplexobj(x) else expected[name].real
        for part in ("real", "imag") if np.iscomplexobj(x) else ("real",):
            found = np.ascontiguousarray(getattr(ours[name], part) if np.iscomplexobj(x) else ours[name])
            tolerances.check_gradients(found, getattr(theirs, part), 8 * out.shape[1] + 16)


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_oracle_is_the_slope(rng, is_complex):
    """Central differences in random directions, of real and of imaginary parts."""

    def forward(x, decay, b, c, skip, initial_state):
        h, rows = initial_state, []
        for t in range(x.shape[1]):
            h = decay * h + b * x[:, t, :, None]
            rows.append((c * h).sum(-1).real + skip * x[:, t])
        return np.stack(rows, 1), h

    given = wide(arguments(rng, length=5, channels=2, states=2, is_complex=is_complex))
    out, state = forward(**given)
    d_out = rng.standard_normal(out.shape)
    d_state = rng.standard_normal(state.shape) + (1j * rng.standard_normal(state.shape) if is_complex else 0)
    gradients = reference.diagonal_scan_backward(d_out, d_state, **given)
    for name, x in given.items():
        for unit in (1, 1j) if np.iscomplexobj(x) else (1,):
            direction = unit * rng.standard_normal(x.shape)
            ends = [forward(**{**given, name: x + sign * 1e-6 * direction}) for sign in (1, -1)]
            changes = [(a - b) / 2e-6 for a, b in zip(*ends, strict=True)]
            slope = (changes[0] * d_out).sum() + (changes[1] * d_state.conj()).sum().real
            np.testing.assert_allclose((gradients[name] * direction.conj()).sum().real, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_complex", [False, True])
def test_reference(rng, isa, is_complex):
    compare(rng, arguments(rng, is_complex=is_complex))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_lengths(rng, is_complex, length):
    compare(rng, arguments(rng, length=length, is_complex=is_complex))


@pytest.mark.parametrize("channels, states", [(1, 1), (64, 4), (65, 5), (130, 2)])
def test_sizes(rng, isa, channels, states):
    compare(rng, arguments(rng, channels=channels, states=states, is_complex=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    compare(rng, arguments(rng, dtype=dtype))


def test_packed_sequences(rng):
    bounds = np.array([0, 3, 3, 69, 70])
    compare(rng, arguments(rng, batch=1, sequences=4, is_complex=True), cu_seqlens=bounds)


def test_no_rows_and_no_channels(rng):
    given = arguments(rng, length=0)
    d_state = rng.standard_normal((2, 9, 3)).astype(F32)
    ours = diagonal_scan_backward(given["x"], d_state, **given)
    np.testing.assert_array_equal(ours.d_initial_state, d_state)
    assert not ours.d_decay.any() and not ours.d_skip.any()
    given = arguments(rng, channels=0)
    assert diagonal_scan_backward(given["x"], None, **given).dx.shape == (2, 70, 0)


def test_threads_do_not_matter(rng):
    given = arguments(rng, channels=130, is_complex=True)
    d_out = rng.standard_normal(given["x"].shape).astype(F32)
    results = [names(r) for r in on_threads(lambda: diagonal_scan_backward(d_out, None, **given))]
    for other in results[1:]:
        for name, x in other.items():
            np.testing.assert_array_equal(x, results[0][name])


def test_wrong_arguments(rng):
    given = arguments(rng)

    def bad(match, error=ValueError, d=given["x"], d_state=None, **changes):
        with pytest.raises(error, match=match):
            diagonal_scan_backward(d, d_state, **{**given, **changes})

    bad("d_out: got shape", d=given["x"][:, 1:])
    bad("d_state: got shape", d_state=np.zeros((2, 9, 4), F32))
    bad("d_state: got complex", TypeError, d_state=np.zeros((2, 9, 3), np.complex64))
    bad("decay: got a magnitude above 1", decay=given["decay"] + 1)
    bad("b: got shape", b=given["b"][:, 1:])
    bad("x: got dtype", TypeError, x=given["x"].astype(int))
