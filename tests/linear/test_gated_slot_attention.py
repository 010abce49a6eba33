"""`gated_slot_attention`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.linear import gated_slot_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, lay


def arguments(rng, length=40, *, batch=2, heads=(4, 2), slots=6, dim=8, value_dim=12, dtype=F32, layout="contiguous"):
    shapes = [(batch, heads[0], length, dim), (batch, heads[1], length, dim), (batch, heads[1], length, value_dim)]
    q, k, v = (lay(rng.standard_normal(shape).astype(dtype), layout) for shape in shapes)
    return q, k, v, (-rng.random((batch, heads[1], length, slots))).astype(F32)


def slots_of(rng, given, sequences=None):
    q, k, v, g = given
    n = sequences or len(q)
    shapes = [(n, k.shape[1], k.shape[3], g.shape[3]), (n, k.shape[1], g.shape[3], v.shape[3])]
    return tuple(rng.standard_normal(shape).astype(F32) for shape in shapes)


def check(given, state=None, **options):
    """A call against the oracle, outputs and slots."""
    plain = {name: x for name, x in options.items() if name in ("cu_seqlens", "scale")}
    before = None if state is None else tuple(x.copy() for x in state)
    out, last = gated_slot_attention(*given, initial_state=state, **options)
    pick = [lambda *a, **o: reference.gated_slot_attention(*a, **o)[0]]
    pick += [lambda *a, i=i, **o: reference.gated_slot_attention(*a, **o)[1][i] for i in (0, 1)]
    for found, oracle in zip((out, *last), pick, strict=True):
        dtype = found.dtype
        expected, allowed = tolerances.perturbed(oracle, given, {"initial_state": before, **plain}, dtype)
        assert found.shape == expected.shape
        error = np.abs(found.astype(np.float64) - expected)
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"
    assert out.dtype == given[0].dtype
    return out, last


@pytest.mark.parametrize("length", [1, 2, 13, 65])
def test_reference(rng, isa, length):
    given = arguments(rng, length)
    check(given)
    check(given, slots_of(rng, given))


@pytest.mark.parametrize("dim, slots, value_dim", [(1, 1, 1), (33, 40, 2), (5, 17, 70)])
def test_sizes(rng, isa, dim, slots, value_dim):
    given = arguments(rng, 30, batch=1, dim=dim, slots=slots, value_dim=value_dim)
    check(given, slots_of(rng, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 50])
def test_dtypes(rng, isa, dtype, length):
    check(arguments(rng, length, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(arguments(rng, layout=layout))


@pytest.mark.parametrize("chunk_size", [1, 12, 31, 64, 256])
def test_chunk_sizes(rng, threads, chunk_size):
    check(arguments(rng, 100, batch=1), chunk_size=chunk_size)


def test_steps_are_the_rows_of_a_prefill(rng):
    given = arguments(rng, 20)
    out, last = gated_slot_attention(*given)
    state = tuple(np.zeros_like(x) for x in last)
    for t in range(20):
        row, after = gated_slot_attention(*(x[:, :, t : t + 1] for x in given), initial_state=state, out_state=state)
        assert all(x is y for x, y in zip(after, state, strict=True))
        np.testing.assert_allclose(row, out[:, :, t : t + 1], atol=1e-5)
    for x, y in zip(state, last, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("split", [0, 1, 48, 99])
def test_slots_hand_over(rng, split):
    given = arguments(rng, 100)
    out, last = gated_slot_attention(*given)
    first, state = gated_slot_attention(*(x[:, :, :split] for x in given))
    second, state = gated_slot_attention(*(x[:, :, split:] for x in given), initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=2), out, atol=1e-5)
    for x, y in zip(state, last, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_packed_sequences(rng):
    given = arguments(rng, 100, batch=1)
    check(given, slots_of(rng, given, 4), cu_seqlens=np.array([0, 30, 30, 31, 100]))


def test_slots_that_are_overwritten_in_turn_are_softmax_attention(rng):
    q, k, v, _ = arguments(rng, 30, batch=1)
    g = np.zeros((1, 2, 30, 30), F32)
    g[..., np.arange(30), np.arange(30)] = -np.inf
    out, (keys, values) = gated_slot_attention(q, k, v, g)
    np.testing.assert_allclose(keys.swapaxes(-1, -2), k, atol=1e-6)
    np.testing.assert_allclose(values, v, atol=1e-6)
    np.testing.assert_allclose(out[:, :, -1:], la.attention(q[:, :, -1:], k, v), atol=1e-5)


def test_values_that_never_change(rng):
    q, k, v, g = arguments(rng, 300)
    out, _ = gated_slot_attention(q, k, np.full_like(v, 2.5), g)
    np.testing.assert_allclose(out[:, :, 250:], 2.5, rtol=1e-5)


def test_without_a_batch_and_out(rng):
    given = arguments(rng, 30, batch=1)
    out, last = gated_slot_attention(*given)
    to = np.empty_like(out[0])
    alone, state = gated_slot_attention(*(x[0] for x in given), out=to)
    assert alone is to
    np.testing.assert_array_equal(alone, out[0])
    for x, y in zip(state, last, strict=True):
        np.testing.assert_array_equal(x, y[0])


def test_wrong_arguments(rng):
    q, k, v, g = arguments(rng)
    with pytest.raises(ValueError, match="g: got shape"):
        gated_slot_attention(q, k, v, g[0])
    with pytest.raises(ValueError, match="g: got a number above 0 or NaN"):
        gated_slot_attention(q, k, v, -g)
    with pytest.raises(ValueError, match="k: got length"):
        gated_slot_attention(q, k[:, :, :-1], v, g)
    with pytest.raises(TypeError, match="v: got dtype"):
        gated_slot_attention(q, k, v.astype(int), g)
    with pytest.raises(TypeError, match="initial_state: got"):
        gated_slot_attention(q, k, v, g, initial_state=np.zeros(3))
    with pytest.raises(ValueError, match="initial_state: got shape"):
        gated_slot_attention(q, k, v, g, initial_state=(np.zeros((2, 2, 8, 5)), None))
