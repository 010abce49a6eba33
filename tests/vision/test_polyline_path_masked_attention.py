"""`polyline_path_masked_attention`: decays along paths between places."""

import sys

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.reference.vision.polyline_path_masked_attention import path_masks
from longattn.vision import polyline_decays, polyline_mask_apply, polyline_path_masked_attention
from longattn.vision.polyline_path_masked_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, close, raises, same

COMBINATIONS = ("logit_mean", "gate", "criss_cross")


def arguments(rng, shape=(2, 2, 4, 5), size=1.0):
    b, h, height, width = shape
    decays = (-size * rng.random((b, height, width, h)) for _ in range(2))
    return *(normal(rng, (*shape, n)) for n in (8, 8, 6)), *(d.astype(F32) for d in decays)


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 1, 1, 6), (1, 2, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_reference(rng, isa, shape, combine):
    check(METHOD, *arguments(rng, shape), combine=combine, scale=0.5)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_some_lines_at_a_time(rng, monkeypatch, combine):
    args = arguments(rng)
    whole = polyline_path_masked_attention(*args, combine=combine)
    monkeypatch.setattr(sys.modules[METHOD.function.__module__], "BLOCK", 200)
    np.testing.assert_allclose(polyline_path_masked_attention(*args, combine=combine), whole, atol=1e-6)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


def test_decays_of_zero(rng):
    q, k, v, *_ = arguments(rng)
    zero = np.zeros((2, 4, 5, 2), F32)
    rows = [x.reshape(2, 2, 20, -1) for x in (q, k, v)]
    out = polyline_path_masked_attention(q, k, v, zero, zero)
    same(METHOD, out, la.attention(*rows).reshape(v.shape), q, k, v, zero, zero)

    def lines(values, axis):
        parts = [np.ascontiguousarray(np.moveaxis(x, axis, -2)) for x in (q, k, values)]
        found = la.attention(*(x.reshape(-1, 1, *x.shape[-2:]) for x in parts))
        return np.moveaxis(found.reshape(parts[2].shape), -2, axis)

    expected = 0.5 * (lines(lines(v, 3), 2) + lines(lines(v, 2), 3))
    out = polyline_path_masked_attention(q, k, v, zero, zero, combine="criss_cross")
    same(METHOD, out, expected, q, k, v, zero, zero, combine="criss_cross")


def test_one_row(rng):
    q, k, v, la_x, la_y = arguments(rng, (2, 2, 1, 7))
    sums = np.cumsum(np.moveaxis(la_x[:, 0], -1, 1).astype(np.float64), axis=-1)
    bias = -np.abs(sums[..., :, None] - sums[..., None, :])
    expected = la.attention(*(x[:, :, 0] for x in (q, k, v)), bias=bias)[:, :, None]
    same(METHOD, polyline_path_masked_attention(q, k, v, la_x, la_y), expected, q, k, v, la_x, la_y)
    one, other = path_masks(la_x, la_y)
    np.testing.assert_allclose(one, other, atol=1e-12)


def test_transposed_paths(rng):
    """The published matrices, read off through identity values with equal queries."""
    _, _, _, la_x, la_y = arguments(rng, (1, 1, 3, 4))
    one, other = path_masks(la_x, la_y)
    np.testing.assert_allclose(one, other.swapaxes(-1, -2), atol=1e-12)
    eye = np.eye(12, dtype=F32).reshape(1, 1, 3, 4, 12)
    applied = polyline_mask_apply(eye, la_x, la_y).reshape(12, 12)
    np.testing.assert_allclose(applied, np.exp(one[0, 0]), rtol=1e-5)


def test_scans(rng):
    *_, v, la_x, la_y = arguments(rng)
    out = polyline_mask_apply(v, la_x, la_y)
    close(out, *tolerances.perturbed(reference.polyline_mask_apply, (v, la_x, la_y), {}, F32))


def test_strong_decays(rng):
    q, k, v, *_ = arguments(rng)
    strong = np.full((2, 4, 5, 2), -200, F32)
    for combine in ("logit_mean", "criss_cross"):
        np.testing.assert_allclose(
            polyline_path_masked_attention(q, k, v, strong, strong, combine=combine), v, atol=1e-6
        )


def test_decays_of_features(rng):
    x, w_x, w_y, a_log, bias = (normal(rng, s) for s in ((2, 3, 4, 6), (3,), (3,), (2,), (2,)))
    found = polyline_decays(x, w_x, w_y, a_log, bias=bias)
    for decay, w in zip(found, (w_x, w_y), strict=True):
        s = x.reshape(2, 3, 4, 2, 3).astype(np.float64) @ w + bias
        np.testing.assert_allclose(decay, -np.exp(a_log) * np.log1p(np.exp(s)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"a_log: got 4 heads"):
        polyline_decays(x, w_x, w_y, np.zeros(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.zeros((2, 2, 20, 8), F32)}, ValueError, r"q: got shape \(2, 2, 20, 8\)"),
        ({"v": np.zeros((2, 2, 4, 4, 6), F32)}, ValueError, r"v: got shape \(2, 2, 4, 4, 6\)"),
        (
            {"decay_x": np.zeros((2, 2, 4, 5))},
            ValueError,
            r"decay_x: got shape \(2, 2, 4, 5\), expected \(2, 4, 5, 2\)",
        ),
        ({"decay_y": np.ones((2, 4, 5, 2))}, ValueError, r"decay_y: got numbers above 0"),
        ({"combine": "sum"}, ValueError, r"combine: got 'sum'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v, x, y = arguments(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "decay_x": x, "decay_y": y}, **change)
