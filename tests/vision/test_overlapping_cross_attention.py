"""`overlapping_cross_attention`: windows and larger ones around them."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import grouped_attention, overlapping_cross_attention
from longattn.vision.overlapping_cross_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 4, 8, 12), bias=True):
    return normal(rng, shape), *(weights(rng, 12, 12, bias) for _ in range(3))


@pytest.mark.parametrize(("window", "overlap"), [(4, 0.5), (4, 1.0), (2, 1.0), (2, 0.0)])
@pytest.mark.parametrize("layout", ["canonical", "release"])
@pytest.mark.parametrize("mask_pad", [False, True])
def test_reference(rng, isa, window, overlap, layout, mask_pad):
    rows = (2 * window + int(window * overlap) - 1) ** 2
    options = {"table": normal(rng, (rows, 3)), "layout": layout, "mask_pad": mask_pad, "wo": weights(rng, 12, 5, True)}
    x, *w = arguments(rng)
    # Padding is zeros after the projections, so biases of these make a difference: none of keys and values here.
    check(METHOD, x, w[0], w[1][0], w[2][0], heads=3, window=window, overlap=overlap, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng, bias=False), heads=3, window=4)


def test_without_overlap(rng):
    x, *w = arguments(rng, bias=False)
    expected = grouped_attention(*(x @ m for m in w), 4, heads=3)
    same(
        METHOD,
        overlapping_cross_attention(x, *w, heads=3, window=4, overlap=0.0),
        expected,
        x,
        *w,
        heads=3,
        window=4,
        overlap=0.0,
    )


def test_windows_of_one_place(rng):
    x, *w = arguments(rng, (1, 5, 6, 12), bias=False)
    out = overlapping_cross_attention(x, *w, heads=3, window=1, overlap=2.0, mask_pad=True)
    y, column = np.divmod(np.arange(30), 6)
    mask = (np.abs(y[:, None] - y) <= 1) & (np.abs(column[:, None] - column) <= 1)
    rows = ((x @ m).reshape(1, 30, 3, 4).swapaxes(1, 2) for m in w)
    expected = la.attention(*rows, mask=mask).swapaxes(1, 2).reshape(x.shape)
    same(METHOD, out, expected, x, *w, heads=3, window=1, overlap=2.0, mask_pad=True)


def test_orders_of_the_table(rng):
    """Row `(M - 1 - a) * S + M - 1 - b` of one order, modulo the table, is row `a' * S + b'` of the other."""
    x, *w = arguments(rng, bias=False)
    side, wide = 4, 6
    span = side + wide - 1
    table = normal(rng, (span**2, 3))
    d = np.arange(span) - (side - 1)  # key less query
    canonical = (side - 1 + wide - 1 - (d + side - 1))[:, None] * span + (side - 1 + wide - 1 - (d + side - 1))[None]
    release = ((d + side - wide + 1)[:, None] * span + (d + side - wide + 1)[None]) % span**2
    assert len(np.unique(release)) == span**2
    other = np.empty_like(table)
    other[release.ravel()] = table[canonical.ravel()]
    one = overlapping_cross_attention(x, *w, heads=3, window=side, table=table)
    two = overlapping_cross_attention(x, *w, heads=3, window=side, table=other, layout="release")
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 3}, ValueError, r"window: got 3, expected a divisor of 4 and 8"),
        ({"overlap": 0.25}, ValueError, r"overlap: got 0.25"),
        ({"overlap": -1.0}, ValueError, r"overlap: got -1.0"),
        ({"table": np.zeros((9, 3))}, ValueError, r"table: got shape \(9, 3\), expected \[81, 3\]"),
        ({"layout": "other"}, ValueError, r"layout: got 'other'"),
        ({"x": np.zeros((2, 4, 12), F32)}, ValueError, r"x: got shape \(2, 4, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("x", "wq", "wk", "wv")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)) | {"heads": 3, "window": 4}, **change)
