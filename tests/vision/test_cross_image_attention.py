"""`cross_image_attention`: softmax weights with more contrast, and `masked_adain`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import cross_image_attention, masked_adain
from longattn.vision.cross_image_attention import METHOD
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv
from vision_checks import check, check_kinds, close, raises, same


@pytest.mark.parametrize("contrast", [0.0, 0.5, 1.0, 1.67, 40.0])
@pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 37, 16), (5, 300, 24), (130, 270, 7)])
def test_reference(rng, isa, rows, keys, dim, contrast):
    check(METHOD, *qkv(rng, batch=2, rows=rows, keys=keys, dim=dim, value_dim=dim + 3, spread=3), contrast=contrast)


def test_kinds(rng):
    check_kinds(METHOD, *qkv(rng, rows=9), scale=0.4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(METHOD, *qkv(rng, rows=9, layout=layout))


def test_weights_are_clipped_at_both_ends(rng):
    q, k, v = qkv(rng, rows=9, spread=30)
    v = np.ones_like(v)
    out = cross_image_attention(q, k, v, contrast=5.0)
    assert (out <= 1.0 + 1e-6).any() and (out > 0).all()


def test_contrast_of_one_is_attention(rng):
    q, k, v = qkv(rng, rows=9)
    same(METHOD, cross_image_attention(q, k, v, contrast=1.0), la.attention(q, k, v), q, k, v, contrast=1.0)
    own = cross_image_attention(k, k, v, contrast=1.0)
    same(METHOD, own, la.attention(k, k, v), k, k, v, contrast=1.0)


def test_contrast_of_zero_gives_the_mean_value(rng):
    q, k, v = qkv(rng, heads=2, rows=9)
    expected = np.broadcast_to(v.mean(axis=2, keepdims=True), (1, 2, 9, 16))
    same(METHOD, cross_image_attention(q, k, v, contrast=0.0), expected, q, k, v, contrast=0.0)


def test_equal_weights_stay(rng):
    q, k, v = qkv(rng, heads=2, rows=9)
    q = np.zeros_like(q)
    expected = np.broadcast_to(v.mean(axis=2, keepdims=True), (1, 2, 9, 16))
    same(METHOD, cross_image_attention(q, k, v), expected, q, k, v)


def test_no_keys(rng):
    q, k, v = qkv(rng)
    assert not cross_image_attention(q, k[:, :, :0], v[:, :, :0]).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"contrast": -1.0}, ValueError, r"contrast: got -1.0, expected at least 0"),
        ({"scale": "1"}, TypeError, r"scale: got '1'"),
        ({"v": np.zeros((1, 2, 36, 8), F32)}, ValueError, r"v: got length 36"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v}, **change)


def grids(rng, dtype=F32):
    x, style = normal(rng, (2, 5, 6, 4), dtype), normal(rng, (2, 7, 3, 4), dtype, spread=2.0)
    mask, style_mask = rng.random((2, 5, 6)) < 0.5, rng.random((2, 7, 3)) < 0.5
    return x, style, mask, style_mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adain_reference(rng, dtype):
    arguments = grids(rng, dtype)
    out = masked_adain(*arguments)
    assert out.dtype == dtype
    close(out, *tolerances.perturbed(reference.masked_adain, arguments, {}, dtype))


def test_adain_matches_mean_and_deviation(rng):
    x, style, mask, style_mask = grids(rng)
    out = masked_adain(x, style, mask, style_mask, eps=0.0)
    np.testing.assert_array_equal(out[~mask], x[~mask])
    for n in range(2):
        ours, theirs = out[n][mask[n]], style[n][style_mask[n]]
        np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=1e-5)


def test_adain_without_places(rng):
    x, style, mask, style_mask = grids(rng)
    style_mask[1] = False
    np.testing.assert_array_equal(masked_adain(x, style, mask, style_mask)[1], x[1])


def test_adain_bad_arguments(rng):
    x, style, mask, style_mask = grids(rng)
    with pytest.raises(TypeError, match="mask: got dtype float64"):
        masked_adain(x, style, mask.astype(float), style_mask)
    with pytest.raises(ValueError, match="style_mask: got shape"):
        masked_adain(x, style, mask, style_mask[:, :2])
    with pytest.raises(ValueError, match="style: got shape"):
        masked_adain(x, style[..., :2], mask, style_mask)
