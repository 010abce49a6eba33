"""`long_short_distance_attention`: windows, and groups of places an interval apart."""

import numpy as np
import pytest

import longattn as la
from longattn import vision
from longattn.vision import long_short_distance_attention
from longattn.vision.long_short_distance_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 6, 8), c=12, bias=True):
    return normal(rng, (*shape, c)), *(weights(rng, c, c, bias) for _ in range(3))


def dense(x, wq, wk, wv, heads, bias=None):
    rows = [(x @ w).reshape(len(x), -1, heads, w.shape[1] // heads).swapaxes(1, 2) for w in (wq, wk, wv)]
    return la.attention(*rows, bias=bias).swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("shape", "group", "options"),
    [
        ((2, 6, 8), 2, {}),
        ((1, 7, 9), 3, {}),
        ((2, 8, 8), 2, {"interval": 2}),
        ((1, 7, 10), 2, {"interval": 3}),
        ((1, 7, 9), 3, {"adaptive_interval": True}),
        ((1, 3, 5), 7, {"interval": 2}),
    ],
)
def test_reference(rng, isa, shape, group, options):
    side = min(group, *shape[1:])
    table = normal(rng, ((2 * side - 1) ** 2, 3))
    check(METHOD, *arguments(rng, shape), heads=3, group=group, table=table, wo=weights(rng, 12, 5, True), **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng, (1, 5, 6)), heads=2, group=2, interval=2, table=normal(rng, (9, 2)))


def test_a_group_of_the_image(rng):
    x, *w = arguments(rng, (2, 4, 4), bias=False)
    table = normal(rng, (49, 3))
    out = long_short_distance_attention(x, *w, heads=3, group=4, table=table)
    expected = dense(x, *w, 3, vision.relative_position_bias(table, (4, 4)))
    same(METHOD, out, expected, x, *w, heads=3, group=4, table=table)


def test_one_region_is_dilated(rng):
    x, *w = arguments(rng, (1, 6, 6), bias=False)
    out = long_short_distance_attention(x, *w, heads=3, group=3, interval=2)
    expected = np.empty_like(x)
    for i in range(2):
        for j in range(2):
            expected[:, i::2, j::2] = dense(np.ascontiguousarray(x[:, i::2, j::2]), *w, 3)
    same(METHOD, out, expected, x, *w, heads=3, group=3, interval=2)


def test_a_table_of_zeros(rng):
    x, *w = arguments(rng)
    options = {"heads": 3, "group": 2}
    plain, biased = (long_short_distance_attention(x, *w, **options, table=t) for t in (None, np.zeros((9, 3), F32)))
    same(METHOD, biased, plain, x, *w, **options)


def test_both_connect_all(rng):
    x, *w = arguments(rng, (1, 4, 4))
    other = x.copy()
    other[0, 1, 2] += 1

    def both(a):
        short = long_short_distance_attention(a, *w, heads=3, group=2)
        return long_short_distance_attention(short, *w, heads=3, group=2, interval=2)

    assert (np.abs(both(other) - both(x)).max(axis=-1) > 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"group": 0}, ValueError, r"group: got 0"),
        ({"interval": 1.5}, TypeError, r"interval: got 1.5"),
        ({"heads": 5}, ValueError, r"heads: got 5, expected a divisor of the 12 channels of wq"),
        ({"table": np.zeros((9, 2))}, ValueError, r"table: got shape \(9, 2\), expected \(9, 3\)"),
        ({"wk": np.zeros((12, 6), F32)}, ValueError, r"wk: got shape \(12, 6\)"),
        ({"adaptive_interval": 2}, TypeError, r"adaptive_interval: got 2"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wq": wq, "wk": wk, "wv": wv, "heads": 3, "group": 2}, **change)
