"""`generalized_gaussian_bias_attention`: the prior over relative position, and the logarithmic scale."""

from itertools import pairwise

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import generalized_gaussian_bias_attention as gaussian_attention
from longattn.dense import generalized_gaussian_table
from longattn.reference import dense as reference
from random_arrays import DTYPES, F32, LAYOUTS, qkv

#: Priors whose size stays moderate over the lengths of these tests.
PRIOR = {
    "inverse_scale": np.array([0.5, 0.05, 0.1, 1.0]),
    "shape": np.array([1.0, 2.0, 0.3, -0.2]),
    "loc": np.array([0.0, -3.5, 2.0, 0.25]),
}


def check(q, k, v, *, offset=60.0, **options):
    out, lse = gaussian_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    options.pop("table", None)
    expected, expected_lse = reference.generalized_gaussian_bias_attention(q, k, v, return_lse=True, **options)
    scale = q.shape[-1] ** -0.5 * (1 if options.get("ssmax") is None else 2 * np.log(k.shape[-2] + 2))
    tolerances.attention(q, k, v, scale=scale, offset=offset).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("rows", "keys"), [(1, 120), (9, 45), (40, 40), (130, 130), (5, 3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ssmax", [None, 0.7], ids=["plain", "ssmax"])
def test_reference(rng, isa, *, rows, keys, causal, ssmax):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=24, value_dim=20)
    check(q, k, v, causal=causal, ssmax=ssmax, **PRIOR)


def test_defaults(rng, isa):
    q, k, v = qkv(rng, heads=8, kv_heads=2, rows=30, keys=50)
    check(q, k, v)
    check(q, k, v, ssmax=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*qkv(rng, rows=3, keys=70, dim=32, q_dtype=dtype), **PRIOR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=3, keys=70, dim=32, layout=layout), ssmax=1.0, **PRIOR)


def test_options_without_a_batch(rng, isa):
    q, k, v = (x[0] for x in qkv(rng, rows=6, keys=50))
    ssmax = np.array([1.0, 0.5, 0.0, 1.5])
    sinks = np.array([0.0, 1.0, -1.0, 2.0], F32)
    check(q, k, v, window=(20, -1), ssmax=ssmax, sinks=sinks, scale=0.2, **PRIOR)
    check(q, k, v, window=(20, 3), causal=False, ssmax=ssmax, scale=0.2, **PRIOR)


def test_documents_are_counted_by_the_caller(rng, isa):
    """Three documents in one row: each one alone is the same."""
    bounds = np.array([0, 10, 17, 40])
    q, k, v = qkv(rng, rows=40, keys=40, dim=8)
    ids = np.repeat(np.arange(3), np.diff(bounds))
    counts = np.arange(40) - bounds[ids] + 1
    out = gaussian_attention(q, k, v, segments=(ids, ids), ssmax=1.0, visible=counts, **PRIOR)
    for a, b in pairwise(bounds):
        alone = gaussian_attention(*(x[:, :, a:b] for x in (q, k, v)), ssmax=1.0, **PRIOR)
        tolerances.same_storage(q, k, v, scale=4 * 8**-0.5, offset=60).check(out[:, :, a:b], alone)
    several = gaussian_attention(q, k, v, segments=(ids, ids), ssmax=1.0, visible=counts[None], **PRIOR)
    np.testing.assert_array_equal(several, out)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_the_prior_has_a_floor(rng, isa, eps):
    """A negative shape penalises the own position without bound: a row that sees nothing else sees that."""
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=5, keys=5)
    table = generalized_gaussian_table(2, 5, shape=-3.0, inverse_scale=1.0, eps=eps)
    np.testing.assert_array_equal(table[:, -1], [-1e9, -1e9])
    np.testing.assert_allclose(table[:, -2], [-1, -1], atol=1e-4)
    out, lse = gaussian_attention(q, k, v, shape=-3.0, inverse_scale=1.0, eps=eps, return_lse=True)
    np.testing.assert_allclose(out[:, :, 0], v[:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(lse[:, :, 0], -1e9)
    assert np.isfinite(lse).all()
    expected = reference.generalized_gaussian_bias_attention(q, k, v, shape=-3.0, inverse_scale=1.0, eps=eps)
    tolerances.attention(q, k, v, offset=2).check(out, expected)


def test_table(rng):
    table = generalized_gaussian_table(4, 30, **PRIOR)
    assert table.dtype == np.float32 and table.shape == (4, 30)
    for h in range(4):
        scale, shape, loc = (PRIOR[name][h] for name in ("inverse_scale", "shape", "loc"))
        expected = [-((abs((-d - loc) * scale) + 1e-5) ** shape) for d in range(29, -1, -1)]
        np.testing.assert_allclose(table[h], expected, rtol=1e-6)


# Identities


def test_shape_1_is_alibi(rng, isa):
    q, k, v = qkv(rng, heads=8, kv_heads=2, rows=20, keys=70)
    slopes = 2.0 ** -np.arange(1, 9)
    out, lse = gaussian_attention(q, k, v, eps=0.0, return_lse=True)
    expected, expected_lse = la.attention(q, k, v, causal=True, alibi_slopes=slopes, return_lse=True)
    tolerances.same_storage(q, k, v, offset=35).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("change", [{"shape": 0.0}, {"inverse_scale": 0.0}], ids=["shape 0", "inverse scale 0"])
def test_a_constant_prior_is_no_positions(rng, isa, change):
    q, k, v = qkv(rng, rows=20, keys=70)
    out, lse = gaussian_attention(q, k, v, return_lse=True, **change)
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    constant = -1.0 if "shape" in change else -1e-5
    tolerances.same_storage(q, k, v, offset=1).check(out, expected, lse, expected_lse + constant)


def test_shape_2_is_a_gaussian_window(rng, isa):
    """Equal keys, so that the weights are the prior alone."""
    q, k, v = qkv(rng, heads=1, kv_heads=1, rows=1, keys=40)
    k[:] = 0
    out = gaussian_attention(q, k, v, shape=2.0, inverse_scale=0.2, eps=0.0)
    weights = np.exp(-((np.arange(39, -1, -1) * 0.2) ** 2))
    expected = weights @ v[0, 0].astype(np.float64) / weights.sum()
    tolerances.attention(q, k, v, offset=65).check(out[0, 0, 0], expected)


def test_ssmax_that_comes_to_1_is_the_plain_method(rng, isa):
    """`ssmax_h * ln(n_i)` is 1 where every query sees 7 keys and `ssmax_h` is `1 / ln 7`."""
    q, k, v = qkv(rng, rows=9, keys=30)
    plain, plain_lse = gaussian_attention(q, k, v, return_lse=True, **PRIOR)
    seven = np.full(9, 7)
    out, lse = gaussian_attention(q, k, v, ssmax=1 / np.log(7), visible=seven, return_lse=True, **PRIOR)
    tolerances.same_storage(q, k, v, offset=60).check(out, plain, lse, plain_lse)


def test_ssmax_leaves_the_prior_as_it_is(rng, isa):
    """With a content part of 0 the weights are those of the prior, whatever `ssmax` is."""
    q, k, v = qkv(rng, rows=9, keys=30)
    q[:] = 0
    out, scaled = (gaussian_attention(q, k, v, ssmax=s, **PRIOR) for s in (None, 3.0))
    np.testing.assert_array_equal(scaled, out)


@pytest.mark.parametrize("ssmax", [None, 0.7], ids=["plain", "ssmax"])
def test_steps_from_one_table_are_the_prefill(rng, isa, ssmax):
    q, k, v = qkv(rng, rows=20, keys=20, dim=32)
    whole = gaussian_attention(q, k, v, ssmax=ssmax, **PRIOR)
    table = generalized_gaussian_table(4, 100, **PRIOR)
    tolerance = tolerances.same_storage(q, k, v, offset=60, scale=3 * 32**-0.5)
    np.testing.assert_array_equal(gaussian_attention(q, k, v, ssmax=ssmax, table=table), whole)
    for n in range(1, 21):
        step = gaussian_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], ssmax=ssmax, table=table)
        tolerance.check(step, whole[:, :, n - 1 : n])


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": np.ones(3)}, ValueError, r"shape: got shape \(3,\), expected \(4,\)"),
        ({"shape": np.ones(4, int)}, TypeError, r"shape: got dtype int64"),
        ({"shape": np.inf}, ValueError, r"shape: got .*, expected finite numbers"),
        ({"loc": "0"}, TypeError, r"loc: got '0'"),
        ({"inverse_scale": np.full(4, np.nan)}, ValueError, r"inverse_scale: got .*, expected finite numbers"),
        ({"eps": -1e-5}, ValueError, r"eps: got -1e-05, expected a finite number of at least 0"),
        ({"table": np.zeros((4, 36), F32)}, ValueError, r"table: got shape \(4, 36\), expected \[4, n\] with n at"),
        ({"table": np.zeros((3, 40), F32)}, ValueError, r"table: got shape \(3, 40\)"),
        ({"table": np.zeros((4, 40), int)}, TypeError, r"table: got dtype int64"),
        ({"table": np.zeros((4, 40), F32), "shape": 2.0}, ValueError, r"table: got one beside the prior's parameters"),
        ({"table": np.zeros((4, 40), F32), "causal": False}, ValueError, r"table: got one without causal"),
        ({"ssmax": 1.0, "mask": np.ones((5, 37), bool)}, ValueError, r"visible: got None beside ssmax and mask"),
        ({"ssmax": np.ones(2)}, ValueError, r"ssmax: got shape \(2,\), expected \(4,\)"),
        ({"ssmax": 1.0, "visible": np.ones(4, int)}, ValueError, r"visible: got shape \(4,\), expected \(5,\) or"),
        ({"ssmax": 1.0, "visible": np.ones(5)}, TypeError, r"visible: got dtype float64"),
        ({"ssmax": 1.0, "visible": np.full(5, -1)}, ValueError, r"visible: got -1, expected at least 0"),
        ({"ssmax": 1.0, "window": 3}, TypeError, r"window: got 3"),
        ({"q": np.ones(3, F32)}, ValueError, r"q: got shape \(3,\), expected rank 3 or 4"),
        ({"k": np.ones(3, F32)}, ValueError, r"k: got shape \(3,\)"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng)
    with pytest.raises(error, match=message):
        gaussian_attention(**{"q": q, "k": k, "v": v} | change)


@pytest.mark.parametrize(
    ("heads", "length", "error", "message"),
    [(0, 5, ValueError, "heads: got 0"), (2, 0, ValueError, "length: got 0"), (2, 1.5, TypeError, "length: got 1.5")],
)
def test_bad_tables(heads, length, error, message):
    with pytest.raises(error, match=message):
        generalized_gaussian_table(heads, length)
