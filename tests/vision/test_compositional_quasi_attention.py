"""`compositional_quasi_attention`: signed weights without a softmax."""

import numpy as np
import pytest

from longattn.reference import vision as reference
from longattn.vision import compositional_quasi_attention
from longattn.vision.compositional_quasi_attention import METHOD
from random_arrays import F32, LAYOUTS, qkv
from vision_checks import check, check_kinds, raises, same

OPTIONS = [
    {},
    {"causal": True},
    {"centred": True},
    {"doubled": True, "beta": 0.3, "alpha": 1.5},
    {"beta": 0.0, "scale": 0.2},
    {"centred": True, "causal": True, "doubled": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 37, 16), (5, 300, 24), (130, 270, 7)])
def test_reference(rng, isa, rows, keys, dim, options):
    check(METHOD, *qkv(rng, batch=2, rows=rows, keys=keys, dim=dim, value_dim=dim + 3), **options)


@pytest.mark.parametrize("centred", [False, True])
def test_mask(rng, centred):
    q, k, v = qkv(rng, rows=9, keys=40)
    mask = rng.random((1, 4, 9, 40)) < 0.5
    mask[0, 1, 3] = False
    out = check(METHOD, q, k, v, mask=mask, centred=centred)
    assert not out[0, 1, 3].any()


def test_kinds(rng):
    check_kinds(METHOD, *qkv(rng, rows=9))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(METHOD, *qkv(rng, rows=9, layout=layout))


def test_no_batch(rng):
    q, k, v = qkv(rng, rows=9)
    np.testing.assert_array_equal(compositional_quasi_attention(q[0], k[0], v[0]), METHOD.function(q, k, v)[0])


def test_large_distances_weigh_nothing(rng):
    q, k, v = qkv(rng, rows=9)
    out = compositional_quasi_attention(q + 1000, k, v)
    assert np.isfinite(out).all() and (np.abs(out) < 1e-30).all()


@pytest.mark.parametrize("rows", [3, 40])
def test_values_that_are_hidden_do_not_count(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=rows)
    expected = compositional_quasi_attention(q, k, v, causal=True)
    v[:, :, -1] = np.nan
    out = compositional_quasi_attention(q, k, v, causal=True)
    np.testing.assert_allclose(out[:, :, :-1], expected[:, :, :-1], rtol=1e-5, atol=1e-5)
    assert np.isnan(out[:, :, -1]).all()


def test_rows_without_keys_give_zeros(rng):
    q, k, v = qkv(rng, rows=7, keys=4)
    out = check(METHOD, q, k, v, causal=True)
    assert not out[:, :, :3].any() and out[:, :, 3].any()
    assert not compositional_quasi_attention(q, k[:, :, :0], v[:, :, :0]).any()


def test_without_distance_it_is_tanh_attention(rng):
    q, k, v = qkv(rng, heads=2, rows=9)
    expected = np.tanh(0.25 * np.asarray(q, np.float64) @ k.swapaxes(-1, -2)) @ v
    for options, factor in (({}, 0.5), ({"doubled": True}, 1.0)):
        out = compositional_quasi_attention(q, k, v, beta=0.0, **options)
        same(METHOD, out, factor * expected, q, k, v, beta=0.0, **options)


def test_queries_of_zeros_give_zeros(rng):
    q, k, v = qkv(rng, rows=9)
    assert not compositional_quasi_attention(np.zeros_like(q), k, v).any()


def test_opposites(rng):
    q, k, v = qkv(rng, rows=9)
    out = compositional_quasi_attention(q, k, v)
    np.testing.assert_array_equal(compositional_quasi_attention(q, k, -v), -out)
    out = compositional_quasi_attention(q, k, v, beta=0.0)
    np.testing.assert_allclose(compositional_quasi_attention(-q, k, v, beta=0.0), -out, rtol=1e-5, atol=1e-5)


def test_parts_of_the_keys_add_up(rng):
    q, k, v = qkv(rng, rows=9, keys=600)
    parts = [compositional_quasi_attention(q, k[:, :, s], v[:, :, s]) for s in (slice(250), slice(250, None))]
    same(METHOD, parts[0] + parts[1], compositional_quasi_attention(q, k, v), q, k, v)


def test_equal_vectors_weigh_the_tanh_of_their_square(rng):
    q = rng.standard_normal((1, 2, 8, 16)).astype(F32)
    out = compositional_quasi_attention(q, q, np.broadcast_to(np.eye(8, dtype=F32), (1, 2, 8, 8)), doubled=True)
    expected = np.tanh((np.asarray(q, np.float64) ** 2).sum(axis=-1) / 4)
    np.testing.assert_allclose(np.diagonal(out, axis1=-2, axis2=-1), expected, rtol=1e-5)


def test_step_is_the_last_row(rng):
    q, k, v = qkv(rng, rows=37)
    whole = compositional_quasi_attention(q, k, v, causal=True)
    step = compositional_quasi_attention(q[:, :, -1:], k, v, causal=True)
    same(METHOD, step, reference.compositional_quasi_attention(q[:, :, -1:], k, v), q[:, :, -1:], k, v)
    np.testing.assert_allclose(step, whole[:, :, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, r"beta: got -1.0, expected at least 0"),
        ({"alpha": None}, TypeError, r"alpha: got None"),
        ({"centred": 1}, TypeError, r"centred: got 1"),
        ({"mask": np.ones((3, 3), bool)}, ValueError, r"mask: got"),
        ({"k": np.zeros((1, 2, 37, 8), F32)}, ValueError, r"k: got head_dim 8"),
        ({"q": np.zeros((1, 4, 5, 16))}, TypeError, r"q: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v}, **change)
