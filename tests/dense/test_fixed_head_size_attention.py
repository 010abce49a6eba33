"""`fixed_head_size_attention` with its projections, and `score_rank`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import fixed_head_size_attention, score_rank
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, lay, normal


def layer(rng, *, batch=2, rows=9, width=24, heads=3, kv_heads=3, dim=16, value_dim=None, dtype=F32, source=None):
    """Input and projections whose products are of order 1."""
    value_dim = dim if value_dim is None else value_dim
    source = width if source is None else source

    def projection(inside, outside):
        return normal(rng, (inside, outside), dtype, spread=inside**-0.5)

    return {
        "x": normal(rng, (batch, rows, width), dtype),
        "wq": projection(width, heads * dim),
        "wk": projection(source, kv_heads * dim),
        "wv": projection(source, kv_heads * value_dim),
        "wo": projection(heads * value_dim, width),
    }


def check(a, *, heads, **options):
    out = fixed_head_size_attention(**a, heads=heads, **options)
    assert out.dtype == a["x"].dtype
    expected = reference.fixed_head_size_attention(**a, heads=heads, **options)
    shown = {name: options[name] for name in ("context", "scale") if name in options}
    tolerance = tolerances.projected_attention(**a, heads=heads, **shown)
    tolerances.stored(tolerance, a["x"].dtype).check(out, expected)
    return out


@pytest.mark.parametrize("dim", [4, 8, 33, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (5, 1)])
def test_reference(rng, isa, *, dim, heads, kv_heads):
    a = layer(rng, heads=heads, kv_heads=kv_heads, dim=dim)
    check(a, heads=heads)
    check(a, heads=heads, causal=True)


def test_values_of_another_width(rng, isa):
    check(layer(rng, dim=16, value_dim=5), heads=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(layer(rng, dtype=dtype), heads=3, causal=True)


def test_cross_attention(rng, isa):
    a = layer(rng, source=10, heads=4, kv_heads=2)
    check(a, heads=4, context=normal(rng, (2, 31, 10)))


def test_without_a_batch(rng):
    a = layer(rng)
    one = a | {"x": a["x"][0]}
    out = check(one, heads=3, window=(3, 2), softcap=3.0)
    tolerance = tolerances.projected_attention(**a, heads=3)
    tolerance.check(out, fixed_head_size_attention(**a, heads=3, window=(3, 2), softcap=3.0)[0])


@pytest.mark.parametrize("layout", ["blhd", "sliced", "fused", "reversed", "stepped", "misaligned"])
def test_layouts(rng, layout):
    a = layer(rng)
    laid = {name: lay(x, layout) if layout != "blhd" or x.ndim == 3 else x for name, x in a.items()}
    out, expected = (fixed_head_size_attention(**b, heads=3) for b in (laid, a))
    tolerances.projected_attention(**a, heads=3).check(out, np.asarray(expected, np.float64))


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    a = layer(rng)
    out = fixed_head_size_attention(**{name: torch.from_numpy(x) for name, x in a.items()}, heads=3)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), fixed_head_size_attention(**a, heads=3))


# Identities


def test_a_head_size_of_c_over_h_is_standard_attention(rng, isa):
    a = layer(rng, width=24, heads=3, dim=8)
    q, k, v = ((a["x"] @ a[name]).reshape(2, 9, 3, 8).swapaxes(1, 2) for name in ("wq", "wk", "wv"))
    expected = la.attention(q, k, v, causal=True).swapaxes(1, 2).reshape(2, 9, 24) @ a["wo"]
    out = fixed_head_size_attention(**a, heads=3, causal=True)
    tolerances.projected_attention(**a, heads=3).check(out, np.asarray(expected, np.float64))


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_rank_is_at_most_the_head_size(rng, dim):
    q, k = normal(rng, (2, 4, 40, dim)), normal(rng, (2, 2, 50, dim))
    found = score_rank(q, k)
    assert (found.rank == dim).all() and found.singular_values.shape == (2, 4, dim)
    scores = q.astype(np.float64) @ np.repeat(k, 2, axis=1).astype(np.float64).swapaxes(-1, -2)
    spectrum = np.linalg.svd(scores, compute_uv=False)
    assert (spectrum[..., dim:] < 1e-10 * spectrum[..., :1]).all()


@pytest.mark.parametrize("more", [1, 17])
def test_widening_by_zeros_changes_nothing(rng, isa, more):
    a = layer(rng, heads=3, dim=8)
    wide = dict(a)
    for name in ("wq", "wk"):
        columns = a[name].reshape(24, 3, 8)
        wide[name] = np.concatenate((columns, np.zeros((24, 3, more), F32)), axis=-1).reshape(24, -1)
    out = fixed_head_size_attention(**wide, heads=3, scale=8**-0.5)
    tolerance = tolerances.projected_attention(**a, heads=3)
    tolerance.check(out, np.asarray(fixed_head_size_attention(**a, heads=3), np.float64))


# Rank


@pytest.mark.parametrize(("rows", "keys", "dim"), [(20, 30, 8), (5, 30, 8), (30, 5, 8), (4, 3, 16), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spectrum_is_that_of_the_matrix(rng, *, rows, keys, dim, dtype):
    q, k = normal(rng, (6, rows, dim), dtype), normal(rng, (2, keys, dim), dtype)
    found = score_rank(q, k)
    scores = q.astype(np.float64) @ np.repeat(k, 3, axis=0).astype(np.float64).swapaxes(-1, -2)
    spectrum = np.linalg.svd(scores, compute_uv=False)
    least = min(rows, keys, dim)
    assert found.singular_values.shape == (6, least)
    np.testing.assert_allclose(found.singular_values, spectrum[:, :least], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(found.rank, np.linalg.matrix_rank(scores))
    stable = (scores**2).sum(axis=(-1, -2)) / spectrum[:, 0] ** 2
    np.testing.assert_allclose(found.stable_rank, stable, rtol=1e-10)


def test_known_ranks(rng):
    """Two directions of lengths 3 and 1, one direction, and zeros."""
    q = np.zeros((3, 10, 6), F32)
    k = np.zeros((3, 12, 6), F32)
    q[0, 0, 0], q[0, 1, 1], k[0, 0, 0], k[0, 1, 1] = 3, 1, 1, 1
    q[1], k[1] = np.outer(np.arange(10), np.ones(6)), 1.0
    found = score_rank(q, k)
    np.testing.assert_array_equal(found.rank, [2, 1, 0])
    np.testing.assert_allclose(found.stable_rank, [10 / 9, 1, 0], atol=1e-12)
    np.testing.assert_array_equal(score_rank(q, k, rtol=0.5).rank, [1, 1, 0])


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros(24, F32)}, ValueError, r"x: got shape \(24,\), expected \[B, L, C\] or \[L, C\]"),
        ({"x": np.zeros((2, 9, 24))}, TypeError, r"x: got dtype float64"),
        ({"x": np.zeros((2, 9, 23), F32)}, ValueError, r"wq: got shape \(24, 48\), expected \[23, heads \* width\]"),
        ({"heads": 5}, ValueError, r"heads: got 5, expected a divisor of the 48 columns of wq"),
        ({"heads": 3.0}, TypeError, r"heads: got 3.0, expected an integer"),
        ({"wk": np.zeros((24, 40), F32)}, ValueError, r"wk: got 40 columns, expected a multiple of the head size 16"),
        ({"wk": np.zeros((24, 32), F32)}, ValueError, r"q: got 3 heads, expected a positive multiple of the 2 heads"),
        ({"wv": np.zeros((24, 47), F32)}, ValueError, r"wv: got 47 columns, expected a positive multiple of 3 heads"),
        ({"wo": np.zeros((40, 24), F32)}, ValueError, r"wo: got shape \(40, 24\), expected \[48, C\]"),
        ({"context": np.zeros((1, 5, 24), F32)}, ValueError, r"context: got shape \(1, 5, 24\), expected batch and"),
        ({"context": np.zeros((2, 5, 20), F32)}, ValueError, r"wk: got shape \(24, 48\), expected \[20, heads"),
        ({"return_lse": True}, TypeError, r"return_lse: got one, expected none"),
        ({"out": np.zeros((2, 9, 24), F32)}, TypeError, r"out: got one, expected none"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        fixed_head_size_attention(**layer(rng) | {"heads": 3} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.zeros((10, 6), F32)}, ValueError, r"q: got shape \(10, 6\)"),
        ({"k": np.zeros((2, 0, 6), F32)}, ValueError, r"k: got shape \(2, 0, 6\)"),
        ({"k": np.zeros((2, 9, 5), F32)}, ValueError, r"k: got shape \(2, 9, 5\), expected batch and head_dim of q"),
        ({"k": np.zeros((3, 9, 6), F32)}, ValueError, r"q: got 4 heads, expected a positive multiple of the 3"),
        ({"k": np.full((2, 9, 6), np.nan, BF16)}, ValueError, r"k: got numbers that are not finite"),
        ({"q": np.zeros((4, 10, 6))}, TypeError, r"q: got dtype float64"),
        ({"rtol": 2.0}, ValueError, r"rtol: got 2.0, expected 0 to 1"),
        ({"rtol": "a"}, TypeError, r"rtol: got 'a'"),
    ],
)
def test_bad_ranks(change, error, message):
    with pytest.raises(error, match=message):
        score_rank(**{"q": np.ones((4, 10, 6), F32), "k": np.ones((2, 9, 6), F32)} | change)
