"""`grouped_linear_attention_local_conv`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import grouped_linear_attention_local_conv, linear_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, lay


def arguments(
    rng, length=100, *, batch=2, heads=(4, 2, 2), dim=8, value_dim=12, taps=3, dtype=F32, layout="contiguous"
):
    widths = (dim, dim, value_dim)
    shapes = [(batch, n, length, width) for n, width in zip(heads, widths, strict=True)]
    q, k, v = (lay(rng.standard_normal(shape).astype(dtype), layout) for shape in shapes)
    return q, k, v, rng.standard_normal((heads[2], taps)).astype(F32)


def check(given, **options):
    out, state = grouped_linear_attention_local_conv(*given, **options)
    expected = reference.grouped_linear_attention_local_conv(*given, **options)
    q, _, v, w = given
    sizes = np.abs(np.asarray(v, np.float64)).cumsum(axis=-2).max() * (1 + np.abs(w).max())
    assert out.dtype == q.dtype
    tolerances.check_linear(out, expected, sizes, q.shape[-1] + q.shape[-2])
    return out, state


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("sim_local", ["relu2", "linear"])
def test_reference(rng, isa, length, sim_local):
    check(arguments(rng, length), group_size=16, sim_local=sim_local)


@pytest.mark.parametrize("group_size", [1, 7, 64, 252])
def test_groups(rng, threads, group_size):
    check(arguments(rng, 300, batch=1), group_size=group_size)


@pytest.mark.parametrize("dim, value_dim, taps", [(1, 1, 1), (33, 2, 5), (5, 70, 40)])
def test_sizes(rng, isa, dim, value_dim, taps):
    check(arguments(rng, 30, dim=dim, value_dim=value_dim, taps=taps), group_size=12)


@pytest.mark.parametrize("heads", [(2, 1, 2), (6, 1, 3)])
def test_heads(rng, heads):
    check(arguments(rng, 50, heads=heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(arguments(rng, 50, dtype=dtype), group_size=16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(arguments(rng, 50, layout=layout), group_size=16)


@pytest.mark.parametrize("split", [0, 1, 15, 16, 50, 99])
def test_states_hand_over(rng, split):
    q, k, v, w = arguments(rng)
    out, last = grouped_linear_attention_local_conv(q, k, v, w, group_size=16)
    parts = [tuple(x[:, :, rows] for x in (q, k, v)) for rows in (slice(0, split), slice(split, None))]
    first, state = grouped_linear_attention_local_conv(*parts[0], w, group_size=16)
    second, state = grouped_linear_attention_local_conv(*parts[1], w, group_size=16, initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=2), out, rtol=1e-5, atol=1e-5)
    for name in ("sums", "keys", "values", "before"):
        np.testing.assert_allclose(getattr(state, name), getattr(last, name), rtol=1e-5, atol=1e-5)


def test_steps_are_the_rows_of_a_prefill(rng, isa):
    q, k, v, w = arguments(rng, 40)
    out, _ = grouped_linear_attention_local_conv(q, k, v, w, group_size=16)
    state = None
    for t in range(40):
        rows = (x[:, :, t : t + 1] for x in (q, k, v))
        row, state = grouped_linear_attention_local_conv(*rows, w, group_size=16, initial_state=state)
        np.testing.assert_allclose(row, out[:, :, t : t + 1], rtol=1e-5, atol=1e-5)


def test_linear_similarities_know_no_groups(rng):
    q, k, v, _ = arguments(rng)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]
    expected, _ = linear_attention(*unit, v, normalize=False)
    for size in (1, 16, 100):
        out, _ = grouped_linear_attention_local_conv(q, k, v, group_size=size, sim_local="linear")
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_rows_see_nothing_of_later_ones(rng):
    q, k, v, w = arguments(rng)
    out, _ = grouped_linear_attention_local_conv(q, k, v, w, group_size=16)
    for x in (q, k, v):
        x[:, :, 70:] = 9
    changed, _ = grouped_linear_attention_local_conv(q, k, v, w, group_size=16)
    np.testing.assert_array_equal(changed[:, :, :70], out[:, :, :70])


def test_without_a_batch_and_out(rng):
    q, k, v, w = arguments(rng, batch=1)
    out, _ = grouped_linear_attention_local_conv(q, k, v, w)
    to = np.empty_like(out[0])
    alone, _ = grouped_linear_attention_local_conv(q[0], k[0], v[0], w, out=to)
    assert alone is to
    np.testing.assert_array_equal(alone, out[0])


def test_wrong_arguments(rng):
    q, k, v, w = arguments(rng)
    _, state = grouped_linear_attention_local_conv(q, k, v, w)

    def bad(match, error=ValueError, given=(q, k, v, w), **options):
        with pytest.raises(error, match=match):
            grouped_linear_attention_local_conv(*given, **options)

    bad("group_size: got 0", group_size=0)
    bad("group_size: got 253", group_size=253)
    bad("sim_local: got 'exp'", sim_local="exp")
    bad("weight: got shape", given=(q, k, v, w[:1]))
    bad("v: got shape", given=(q, k, v[:, :, :-1], w))
    bad("q: got dtype", TypeError, given=(q.astype(int), k, v, w))
    bad("initial_state: got keys", group_size=16, initial_state=state)
    bad("initial_state: got before", given=(q, k, v, w[:, :1]), initial_state=state)
    bad("initial_state: got tuple", TypeError, initial_state=(1, 2))
